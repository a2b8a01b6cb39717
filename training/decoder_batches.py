"""Samples for training decoders and encoders: latents with the frames they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.data import ClipDataset
from training.pca import SPATIAL_STRIDE, TEMPORAL_STRIDE

Part = Literal["linear", "decoder", "encoder"]
_SUBJECT_SHARE = 5
"""A latent cell counts as the subject's from this share of it on, in 255ths."""


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one shape of batch.

    Attributes:
        part: what is trained. A part's phases follow one another.
        share: of the whole budget.
        samples, latents: clips in a batch and latent frames of each.
        crop: height and width of a sample in latent cells; None for all of it.
    """

    part: Part
    share: float
    samples: int
    latents: int
    crop: tuple[int, int] | None = None


@dataclass(frozen=True)
class Batch:
    """Latents [B, F, C, h, w] and the frames of their groups [B, T, 3, H, W] in 0..1, with the weight of
    each.

    Weights of pixels are [B, T, 1, H, W], those of latents [B, F, 1, 1, 1].
    """

    latents: Tensor
    frames: Tensor
    pixel_weights: Tensor
    latent_weights: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


class Batches:
    """Draws samples from the clips whose pixels are stored.

    Args:
        held_out: clips at the end that are never drawn.
        first_group: frames that the first latent of a sample stands for, 1 or the temporal stride.
        subject_weight: extra weight of the subject's pixels.
        first_share: share of the samples that begin with their clip.
    """

    def __init__(
        self,
        data: ClipDataset,
        *,
        held_out: int,
        first_group: int,
        subject_weight: float,
        first_share: float,
        seed: int,
    ) -> None:
        self._data = data
        self._clips = len(data.pixels) - held_out
        if self._clips < 1:
            raise ValueError(
                f"the data set stores the pixels of {len(data.pixels)} clips and {held_out} of them are held "
                "out: nothing is left to train on"
            )
        self._first_group, self._subject_weight, self._first_share = first_group, subject_weight, first_share
        self.random = np.random.default_rng(seed)

    def draw(self, phase: Phase) -> Batch:
        clips = self.random.integers(self._clips, size=phase.samples)
        columns = zip(*(self._sample(int(clip), phase) for clip in clips), strict=True)
        latents, frames, mask, whole = (torch.from_numpy(np.stack(column)) for column in columns)
        weights = (1 + self._subject_weight * mask) * whole[..., None, None]
        weights = F.interpolate(weights, scale_factor=float(SPATIAL_STRIDE)).repeat_interleave(TEMPORAL_STRIDE, 1)
        weights = weights[:, -frames.shape[1] :, None]
        weights[:, 0] *= TEMPORAL_STRIDE // self._first_group  # a single first frame counts as much as a group
        return Batch(
            latents.float(),
            frames.permute(0, 1, 4, 2, 3).float() / 255,
            weights,
            whole[..., None, None, None],
        )

    def _sample(self, clip: int, phase: Phase) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Latents [F, C, h, w], frames uint8 [T, H, W, 3], subject mask [F, h, w], and which latents count
        [F]."""
        count, _, height, width = self._data.info.latent_shape
        rows, columns = phase.crop or (height, width)
        starts = self.random.random() < self._first_share
        start = 0 if starts else int(self.random.integers(1, count - phase.latents + 1))
        top = int(self.random.integers(height - rows + 1))
        left = int(self.random.integers(width - columns + 1))
        cells = np.s_[start : start + phase.latents, ..., top : top + rows, left : left + columns]

        # Latent 0 holds frame 0 alone, repeated to fill its group; latent k > 0 the frames up to stride * k.
        last = TEMPORAL_STRIDE * (start + phase.latents - 1)
        times = np.arange(TEMPORAL_STRIDE * start - self._first_group + 1, last + 1).clip(0)
        s = SPATIAL_STRIDE
        area = np.s_[times[0] : last + 1, top * s : (top + rows) * s, left * s : (left + columns) * s]
        whole = np.ones(phase.latents, np.float32)
        # A latent from the middle of a clip does not stand for a single frame: it is context only.
        whole[0] = start == 0 or self._first_group == TEMPORAL_STRIDE
        return (
            self._data.latents[clip][cells],
            self._data.pixels[clip][area][times - times[0]],
            (self._data.masks[clip][cells] > _SUBJECT_SHARE).astype(np.float32),
            whole,
        )
