"""Names and scales of published UMT5 encoders, brought to those of transformers' `UMT5EncoderModel`.

Two layouts exist. Wan's own has names of its own (`blocks.0.attn.q.weight`). Others publish transformers' names with
8-bit weights, beside each of which stands the number it was divided by (`....scale_weight`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import WeightsError

_WAN_TOP = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}
_WAN_BLOCK = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
_NOT_WEIGHTS = ("scaled_fp8", "spiece_model")
"""A mark of the layout, and the tokenizer, which comes from elsewhere."""
_SCALE = ".scale_weight"
_INPUT_SCALE = ".scale_input"
"""For arithmetic in 8 bits, which is not done here."""


def umt5_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename Wan's layout; what has transformers' names already keeps them. Unknown names stay, to be refused later."""
    return {_renamed(name): tensor for name, tensor in state.items() if name != "encoder.embed_tokens.weight"}


def _renamed(name: str) -> str:
    if name in _WAN_TOP:
        return _WAN_TOP[name]
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", name)
    if match is None or match[2] not in _WAN_BLOCK:
        return name
    return f"encoder.block.{match[1]}.{_WAN_BLOCK[match[2]]}.weight"


def unscaled(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights by name, and the scale of those that have one.

    Raises:
        WeightsError: 8-bit weights without their scale, or a scale that belongs to nothing.
    """
    scales = {name.removesuffix(_SCALE) + ".weight": value for name, value in state.items() if name.endswith(_SCALE)}
    weights = {
        name: value
        for name, value in state.items()
        if name not in _NOT_WEIGHTS and not name.endswith((_SCALE, _INPUT_SCALE))
    }
    if bad := sorted(scales.keys() - weights.keys()):
        raise WeightsError(f"The text encoder's file has a scale for {bad[0]}, which it does not hold.")
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise WeightsError(f"The text encoder's file holds {name}, which is no tensor.")
        if value.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) and "scaled_fp8" in state and name not in scales:
            raise WeightsError(f"The text encoder's file has 8-bit weights {name} without their scale.")
    return weights, scales
