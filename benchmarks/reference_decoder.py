"""The two decoders as the authors' demo uses them, on the same weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from pipeline import wan_layers
from pipeline.taehv import TAEHV, MemBlock, TGrow
from pipeline.upsampling import UpsamplingConv

OVERLAP = 3
"""Latents of the block before that the demo decodes once more."""


class ReferenceTaehvDecoder:
    """Decodes each block afresh behind the last latents of the one before, frame by frame, and drops what that makes.

    That is exact for the first two blocks only: later ones lack what the layers would remember of older latents.
    """

    def __init__(self, taehv: TAEHV) -> None:
        self.weights = self._taehv = taehv
        self._layers = [_as_published(layer) for layer in taehv.decoder]
        self.reset()

    def reset(self) -> None:
        self._before: Tensor | None = None

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [1, F, C, h, w] -> frames [1, T, 3, H, W] in [0, 1]."""
        taehv = self._taehv
        behind = latents if self._before is None else torch.cat([self._before, latents], dim=1)
        memory: dict[int, Tensor] = {}
        frames: list[Tensor] = []
        for latent in behind[0].to(taehv.dtype).split(1):
            frames += _walk(self._layers, 0, latent, memory)
        dropped = taehv.temporal_scale - 1
        if self._before is not None:
            dropped = taehv.temporal_scale * self._before.shape[1]
        self._before = latents[:, -OVERLAP:]
        video = F.pixel_shuffle(torch.cat(frames[dropped:]), taehv.config["patch_size"])
        return video.clamp(0, 1).unsqueeze(0)


def _as_published(layer: nn.Module) -> nn.Module:
    """Where frames are doubled in their code: before they are split and convolved."""
    if isinstance(layer, nn.Identity):
        return nn.Upsample(scale_factor=2)
    if isinstance(layer, UpsamplingConv):
        plain = copy.copy(layer)
        plain.__class__ = nn.Conv2d
        return plain
    return layer


def _walk(layers: list[nn.Module], start: int, frame: Tensor, memory: dict[int, Tensor]) -> Iterator[Tensor]:
    """One frame [1, C, h, w] through the layers from `start` on; a layer that makes several sends them on in turn."""
    for index in range(start, len(layers)):
        layer = layers[index]
        if isinstance(layer, MemBlock):
            past = memory.get(index)
            memory[index] = frame
            frame = layer(frame, torch.zeros_like(frame) if past is None else past)
        elif isinstance(layer, TGrow):
            for part in layer(frame).split(1):
                yield from _walk(layers, index + 1, part, memory)
            return
        else:
            frame = layer(frame)
    yield frame


def original_layers(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """The same VAE, sharing its tensors, with the layers as published instead of those of `pipeline/wan_layers.py`."""
    original = twin(vae)
    for module in original.modules():
        if type(module).__module__ == wan_layers.__name__:
            module.__class__ = type(module).__bases__[0]
    return original


def twin(model: nn.Module) -> nn.Module:
    """Another module on the same tensors: what is done to its layers leaves the first one alone."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)
