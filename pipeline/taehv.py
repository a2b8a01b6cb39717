"""TAEHV, the tiny autoencoder for video latents: a few 2-D convolutions and a memory of one frame per block.

The architecture and the state-dict keys are those of the published ``taew2_1`` weights (madebyollin/taehv),
written here for streaming: the state of a stream is a list that the caller owns, so one module serves any
number of streams. Sizes come from the config; the defaults are the published ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from pipeline.errors import InvalidRequest, WeightsError
from pipeline.upsampling import UpsamplingConv

__all__ = ["TAEHV", "Memory"]

Memory = list[Tensor | None]
"""For each `MemBlock` in order, its input for the last frame seen [B, C, h, w]; None before the first."""

_RGB = 3
"""Channels of a video frame."""


def _conv(inputs: int, outputs: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)


class SoftClamp(nn.Module):
    """Bounds latents smoothly to (-limit, limit), the range the decoder was trained on."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / self.limit) * self.limit


class MemBlock(nn.Module):
    """Residual block that sees the frame before through its own input of that frame."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * width, width),
            nn.ReLU(inplace=True),
            _conv(width, width),
            nn.ReLU(inplace=True),
            _conv(width, width),
        )

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        return F.relu(self.conv(torch.cat([x, past], 1)) + x, inplace=True)


class TPool(nn.Module):
    """Merges `stride` consecutive frames into one. [N*stride, C, h, w] -> [N, C, h, w]"""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width * stride, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.reshape(-1, self.stride * x.shape[1], *x.shape[2:]))


class TGrow(nn.Module):
    """Splits a frame into `stride` consecutive ones, earlier first. [N, C, h, w] -> [N*stride, C, h, w]"""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width, width * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(-1, *x.shape[1:])


class TAEHV(ModelMixin, ConfigMixin):
    """Tiny video autoencoder with the published layer order and key names (`encoder.i...`, `decoder.i...`).

    Args:
        latent_channels: channels of a latent frame.
        decoder_widths: width of each decoder stage, and last the width before the output convolution.
        encoder_width: width of the whole encoder.
        decoder_time_upscale: for each stage, in order, whether it doubles the number of frames.
        encoder_time_downscale: for each stage, in order, whether it halves the number of frames.
        blocks_per_stage: `MemBlock`s in each stage of either half.
        latent_limit: bound of the decoder's input; latents are squeezed smoothly into it.
        patch_size: height and width of the pixel patches that the layers see as one, as in ``taew2_2``.

    Every stage scales height and width by two, and the patches by `patch_size` more. Source: madebyollin/taehv.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        decoder_widths: Sequence[int] = (256, 128, 64, 64),
        encoder_width: int = 64,
        decoder_time_upscale: Sequence[bool] = (False, True, True),
        encoder_time_downscale: Sequence[bool] = (True, True, False),
        blocks_per_stage: int = 3,
        latent_limit: float = 3.0,
        patch_size: int = 1,
    ) -> None:
        super().__init__()
        if len(decoder_widths) != len(decoder_time_upscale) + 1:
            raise WeightsError(
                f"A TAEHV decoder needs one width more than it has stages; the config gives widths "
                f"{tuple(decoder_widths)} for {len(decoder_time_upscale)} stages."
            )
        if sum(decoder_time_upscale) != sum(encoder_time_downscale) or len(decoder_time_upscale) != len(
            encoder_time_downscale
        ):
            raise WeightsError(
                "The two halves of a TAEHV must scale time and space alike; the config gives "
                f"decoder_time_upscale {tuple(decoder_time_upscale)} and "
                f"encoder_time_downscale {tuple(encoder_time_downscale)}."
            )
        self.spatial_scale = patch_size * 2 ** len(decoder_time_upscale)
        """Pixels per latent cell, along height and along width."""
        self.temporal_scale = 2 ** sum(decoder_time_upscale)
        """Raw video frames per latent frame."""

        colours = _RGB * patch_size**2
        encoder: list[nn.Module] = [_conv(colours, encoder_width), nn.ReLU(inplace=True)]
        for halve in encoder_time_downscale:
            encoder += [
                TPool(encoder_width, 2 if halve else 1),
                _conv(encoder_width, encoder_width, stride=2, bias=False),
            ]
            encoder += [MemBlock(encoder_width) for _ in range(blocks_per_stage)]
        self.encoder = nn.Sequential(*encoder, _conv(encoder_width, latent_channels))

        first, *after = decoder_widths
        decoder: list[nn.Module] = [SoftClamp(latent_limit), _conv(latent_channels, first), nn.ReLU(inplace=True)]
        width = first
        for double, next_width in zip(decoder_time_upscale, after, strict=True):
            decoder += [MemBlock(width) for _ in range(blocks_per_stage)]
            decoder += [
                # Published weights have their upsampling here. `TGrow` works on single pixels, so it can come before.
                nn.Identity(),
                TGrow(width, 2 if double else 1),
                UpsamplingConv(width, next_width, bias=False),
            ]
            width = next_width
        self.decoder = nn.Sequential(*decoder, nn.ReLU(inplace=True), _conv(width, colours))

    @classmethod
    def from_published(
        cls, weights: Mapping[str, Tensor], decoder_time_upscale: Sequence[bool] = (False, True, True)
    ) -> TAEHV:
        """Build the module from a state dict in the published naming; its sizes are read from the tensors.

        A published `TGrow` may hold rows for more frames than its stage makes here; the last rows are the
        ones to keep, since a stage that does not double time stands for the latest frame of those it could
        make. Raises `WeightsError` for missing, unknown or misshapen tensors.
        """
        try:
            config = _published_config(weights, len(decoder_time_upscale))
        except (KeyError, IndexError, ValueError) as error:
            raise WeightsError(
                f"These are not TAEHV weights: {len(weights)} tensors whose names or shapes do not form an "
                "encoder and a decoder of the published layout. Use a file such as taew2_1."
            ) from error
        model = cls(decoder_time_upscale=tuple(decoder_time_upscale), **config)
        model.load_state_dict(model.fit_published(weights))
        return model

    def fit_published(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The published state dict cut to this module, or `WeightsError` naming what does not fit."""
        own = self.state_dict()
        missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
        if missing or unknown:
            raise WeightsError(
                f"TAEHV weights do not fit this config: {len(missing)} tensors missing {missing[:3]}, "
                f"{len(unknown)} unknown {unknown[:3]}."
            )
        grows = {f"{name}.conv.weight" for name, module in self.named_modules() if isinstance(module, TGrow)}
        fitted: dict[str, Tensor] = {}
        for key, expected in own.items():
            tensor = weights[key][-expected.shape[0] :] if key in grows else weights[key]
            if tensor.shape != expected.shape:
                raise WeightsError(
                    f"TAEHV tensor {key} has shape {tuple(weights[key].shape)}; "
                    f"this config needs {tuple(expected.shape)}."
                )
            fitted[key] = tensor
        return fitted

    def new_memory(self, half: nn.Sequential) -> Memory:
        """Empty state of a stream through `self.encoder` or `self.decoder`."""
        return [None] * sum(isinstance(layer, MemBlock) for layer in half)

    def decode_raw(self, latents: Tensor, memory: Memory | None = None) -> Tensor:
        """Latents [B, F, C, h, w] -> frames [B, F * temporal_scale, 3, H, W], neither trimmed nor clamped.

        `memory` (see `new_memory`) carries the stream from one call to the next and is updated in place; None
        means a clip of its own. A clip's first `temporal_scale - 1` raw frames lie before its first video
        frame.
        """
        self._check(latents, self.config["latent_channels"], "latents [B, F, C, h, w]")
        patches = self.run(self.decoder, latents, memory)
        return F.pixel_shuffle(patches, self.config["patch_size"])

    def encode_raw(self, frames: Tensor, memory: Memory | None = None) -> Tensor:
        """Frames [B, T, 3, H, W] in [0, 1] -> latents [B, ceil(T / temporal_scale), C, h, w].

        Frames are grouped from the start, and the last one is repeated to fill its group, as upstream does.
        """
        self._check(frames, _RGB, "frames [B, T, 3, H, W]")
        if frames.shape[-2] % self.spatial_scale or frames.shape[-1] % self.spatial_scale:
            raise InvalidRequest(
                f"Frames of {frames.shape[-2]}x{frames.shape[-1]} pixels cannot be encoded: height and width "
                f"must be multiples of {self.spatial_scale}."
            )
        lacking = -frames.shape[1] % self.temporal_scale
        if lacking:
            frames = torch.cat([frames, frames[:, -1:].expand(-1, lacking, -1, -1, -1)], 1)
        return self.run(self.encoder, F.pixel_unshuffle(frames, self.config["patch_size"]), memory)

    def _check(self, x: Tensor, channels: int, meaning: str) -> None:
        if x.ndim != 5 or x.shape[2] != channels or x.shape[1] < 1:
            raise InvalidRequest(
                f"TAEHV needs {meaning} with {channels} channels and at least one frame; got shape {tuple(x.shape)}."
            )

    def run(self, layers: nn.Sequential, x: Tensor, memory: Memory | None = None) -> Tensor:
        """Push frames through the layers side by side; a MemBlock sees its previous input at its own rate."""
        batch = x.shape[0]
        x = x.to(device=self.device, dtype=self.dtype).flatten(0, 1)
        block = 0
        for layer in layers:
            if isinstance(layer, MemBlock):
                past = None if memory is None else memory[block]
                x, past = _with_memory(layer, x, past, batch)
                if memory is not None:
                    memory[block] = past
                block += 1
            else:
                x = layer(x)
        return x.unflatten(0, (batch, -1))


def _with_memory(layer: MemBlock, x: Tensor, past: Tensor | None, batch: int) -> tuple[Tensor, Tensor]:
    """Output of the block for frames x [B*T, C, h, w], and its new memory [B, C, h, w]."""
    frames = x.unflatten(0, (batch, -1))
    if past is None:
        past = torch.zeros_like(frames[:, 0])
    shifted = torch.cat([past.unsqueeze(1), frames[:, :-1]], 1).flatten(0, 1)
    latest = frames[:, -1].clone()
    return layer(x, shifted), latest


def _published_config(weights: Mapping[str, Tensor], stages: int) -> dict[str, object]:
    """Config values that the shapes in a published state dict imply."""
    plain: dict[str, list[int]] = {"encoder": [], "decoder": []}
    blocks = 0
    for key in weights:
        if match := re.fullmatch(r"(encoder|decoder)\.(\d+)\.weight", key):
            plain[match[1]].append(int(match[2]))
        blocks += bool(re.fullmatch(r"decoder\.\d+\.conv\.0\.weight", key))
    encoder, decoder = (
        [weights[f"{half}.{index}.weight"] for index in sorted(plain[half])] for half in ("encoder", "decoder")
    )
    pools = sorted(
        (int(match[1]), tensor.shape[1] // tensor.shape[0] > 1)
        for key, tensor in weights.items()
        if (match := re.fullmatch(r"encoder\.(\d+)\.conv\.weight", key))
    )
    if blocks % stages or len(pools) != stages:
        raise ValueError(f"{blocks} blocks and {len(pools)} encoder stages for {stages} stages")
    colours = encoder[0].shape[1]
    patch_size = math.isqrt(colours // _RGB)
    if colours != _RGB * patch_size**2 or decoder[-1].shape[0] != colours:
        raise ValueError(f"{colours} channels enter and {decoder[-1].shape[0]} leave: not those of square patches")
    return {
        "latent_channels": decoder[0].shape[1],
        "decoder_widths": tuple(conv.shape[0] for conv in decoder[:-1]),
        "encoder_width": encoder[0].shape[0],
        "encoder_time_downscale": tuple(halves for _, halves in pools),
        "blocks_per_stage": blocks // stages,
        "patch_size": patch_size,
    }
