"""Random numbers as a function of (seed, step, what for, which sample) and of nothing else.

Nothing is drawn from a running stream. So a run that was killed and continued sees the numbers it would have seen,
and a global batch gets the same numbers however it is cut into processes and parts. `run.noise = "device"` asks for
noise and levels of the part as a whole, which are not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from pipeline.rotary import to_device


@dataclass(frozen=True)
class Draws:
    """The numbers of one training step for one part of the global batch.

    Args:
        seed: the run's.
        step: the training step.
        samples: numbers, within the step's global batch, of the part's clips.
        total: clips in the global batch.
        noise: `device`: a part's numbers are drawn at once, noise where it is used, which a GPU does in no time; they
            then depend on the device and on how the batch is cut.
    """

    seed: int
    step: int
    samples: Sequence[int]
    total: int
    noise: Literal["portable", "device"] = "portable"

    def shared(self, purpose: str) -> np.random.Generator:
        """The same stream on every process and for every part of the batch."""
        return np.random.default_rng(self._key(purpose))

    def own(self, purpose: str) -> list[np.random.Generator]:
        """A stream for each clip of this part."""
        return [np.random.default_rng(self._key(purpose, sample)) for sample in self.samples]

    def normal(self, purpose: str, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """Gaussian noise [clips of this part, *shape], drawn in float32; on the CPU unless `noise` says otherwise."""
        if self.noise == "device":
            generator = torch.Generator(device).manual_seed(self._key(purpose, self.samples[0]))
            return torch.randn((len(self.samples), *shape), generator=generator, device=device).to(dtype)
        clips = []
        for sample in self.samples:
            generator = torch.Generator().manual_seed(self._key(purpose, sample))
            clips.append(torch.randn(tuple(shape), generator=generator))
        return to_device(torch.stack(clips), device).to(dtype)

    def spread(self, purpose: str, columns: int) -> torch.Tensor:
        """Uniform numbers in 0..1, float32 [clips of this part, columns], evenly spread over the global batch."""
        rng = self.shared(purpose)
        order = np.stack([rng.permutation(self.total) for _ in range(columns)], axis=1)
        even = (order + rng.random((self.total, columns))) / self.total
        return torch.from_numpy(even[list(self.samples)]).float()

    def uniform(self, purpose: str, columns: int) -> torch.Tensor:
        """Independent uniform numbers in 0..1, float32 [clips of this part, columns]."""
        if self.noise == "device":
            rng = np.random.default_rng(self._key(purpose, self.samples[0]))
            return torch.from_numpy(rng.random((len(self.samples), columns))).float()
        return torch.from_numpy(np.stack([rng.random(columns) for rng in self.own(purpose)])).float()

    def integers(self, purpose: str, high: int, columns: int = 1) -> torch.Tensor:
        """Whole numbers below `high`, int64 [clips of this part, columns]."""
        return torch.from_numpy(np.stack([rng.integers(high, size=columns) for rng in self.own(purpose)]))

    def _key(self, purpose: str, sample: int | None = None) -> int:
        digest = hashlib.blake2b(f"{self.seed}/{self.step}/{purpose}/{sample}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1
