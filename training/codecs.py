"""The two autoencoder classes in the form they are trained in: a whole clip in one pass, without a stream's
caches.

`AutoencoderKLWan` doubles the frame rate only while it fills a cache, chunk after chunk, and its norms are
slow to differentiate. Here its layers run over all frames side by side, with the same result (a test holds
the two together).

Both decoders begin as a linear one, fitted before in seconds: their residual branches start at zero, and what
is left can be made to compute any `LinearDecoder`, ReLUs and norms notwithstanding. From a random start they
need minutes to come as far.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
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
    patchify,
    unpatchify,
)
from torch import Tensor, nn

from pipeline.decoder import StreamDecoder, TaehvStreamDecoder, WanStreamDecoder, encode_taehv, encode_wan
from pipeline.taehv import TAEHV, MemBlock, TGrow
from pipeline.wan_layers import speed_up

__all__ = ["Codec", "LinearDecoder", "TaehvCodec", "WanCodec"]


class Codec(Protocol):
    """An autoencoder to train. Latents [B, F, C, h, w], frames [B, T, 3, H, W] in about 0..1."""

    module: nn.Module
    first_group: int
    """Video frames that the first latent of a training sample stands for."""

    def linear(self) -> LinearDecoder:
        """A fresh linear decoder, as wide as this class can take over."""

    def begin_as(self, linear: LinearDecoder) -> None:
        """Set the decoder's weights so that it computes what `linear` does."""

    def decode(self, latents: Tensor) -> Tensor:
        """Frames of all groups."""

    def encode(self, frames: Tensor) -> Tensor:
        """Latents of the frames, of the same groups that `decode` makes."""

    def stream(self) -> StreamDecoder: ...

    def encode_clip(self, frames: Tensor) -> Tensor:
        """Latents of a clip of 1 + 4k frames, as the pipeline computes them."""


class LinearDecoder(nn.Module):
    """What the decoders are without their residual branches: convolutions, each after a doubling of height
    and width.

    Args:
        channels: of a latent.
        widths: features at each resolution.
        outputs: channels that a last convolution makes of them: the colours of a patch of pixels.
        join: makes pixels of the patches, [N, outputs, h, w] -> [N, 3, H, W]; its order is the codec's.
        doubles_time: for each stage, whether it makes two frames of one.
        first_group: 1 if the first frame of a sample stays single, as in the Wan VAE.
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        outputs: int,
        join: Callable[[Tensor], Tensor],
        doubles_time: Sequence[bool],
        first_group: int,
    ) -> None:
        super().__init__()
        self.join = join
        self.single_first = first_group == 1
        self.enter = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.splits = nn.ModuleList(
            nn.Conv2d(width, 2 * width, 1, bias=False) if double else nn.Identity()
            for width, double in zip(widths[:-1], doubles_time, strict=True)
        )
        self.grows = nn.ModuleList(
            nn.Conv2d(width, after, 3, padding=1, bias=False) for width, after in itertools.pairwise(widths)
        )
        self.leave = nn.Conv2d(widths[-1], outputs, 3, padding=1)
        with torch.no_grad():  # each layer begins near the identity
            self.enter.weight.mul_(0.3)
            self.enter.weight[:, :, 1, 1] += torch.eye(widths[0], channels)
            for split in self.splits:
                if isinstance(split, nn.Conv2d):
                    split.weight.mul_(0.1)
                    split.weight[:, :, 0, 0] += torch.eye(split.in_channels).repeat(2, 1)
            for grow in self.grows:
                grow.weight.mul_(0.3)
                grow.weight[:, :, 1, 1] += torch.eye(grow.out_channels, grow.in_channels)
            self.leave.weight.mul_(0.3)
            self.leave.weight[:, :, 1, 1] += torch.eye(outputs, widths[-1])
            self.leave.bias.fill_(0.5)

    def forward(self, latents: Tensor) -> Tensor:
        batch = len(latents)
        x = self.enter(latents.flatten(0, 1))
        for split, grow in zip(self.splits, self.grows, strict=True):
            if isinstance(split, nn.Conv2d):
                frames = x.unflatten(0, (batch, -1))
                doubled = split(x).unflatten(1, (2, -1)).unflatten(0, (batch, -1)).flatten(1, 2)
                x = torch.cat([frames[:, :1], doubled[:, 2:]], 1) if self.single_first else doubled
                x = x.flatten(0, 1)
            x = grow(F.interpolate(x, scale_factor=2.0))
        return self.join(self.leave(x)).unflatten(0, (batch, -1))


class WanCodec:
    """`AutoencoderKLWan` with latents that need no normalisation (mean 0, std 1)."""

    first_group = 1

    def __init__(self, module: AutoencoderKLWan) -> None:
        self.module = module
        self._patch_size = module.config.patch_size or 1
        speed_up(module)
        for part in module.modules():
            if isinstance(part, WanResidualBlock):
                _zero(part.conv2)
            elif isinstance(part, WanAttentionBlock):
                _zero(part.proj)

    def linear(self) -> LinearDecoder:
        stages, outputs = self._stages(), self.module.config.out_channels
        widths = [block.upsamplers[0].dim for block in stages]
        # What a stage hands on is narrower than the next one.
        widths = [min(width, 3 * self.module.config.z_dim) for width in widths]
        for index, block in enumerate(stages[:-1]):
            widths[index + 1] = min(widths[index + 1], block.upsamplers[0].resample[1].out_channels)
        last = min(stages[-1].upsamplers[0].resample[1].out_channels, self.module.decoder.conv_out.in_channels)
        widths.append(min((last - 1) // 2, outputs))  # each is a pair of features, and there is one more
        doubles = [block.upsamplers[0].mode == "upsample3d" for block in stages]
        return LinearDecoder(self.module.config.z_dim, widths, outputs, self._join, doubles, self.first_group)

    def _join(self, patches: Tensor) -> Tensor:
        """Patches [N, C, h, w] -> pixels [N, 3, H, W]."""
        return unpatchify(patches.unsqueeze(2), self._patch_size).squeeze(2)

    def _stages(self) -> list[nn.Module]:
        return [block for block in self.module.decoder.up_blocks if block.upsamplers is not None]

    @torch.no_grad()
    def begin_as(self, linear: LinearDecoder) -> None:
        decoder = self.module.decoder
        _pass_on(self.module.post_quant_conv, self.module.config.z_dim)
        width = linear.enter.out_channels
        decoder.conv_in.weight[:width] = 0
        decoder.conv_in.weight[:width, :, -1] = linear.enter.weight
        decoder.conv_in.bias[:width] = linear.enter.bias
        for block, split, grow in zip(self._stages(), linear.splits, linear.grows, strict=True):
            _pass_on_residual(block, width)
            upsampler = block.upsamplers[0]
            if isinstance(split, nn.Conv2d):
                for half, part in enumerate(split.weight.chunk(2)):
                    rows = slice(half * upsampler.dim, half * upsampler.dim + width)
                    upsampler.time_conv.weight[rows] = 0
                    upsampler.time_conv.weight[rows, :width, -1, 0, 0] = part[..., 0, 0]
                    upsampler.time_conv.bias[rows] = 0
            conv, after = upsampler.resample[1], grow.out_channels
            conv.weight[:after] = 0
            conv.weight[:after, :width] = grow.weight
            conv.bias[:after] = 0
            width = after
        # The last norm divides by the length of the features. A large constant beside small ones makes it
        # nearly constant, and silu(x) - silu(-x) = x makes the activation linear.
        constant = 8.0
        conv.weight[width:] = 0
        conv.weight[width : 2 * width] = -conv.weight[:width]
        conv.bias.zero_()
        conv.bias[2 * width] = constant
        _pass_on_residual(decoder.up_blocks[-1], 2 * width + 1)
        shortcut = decoder.up_blocks[-1].resnets[0].conv_shortcut
        if isinstance(shortcut, WanCausalConv3d):  # what else it makes must leave the length alone
            shortcut.weight[2 * width + 1 :] = 0
            shortcut.bias[2 * width + 1 :] = 0
        scale = 2 * constant / decoder.conv_out.in_channels**0.5
        _zero(decoder.conv_out)
        decoder.conv_out.weight[:, :width, -1] = scale * linear.leave.weight
        decoder.conv_out.weight[:, width : 2 * width, -1] = -scale * linear.leave.weight
        decoder.conv_out.bias.copy_(2 * linear.leave.bias - 1)

    def decode(self, latents: Tensor) -> Tensor:
        decoder = self.module.decoder
        x = _causal(self.module.post_quant_conv, latents.transpose(1, 2))
        x = _middle(decoder.mid_block, _causal(decoder.conv_in, x))
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                x = _residual(resnet, x)
            if block.upsamplers is not None:
                x = _upsample(block.upsamplers[0], x)
        x = _causal(decoder.conv_out, F.silu(_norm(decoder.norm_out, x)))
        x = unpatchify(x, self._patch_size)
        return x.transpose(1, 2) / 2 + 0.5

    def encode(self, frames: Tensor) -> Tensor:
        encoder = self.module.encoder
        x = _causal(encoder.conv_in, patchify(frames.transpose(1, 2) * 2 - 1, self._patch_size))
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
        for layer in module.encoder:  # torch's default would shrink the signal tenfold on its way
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        for layer in module.modules():
            if isinstance(layer, MemBlock):
                _zero(layer.conv[-1])

    def linear(self) -> LinearDecoder:
        config = self.module.config
        outputs = self.module.decoder[-1].out_channels
        *widths, last = (width // 2 for width in config["decoder_widths"])
        widths.append(min(last, outputs))
        doubles = config["decoder_time_upscale"]
        return LinearDecoder(config["latent_channels"], widths, outputs, self._join, doubles, self.first_group)

    def _join(self, patches: Tensor) -> Tensor:
        """Patches [N, C, h, w] -> pixels [N, 3, H, W]."""
        return F.pixel_shuffle(patches, self.module.config["patch_size"])

    @torch.no_grad()
    def begin_as(self, linear: LinearDecoder) -> None:
        """A linear feature y becomes the two features relu(y) and relu(-y)."""
        layers = self.module.decoder
        convs = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
        splits = [layer for layer in layers if isinstance(layer, TGrow)]
        width = linear.enter.out_channels
        _both_signs(convs[0], linear.enter.weight, doubled_input=False)
        convs[0].bias[: 2 * width] = torch.cat([linear.enter.bias, -linear.enter.bias])
        for layer, conv, split, grow in zip(splits, convs[1:], linear.splits, linear.grows, strict=False):
            parts = split.weight[..., 0, 0].chunk(2) if isinstance(split, nn.Conv2d) else [torch.eye(width)]
            size = layer.conv.in_channels
            for time, part in enumerate(parts):
                rows = layer.conv.weight[time * size : time * size + 2 * width, :, 0, 0]
                rows[:] = 0
                rows[:width, :width] = part
                rows[width:, width : 2 * width] = part
            _both_signs(conv, grow.weight)
            width = grow.out_channels
        last = convs[-1]
        _zero(last)
        last.weight[:, : 2 * width] = torch.cat([linear.leave.weight, -linear.leave.weight], 1)
        last.bias.copy_(linear.leave.bias)

    def decode(self, latents: Tensor) -> Tensor:
        return self.module.decode_raw(latents)

    def encode(self, frames: Tensor) -> Tensor:
        return self.module.encode_raw(frames)

    def stream(self) -> TaehvStreamDecoder:
        return TaehvStreamDecoder(self.module)

    def encode_clip(self, frames: Tensor) -> Tensor:
        return encode_taehv(self.module, frames)


def _zero(layer: nn.Module) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def _pass_on(conv: WanCausalConv3d, width: int) -> None:
    """Make a convolution of kernel 1 hand on its first `width` channels as they are."""
    conv.weight[:width] = 0
    conv.weight[:width, :width, 0, 0, 0] = torch.eye(width)
    conv.bias[:width] = 0


def _pass_on_residual(block: nn.Module, width: int) -> None:
    for resnet in block.resnets:
        if isinstance(resnet.conv_shortcut, WanCausalConv3d):
            _pass_on(resnet.conv_shortcut, width)


def _both_signs(conv: nn.Conv2d, weight: Tensor, doubled_input: bool = True) -> None:
    """First rows of a convolution: a linear one and its negative, of inputs that are such pairs
    themselves."""
    rows = torch.cat([weight, -weight])
    if doubled_input:
        rows = torch.cat([rows, -rows], 1)
    conv.weight[: len(rows)] = 0
    conv.weight[: len(rows), : rows.shape[1]] = rows


class _RMSNorm(torch.autograd.Function):
    """Root mean square over channels (dimension 1), in the input's dtype: a tenth of the time autograd
    needs."""

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
