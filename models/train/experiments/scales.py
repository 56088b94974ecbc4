"""How large each experiment is at each scale.

The shapes are the paper's where it has one of that size (1M: 5 layers of 128, 3M: 4 of 256, 30M: 10 of 512).
"""

from __future__ import annotations

from models.train.experiments.cell import Scale, Shape

_TINY = {"tiny": Shape(32, 4, 2)}
_ONE = {"1M": Shape(128, 5, 4)}
_THREE = {"3M": Shape(256, 4, 8)}
_TEN = {"10M": Shape(384, 6, 8)}
_THIRTY = {"30M": Shape(512, 10, 8)}
_DEEP = {"2M": Shape(128, 10, 4)}  # eight heads and a trunk

SCALES: dict[str, dict[str, Scale]] = {
    "tiny": {
        "bytes": Scale(
            _TINY, (1, 4), 2, 8, 4, 64, 1e-2, {"prompts": 3, "prompt": 8, "written": 12, "batch": 2, "rounds": 2}, 2
        ),
        "induction": Scale(_TINY, (1, 2), 2, 8, 4, 64, 1e-2, {"names": 64, "stories": 4}, 2),
        "polynomial": Scale(_TINY, (1, 2), 2, 8, 4, 64, 1e-2, {"trained": 2, "tested": 3, "samples": 6}, 2),
    },
    "small": {
        "bytes": Scale(
            _DEEP,
            (1, 2, 4, 8),
            2,
            250,
            8,
            256,
            3e-3,
            {"prompts": 16, "prompt": 64, "written": 96, "batch": 8, "rounds": 3},
        ),
        "induction": Scale(_ONE | _THREE, (1, 2), 2, 300, 16, 128, 3e-3, {"names": 1024, "stories": 100}),
        "polynomial": Scale(_ONE, (1, 2, 4), 2, 800, 32, 64, 3e-3, {"trained": 2, "tested": 4, "samples": 500}),
    },
    "cpu": {
        "bytes": Scale(
            _DEEP,
            (1, 2, 4, 8),
            2,
            1400,
            8,
            256,
            2e-3,
            {"prompts": 64, "prompt": 64, "written": 128, "batch": 8, "rounds": 5},
        ),
        "induction": Scale(_ONE | _THREE, (1, 2), 3, 1500, 16, 128, 2e-3, {"names": 1024, "stories": 100}),
        "polynomial": Scale(_DEEP, (1, 2, 4), 2, 3200, 32, 64, 2e-3, {"trained": 3, "tested": 6, "samples": 500}),
    },
    "gpu": {
        "bytes": Scale(
            _THIRTY,
            (1, 2, 4, 8),
            2,
            1500,
            64,
            1024,
            1e-3,
            {"prompts": 128, "prompt": 128, "written": 256, "batch": 16, "rounds": 5},
        ),
        "induction": Scale(_ONE | _THREE | _TEN, (1, 2), 3, 2500, 128, 512, 1e-3, {"names": 1024, "stories": 100}),
        "polynomial": Scale(_THIRTY, (1, 2, 4), 2, 2500, 256, 256, 1e-3, {"trained": 5, "tested": 10, "samples": 2000}),
    },
}
