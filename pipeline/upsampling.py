"""Doubling a picture and convolving it, without making the doubled picture.

Where each pixel is repeated two by two, a 3x3 kernel meets only four different pixels: two rows by two columns. So each
of the four pixels that come out of one has a 2x2 kernel on the small picture, whose weights are sums of those that
would have met the same pixel: 16 products instead of 36, the same result to rounding. Both decoders end each stage this
way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["UpsamplingConv", "pays", "upsampled_conv"]


def upsampled_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Nearest neighbours, doubled, then a 3x3 convolution with padding 1: [N, C, h, w] -> [N, O, 2h, 2w].

    Args:
        weight: [O, C, 3, 3].
        bias: [O].
    """
    outputs, (height, width) = weight.shape[0], x.shape[2:]
    kernels = _two_taps(_two_taps(weight, 2), 4)  # [O, C, row, 2, column, 2]: of the pixel in this row and column
    kernels = kernels.permute(2, 4, 0, 1, 3, 5).flatten(0, 2)
    # All four kernels at every corner between pixels, where each needs all corners but those at one end.
    corners = F.conv2d(x, kernels, None if bias is None else bias.repeat(4), padding=1)
    corners = corners.unflatten(1, (2, 2, outputs))
    out = x.new_empty(len(x), outputs, height, 2, width, 2)
    for row in (0, 1):
        for column in (0, 1):
            out[:, :, :, row, :, column] = corners[:, row, column, :, row : row + height, column : column + width]
    return out.flatten(4, 5).flatten(2, 3)


def pays(x: Tensor) -> bool:
    """Whether to do so: on a CPU (and in its rehearsal), in float32 and wider.

    In fewer bits sums of weights are rounded, and on a GPU it has not been measured.
    """
    return x.device.type in ("cpu", "meta") and x.dtype in (torch.float32, torch.float64)


def _two_taps(weight: Tensor, dim: int) -> Tensor:
    """Three taps on doubled pixels, in dimension `dim`, as two on the pixels themselves: for the first of the two, and
    for the second. [..., 3, ...] -> [..., 2, 2, ...]"""
    before, at, after = weight.unbind(dim)
    first, second = torch.stack([before, at + after], dim), torch.stack([before + at, after], dim)
    return torch.stack([first, second], dim)


class UpsamplingConv(nn.Conv2d):
    """A 3x3 convolution of the doubled picture: [N, C, h, w] -> [N, O, 2h, 2w]."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True) -> None:
        super().__init__(inputs, outputs, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if pays(x):
            return upsampled_conv(x, self.weight, self.bias)
        return super().forward(F.interpolate(x, scale_factor=2))
