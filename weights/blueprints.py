"""The networks of a manifest's model, made from its configs: for whoever wants to know them before anything is here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from pipeline.checkpoint import wan_transformer
from pipeline.taehv import TAEHV
from weights.convert import read_config
from weights.manifest import Model, Part

_MAKE: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "transformer": wan_transformer,
    "text_encoder": lambda config: UMT5EncoderModel(UMT5Config(**config)),
    "vae": AutoencoderKLWan.from_config,
    "taehv": lambda config: TAEHV(**config),
}


def builders_of(model: Model) -> dict[str, Callable[[], nn.Module]]:
    """Part -> makes it, on torch's default device."""
    return {part.kind: _builder(part) for part in model.parts if part.kind in _MAKE}


def count_of(part: Part) -> int:
    """How many numbers a part's network has, as they are written: what has two names is counted once.

    Raises:
        WeightsError: its config cannot be read.
    """
    with torch.device("meta"):
        network = _builder(part)()
    return sum(tensor.numel() for tensor in (*network.parameters(), *network.buffers()))


def _builder(part: Part) -> Callable[[], nn.Module]:
    return partial(_MAKE[part.kind], {} if part.config is None else read_config(part.config))
