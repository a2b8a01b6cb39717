"""DMD and SiD: the generator follows two score networks, a frozen one of real clips and one that learns its own.

Both need prompts only. DMD takes the difference of the two clean estimates as the gradient of the clip; SiD writes a
loss down in them, whose gradient flows through both networks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.sampler import FlowSchedule
from training.distill import DistillStage
from training.draws import Draws
from training.losses import dmd_gradient, dmd_loss, flow_loss, sid_loss
from training.network import network_config
from training.parallel import Processes
from training.prompts import open_prompts
from training.score import ScoreNetwork
from training.settings import NetworkSettings
from training.stage import Metrics, check_prompts, check_same_shape, check_text
from training.stage_settings import DMDSettings, SiDSettings
from training.window import Scored


class DMDStage(DistillStage[DMDSettings]):
    """Distribution matching distillation (Yin et al. 2024) on Self-Forcing's rollouts (Huang et al. 2025)."""

    settings_kind = DMDSettings

    def __init__(self, settings: DMDSettings, processes: Processes) -> None:
        super().__init__(settings, processes)
        critic = self.trainee("critic", _critic(settings), settings.critic_optimizer)
        schedule = FlowSchedule(settings.score.shift)
        block = settings.rollout.block_frames if settings.score.attention == "causal" else 0
        self.real, self.fake = (
            ScoreNetwork(network, schedule, block, compute_dtype=processes.compute_dtype)
            for network in (self.frozen(settings.score.teacher), critic)
        )
        self.prompts = open_prompts(settings.prompts, self.text.tokenizer, settings.text.length)

    @classmethod
    def check(cls, settings: DMDSettings) -> None:
        super().check(settings)
        check_prompts(settings, settings.prompts)
        config = network_config(settings.network)
        for name, network in (("score.teacher", settings.score.teacher), ("score.critic", _critic(settings))):
            check_same_shape(name, config, network_config(network), ("in_channels", "text_dim"))
            check_text(settings, network_config(network))

    def captions(self, draws: Draws, purpose: str) -> list[str]:
        return self.prompts.draw(draws, f"{purpose}/prompt")

    def generator_loss(self, scored: Scored, draws: Draws) -> Tensor:
        scored = self.judged(scored, draws, "generator")
        with torch.no_grad():
            real, fake = self.estimates(scored.detached(), draws)
            gradient = dmd_gradient(self.cut(scored.clips).detach(), self.cut(real), self.cut(fake))
        return dmd_loss(self.cut(scored.clips), gradient, self.mask(scored))

    def judged(self, scored: Scored, draws: Draws, purpose: str) -> Scored:
        """What of a window is judged: all of it, or a block and those before it, see `ScoreSettings.context`.

        A window of a long rollout lacks what its earlier blocks saw, so of that only the last block can be judged; of
        others, only those that may have gradients. The context has none: it is given.
        """
        if self.settings.score.context == "noised":
            return scored
        rollout = self.settings.rollout
        size, end = rollout.block_frames, len(scored.counted)
        if bool(scored.counted.all()):
            first = max(1, end // size - rollout.recorded_frames // size + 1)
            end = size * int(draws.shared(f"{purpose}/judged").integers(first, end // size + 1))
        counted = torch.zeros(end, dtype=torch.bool)
        counted[end - size :] = True
        clips = torch.cat([scored.clips[:, : end - size].detach(), scored.clips[:, end - size : end]], dim=1)
        return Scored(clips, counted, scored.embeds)

    def cut(self, clips: Tensor) -> Tensor:
        """Of judged clips [B, F, C, h, w], the frames that a loss is scaled by: without clean context."""
        if self.settings.score.context == "noised":
            return clips
        return clips[:, -self.settings.rollout.block_frames :]

    def mask(self, scored: Scored) -> Tensor | None:
        """Of `cut` frames."""
        return scored.mask if self.settings.score.context == "noised" else None

    def score_times(self, scored: Scored, draws: Draws, purpose: str) -> Tensor:
        """Timesteps [B, F] at which clips are judged; clean context is at the level at which it was in the cache."""
        settings, score = self.settings, self.settings.score
        times = self.times(draws, purpose, scored.clips, score.shift, score.low, score.high)
        if score.context == "noised":
            return times
        context = torch.full_like(times, settings.rollout.context_noise)
        return torch.where(scored.counted.to(times.device), times, context)

    def noised(self, scored: Scored, noise: Tensor, times: Tensor) -> Tensor:
        """Clips at their timesteps; context that was in the cache without noise stays without it."""
        noisy = self.real.noised(scored.clips, noise, times)
        if self.settings.score.context == "noised" or self.settings.rollout.context_noise:
            return noisy
        return torch.where(scored.counted.to(noisy.device)[:, None, None, None], noisy, scored.clips)

    def estimates(self, scored: Scored, draws: Draws) -> tuple[Tensor, Tensor]:
        """Clean estimates of the frozen and of the learning network for the same noised clips."""
        score, clips = self.settings.score, scored.clips
        times = self.score_times(scored, draws, "generator/time")
        noisy = self.noised(scored, self.noise_like(draws, "generator/noise", clips), times)
        without = self.without.expand_as(scored.embeds)

        def estimate(network: ScoreNetwork, guidance: float) -> Tensor:
            empty = network.encode(without) if guidance else []
            return network.guided_clean(noisy, times, network.encode(scored.embeds), empty, guidance)

        return estimate(self.real, score.guidance), estimate(self.fake, score.fake_guidance)

    def critic_step(self, step: int, parts: list[Draws]) -> Metrics:
        loss = self.learn((self.critic_loss(part) for part in parts), len(parts))
        return {"critic/loss": loss, "critic/norm": self.trainees["critic"].step(step)}

    def critic_loss(self, draws: Draws) -> Tensor:
        """Flow matching on the generator's clips."""
        scored = self.judged(self.roll(draws, "critic", gradients=False), draws, "critic")
        clips = scored.clips
        times = self.score_times(scored, draws, "critic/time")
        noise = self.noise_like(draws, "critic/noise", clips)
        noisy = self.noised(scored, noise, times)
        return flow_loss(self.fake.flow(noisy, times, self.fake.encode(scored.embeds)), clips, noise, scored.weight)


class SiDStage(DMDStage):
    """Score identity distillation (Zhou et al. 2024)."""

    settings_kind = SiDSettings
    settings: SiDSettings

    def generator_loss(self, scored: Scored, draws: Draws) -> Tensor:
        scored = self.judged(scored, draws, "generator")
        real, fake = (self.cut(clips) for clips in self.estimates(scored, draws))
        return sid_loss(self.cut(scored.clips), real, fake, self.settings.alpha, self.mask(scored))


def _critic(settings: DMDSettings) -> NetworkSettings:
    """Where the critic begins: as the teacher, unless told otherwise."""
    return settings.score.critic or settings.score.teacher
