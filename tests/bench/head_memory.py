"""`python -m tests.bench.head_memory`: the memory of a pretraining step, by the number of heads.

Both orders of the same step on the same model: ours (`multi_token.backward_by_head`), and all heads in one graph. Every
model has as many layers and parameters, so that memory differs by the order alone. Counted are the bytes that torch's
CPU allocator gave out and did not get back, at their highest, gradients included and weights not; no clock is involved,
so a table is the same on every run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from models.mtp import MTPConfig, MTPForCausalLM
from models.train.multi_token import backward_by_head
from models.train.pretrain import new_model

Backward = Callable[[MTPForCausalLM, Tensor], Tensor]
MIB = 1 << 20


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.head_memory", description=__doc__)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--rows", type=int, default=256, help="tokens of the step")
    parser.add_argument("--heads", type=int, nargs="+", default=[1, 2, 4, 8])
    options = parser.parse_args(arguments)
    table = Table("heads", "one head at a time, MiB", "all heads in one graph, MiB")
    for heads in options.heads:
        peaks = [step_peak(order, heads, options.vocab, options.rows) for order in (backward_by_head, backward_at_once)]
        table.add_row(str(heads), *(f"{peak / MIB:.0f}" for peak in peaks))
    console = Console()
    console.print(table)
    console.print(f"One head's logits take {options.rows * options.vocab * 4 / MIB:.0f} MiB.")


def step_peak(backward: Backward, heads: int, vocab: int, rows: int) -> int:
    """Bytes at the highest point of one step of a model of 8 layers, of which so many are heads."""
    config = MTPConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_future_tokens=heads,
        tie_word_embeddings=True,
    )
    model = new_model(config, 0, "cpu").train()
    tokens = torch.randint(vocab, (1, rows + heads), generator=torch.Generator().manual_seed(0))
    return peak_bytes(lambda: backward(model, tokens))


def backward_at_once(model: MTPForCausalLM, tokens: Tensor) -> Tensor:
    """The same gradients as `backward_by_head`, in the order that one would write first."""
    context = tokens.shape[1] - model.config.num_future_tokens
    state, told = model.model.trunk(tokens[:, :context])
    losses = []
    for head in range(model.config.num_future_tokens):
        logits = model.lm_head(model.model.head(head, state, told))
        wanted = tokens[:, head + 1 : head + 1 + context]
        losses.append(cross_entropy(logits.flatten(0, 1), wanted.flatten()))
    total = torch.stack(losses)
    torch.autograd.backward(total.sum())
    return total.detach()


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that were alive at once of those that torch allocated on the CPU during `work`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    assert recorded.profiler is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


if __name__ == "__main__":
    main()
