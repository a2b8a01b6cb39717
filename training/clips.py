"""Clips to learn from: a data set of the procedural world or of one's own videos, and windows drawn from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from pipeline.errors import TrainingDataError
from training.captions import make_caption
from training.data import ClipDataset
from training.draws import Draws
from training.settings import ClipSettings
from training.videos import CAPTIONS_FILE, LATENTS_FILE, VIDEO_MARKER

Array = np.ndarray


@dataclass
class ClipBatch:
    """A part of a batch of clean latents, and what is known about them."""

    latents: torch.Tensor
    """[B, F, C, h, w], float32."""
    captions: list[str]
    """Empty where guidance shall learn to do without."""
    subject: torch.Tensor
    """Share of the subject in each cell, [B, F, h, w], 0..1; zero where it is not known."""
    given: torch.Tensor
    """Boolean [B, F], true for frames that are context by construction and not to be learnt."""


class ClipSource(Protocol):
    """A data set, opened without reading it into memory."""

    latents: Array
    """[N, F, C, h, w]; only the first `count` are for training."""
    count: int

    def caption(self, clip: int, rng: np.random.Generator) -> str: ...

    def subject(self, clip: int, frames: Sequence[int]) -> Array | None:
        """Share of the subject, 0..1, [F, h, w]."""


class WorldClips:
    """The procedural world's data set (`python -m training.data`). A clip has another caption each time."""

    def __init__(self, folder: Path) -> None:
        self._data = ClipDataset(folder)
        self.latents = self._data.latents
        self.count = len(self._data.train_indices)

    def caption(self, clip: int, rng: np.random.Generator) -> str:
        return make_caption(self._data.params[clip], rng)[0]

    def subject(self, clip: int, frames: Sequence[int]) -> Array | None:
        return self._data.masks[clip, list(frames)].astype(np.float32) / 255


class VideoClips:
    """One's own videos, encoded by `python -m training.videos`."""

    def __init__(self, folder: Path) -> None:
        self.latents = np.load(folder / LATENTS_FILE, mmap_mode="r")
        self._captions: list[str] = json.loads((folder / CAPTIONS_FILE).read_text(encoding="utf-8"))
        self.count = len(self._captions)

    def caption(self, clip: int, rng: np.random.Generator) -> str:
        return self._captions[clip]

    def subject(self, clip: int, frames: Sequence[int]) -> Array | None:
        return None


def open_clips(settings: ClipSettings) -> ClipSource:
    """The data set in a folder.

    Raises:
        TrainingDataError: there is none, or its clips are too short.
    """
    folder = Path(settings.folder)
    try:
        source = VideoClips(folder) if (folder / VIDEO_MARKER).is_file() else WorldClips(folder)
    except FileNotFoundError as error:
        raise TrainingDataError(
            f"{folder} holds no finished data set: make one with python -m training.data or python -m training.videos."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingDataError(f"The data set in {folder} is damaged: make it again.") from error
    length = source.latents.shape[1]
    if length < settings.frames:
        raise TrainingDataError(
            f"Clips in {folder} have {length} latent frames, but clips.frames is {settings.frames}."
        )
    return source


class ClipSampler:
    """Draws windows: whole ones from a clip's beginning, shorter ones, and late windows.

    A late window is what the model sees in a long rollout: the clip's first block, and others from later in it. From
    real clips alone a model learns that what rests goes on resting, and what is gone stays away, whatever the prompt
    says: in a rollout, which comes to a standstill now and then, that ends all movement. So in some late windows
    nothing moves before the last block, or the subject is missing there; the last block goes on as it should.
    """

    def __init__(self, source: ClipSource, settings: ClipSettings, block_frames: int) -> None:
        self.source = source
        self.settings = settings
        self.block_frames = block_frames

    def draw(self, draws: Draws, frames: int, purpose: str = "clips") -> ClipBatch:
        """Windows of so many latent frames."""
        drawn = [self._one(rng, frames) for rng in draws.own(purpose)]
        latents, captions, subjects, given = zip(*drawn, strict=True)
        return ClipBatch(
            torch.from_numpy(np.stack(latents)).float(),
            list(captions),
            torch.from_numpy(np.stack(subjects)),
            torch.from_numpy(np.stack(given)),
        )

    def _one(self, rng: np.random.Generator, frames: int) -> tuple[Array, str, Array, Array]:
        source, settings, block = self.source, self.settings, self.block_frames
        clip = int(rng.integers(source.count))
        total = source.latents.shape[1]
        later, start, dropped = rng.random(), rng.random(), rng.random() < settings.caption_drop
        caption = source.caption(clip, rng)
        index = list(range(frames))
        given = np.zeros(frames, bool)
        empty = False
        if frames == 1:
            # A single frame teaches pictures; a clip's first one, which is encoded by itself, must be among them.
            index = [0 if later < 0.5 or total == 1 else 1 + int(start * (total - 1))]
        elif frames == settings.frames > block and later < settings.later_windows:
            first = block + int(start * (total - frames + 1))
            between = slice(block, frames - block)
            given[:block] = True
            altered = rng.random() if settings.still_windows or settings.empty_windows else 1.0
            if frames > 2 * block and altered < settings.still_windows + settings.empty_windows:
                entries = self._entries(clip, frames - block, total - block)
                empty = altered >= settings.still_windows and bool(entries)
                if empty:
                    first = entries[int(start * len(entries))] - (frames - 2 * block)
                given[between] = empty or altered < settings.still_windows
            index = [*range(block), *range(first, first + frames - block)]
            if given[block] and not empty:
                index[between] = [index[-block - 1]] * (frames - 2 * block)
        latents = source.latents[clip, index]
        subject = source.subject(clip, index)
        if subject is None:
            subject = np.zeros((frames, *latents.shape[2:]), np.float32)
        if empty:
            latents[between] = self._without_subject(clip)
            subject[between] = 0
        return latents, "" if dropped else caption, subject, given

    def _entries(self, clip: int, first: int, last: int) -> list[int]:
        """Frames in `first`..`last` of a clip at which least of its subject is to be seen: it is about to come in."""
        shares = self.source.subject(clip, range(self.source.latents.shape[1]))
        if shares is None:
            return []
        seen = shares.sum((1, 2))
        after = np.append(seen[1:], seen[-1])
        low = (seen < _ENTERING * seen.max()) & (seen < after)
        return [at for at in range(first, last + 1) if low[at] and seen[at] <= seen[at - 1]]

    def _without_subject(self, clip: int) -> Array:
        """A frame of the clip put together from cells of its frames in which the subject is elsewhere, [C, h, w]."""
        frames = range(1, self.source.latents.shape[1])  # the first latent of a clip stands for one frame only
        shares = self.source.subject(clip, frames)
        assert shares is not None
        whole, clear = self.source.latents[clip, 1:], shares.argmin(0)
        return np.take_along_axis(whole, clear[None, None], axis=0)[0]


_ENTERING = 0.2
"""Of the most that is ever seen of a subject: with less it is hardly there."""
