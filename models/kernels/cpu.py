"""The C kernels as Python sees them: structures of pointers, and the tensors that they point into.

Invariants:
- every struct lives beside the tensors it points to, so no pointer outlives its memory;
- all calls use torch's number of threads and the OpenMP runtime that torch has loaded: there is one thread pool.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Iterable, Sequence
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_void_p
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from models.batch import Batch
from models.kernels import reference
from models.kernels.build import KernelError, library

BLOCK = 16  # outputs whose weights lie side by side
LANES = 16  # head sizes are multiples of it
MAX_DIM = 256
PACKED_AT_A_TIME = 1024  # outputs; what is made on the way of more falls out of the cache, and takes 10 times as long
MAX_SHARED = 64  # query heads of one kv head


class LinearStruct(Structure):
    _fields_ = (
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("outputs", c_int64),
        ("inputs", c_int64),
        ("bits", c_int64),
    )


class RowsStruct(Structure):
    _fields_ = (("value", c_void_p), ("scale", c_void_p), ("offset", c_void_p), ("sum", c_void_p), ("inputs", c_int64))


class StepStruct(Structure):
    _fields_ = (
        ("segments", c_void_p),
        ("num_segments", c_int64),
        ("table", c_void_p),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("parents", c_void_p),
        ("rows", c_int64),
    )


class AttentionStruct(Structure):
    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("is_half", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("k_dim", c_int64),
        ("v_dim", c_int64),
        ("window", c_int64),
        ("scaling", c_float),
    )


class LayerStruct(Structure):
    _fields_ = (
        ("qkv", LinearStruct),
        ("out", LinearStruct),
        ("gate_up", LinearStruct),
        ("down", LinearStruct),
        ("input_norm", c_void_p),
        ("post_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("epsilon", c_float),
        ("is_rotary", c_int32),
        ("attention", AttentionStruct),
    )


class TrunkStruct(Structure):
    _fields_ = (
        ("layers", POINTER(LayerStruct)),
        ("num_layers", c_int64),
        ("embedding", LinearStruct),
        ("norm", c_void_p),
        ("head", LinearStruct),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("rotary_dim", c_int64),
        ("shown", c_void_p),
        ("num_shown", c_int64),
    )


class DrafterStruct(Structure):
    _fields_ = (("trunk", TrunkStruct), ("input", LinearStruct), ("token_norm", c_void_p), ("state_norm", c_void_p))


class AskedStruct(Structure):
    _fields_ = (
        ("rows", c_void_p),
        ("count", c_int64),
        ("scored", c_void_p),
        ("num_scored", c_int64),
        ("kept", c_void_p),
        ("logits", c_void_p),
    )


class RulesStruct(Structure):
    _fields_ = (
        ("ranks", c_int64),
        ("width", c_int64),
        ("rounds", c_int64),
        ("least_value", c_float),
        ("next_right", c_float),
        ("least_gain", c_float),
        ("heard", c_float),
        ("noisy_sureness", c_float),
        ("outside", c_float),
    )


class DrawStruct(Structure):
    _fields_ = (
        ("temperature", c_float),
        ("top_p", c_float),
        ("min_p", c_float),
        ("top_k", c_int32),
        ("key", c_int64),
    )


class AskStruct(Structure):
    _fields_ = (
        ("context", c_void_p),
        ("tokens", c_void_p),
        ("slots", c_void_p),
        ("num_context", c_int64),
        ("num_chain", c_int64),
        ("position", c_int64),
        ("num_nodes", c_int64),
        ("max_depth", c_int64),
        ("least_value", c_float),
        ("draw", DrawStruct),
    )


class BuffersStruct(Structure):
    _fields_ = (
        ("hidden", c_void_p),
        ("qkv", c_void_p),
        ("query", c_void_p),
        ("attended", c_void_p),
        ("inner", c_void_p),
        ("narrow", RowsStruct),
        ("between", RowsStruct),
    )


@lru_cache(maxsize=1)
def kernels() -> ctypes.CDLL:
    """The library, built at the first call. Raises KernelError."""
    path = library()
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelError(f"The CPU kernels cannot be loaded ({error}): set CC to gcc.") from error


_spent = 0.0


def take_seconds() -> float:
    """Seconds spent in kernels since this was last asked."""
    global _spent
    seconds, _spent = _spent, 0.0
    return seconds


def call(name: str, *arguments: object) -> None:
    """Run one kernel with torch's number of threads, and keep the time."""
    global _spent
    started = time.perf_counter()
    getattr(kernels(), name)(c_int(torch.get_num_threads()), *arguments)
    _spent += time.perf_counter() - started


def address(tensor: Tensor | None) -> c_void_p:
    return c_void_p(None if tensor is None else tensor.data_ptr())


class Arena:
    """Memory for weights in huge pages, which are read faster than small ones; never given back."""

    SIZE = 1 << 25

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor`, aligned to 64 bytes."""
        size = -(-tensor.nbytes // 64) * 64
        if size > len(self._free):
            area = mmap.mmap(-1, max(self.SIZE, size))
            if hasattr(mmap, "MADV_HUGEPAGE"):
                area.madvise(mmap.MADV_HUGEPAGE)
            self._free = torch.frombuffer(area, dtype=torch.uint8)
        mine, self._free = self._free[: tensor.nbytes], self._free[size:]
        return mine.view(tensor.dtype).view(tensor.shape).copy_(tensor)


_arena = Arena()


class PackedLinear:
    """A linear layer's weights in the kernels' order, padded to whole blocks and groups."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, bits: int = 8) -> None:
        """weight: [outputs, inputs]; bias: [outputs]; bits: 8 or 4."""
        self.outputs, self.inputs = weight.shape
        quantize = reference.quantize_weight_int4 if bits == 4 else reference.quantize_weight
        parts = [quantize(part) for part in torch.split(weight.detach(), PACKED_AT_A_TIME)]
        values = torch.cat([part[0] for part in parts])  # [outputs, groups, GROUP]
        scales = torch.cat([part[1] for part in parts], -2)  # [outputs, groups], or two of them
        missing = -self.outputs % BLOCK
        values, scales = pad(values, (0, 0, 0, 0, 0, missing)), pad(scales, (0, 0, 0, missing))
        blocks, groups = len(values) // BLOCK, values.shape[1]
        stored = values if bits == 4 else values.view(torch.uint8) ^ 128
        stored = stored.view(torch.int32).view(blocks, BLOCK, groups, 8)  # four at once
        if bits == 4:
            stored = stored[..., :4] | stored[..., 4:] << 4
        self._weight = _arena.keep(stored.flatten(2).transpose(1, 2))  # [blocks, groups * 8 or 4, BLOCK] of four bytes
        scales = scales.view(-1, blocks, BLOCK, groups)  # [1 or 2, ...]
        self._scale = _arena.keep(scales.permute(1, 3, 0, 2))  # [blocks, groups, 1 or 2, BLOCK]
        self._bias = None if bias is None else pad(bias.detach().float(), (0, missing))
        self.struct = LinearStruct(
            address(self._weight),
            address(self._scale),
            address(self._bias),
            blocks * BLOCK,
            groups * reference.GROUP,
            bits,
        )

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, inputs] float32 -> [rows, outputs] float32."""
        struct, count = self.struct, len(x)
        x = pad(x, (0, struct.inputs - self.inputs)) if struct.inputs > self.inputs else x.contiguous()
        out = torch.empty(count, struct.outputs)
        rows = Rows(count, struct.inputs)
        call("medusa_linear", ctypes.byref(struct), c_int64(count), address(x), ctypes.byref(rows.struct), address(out))
        return out[:, : self.outputs]


class Rows:
    """Room for quantised rows."""

    def __init__(self, count: int, inputs: int) -> None:
        groups = inputs // reference.GROUP
        self._tensors = (
            torch.empty(count, inputs, dtype=torch.int8),
            torch.empty(count, groups),
            torch.empty(count, groups, dtype=torch.int32),
            torch.empty(count, groups),
        )
        self.struct = RowsStruct(*map(address, self._tensors), inputs)


class Asked:
    """Rows of a step that are asked about, and room for the answers: `kept` [n, width], `logits` [scored, outputs]."""

    def __init__(self, rows: Tensor, scored: Tensor | None, width: int, outputs: int) -> None:
        """`scored`: indices into `rows` of those with logits; None is all."""
        self._rows, self._scored = rows, scored
        count = rows.shape[0]
        num_scored = count if scored is None else scored.shape[0]
        self.kept, self.logits = torch.empty(count, width), torch.empty(num_scored, outputs)
        self.struct = AskedStruct(
            address(rows), count, address(scored), num_scored, address(self.kept), address(self.logits)
        )


def best(scores: Tensor, vocab: int, count: int) -> tuple[Tensor, Tensor]:
    """scores: [rows, at least vocab] -> the `count` best, and their shares of softmax(scores).

    Both are [rows, count]; `count` is at most `vocab`.
    """
    found, shares = torch.empty(len(scores), count, dtype=torch.int64), torch.empty(len(scores), count)
    sizes = map(c_int64, (len(scores), scores.stride(0), vocab, count))
    kernels().medusa_best(address(scores), *sizes, address(found), address(shares))
    return found, shares


def draw(logits: Tensor, draws: Iterable[DrawStruct]) -> Tensor:
    """A token for each row of logits [rows, vocab] float32: `models.sampling` once more. Returns [rows]."""
    rows, vocab = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    tokens = torch.empty(rows, dtype=torch.int64)
    sizes = map(c_int64, (rows, logits.stride(0), vocab))
    call("medusa_draw", address(logits), *sizes, (DrawStruct * rows)(*draws), address(tokens))
    return tokens


def noise(keys: Sequence[int], tokens: Tensor) -> Tensor:
    """Gumbel noise of each key at `tokens` [tokens] int64: [keys, tokens]."""
    out = torch.empty(len(keys), len(tokens))
    own = (c_int64 * len(keys))(*keys)
    call("medusa_noise", own, c_int64(len(keys)), address(tokens), c_int64(len(tokens)), address(out))
    return out


def attention_struct(keys: Tensor, values: Tensor, heads: int, scaling: float, window: int | None) -> AttentionStruct:
    """keys, values: one layer's pool, [slots, kv_heads, dim] of float32 or float16."""
    _, kv_heads, k_dim = keys.shape
    v_dim = values.shape[2]
    is_half = keys.dtype == torch.float16
    return AttentionStruct(address(keys), address(values), is_half, heads, kv_heads, k_dim, v_dim, window or 0, scaling)


def can_attend(keys: Tensor, values: Tensor, num_heads: int) -> bool:
    """Whether the kernel knows such heads: [slots, kv_heads, dim] both."""
    dims = keys.shape[2], values.shape[2]
    return (
        keys.dtype in (torch.float32, torch.float16)
        and all(dim % LANES == 0 and dim <= MAX_DIM for dim in dims)
        and num_heads // keys.shape[1] <= MAX_SHARED
    )


def step_struct(batch: Batch) -> StepStruct:
    layout = batch.layout
    return StepStruct(
        address(layout.segments),
        layout.segments.shape[0],
        address(layout.table),
        address(batch.positions),
        address(batch.slots),
        address(layout.parents),
        batch.slots.shape[0],
    )


def attention(query: Tensor, keys: Tensor, values: Tensor, batch: Batch, scaling: float, window: int | None) -> Tensor:
    """query: [rows, heads, k_dim]; keys, values: [slots, kv_heads, dim]. Returns [rows, heads, v_dim] float32."""
    query = query.contiguous()
    out = query.new_empty(*query.shape[:2], values.shape[2])
    struct, step = attention_struct(keys, values, query.shape[1], scaling, window), step_struct(batch)
    call("medusa_attention", ctypes.byref(struct), ctypes.byref(step), address(query), address(out))
    return out
