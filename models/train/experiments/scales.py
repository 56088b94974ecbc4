"""How large each experiment is at each scale.

Invariant: shapes are the paper's where it has one of that size (1M: 5 layers of 128, 3M: 4 of 256, 10M: 6 of 384, 30M:
10 of 512). `cpu` and `gpu` were sized by arithmetic, not by a clock.
"""

from __future__ import annotations

from dataclasses import replace

from models.train.experiments.cell import Scale, Shape

_TINY = {"tiny": Shape(32, 4, 2)}
_ONE = {"1M": Shape(128, 5, 4)}
_TWO = {"2M": Shape(128, 10, 4)}  # room for eight heads and a trunk
_THREE = {"3M": Shape(256, 4, 8)}
_TEN = {"10M": Shape(384, 6, 8)}
_THIRTY = {"30M": Shape(512, 10, 8)}

_BYTES = Scale(
    shapes=_TWO,
    heads=(1, 2, 4, 8),
    seeds=2,
    steps=1400,
    batch_size=8,
    context=256,
    lr=2e-3,
    extra={"prompts": 64, "prompt": 64, "written": 128, "batch": 8, "rounds": 5},
)
_INDUCTION = Scale(
    shapes=_ONE | _THREE,
    heads=(1, 2),
    seeds=3,
    steps=1200,
    batch_size=16,
    context=128,
    lr=2e-3,
    extra={"names": 1024, "stories": 100},
)
_POLYNOMIAL = Scale(
    shapes=_TWO,
    heads=(1, 2, 4),
    seeds=2,
    steps=2000,
    batch_size=32,
    context=64,
    lr=2e-3,
    extra={"trained": 3, "tested": 6, "samples": 500},
)


def _tiny(scale: Scale, heads: tuple[int, ...], extra: dict[str, int]) -> Scale:
    return replace(
        scale, shapes=_TINY, heads=heads, seeds=2, steps=8, batch_size=4, context=64, lr=1e-2, extra=extra, checks=2
    )


SCALES: dict[str, dict[str, Scale]] = {
    "tiny": {
        "bytes": _tiny(_BYTES, (1, 4), {"prompts": 3, "prompt": 8, "written": 12, "batch": 2, "rounds": 2}),
        "induction": _tiny(_INDUCTION, (1, 2), {"names": 64, "stories": 4}),
        "polynomial": _tiny(_POLYNOMIAL, (1, 2), {"trained": 2, "tested": 3, "samples": 6}),
    },
    "small": {
        "bytes": replace(_BYTES, steps=300, lr=3e-3, extra={**_BYTES.extra, "prompts": 16, "written": 64, "rounds": 3}),
        "induction": replace(_INDUCTION, seeds=2, steps=300, lr=3e-3),
        "polynomial": replace(_POLYNOMIAL, shapes=_ONE, steps=500, extra={"trained": 2, "tested": 4, "samples": 500}),
    },
    "cpu": {"bytes": _BYTES, "induction": _INDUCTION, "polynomial": _POLYNOMIAL},
    "gpu": {
        "bytes": replace(
            _BYTES,
            shapes=_THIRTY,
            steps=1500,
            batch_size=64,
            context=1024,
            lr=1e-3,
            extra={"prompts": 128, "prompt": 128, "written": 256, "batch": 16, "rounds": 5},
        ),
        "induction": replace(_INDUCTION, shapes=_ONE | _THREE | _TEN, steps=2500, batch_size=128, context=512, lr=1e-3),
        "polynomial": replace(
            _POLYNOMIAL,
            shapes=_THIRTY,
            steps=1000,
            batch_size=256,
            context=256,
            lr=1e-3,
            extra={"trained": 5, "tested": 10, "samples": 2000},
        ),
    },
}
