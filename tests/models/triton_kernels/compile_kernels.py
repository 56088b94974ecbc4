"""Compiles the Triton kernels for an H100, which needs no GPU, only that Triton is not told to interpret them.

Run as a program by `test_compiled`. It prints a line for each variant: kernel, variant, bytes of shared memory.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[3]))
from models.kernels import triton_attention, triton_layers, triton_sampling
from tests.bench.gpu import SHAPES

H100 = GPUTarget("cuda", 90, 32)
INDICES = ("tiles", "table", "slots", "positions", "ancestors", "tokens")
SCALARS = {
    "epsilon": "fp32",
    "scaling": "fp32",
    "softcap": "fp32",
    **dict.fromkeys(("window", "num_rows", "query_row", "query_head", "num_spans", "num_results"), "i32"),
    **dict.fromkeys(("key_row", "key_head", "value_row", "value_head", "vocab", "scaled_row"), "i32"),
}
FLOATS = ("sums", "cosines", "sines", "parts", "scaled")
SIZES = ("SmolLM2-135M", "Llama-3.1-8B")
DTYPES = ("bf16", "fp32")


def variants() -> Iterator[tuple[Any, str, dict[str, Any], dict[str, str]]]:
    """Kernel, name, constants, and types of pointers that are not of the model's type."""
    for shape in SIZES:
        of = SHAPES[shape]
        heads, kv_heads, hidden, inner = of.heads, of.kv_heads, of.hidden, of.inner
        shared, dim = heads // kv_heads, hidden // heads
        dims = {"K_DIM": dim, "V_DIM": dim, "K_WIDTH": dim, "V_WIDTH": dim}
        for width in (16, 64):
            for extras, out in ((False, ""), (True, "fp32")):
                features = dict.fromkeys(("HAS_SOFTCAP", "HAS_WINDOW", "HAS_SINKS"), extras)
                sizes = {"SHARED": shared, "KV_HEADS": kv_heads, "TILE": width, "KEYS": triton_attention.KEYS_AT_A_TIME}
                constants = sizes | dims | features | {"SPAN_KEYS": triton_attention.SPAN}
                yield triton_attention._attend, f"{shape}, tiles of {width}, {extras}", constants, {"out": out}
        yield triton_attention._join, shape, {"V_DIM": dim, "V_WIDTH": dim}, {}
        yield triton_attention._write, shape, {"KV_HEADS": kv_heads, **dims}, {}
        power = triton_attention.power
        for has_delta in (False, True):
            constants = {"SIZE": hidden, "WIDTH": power(hidden), "HAS_DELTA": has_delta}
            yield triton_layers._add_norm, f"{shape}, {has_delta}", constants, {}
        for turned, has_norm in ((dim, False), (dim, True), (0, False)):
            constants = {"HEADS": heads, "KV_HEADS": kv_heads, "DIM": dim, "WIDTH": dim, "TURNED": turned}
            yield triton_layers._place, f"{shape}, {turned}, {has_norm}", constants | {"HAS_NORM": has_norm}, {}
        yield triton_layers._gated, shape, {"INNER": inner, "WIDTH": triton_layers.INNER_AT_A_TIME}, {}
    yield triton_sampling._best, "", {"TOKENS": triton_sampling.TOKENS_AT_A_TIME}, {"keys": "i64", "values": "fp32"}


def main() -> None:
    for kernel, name, constants, others in variants():
        for dtype in DTYPES:
            own = dict(constants)
            if "PRECISION" in kernel.arg_names:
                own["PRECISION"] = "ieee" if dtype == "fp32" else "tf32"
            types = {each: _type(each, own, others, dtype) for each in kernel.arg_names}
            made = triton.compile(ASTSource(kernel, types, own), target=H100)
            sys.stdout.write(f"{kernel.__name__} {name} {dtype} {made.metadata.shared}\n")


def _type(name: str, constants: dict[str, Any], others: dict[str, str], dtype: str) -> str:
    if name in constants:
        return "constexpr"
    if name in SCALARS:
        return SCALARS[name]
    if name in INDICES:
        return "*i64"
    return f"*{others.get(name) or ('fp32' if name in FLOATS else dtype)}"


if __name__ == "__main__":
    main()
