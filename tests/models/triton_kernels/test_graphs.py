"""Steps as graphs would run them: the same rows in fixed buffers, filled up. On a GPU they are recorded, too."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from common_models import common
from stepping import Engine, Request, TokenPath
from torch import Tensor

from models import graphs
from models.backbone import Backbone
from models.batch import Segment, build_batch
from models.drafters.sequential import SequentialHeads, Shape
from models.drafters.sequential_drafter import TorchGuesser
from models.kernels.triton_attention import attention
from models.kv_pool import KVPool
from models.kv_pool import Shape as KVShape

LIMITS = {"most_rows": 8, "longest": 40}


@pytest.fixture
def backbone(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Backbone:
    monkeypatch.setattr("models.backbone.runs_triton", lambda _: True)
    return Backbone(common("qwen3").to(device))


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "ROWS", (1, 4, 8))
    monkeypatch.setattr(graphs, "MAX_KEYS", 60)


class Recorded:
    """In place of a graph: the run itself, counted."""

    def __init__(self) -> None:
        self.num_replays = 0

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            self.num_replays += 1
            run()

        return replay


def record(backbone: Backbone, engine: Engine, longest: int = 40) -> Recorded:
    recorded = Recorded()
    assert backbone.record(engine.pool, most_rows=8, longest=longest, record=recorded) > 0
    return recorded


def steps(engine: Engine) -> list[list[tuple[TokenPath, Tensor]]]:
    """Prompts, then trees of as many rows as a graph has, and of fewer."""
    requests = [Request([3, 1, 4, 1, 5, 9, 2, 6, 5, 3]), Request([2, 7])]
    return [
        engine.step([(requests[0], 10, ())]),  # too many rows for a graph
        engine.step([(requests[0], 1, (-1, 0)), (requests[1], 1, ())]),
        engine.step([(requests[0], 1, (-1, 0, -1)), (requests[1], 1, (-1,))]),
        engine.step([(requests[1], 1, ())]),
    ]


def test_rows_are_the_same_as_without(backbone: Backbone) -> None:
    expected = steps(Engine(backbone))
    engine = Engine(backbone)
    recorded = record(backbone, engine)
    found = steps(engine)
    assert recorded.num_replays == 3
    for mine, wanted in zip(found, expected, strict=True):
        for (path, logits), (same, reference) in zip(mine, wanted, strict=True):
            assert path == same
            torch.testing.assert_close(logits, reference, atol=1e-5, rtol=1e-5)
    assert not any(layer[0].any() for layer in (*engine.pool.keys, *engine.pool.values))  # filling up wrote nothing


def test_states_outlive_the_next_step(backbone: Backbone) -> None:
    """All steps write to the same memory."""
    engine = Engine(backbone)
    record(backbone, engine)
    batch = build_batch(
        [Segment(2, torch.tensor([1]), 2, ())], torch.tensor([1, 2]), torch.tensor([2, 3]), engine.device
    )
    logits, hidden = backbone._graphs.run([torch.tensor([5, 6])], batch)
    before = hidden.clone()
    again, _ = backbone._graphs.run([torch.tensor([7, 8])], batch)
    assert logits.data_ptr() == again.data_ptr()
    assert torch.equal(hidden, before)


def test_what_fits_no_graph_runs_without(backbone: Backbone) -> None:
    engine, others = Engine(backbone), Engine(backbone)
    recorded = record(backbone, engine)
    request = Request([random.Random(0).randrange(97) for _ in range(61)])
    engine.step([(request, 60, ())])
    engine.step([(request, 1, ())])  # 61 keys
    others.step([(Request([5]), 1, ())])  # another pool
    slots = torch.tensor([1, 2])
    batch = build_batch([Segment(2, slots[:0], 2, ())], torch.arange(2), slots, engine.device)
    tokens, part = torch.tensor([5, 6], device=engine.device), torch.tensor([1], device=engine.device)
    backbone.forward(tokens, batch, engine.pool, part)
    assert recorded.num_replays == 0
    engine.step([(Request([5]), 1, ())])
    assert recorded.num_replays == 1


@pytest.mark.parametrize(
    ("longest", "spans"), [(graphs.SPAN, [1]), (graphs.SPAN + 1, [1, 4]), (1 << 20, [1, 4, 16, 64])]
)
def test_there_are_as_many_spans_as_sequences_need(backbone: Backbone, longest: int, spans: list[int]) -> None:
    record(backbone, Engine(backbone), longest=longest)
    assert sorted({span for _, span in backbone._graphs._replays}) == spans
    assert backbone._graphs.num_graphs == 3 * len(spans)


def test_other_states_to_show_end_the_records(backbone: Backbone) -> None:
    engine = Engine(backbone)
    recorded = record(backbone, engine)
    backbone.show((1,))
    engine.step([(Request([5]), 1, ())])
    assert recorded.num_replays == 0


def test_models_that_are_not_fused_here_are_not_recorded() -> None:
    backbone = Backbone(common("qwen3"))
    assert backbone.record(Engine(backbone).pool, **LIMITS) == 0


def test_a_drafters_passes_are_the_same_as_without(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.drafters.sequential.kernel_for", lambda _: attention)
    torch.manual_seed(0)
    shape = Shape(hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=16, inner_size=48)
    heads = SequentialHeads(shape, torch.randn(97, 32), torch.randn(50, 32), num_heads=3)
    torch.nn.init.normal_(heads.layer.self_attn.o_proj.weight, std=0.2)
    heads = heads.to(device).requires_grad_(False)
    guesser, recorder, pools = (
        TorchGuesser(heads),
        Recorded(),
        [pooled(heads.shape.kv, device=device) for _ in range(2)],
    )
    slots, states, results = torch.arange(1, 7), torch.randn(6, 32), []
    for recorded, pool in enumerate(pools):
        if recorded:
            guesser.record(pool, **LIMITS, record=recorder)
        passes = []
        for begin, end in ((0, 3), (3, 4), (4, 6)):
            segment = Segment(end - begin, slots[:begin], end - begin, ())
            batch = build_batch([segment], torch.arange(begin, end), slots[begin:end], device)
            rows = torch.tensor([0, end - begin - 1], device=device)
            own = slots[begin:end].to(device), states[begin:end].to(device)
            passes.append(guesser.guess(*own, batch, pool, rows))
        results.append([torch.cat(parts) for parts in zip(*passes, strict=True)])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
    assert recorder.num_replays == 3


def test_recorded_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    backbone = Backbone(common("qwen3").to("cuda"))
    with torch.inference_mode():
        eager, graphed = (pooled(*backbone.kv_shapes, device="cuda") for _ in range(2))
        assert backbone.record(graphed, **LIMITS) == 3
        junk = [torch.randint(97, (8,), device="cuda") for _ in range(100)]  # where what was dropped once lay
        before = torch.stack(junk)
        for count in (1, 3, 8):
            slots = torch.arange(1, count + 1)
            batch = build_batch([Segment(count, slots[:0], count, ())], slots - 1, slots, "cuda")
            arguments = torch.arange(count, device="cuda"), batch
            expected = backbone.forward(*arguments, eager, torch.arange(count, device="cuda"))
            found = backbone.forward(*arguments, graphed, torch.arange(count, device="cuda"))
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(torch.stack(junk), before)


def pooled(*shapes: KVShape, device: torch.device | str) -> KVPool:
    return KVPool(shapes, 50, dtype=torch.float32, device=device)
