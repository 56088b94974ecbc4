"""What `tests.bench.kernel_speed` times: every way to read memory, and every kernel on as many rows as are asked for.

Invariants:
- a pass reads more than the caches hold, so that it reads from memory, as it does between the layers of a model;
- the arguments of kernel calls are made before: a pass is the kernels and the way into each.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear as torch_linear
from transformers import LlamaConfig, LlamaForCausalLM

from models.attention import Scoring, tree_attention
from models.backbone import Backbone
from models.batch import Batch, Segment, build_batch
from models.kernels import cpu, reference
from models.kv_pool import KVPool

SCALE_BYTES = 2

Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Sizes:
    """A model of the common shape; SmolLM2-135M unless told otherwise."""

    layers: int = 30
    hidden: int = 576
    inner: int = 1536
    heads: int = 9
    kv_heads: int = 3
    dim: int = 64
    vocab: int = 49152
    bits: int = 8  # of the weights; the LM head's have 8

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of every linear layer, those with one input joined, and of the LM head."""
        queries = self.heads * self.dim
        layer = [
            (queries + 2 * self.kv_heads * self.dim, self.hidden),
            (self.hidden, queries),
            (2 * self.inner, self.hidden),
            (self.hidden, self.inner),
        ]
        return layer * self.layers + [(self.vocab, self.hidden)]

    @property
    def weight_bytes(self) -> int:
        """Of the weights and their scales, and least values if they have some."""
        *layers, head = self.shapes
        return sum(packed_bytes(*shape, self.bits) for shape in layers) + packed_bytes(*head, 8)

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.dim,
            tie_word_embeddings=True,
        )


def packed_bytes(outputs: int, inputs: int, bits: int) -> int:
    """Of a linear layer's weights: a scale for each group, or with four bits two numbers."""
    return outputs * (inputs * bits // 8 + inputs // reference.GROUP * SCALE_BYTES * (2 if bits == 4 else 1))


def memory_reads(size: int) -> dict[str, Run]:
    """Ways to read `size` bytes once; which is the fastest depends on the machine."""
    data, threads = torch.ones(size // 8 * 2), torch.get_num_threads()
    floats = np.array_split(data.numpy(), threads)
    integers = np.array_split(data.view(torch.int64).numpy(), threads)
    pool = ThreadPoolExecutor(threads)
    memchr = ctypes.CDLL(None).memchr
    memchr.argtypes, memchr.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), ctypes.c_void_p

    def find(part: NDArray[np.float32]) -> None:
        assert memchr(part.ctypes.data, 7, part.nbytes) is None  # no byte is 7, so all are read

    return {
        "read: torch.sum": data.view(torch.int64).sum,
        "read: numpy.max": lambda: list(pool.map(np.max, integers)),
        "read: numpy.dot": lambda: list(pool.map(np.dot, floats, floats)),
        "read: memchr": lambda: list(pool.map(find, floats)),
        "read: memchr, one thread": lambda: find(data.numpy()),
    }


def linear_runs(sizes: Sizes, rows: Sequence[int]) -> dict[str, Run]:
    """For each number of rows: our layers, the whole model, and torch's layers in float32."""
    weights = [torch.randn(shape) / shape[1] ** 0.5 for shape in sizes.shapes]
    layers = [cpu.PackedLinear(weight, bits=sizes.bits) for weight in weights[:-1]] + [cpu.PackedLinear(weights[-1])]
    model = Backbone(LlamaForCausalLM(sizes.config()))
    model.quantize("int4" if sizes.bits == 4 else "int8")
    pool = KVPool(model.kv_shapes, max(rows), dtype=model.kv_dtype, device="cpu")
    runs: dict[str, Run] = {}
    for count in rows:
        inputs = {width: torch.randn(count, width) for _, width in sizes.shapes}
        runs[f"ours: {count}"] = Calls([linear_call(layer, inputs[layer.inputs]) for layer in layers])
        runs[f"model: {count}"] = model_call(model, pool, count)
        runs[f"torch: {count}"] = functools.partial(torch_layers, weights, inputs)
    return runs


def torch_layers(weights: Sequence[Tensor], inputs: Mapping[int, Tensor]) -> None:
    for weight in weights:
        torch_linear(inputs[weight.shape[1]], weight)


class Calls:
    """Kernel calls with all arguments made: what is timed is what a fused model does, and the entry of each kernel."""

    def __init__(self, calls: Sequence[tuple[Run, object]]) -> None:
        """Each call, and what its addresses point into."""
        self._calls, self._kept = [run for run, _ in calls], [kept for _, kept in calls]

    def __call__(self) -> None:
        for run in self._calls:
            run()


@functools.cache
def scratch(count: int, width: int) -> Tensor:
    """Results that nobody reads share their memory."""
    return torch.empty(count, width)


def linear_call(layer: cpu.PackedLinear, x: Tensor) -> tuple[Run, object]:
    rows, out = cpu.Rows(len(x), layer.inputs), scratch(len(x), layer.outputs)
    count, places = ctypes.c_int64(len(x)), (cpu.address(x), ctypes.byref(rows.struct), cpu.address(out))
    return functools.partial(cpu.call, "medusa_linear", ctypes.byref(layer.struct), count, *places), (layer, x, rows)


def model_call(model: Backbone, pool: KVPool, count: int) -> Run:
    tokens, rows = torch.randint(model.vocab_size, (count,)), torch.arange(count)
    return functools.partial(model.forward, tokens, one_request(1, 0, count, 0), pool, rows)


def one_request(first_slot: int, num_context: int, num_chain: int, num_nodes: int) -> Batch:
    """`num_chain` rows in sequence after a context, and nodes that all hang from the last; slots in order."""
    count, end = num_chain + num_nodes, num_context + num_chain
    slots = torch.arange(first_slot, first_slot + num_context + count)
    segment = Segment(count, slots[:num_context], num_chain, (-1,) * num_nodes)
    return build_batch(
        [segment], torch.arange(num_context, num_context + count).clamp(max=end), slots[num_context:], "cpu"
    )


def attention_runs(sizes: Sizes, context: int, rows: int, requests: int) -> dict[str, Run]:
    """The attention of all layers for one request after another: ours on binary16 and torch's on float32."""
    shapes, length = [(sizes.kv_heads, sizes.dim, sizes.dim)] * sizes.layers, context + rows
    pools = [KVPool(shapes, requests * length, dtype=kind, device="cpu") for kind in (torch.half, torch.float)]
    for part in itertools.chain.from_iterable((*pool.keys, *pool.values) for pool in pools):
        part.copy_(torch.randn(part.shape[1:]))
    batches = [one_request(1 + i * length, context, 1, rows - 1) for i in range(requests)]
    query = torch.randn(rows, sizes.heads, sizes.dim)
    layers = list(zip(pools[0].keys, pools[0].values, strict=True))
    calls = [attention_call(query, *layer, batch) for batch in batches for layer in layers]
    name = f"attention: {context}, {rows}"
    return {name: Calls(calls), f"torch {name}": functools.partial(torch_attention, query, pools[1], batches)}


def attention_call(query: Tensor, keys: Tensor, values: Tensor, batch: Batch) -> tuple[Run, object]:
    count, heads, dim = query.shape
    struct, step = cpu.attention_struct(keys, values, heads, dim**-0.5, None), cpu.step_struct(batch)
    places = ctypes.byref(struct), ctypes.byref(step), cpu.address(query), cpu.address(scratch(count, heads * dim))
    return functools.partial(cpu.call, "medusa_attention", *places), (query, keys, values, batch)


def torch_attention(query: Tensor, pool: KVPool, batches: Sequence[Batch]) -> None:
    scoring = Scoring(query.shape[2] ** -0.5)
    for batch in batches:
        for keys, values in zip(pool.keys, pool.values, strict=True):
            tree_attention(query, keys, values, batch, scoring)
