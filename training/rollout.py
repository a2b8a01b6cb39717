"""Self-Forcing's rollout: clips made block by block on the model's own outputs, with gradients through one step.

Loop, sampler, cache and network are those of inference (`pipeline.rollout`). What training adds: batches, a random
exit step instead of the last one, gradients in that step for the blocks that will be scored, and prompts that change
on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pipeline.cache import KVCache
from pipeline.rollout import ContextNoise, roll_out
from pipeline.rotary import to_device
from pipeline.sampler import TRAIN_STEPS, DenoisingSteps, FlowSchedule
from pipeline.transformer import CausalWanTransformer3DModel
from training.draws import Draws
from training.settings import RolloutSettings


@dataclass(frozen=True)
class RolloutPlan:
    """What is random about a rollout, the same for all clips of a step and on every process."""

    num_blocks: int
    exit_steps: tuple[int, ...]
    """Per block, the step whose clean estimate is the result."""
    switch_block: int | None = None
    """First block that follows the second prompt."""

    @classmethod
    def full(cls, settings: RolloutSettings) -> RolloutPlan:
        """A clip as long as the scored window with all steps, as inference makes it."""
        return cls(settings.num_blocks, (len(settings.denoising_steps) - 1,) * settings.num_blocks)

    @classmethod
    def random(cls, settings: RolloutSettings, draws: Draws, purpose: str) -> RolloutPlan:
        """A plan of the length, exit steps and prompt switch that the settings allow."""
        rng = draws.shared(f"{purpose}/plan")
        long = rng.random() < settings.long_share
        low, high = settings.long_blocks if long else (settings.num_blocks, settings.num_blocks)
        num_blocks = int(rng.integers(low, high + 1))
        last = len(settings.denoising_steps) - 1
        steps = [last if settings.last_step_only else int(rng.integers(last + 1)) for _ in range(num_blocks)]
        if not settings.exit_per_block:
            steps = [steps[0]] * num_blocks
        switch = None
        if num_blocks > 1 and rng.random() < settings.switch_share:
            # Within the scored window, so that something of the new prompt is learnt.
            first = max(1, num_blocks - settings.num_blocks + 1)
            switch = int(rng.integers(first, num_blocks))
        return cls(num_blocks, tuple(steps), switch)


class Rollout:
    """Rolls out batches of clips of one latent size.

    Args:
        network: generator, sharded or not.
        settings: how it samples.
        shape: (C, h, w) of a latent frame.
        device, dtype: where and in what the network computes.
    """

    def __init__(
        self,
        network: CausalWanTransformer3DModel,
        settings: RolloutSettings,
        shape: tuple[int, int, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.network = network
        self.settings = settings
        self.shape = shape
        self.device = device
        self.dtype = dtype
        self.schedule = FlowSchedule(settings.shift)
        self.steps = DenoisingSteps.from_schedule(self.schedule, settings.denoising_steps)
        self._cache: KVCache | None = None

    def __call__(
        self,
        prompts: Sequence[torch.Tensor],
        plan: RolloutPlan,
        noise: Callable[[int, int], torch.Tensor],
        *,
        gradients: bool,
    ) -> torch.Tensor:
        """Make clips [B, num_blocks * block_frames, C, h, w].

        Args:
            prompts: embeddings [B, text_len, text_dim] of the prompts and, for a switch, of those that follow.
            noise: (block, step) -> [B, block_frames, C, h, w]; step `len(steps)` is that of the block's clean pass.
            gradients: whether the exit step of the blocks in the last `gradient_frames` frames is recorded.
        """
        settings = self.settings
        first_scored = plan.num_blocks * settings.block_frames - settings.recorded_frames
        with torch.set_grad_enabled(gradients):
            texts = [self.network.encode_text(embeds.to(self.dtype)) for embeds in prompts]
        cache = self._fresh_cache(len(prompts[0]))

        def recorded(block: int, step: int | None) -> bool:
            return gradients and step == plan.exit_steps[block] and block * settings.block_frames >= first_scored

        def block_noise(block: int, step: int) -> torch.Tensor:
            return noise(block, step) if recorded(block, step) else noise(block, step).detach()

        def call(latents: torch.Tensor, timesteps: tuple[float, ...], block: int, step: int | None) -> torch.Tensor:
            timestep = to_device(torch.tensor(timesteps), self.device).expand(len(latents), -1)
            text = texts[plan.switch_block is not None and block >= plan.switch_block]
            with torch.set_grad_enabled(recorded(block, step)):
                return self.network(latents.to(self.dtype), timestep, text, cache=cache)

        blocks = roll_out(
            call,
            cache,
            block_noise,
            self.steps,
            plan.num_blocks,
            self._context(),
            exit_step=plan.exit_steps.__getitem__,
        )
        with torch.set_grad_enabled(gradients):
            return torch.cat(list(blocks), dim=1)

    def with_noise(
        self, prompts: Sequence[torch.Tensor], plan: RolloutPlan, draws: Draws, purpose: str, *, gradients: bool
    ) -> torch.Tensor:
        """Make clips from noise that belongs to a training step, as `draws` has it under the name `purpose`."""
        shape = (self.settings.block_frames, *self.shape)

        def noise(block: int, step: int) -> torch.Tensor:
            return draws.normal(f"{purpose}/{block}/{step}", shape, self.device, self.dtype)

        return self(prompts, plan, noise, gradients=gradients)

    def _context(self) -> ContextNoise:
        settings = self.settings
        level = settings.context_noise
        if settings.context_sigma == "table":
            return ContextNoise(level, self.schedule.sigma(torch.tensor(level)))
        return ContextNoise(level, torch.tensor(level / TRAIN_STEPS) if level else None)

    def _fresh_cache(self, batch: int) -> KVCache:
        if self._cache is None or self._cache.batch != batch:
            _, height, width = self.shape
            self._cache = self.network.make_cache(
                self.settings.window,
                height,
                width,
                batch,
                device=self.device,
                dtype=self.dtype,
                leaky=self.settings.cache_gradients == "leaky",
            )
        self._cache.reset()
        return self._cache
