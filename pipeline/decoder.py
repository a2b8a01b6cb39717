"""Latents to frames, block after block, and frames back to latents.

A `StreamDecoder` holds the state of one stream; the weights it uses hold none, so several streams can share
them. Blocks of any sizes give the same frames as the whole clip at once: one frame for the first latent of a
stream, then as many as the temporal stride for each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify, unpatchify
from torch import Tensor, nn

from pipeline.errors import InvalidRequest, NonFiniteOutput
from pipeline.taehv import TAEHV, Memory

__all__ = ["StreamDecoder", "TaehvStreamDecoder", "WanStreamDecoder", "encode_taehv", "encode_wan"]


Step = Callable[..., tuple[Tensor, tuple[Any, ...]]]
"""One call of a decoder's layers without any state: (module, latents, what the last call left) -> (frames, the same for
the next call)."""


class StreamDecoder(Protocol):
    """Decodes one stream of latents. After an error or a cancelled call, `reset` before the next clip.

    Invalid numbers stay visible: an infinite pixel comes out as NaN.
    """

    weights: nn.Module
    step: Step | None
    """Takes the place of the layers: `plain_step` compiled. May be set and taken away between clips."""
    plain_step: Step

    def reset(self) -> None:
        """Forget the stream; the next block starts a clip."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, F, C, h, w] -> the next frames [B, T, 3, H, W] in [0, 1]."""


class WanStreamDecoder:
    """The Wan VAE's decoder with a cache of its own.

    `AutoencoderKLWan.decode` clears one cache that all its callers share, so it can neither continue a clip
    nor serve two. Here the layers are called directly, one latent frame at a time as in the reference. A VAE
    that works on pixel patches, as Wan 2.2's does, decodes to patches, which are cut apart last.
    """

    @staticmethod
    def plain_step(
        decoder: nn.Module, latent: Tensor, cache: tuple[Tensor | str | None, ...], first: bool
    ) -> tuple[Tensor, tuple[Tensor | str | None, ...]]:
        """One latent frame [B, C, 1, h, w] -> pixels [B, 3, T, H, W] in patches, and the layers' new caches."""
        slots = list(cache)
        return decoder(latent, feat_cache=slots, feat_idx=[0], first_chunk=first), tuple(slots)

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self.weights = self._vae = vae
        # One slot per causal convolution; those of kernel 1 leave theirs unused.
        self._slots = _count_causal(vae.decoder)
        self.step: Step | None = None
        self.reset()

    def reset(self) -> None:
        self._cache: list[Tensor | str | None] = [None] * self._slots
        self._shape: tuple[int, ...] | None = None

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        starts = self._shape is None
        self._shape = _check_latents(latents, self._vae.config.z_dim, self._shape)
        if starts:
            self._mean, self._inverse_std = _statistics(self._vae, latents)
        latents = latents / self._inverse_std + self._mean
        latents = latents.to(device=self._vae.device, dtype=self._vae.dtype)
        hidden = self._vae.post_quant_conv(latents.transpose(1, 2))
        parts: list[Tensor] = []
        for latent in hidden.split(1, dim=2):
            first = starts and not parts
            if self.step is None:  # in place: what a layer kept goes before the next one keeps something
                part = self._vae.decoder(latent, feat_cache=self._cache, feat_idx=[0], first_chunk=first)
            else:
                part, self._cache[:] = self.step(self._vae.decoder, latent, tuple(self._cache), first)
            parts.append(part)
        frames = unpatchify(torch.cat(parts, 2), _patch_size(self._vae)).transpose(1, 2)
        return _clamped(frames, -1, 1).add(1).div(2)


class TaehvStreamDecoder:
    """TAEHV with the memory of its blocks carried from call to call: exact, and nothing is decoded twice."""

    @staticmethod
    def plain_step(
        taehv: TAEHV, latents: Tensor, memory: tuple[Tensor | None, ...]
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Latents [B, F, C, h, w] -> raw frames, see `TAEHV.decode_raw`, and the blocks' new memory."""
        kept = list(memory)
        return taehv.decode_raw(latents, kept), tuple(kept)

    def __init__(self, taehv: TAEHV) -> None:
        self.weights = self._taehv = taehv
        self.step: Step | None = None
        self.reset()

    def reset(self) -> None:
        self._memory: Memory = self._taehv.new_memory(self._taehv.decoder)
        self._shape: tuple[int, ...] | None = None

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        starts = self._shape is None
        self._shape = _check_latents(latents, self._taehv.config["latent_channels"], self._shape)
        if self.step is None:
            frames = self._taehv.decode_raw(latents, self._memory)
        else:
            frames, self._memory[:] = self.step(self._taehv, latents, tuple(self._memory))
        if starts:  # the first latent stands for one frame; what the layers make before it is warm-up
            frames = frames[:, self._taehv.temporal_scale - 1 :]
        return _clamped(frames, 0, 1)


def to_uint8(frames: torch.Tensor, block: int) -> np.ndarray:
    """Decoded frames [1, T, 3, H, W] in [0, 1] -> uint8 [T, H, W, 3] in main memory.

    Raises:
        NonFiniteOutput: there are NaNs among them, which would become black; names the block.
    """
    finite = torch.isfinite(frames).all()
    pixels = frames[0].permute(0, 2, 3, 1).float().mul(255).round_().clamp_(0, 255).to(torch.uint8).contiguous()
    # From a GPU into pinned memory, ten times as fast as into any other; torch keeps it for the next block.
    copy = torch.empty_like(pixels, device="cpu", pin_memory=pixels.is_cuda)
    copy.copy_(pixels, non_blocking=True)
    if not finite:  # waits for all that the device was told, the copy included
        raise NonFiniteOutput(f"The decoder produced invalid numbers in block {block + 1}. Try another seed.")
    return copy.numpy()


@torch.no_grad()
def encode_wan(vae: AutoencoderKLWan, frames: Tensor, tiled: bool = False) -> Tensor:
    """Frames [B, 1 + 4k, 3, H, W] in [0, 1] -> normalised latents [B, 1 + k, C, h, w], the posterior's mean.

    Touches no state of `vae` that a stream uses, so it may run while one decodes.

    Args:
        tiled: by overlapping tiles, whose sizes are the VAE's `tile_sample_...`: that takes less memory, but each tile
            knows nothing of the others, so the latents are other ones.

    Raises:
        InvalidRequest: the frames have another shape.
    """
    _check_frames(frames, vae.config.scale_factor_temporal, vae.config.scale_factor_spatial)
    hidden = _encoded_in_tiles(vae, frames) if tiled else _encoded(vae, frames)
    latents = hidden[:, : vae.config.z_dim].transpose(1, 2)
    mean, inverse_std = _statistics(vae, latents)
    return (latents - mean) * inverse_std


def _encoded(vae: AutoencoderKLWan, frames: Tensor) -> Tensor:
    """Frames -> mean and logarithm of the posterior's variance, [B, 2C, 1 + k, h, w]."""
    stride = vae.config.scale_factor_temporal
    cache: list[Tensor | None] = [None] * _count_causal(vae.encoder)
    parts: list[Tensor] = []
    # Group by group also to the device and in its dtype: a clip of large frames is as large as all that encodes it.
    for group in (frames[:, :1], *(frames[:, 1:].split(stride, dim=1) if frames.shape[1] > 1 else ())):
        pixels = group.to(device=vae.device, dtype=vae.dtype).mul(2).sub(1).transpose(1, 2)
        parts.append(vae.encoder(patchify(pixels, _patch_size(vae)), feat_cache=cache, feat_idx=[0]))
    return vae.quant_conv(torch.cat(parts, 2))


def _encoded_in_tiles(vae: AutoencoderKLWan, frames: Tensor) -> Tensor:
    """As `_encoded`; all frames go to the device at once, as they are to be there: diffusers cuts them up."""
    pixels = frames.mul(2).sub(1).to(vae.dtype).to(vae.device).transpose(1, 2)
    try:
        return vae.tiled_encode(patchify(pixels, _patch_size(vae)))
    finally:  # of a call that failed something is left
        vae.clear_cache()


@torch.no_grad()
def encode_taehv(taehv: TAEHV, frames: Tensor) -> Tensor:
    """Frames [B, 1 + 4k, 3, H, W] in [0, 1] -> latents [B, 1 + k, C, h, w], aligned in time with Wan's.

    TAEHV groups frames from the start (0-3, 4-7, ...), Wan has the first alone (0, 1-4, 5-8, ...): so the
    first frame is repeated to fill a group of its own. Raises `InvalidRequest` for other shapes.
    """
    _check_frames(frames, taehv.temporal_scale, taehv.spatial_scale)
    lead = frames[:, :1].expand(-1, taehv.temporal_scale - 1, -1, -1, -1)
    return taehv.encode_raw(torch.cat([lead, frames], 1))


def _clamped(frames: Tensor, low: float, high: float) -> Tensor:
    """`clamp` would make an infinity, a sign of failure, look like plain black or white; so it becomes NaN."""
    return frames.masked_fill(frames.isinf(), torch.nan).clamp(low, high)


def _count_causal(half: nn.Module) -> int:
    return sum(isinstance(module, WanCausalConv3d) for module in half.modules())


def _patch_size(vae: AutoencoderKLWan) -> int:
    """Height and width in pixels of what the VAE's layers take as one; 1 where the config gives none."""
    return vae.config.patch_size or 1


def _statistics(vae: AutoencoderKLWan, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1/std of the VAE's own latents, rounded in the dtype of `latents` as upstream."""
    mean = torch.tensor(vae.config.latents_mean, dtype=torch.float32).to(latents).view(1, 1, -1, 1, 1)
    std = torch.tensor(vae.config.latents_std, dtype=torch.float32).to(latents).view(1, 1, -1, 1, 1)
    return mean, 1.0 / std


def _check_latents(latents: Tensor, channels: int, stream: tuple[int, ...] | None) -> tuple[int, ...]:
    """The stream's (B, C, h, w); `InvalidRequest` if the block does not suit the weights or the stream."""
    if latents.ndim != 5 or latents.shape[1] < 1 or latents.shape[2] != channels:
        raise InvalidRequest(
            f"This decoder needs latents [B, F, {channels}, h, w] with at least one frame; "
            f"got shape {tuple(latents.shape)}."
        )
    batch, _, *rest = latents.shape
    shape = (batch, *rest)
    if stream is not None and shape != stream:
        raise InvalidRequest(
            f"The stream began with latents of (B, C, h, w) = {stream} and this block has {shape}; "
            "reset the decoder before another clip."
        )
    return shape


def _check_frames(frames: Tensor, temporal: int, spatial: int) -> None:
    if frames.ndim != 5 or frames.shape[2] != 3:
        raise InvalidRequest(f"The encoder needs frames [B, T, 3, H, W]; got shape {tuple(frames.shape)}.")
    count, height, width = frames.shape[1], *frames.shape[3:]
    if count < 1 or (count - 1) % temporal:
        below = max(0, count - 1) // temporal * temporal + 1
        raise InvalidRequest(
            f"{count} frames cannot be encoded: the number must be 1 + {temporal}k, "
            f"such as {below} or {below + temporal}."
        )
    if height % spatial or width % spatial:
        raise InvalidRequest(
            f"Frames of {height}x{width} pixels cannot be encoded: both must be multiples of {spatial}."
        )
