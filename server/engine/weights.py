"""How many bits the model's weights get: what `--quantization` says, or what suits the machine and the model."""

from __future__ import annotations

import logging
from typing import cast

import torch

from models.backbone import Backbone
from models.kernels.build import KernelError
from models.kernels.cpu import kernels
from models.quantize import Quantization
from server.errors import StartupError

logger = logging.getLogger(__name__)


def quantize(backbone: Backbone, wanted: str | None) -> None:
    """Quantise a loaded model, or leave it. Raises `StartupError` if what was asked for cannot be done."""
    found = _choose(backbone, wanted)
    if found is not None:
        backbone.quantize(found)


def _choose(backbone: Backbone, wanted: str | None) -> Quantization | None:
    weight = backbone.lm_head_weight
    fits = weight.device.type == "cpu" and weight.dtype == torch.float32
    if wanted == "none" or (wanted is None and not fits):
        return None
    if not fits:
        raise StartupError(f"--quantization {wanted} is for --device cpu and --dtype float32; leave it out.")
    try:
        kernels()
    except KernelError as error:
        if wanted is not None:
            raise StartupError(f"--quantization {wanted} is not possible: {error}") from error
        logger.warning("%s Until then decoding runs on torch in float32, several times slower.", error)
        return None
    lossless = backbone.default_quantization() if wanted != "int8" else None
    if wanted == "int4" and lossless != "int4":
        logger.warning(
            "Four bits do not hold this model's weights: its answers get worse. How much, `medusa-serve evaluate "
            "perplexity --quantization int4` says; --quantization int8 hardly loses anything."
        )
    return cast(Quantization | None, wanted) or lossless
