"""The two autoencoder classes in the form they are trained in: a whole clip in one pass, without a stream's caches.

`AutoencoderKLWan` doubles the frame rate only while it fills a cache, chunk after chunk, and its norms are slow to
differentiate. Here its layers run over all frames side by side, with the same result (a test holds the two together).
Both classes can stop below full resolution, where a step costs a tenth: most parameters lie there.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanCausalConv3d,
    WanResample,
    WanResidualBlock,
    WanRMS_norm,
)
from torch import Tensor, nn

from pipeline.decoder import StreamDecoder, TaehvStreamDecoder, WanStreamDecoder, encode_taehv, encode_wan
from pipeline.taehv import TAEHV, MemBlock, TGrow

__all__ = ["Codec", "PatchHead", "TaehvCodec", "WanCodec"]


class Codec(Protocol):
    """An autoencoder to train. Latents [B, F, C, h, w], frames [B, T, 3, H, W] in about 0..1."""

    module: nn.Module
    first_group: int
    """Video frames that the first latent of a training sample stands for."""

    def decode(self, latents: Tensor, depth: int | None = None) -> Tensor:
        """Frames, or with a depth the features [B, T', C, h * 2**depth, w * 2**depth] before that upsampling."""

    def head(self, depth: int) -> PatchHead:
        """A fresh linear map from the features at a depth to frames."""

    def encode(self, frames: Tensor) -> Tensor:
        """Latents of the frames, of the same groups that `decode` makes."""

    def stream(self) -> StreamDecoder: ...

    def encode_clip(self, frames: Tensor) -> Tensor:
        """Latents of a clip of 1 + 4k frames, as the pipeline computes them."""


class PatchHead(nn.Module):
    """Linear decoder of features: each becomes `time` frames of `space` x `space` pixels."""

    def __init__(self, width: int, time: int, space: int, first_group: int) -> None:
        super().__init__()
        self.time, self.space = time, space
        self.dropped = time - min(time, first_group)
        self.conv = nn.Conv2d(width, 3 * time * space * space, 1)

    def forward(self, features: Tensor) -> Tensor:
        pixels = F.pixel_shuffle(self.conv(features.flatten(0, 1)), self.space)
        frames = pixels.unflatten(1, (self.time, 3)).unflatten(0, features.shape[:2]).flatten(1, 2)
        return frames[:, self.dropped :] + 0.5


class WanCodec:
    """`AutoencoderKLWan` with latents that need no normalisation (mean 0, std 1)."""

    first_group = 1

    def __init__(self, module: AutoencoderKLWan) -> None:
        self.module = module
        for name, parameter in module.named_parameters():
            if name.endswith("conv2.weight"):  # residual branches start small
                parameter.data.mul_(0.1)

    def decode(self, latents: Tensor, depth: int | None = None) -> Tensor:
        decoder = self.module.decoder
        x = _causal(self.module.post_quant_conv, latents.transpose(1, 2))
        x = _middle(decoder.mid_block, _causal(decoder.conv_in, x))
        for level, block in enumerate(decoder.up_blocks):
            for resnet in block.resnets:
                x = _residual(resnet, x)
            if level == depth:
                return x.transpose(1, 2)
            if block.upsamplers is not None:
                x = _upsample(block.upsamplers[0], x)
        x = _causal(decoder.conv_out, F.silu(_norm(decoder.norm_out, x)))
        return x.transpose(1, 2) / 2 + 0.5

    def head(self, depth: int) -> PatchHead:
        blocks = self.module.decoder.up_blocks
        doublings = sum(block.upsamplers[0].mode == "upsample3d" for block in blocks[:depth])
        time = self.module.config.scale_factor_temporal // 2**doublings
        space = self.module.config.scale_factor_spatial // 2**depth
        return PatchHead(blocks[depth].resnets[-1].out_dim, time, space, self.first_group)

    def encode(self, frames: Tensor) -> Tensor:
        encoder = self.module.encoder
        x = _causal(encoder.conv_in, frames.transpose(1, 2) * 2 - 1)
        for layer in encoder.down_blocks:
            x = _residual(layer, x) if isinstance(layer, WanResidualBlock) else _downsample(layer, x)
        x = F.silu(_norm(encoder.norm_out, _middle(encoder.mid_block, x)))
        moments = _causal(self.module.quant_conv, _causal(encoder.conv_out, x))
        return moments[:, : self.module.config.z_dim].transpose(1, 2)

    def stream(self) -> WanStreamDecoder:
        return WanStreamDecoder(self.module)

    def encode_clip(self, frames: Tensor) -> Tensor:
        return encode_wan(self.module, frames)


class TaehvCodec:
    """`TAEHV`, whose first latent is a group of its own: a clip's first frame repeated."""

    def __init__(self, module: TAEHV) -> None:
        self.module = module
        self.first_group = module.temporal_scale
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        for layer in module.modules():
            if isinstance(layer, MemBlock):  # residual branches start small
                layer.conv[-1].weight.data.mul_(0.1)
            elif isinstance(layer, TGrow):  # no ReLU after it
                layer.conv.weight.data.mul_(0.7)
        module.decoder[-1].weight.data.mul_(0.1)
        nn.init.constant_(module.decoder[-1].bias, 0.5)

    def decode(self, latents: Tensor, depth: int | None = None) -> Tensor:
        layers = self.module.decoder
        return self.module.run(layers if depth is None else layers[: self._end(depth)], latents)

    def head(self, depth: int) -> PatchHead:
        config = self.module.config
        time = self.module.temporal_scale // 2 ** sum(config["decoder_time_upscale"][:depth])
        space = self.module.spatial_scale // 2**depth
        return PatchHead(config["decoder_widths"][depth], time, space, self.first_group)

    def _end(self, depth: int) -> int:
        """Index of the upsampling after which features are no longer of this depth."""
        layers = self.module.decoder
        return [index for index, layer in enumerate(layers) if isinstance(layer, nn.Upsample)][depth]

    def encode(self, frames: Tensor) -> Tensor:
        return self.module.encode_raw(frames)

    def stream(self) -> TaehvStreamDecoder:
        return TaehvStreamDecoder(self.module)

    def encode_clip(self, frames: Tensor) -> Tensor:
        return encode_taehv(self.module, frames)


class _RMSNorm(torch.autograd.Function):
    """Root mean square over channels (dimension 1), in the input's dtype: a tenth of the time autograd needs."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, gamma: Tensor) -> Tensor:
        power = (x * x).mean(1, keepdim=True, dtype=torch.float32)
        inverse = power.clamp_min_(1e-12).rsqrt_().to(x.dtype)
        ctx.save_for_backward(x, gamma, inverse)
        return x * inverse * gamma.to(x.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, gamma, inverse = ctx.saved_tensors
        normed = x * inverse
        along = gradient * normed
        by_gamma = along.flatten(2).sum((0, 2), dtype=torch.float32).view_as(gamma)
        scaled = gradient * gamma.to(x.dtype)
        radial = (scaled * normed).mean(1, keepdim=True)
        return torch.addcmul(scaled, normed, radial, value=-1).mul_(inverse), by_gamma


def _norm(layer: WanRMS_norm, x: Tensor) -> Tensor:
    return _RMSNorm.apply(x, layer.gamma)


def _causal(conv: WanCausalConv3d, x: Tensor) -> Tensor:
    """The causal convolution over all frames, zeros before the first."""
    time, height, width = conv.kernel_size
    if time > 1:
        x = F.pad(x, (0, 0, 0, 0, time - 1, 0))
    return F.conv3d(x, conv.weight, conv.bias, padding=(0, height // 2, width // 2))


def _residual(block: WanResidualBlock, x: Tensor) -> Tensor:
    skip = x if isinstance(block.conv_shortcut, nn.Identity) else _causal(block.conv_shortcut, x)
    x = _causal(block.conv1, F.silu(_norm(block.norm1, x)))
    return _causal(block.conv2, F.silu(_norm(block.norm2, x))) + skip


def _middle(block: nn.Module, x: Tensor) -> Tensor:
    x = _residual(block.resnets[0], x)
    attention: WanAttentionBlock
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        x = _residual(resnet, attention(x))
    return x


def _upsample(layer: WanResample, x: Tensor) -> Tensor:
    """The first frame keeps its rate; the others' time convolution starts from zeros, as in the reference."""
    if layer.mode == "upsample3d":
        first, rest = x[:, :, :1], x[:, :, 1:]
        pairs = _causal(layer.time_conv, rest).unflatten(1, (2, -1))
        x = torch.cat([first, torch.stack(pairs.unbind(1), 3).flatten(2, 3)], 2)
    frames = x.transpose(1, 2).flatten(0, 1)
    frames = layer.resample[1](F.interpolate(frames, scale_factor=2.0, mode="nearest-exact"))
    return frames.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


def _downsample(layer: WanResample, x: Tensor) -> Tensor:
    """The first frame keeps its rate; the time convolution over the others sees one frame before them."""
    frames = layer.resample(x.transpose(1, 2).flatten(0, 1))
    x = frames.unflatten(0, (x.shape[0], -1)).transpose(1, 2)
    if layer.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], 2)
    return x
