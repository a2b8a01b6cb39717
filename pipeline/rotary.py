"""Three-dimensional rotary positions (frame, row, column), computed for the frames at hand instead of looked up.

Wan splits a head's channel pairs into a temporal, a vertical and a horizontal part, each with its own frequency
ladder, and rotates two adjacent channels as one complex number. Published code slices a table of 1024 frames and
fails, or silently repeats the last row, when a long video runs past its end. Here the angles of a block are
computed from the frame number in double precision: there is no last frame, and frame 1,000,000 is as exact as frame
0.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosine and sine, float32, broadcastable to [B, tokens, heads, head_dim / 2]."""


class RotaryPositions:
    """Angles for tokens on a grid of `rows` x `columns` per frame.

    Args:
        head_dim: channels of one attention head.
        rows, columns: tokens of one latent frame after patching.
        theta: base of the frequency ladders.
    """

    def __init__(self, head_dim: int, rows: int, columns: int, theta: float = 10000.0) -> None:
        spatial = 2 * (head_dim // 6)
        self._temporal_freqs = _frequencies(head_dim - 2 * spatial, theta)
        freqs = _frequencies(spatial, theta)
        row_angles = torch.outer(torch.arange(rows, dtype=torch.float64), freqs)
        column_angles = torch.outer(torch.arange(columns, dtype=torch.float64), freqs)
        angles = [row_angles[:, None].expand(rows, columns, -1), column_angles[None].expand(rows, columns, -1)]
        # The same in every frame, and two thirds of all.
        self._spatial = _cos_and_sin(torch.cat(angles, dim=-1).flatten(0, 1))  # [tokens, pairs] each

    def __call__(self, frames: Sequence[int], device: torch.device | str = "cpu") -> Rotation:
        """Rotation of all tokens of the given frame positions, in order: two [1, F * tokens, 1, head_dim / 2]."""
        temporal = _cos_and_sin(torch.outer(torch.tensor(frames, dtype=torch.float64), self._temporal_freqs))
        return tuple(
            to_device(_joined(of_frames, of_tokens), device)
            for of_frames, of_tokens in zip(temporal, self._spatial, strict=True)
        )

    def temporal_shift(self, frames: int, device: torch.device | str = "cpu") -> Rotation:
        """Rotation that moves already rotated keys by `frames` in time and leaves rows and columns alone."""
        pairs = len(self._temporal_freqs) + self._spatial[0].shape[-1]
        angles = torch.zeros(pairs, dtype=torch.float64)
        angles[: len(self._temporal_freqs)] = frames * self._temporal_freqs
        cos, sin = _cos_and_sin(angles[None, None, None])
        return to_device(cos, device), to_device(sin, device)


@lru_cache(maxsize=32)
def rotary_positions(head_dim: int, rows: int, columns: int) -> RotaryPositions:
    """Shared instance for a grid: the spatial half is the same in every call."""
    return RotaryPositions(head_dim, rows, columns)


def apply_rotary(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Rotate the adjacent channel pairs of x [B, tokens, heads, head_dim], in float32 or wider; in x's dtype."""
    cos, sin = rotation
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    if torch.compiler.is_dynamo_compiling():  # the compiler makes one kernel of this, and knows no complex numbers
        real, imaginary = pairs.unbind(-1)
        rotated = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
    else:  # one product that reads and writes the pairs once: a fifth of the time
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return rotated.flatten(-2).to(x.dtype)


def _frequencies(channels: int, theta: float) -> torch.Tensor:
    return theta ** -(torch.arange(0, channels, 2, dtype=torch.float64) / channels)


def _cos_and_sin(angles: torch.Tensor) -> Rotation:
    """Cosine and sine of angles in float64, rounded to float32."""
    return angles.cos().float(), angles.sin().float()


def _joined(of_frames: torch.Tensor, of_tokens: torch.Tensor) -> torch.Tensor:
    """[F, temporal pairs] and [tokens, spatial pairs] -> [1, F * tokens, 1, head_dim / 2]"""
    frames, tokens = len(of_frames), len(of_tokens)
    both = [of_frames[:, None].expand(-1, tokens, -1), of_tokens[None].expand(frames, -1, -1)]
    return torch.cat(both, dim=-1).flatten(0, 1)[None, :, None]


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Send a small CPU tensor to a device. To a GPU it goes from pinned memory, without waiting for the queue there."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
