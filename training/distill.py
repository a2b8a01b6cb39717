"""What DMD, SiD and GAN share: clips rolled out by the generator, and two networks that learn in turn.

In every step the critic learns from new clips; in every k-th, before that, the generator learns from others.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor

from training.draws import Draws
from training.losses import score_timesteps
from training.network import check_vae, clip_shape, load_vae
from training.optim import Trainee
from training.parallel import Processes
from training.rollout import Rollout, RolloutPlan
from training.stage import Metrics, Stage
from training.stage_settings import DistillSettings
from training.window import Scored, scored_window

Kind = TypeVar("Kind", bound=DistillSettings)
RAW_TIMES = 1000
"""Timesteps are drawn as whole numbers below this, as the authors do."""


class DistillStage(Stage[Kind]):
    """Subclasses say where prompts come from, what the generator's loss is, and how the critic learns."""

    def __init__(self, settings: Kind, processes: Processes) -> None:
        super().__init__(settings, processes)
        network = self.trainee("generator", settings.network, settings.optimizer)
        shape = clip_shape(settings.rollout, settings.network)[1:]
        self.rollout = Rollout(network, settings.rollout, shape, processes.device, processes.compute_dtype)
        self.vae = load_vae(settings.vae, processes.device) if settings.vae else None

    @classmethod
    def check(cls, settings: Kind) -> None:
        super().check(settings)
        _, channels, _, _ = clip_shape(settings.rollout, settings.network)
        if settings.vae:
            check_vae("vae", settings.vae, channels)

    @abstractmethod
    def captions(self, draws: Draws, purpose: str) -> list[str]:
        """Prompts to roll out."""

    @abstractmethod
    def generator_loss(self, scored: Scored, draws: Draws) -> Tensor:
        """The loss of clips that carry gradients."""

    @abstractmethod
    def critic_step(self, step: int, parts: list[Draws]) -> Metrics:
        """One step of whatever judges the generator."""

    def step(self, step: int) -> Metrics:
        settings, parts = self.settings, self.parts(step)
        metrics: Metrics = {}
        if step >= settings.critic_warmup and step % settings.generator_every == 0:
            metrics["generator/loss"] = self.learn(self._generator_losses(parts), len(parts))
            metrics["generator/norm"] = self.trainees["generator"].step(step)
            for trainee in self._critics():
                trainee.forget_gradients()  # SiD and GAN lead gradients through the critic: they are not its own
        return metrics | self.critic_step(step, parts)

    def _generator_losses(self, parts: list[Draws]) -> Iterator[Tensor]:
        for part in parts:
            yield self.generator_loss(self.roll(part, "generator", gradients=True), part)

    def _critics(self) -> list[Trainee]:
        return [trainee for name, trainee in self.trainees.items() if name != "generator"]

    def roll(self, draws: Draws, purpose: str, *, gradients: bool) -> Scored:
        """New clips of the generator, cut to the window that is scored, in the dtype of the weights."""
        settings = self.settings.rollout
        plan = RolloutPlan.random(settings, draws, purpose)
        captions = [self.captions(draws, purpose)]
        if plan.switch_block is not None:
            captions.append(self.captions(draws, f"{purpose}/switched"))
        prompts = [self.embed(group) for group in captions]
        latents = self.rollout.with_noise(prompts, plan, draws, purpose, gradients=gradients)
        return scored_window(latents.to(self.processes.master_dtype), plan, settings, prompts, self.vae)

    def times(self, draws: Draws, purpose: str, scored: Tensor, shift: float, low: float, high: float) -> Tensor:
        """A timestep for each clip, [B, F], at which it is judged."""
        raw = draws.integers(purpose, RAW_TIMES)
        times = score_timesteps(raw, shift, low, high).float()
        return times.to(scored.device).expand(-1, scored.shape[1])

    @torch.no_grad()
    def sample(self, draws: Draws) -> tuple[list[str], Tensor]:
        captions = self.captions(draws, "sample")
        plan = RolloutPlan.full(self.settings.rollout)
        return captions, self.rollout.with_noise([self.embed(captions)], plan, draws, "sample", gradients=False)
