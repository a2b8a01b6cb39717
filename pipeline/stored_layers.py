"""Layers that keep their weights in 8 bits, with a scale for each row, and compute in another dtype.

e4m3 has no numbers below 0.002 and only coarse ones below 0.016, which is where whole weights of a large model lie. So
each row is brought up to the range of e4m3 first. Scales are powers of two: multiplied with them, a number changes in
no other way, whatever the dtype, and rounding to 8 bits is all that is lost.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FP8_STORAGE = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8_STORAGE).max


def stored_rows(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A weight [rows, columns] in 8 bits, and what its rows are to be multiplied with in `dtype`, [rows, 1]."""
    peak = torch.linalg.vector_norm(weight, torch.inf, 1, keepdim=True).float()
    # A row of zeros, too, gets a scale that it can be divided by.
    scale = (peak / LARGEST).log2().ceil().exp2().clamp_min(torch.finfo(dtype).tiny)
    return (weight / scale.to(weight.dtype)).to(FP8_STORAGE), scale.to(dtype)


def store(model: nn.Module, dtype: torch.dtype, chosen: Callable[[str], bool]) -> None:
    """Store the linear layers and embeddings of a model in 8 bits, and let them compute in `dtype` from now on.

    A weight that two layers share stays shared.

    Args:
        chosen: whether the layer of a name is one of them.
    """
    layers: dict[int, list[nn.Module]] = {}
    for name, layer in model.named_modules():
        if type(layer) in _STORED and chosen(name):
            layers.setdefault(id(layer.weight), []).append(layer)
    for sharing in layers.values():  # one after the other: what was whole goes before the next is rounded
        values, scale = (nn.Parameter(part, requires_grad=False) for part in stored_rows(sharing[0].weight, dtype))
        for layer in sharing:
            layer.weight, layer.scale = values, scale
            layer.__class__ = _STORED[type(layer)]


class StoredLinear(nn.Linear):
    scale: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(self.scale.dtype).mul_(self.scale), self.bias)


class StoredEmbedding(nn.Embedding):
    """Only the rows that are asked for are made whole."""

    scale: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        # As whole numbers: on a CPU, older versions of torch cannot pick rows of 8-bit floats.
        rows = self.weight.view(torch.uint8)[input].view(self.weight.dtype)
        return rows.to(self.scale.dtype).mul_(self.scale[input])


_STORED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: StoredLinear, nn.Embedding: StoredEmbedding}
