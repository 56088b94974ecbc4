"""Prometheus cannot tell it from its own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.samples import Sample

from server.histogram import RepeatedHistogram

BUCKETS = (0.1, 1.0, 2.0)


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.25, 1.0, 1.5, 2.0, 9.0]), st.integers(1, 5))))
def test_repeated_observations_are_shown_as_prometheus_does(observations: list[tuple[float, int]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    mine = RepeatedHistogram("gap", "A gap.", {"model_name": "m"}, BUCKETS)
    ours.register(mine)
    reference = Histogram("gap", "A gap.", ["model_name"], registry=theirs, buckets=BUCKETS).labels("m")
    for seconds, times in observations:
        mine.observe(seconds, times)
        for _ in range(times):
            reference.observe(seconds)
    for sample in samples(theirs):
        assert ours.get_sample_value(sample.name, sample.labels) == pytest.approx(sample.value)
    assert len(samples(ours)) == len(samples(theirs))


def samples(registry: CollectorRegistry) -> list[Sample]:
    return [s for family in registry.collect() for s in family.samples if not s.name.endswith("_created")]
