"""Flow-matching arithmetic and the few-step denoising of one block: pure functions shared by inference and training.

A noised latent is x_t = (1 - sigma) * clean + sigma * noise, the network predicts flow = noise - clean, and time
runs from t = 1000 (noise) down to 0. Sigmas come from the published table of 1000 shifted levels in float32,
because the released weights were trained on exactly those; t = 0 therefore means the table's last row and not sigma
0.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

TRAIN_STEPS = 1000
"""Resolution of the timestep scale 0..1000, a convention of all flow-matching checkpoints rather than of one model."""


@dataclass(frozen=True)
class FlowSchedule:
    """The shifted sigma table: sigma = shift * u / (1 + (shift - 1) * u), noisiest first.

    Args:
        shift: > 1 spends more of the range on high noise.
        num_levels: rows of the table. The zero that would follow the last one is left out, as in the authors' tables.
    """

    shift: float
    num_levels: int = TRAIN_STEPS

    @cached_property
    def sigmas(self) -> torch.Tensor:
        """float32 [num_levels]."""
        u = torch.linspace(1.0, 0.0, self.num_levels + 1, dtype=torch.float32)[:-1]
        return shifted_time(u, self.shift)

    @cached_property
    def timesteps(self) -> torch.Tensor:
        """float32 [num_levels]."""
        return self.sigmas * TRAIN_STEPS

    @cached_property
    def training_weights(self) -> torch.Tensor:
        """Loss weight of each level for plain flow matching: a bell over the middle timesteps, summing to 1000."""
        bell = torch.exp(-2 * ((self.timesteps - TRAIN_STEPS / 2) / TRAIN_STEPS) ** 2)
        bell = bell - bell.min()
        return bell * (TRAIN_STEPS / bell.sum())

    def warp(self, steps: Sequence[float]) -> torch.Tensor:
        """Map unwarped steps such as [1000, 750, 500, 250] onto the table: float32 timesteps."""
        table = torch.cat([self.timesteps, torch.zeros(1, dtype=torch.float32)])
        return table[[self.num_levels - round(step * self.num_levels / TRAIN_STEPS) for step in steps]]

    def nearest(self, timestep: torch.Tensor) -> torch.Tensor:
        """Row of the table nearest to each timestep."""
        distance = (self.timesteps.to(timestep.device) - timestep.float().unsqueeze(-1)).abs()
        return distance.argmin(-1)

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        """float32 sigma of the table row nearest to each timestep, in timestep's shape."""
        return self.sigmas.to(timestep.device)[self.nearest(timestep)]


def add_noise(clean: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """(1 - sigma) * clean + sigma * noise, in float32 at least; returned in noise's dtype.

    The conversion is explicit because a zero-dimensional sigma would not lift half-precision inputs by itself.
    """
    wide = torch.promote_types(noise.dtype, torch.float32)
    return ((1 - sigma) * clean.to(wide) + sigma * noise.to(wide)).to(noise.dtype)


def flow_to_clean(flow: torch.Tensor, noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """x0 = x_t - sigma * flow, in float64 as the authors do; returned in flow's dtype."""
    return (noisy.double() - sigma.double() * flow.double()).to(flow.dtype)


def clean_to_flow(clean: torch.Tensor, noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """flow = (x_t - x0) / sigma, in float64; returned in clean's dtype."""
    return ((noisy.double() - clean.double()) / sigma.double()).to(clean.dtype)


def euler_step(flow: torch.Tensor, noisy: torch.Tensor, sigma: torch.Tensor, next_sigma: torch.Tensor) -> torch.Tensor:
    """One step of the probability-flow ODE from sigma to next_sigma."""
    return noisy + flow * (next_sigma - sigma)


def block_noise(seed: int, block: int, step: int, shape: Sequence[int]) -> torch.Tensor:
    """The noise of one denoising step: a function of (seed, block, step) and nothing else.

    Drawn on the CPU in float32 so that every device starts from the same numbers, however many blocks a clip has and
    whatever ran before. The three numbers are hashed because neighbouring seeds of a generator are not independent.
    """
    digest = hashlib.blake2b(f"{seed}/{block}/{step}".encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32)


@dataclass(frozen=True)
class DenoisingSteps:
    """Warped timesteps and their sigmas, noisiest first, looked up once: the hot path searches no table.

    The sigmas are zero-dimensional CPU tensors. They combine with tensors of any device without a transfer.
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[torch.Tensor, ...]

    @classmethod
    def from_schedule(cls, schedule: FlowSchedule, steps: Sequence[float]) -> DenoisingSteps:
        warped = schedule.warp(steps)
        return cls(tuple(warped.tolist()), tuple(schedule.sigma(warped).unbind()))

    def __len__(self) -> int:
        return len(self.timesteps)


FlowModel = Callable[[torch.Tensor, float, int], torch.Tensor]
"""(noisy latents [B, F, C, h, w], timestep, step index) -> flow of the same shape."""
NoiseSource = Callable[[int], torch.Tensor]
"""step index -> noise [B, F, C, h, w]. Step 0 is the starting noise, step i > 0 re-noises the result of step i - 1."""


def denoise_block(
    predict_flow: FlowModel, noise: NoiseSource, steps: DenoisingSteps, last_step: int | None = None
) -> Iterator[torch.Tensor]:
    """Yield the clean estimate [B, F, C, h, w] after every step; the last one is the block.

    A generator, so that a caller may look at a cancel flag, count time or stop early between steps; training stops at
    its random exit step by `last_step` and turns gradients on for it.
    """
    latents = noise(0)
    last_step = len(steps) - 1 if last_step is None else last_step
    for index in range(last_step + 1):
        sigma = steps.sigmas[index]
        flow = predict_flow(latents, steps.timesteps[index], index)
        clean = flow_to_clean(flow, latents, sigma)
        yield clean
        if index < last_step:
            latents = add_noise(clean, noise(index + 1), steps.sigmas[index + 1])


def shifted_time(uniform: torch.Tensor, shift: float) -> torch.Tensor:
    """Warp uniform numbers in 0..1 as the table does; for training, where any real time may be drawn."""
    if not math.isfinite(shift) or shift <= 0:
        raise ValueError(f"shift must be positive, not {shift}")
    return shift * uniform / (1 + (shift - 1) * uniform)
