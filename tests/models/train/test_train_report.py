"""The report's numbers by hand, and its files as programs read them."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from models.train.acceptance import MISSING, NODES, Text, measure_accuracies
from models.train.report import REQUESTS, SIZES, UNNAMED, Report, Setting, judge, markdown, write_report
from models.train.step_times import StepTime, StepTimes

SETTING = Setting("org/model", "float32", "a machine", 2, 20, 0.5)


def text(*ranks: int) -> Text:
    """The same ranks at nine positions, and a tenth that nothing follows."""
    known = np.ones((10, len(ranks)), dtype=np.bool_)
    known[-1] = False
    return Text(np.tile(np.array(ranks), (10, 1)), known)


def times(per_node: float, draft: float) -> StepTimes:
    """A second, and `per_node` more for each node of each request."""
    sizes = [(requests, nodes) for requests in REQUESTS for nodes in SIZES]
    return {(r, n): StepTime(0.75 + r * n * per_node, draft * (n > 0), 0.25) for r, n in sizes}


def test_top_shares_add_up_over_ranks() -> None:
    texts = {"": [text(0, MISSING), text(2, 7)]}
    design = judge("a", "", 1, texts, ((0.5, 0.3, 0.2), (0.1, 0.1)), None)
    assert [dict(top) for top in design.top] == [{1: 0.5, 2: 1.0, 4: 1.0, 8: 1.0}, {1: 0.5, 2: 0.5, 4: 0.5, 8: 0.5}]
    assert design.speeds == []
    assert design.categories == {}


def test_tau_is_told_by_category() -> None:
    texts = {"code": [text(0)], "": [text(MISSING)]}
    design = judge("a", "", 1, texts, ((1.0,),), None)
    assert [tau.measured for tau in design.categories["code"]] == [1.8] * len(NODES)  # nine tokens in five steps
    assert [tau.measured for tau in design.categories[UNNAMED]] == [1.0] * len(NODES)
    assert design.taus[0].measured == pytest.approx(18 / 14)
    assert "| code | 1.800 ± 0.000 |" in markdown(Report(SETTING, [design]))


def test_the_fastest_is_what_brings_most_tokens_per_second() -> None:
    """`cheap` guesses one token for nothing, `dear` two for a quarter of a second."""
    cheap = judge("cheap", "", 1, {"": [text(0, MISSING)]}, ((0.9,), (0.1,)), times(0.01, 0.0))
    dear = judge("dear", "", 1, {"": [text(0, 0)]}, ((0.9,), (0.8,)), times(0.01, 0.25))
    report = Report(SETTING, [cheap, dear])
    design, speed = report.fastest(1)
    assert (design.name, speed.nodes) == ("dear", 2)
    assert speed.tokens_per_second == pytest.approx(dear.taus[1].measured / (1 + 2 * 0.01 + 0.25))
    assert speed.speedup == pytest.approx(speed.tokens_per_second)  # plain: a token a second
    told = markdown(report)
    assert f"1 request at a time: dear with 2 nodes ({speed.tokens_per_second:.1f} tokens/s" in told

    slow = Report(SETTING, [judge("slow", "", 1, {"": [text(0, 0)]}, ((0.9,), (0.8,)), times(9.0, 9.0))])
    assert slow.fastest(8)[1].nodes == 0
    assert "8 requests at a time: plain decoding (8.0 tokens/s, 1.00 times" in markdown(slow)


def test_files_hold_the_same(tmp_path: Path) -> None:
    design = judge("a <b>", "heads", 1_500_000, {"": [text(0)]}, measure_accuracies([text(0)]), times(0.01, 0.0))
    report = Report(SETTING, [design])
    write_report(tmp_path, report)
    assert (tmp_path / "report.md").read_text().startswith(markdown(report))
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["setting"]["model"] == "org/model"
    assert [choice["requests"] for choice in found["fastest"]] == list(REQUESTS)
    assert found["fastest"][0]["tokens_per_second"] == report.fastest(1)[1].tokens_per_second
    assert found["designs"][0]["taus"][0]["measured"] == design.taus[0].measured
    picture = ElementTree.parse(tmp_path / "report.svg")
    assert "a <b>" in {element.text for element in picture.iter()}
    write_report(tmp_path, Report(SETTING, [judge("c", "", 1, {"": [text(0)]}, ((1.0,),), None)]))
    assert "tokens per step" in {element.text for element in ElementTree.parse(tmp_path / "report.svg").iter()}
    assert "per second" not in (tmp_path / "report.md").read_text()
