"""Layers of the Wan VAE in a form that runs several times faster, with the same result to rounding.

torch gives a float32 3-D convolution over a single small clip to a slow path (it chooses by the tensor's
size), the norm as diffusers writes it reads its input a dozen times, and a picture need not be doubled to be convolved
(`upsampling.py`). That is for a CPU in float32. On a GPU in half precision some versions of cuDNN want the weights in
another order of memory; elsewhere nothing changes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanResample,
    WanRMS_norm,
)
from torch import Tensor, nn

from pipeline.upsampling import pays, upsampled_conv

__all__ = ["speed_up"]


FAULTY_CUDNN = range(9_08_00, 9_15_00)
"""Versions whose 3-D convolutions in half precision are wrong unless channels are the last in memory. So torch does
without (from 2.9.1 on): it copies the pictures once for each place of a kernel, which takes gigabytes and far more time
than the product itself."""


def speed_up(vae: AutoencoderKLWan) -> None:
    """Exchange the classes of the VAE's convolutions, norms and upsamplings; weights, names and config stay as they
    are. A VAE that a GPU computes is to be there already."""
    if vae.device.type == "cuda" and vae.dtype != torch.float32 and torch.backends.cudnn.version() in FAULTY_CUDNN:
        for module in vae.modules():
            if isinstance(module, WanCausalConv3d):
                module.to(memory_format=torch.channels_last_3d)
    if not torch.backends.mkldnn.is_available():
        return
    for module in vae.modules():
        if type(module) is WanCausalConv3d:
            module.__class__ = _CausalConv3d
        elif type(module) is WanRMS_norm and module.channel_first:
            module.__class__ = _RMSNorm
        elif isinstance(module, WanResample) and module.mode.startswith("upsample"):
            module.resample.__class__ = _UpsampleAndConvolve


def _applies(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32


class _CausalConv3d(WanCausalConv3d):
    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        if not _applies(x):
            return super().forward(x, cache_x)
        width, _, height, _, before, _ = self._padding
        if cache_x is not None and before > 0:
            x = torch.cat([cache_x, x], dim=2)
            before -= cache_x.shape[2]  # a cache holds no more frames than the kernel looks back
        if before > 0:  # that at the edges is the convolution's own: no copy of the pictures
            x = F.pad(x, (0, 0, 0, 0, before, 0))
        # For torch.compile the same call under a name of its own: it knows no shapes of oneDNN's.
        convolve = _convolution if torch.compiler.is_dynamo_compiling() else torch.mkldnn_convolution
        padding = (0, height, width)
        return convolve(x, self.weight, self.bias, padding, self.stride, self.dilation, self.groups)


def _convolve(input: Tensor, weight: Tensor, bias: Tensor | None, *sizes: Any) -> Tensor:
    return torch.mkldnn_convolution(input, weight, bias, *sizes).contiguous()


def _convolved_shape(
    input: Tensor, weight: Tensor, bias: Tensor | None, padding: Any, stride: Any, dilation: Any, groups: int
) -> Tensor:
    return input.new_empty(F.conv3d(input, weight, bias, stride, padding, dilation, groups).shape)


_convolution = torch.library.custom_op(
    "self_forcing::mkldnn_convolution",
    _convolve,
    mutates_args=(),
    schema="(Tensor input, Tensor weight, Tensor? bias, int[] padding, int[] stride, int[] dilation, int groups)"
    " -> Tensor",
)
_convolution.register_fake(_convolved_shape)


class _RMSNorm(WanRMS_norm):
    def forward(self, x: Tensor) -> Tensor:
        if not _applies(x) or x.requires_grad:  # gradients need what is overwritten below
            return super().forward(x)
        power = (x * x).sum(1, keepdim=True)
        normed = x * power.clamp_min_(1e-24).rsqrt_().mul_(self.scale) * self.gamma
        return normed + self.bias if isinstance(self.bias, Tensor) else normed


class _UpsampleAndConvolve(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        if not pays(x):
            return super().forward(x)
        return upsampled_conv(x, self[1].weight, self[1].bias)
