"""GAN: the generator's clips against real ones, both noised, judged on the features of a diffusion network."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.sampler import FlowSchedule
from pipeline.transformer import TIME_EMBEDDING
from training.clips import ClipBatch, ClipSampler, open_clips
from training.discriminator import DiscriminatorHead
from training.distill import DistillStage
from training.draws import Draws
from training.losses import finite_difference_penalty, gan_discriminator_loss, gan_generator_loss
from training.network import network_config
from training.optim import Trainee
from training.parallel import Processes
from training.score import ScoreNetwork
from training.settings import require
from training.stage import Metrics, check_same_shape, check_text
from training.stage_settings import GANSettings
from training.window import Scored


class GANStage(DistillStage[GANSettings]):
    """Two trainees judge: the `critic`, a diffusion network, and the `head`, which reads its features."""

    settings_kind = GANSettings

    def __init__(self, settings: GANSettings, processes: Processes) -> None:
        super().__init__(settings, processes)
        critic = self.trainee("critic", settings.critic or settings.network, settings.critic_optimizer)
        block = settings.rollout.block_frames if settings.attention == "causal" else 0
        self.score = ScoreNetwork(critic, FlowSchedule(settings.shift), block, compute_dtype=processes.compute_dtype)
        config = critic.config
        width = config.num_attention_heads * config.attention_head_dim
        head = DiscriminatorHead(width, config.num_attention_heads, settings.taps, settings.time_embedding)
        head = head.initialise(settings.run.seed).to(processes.master_dtype)
        # The penalties compare verdicts on clips that differ by a little noise. With the whole judge in bfloat16 and
        # the authors' nudge of 0.01, verdicts near 5 were the same or a rounding step apart, so squared slopes came out
        # as 0 or 2.4 where float32 has 0.02. The judge learnt from that noise, ended with the same verdict on real and
        # on made clips, and the generator did not follow prompts better. So the head computes in float32, and
        # embedded_gan.toml nudges by 0.1.
        self.head = processes.shard(head, exact=True)
        self.trainees["head"] = Trainee(self.head, settings.critic_optimizer, settings.run.steps)
        self.clips = ClipSampler(open_clips(settings.clips), settings.clips, settings.rollout.block_frames)

    @classmethod
    def check(cls, settings: GANSettings) -> None:
        super().check(settings)
        config, rollout = network_config(settings.network), settings.rollout
        critic = network_config(settings.critic or settings.network)
        check_same_shape("critic", config, critic, ("in_channels", "text_dim"))
        check_text(settings, critic)
        require(
            settings.taps[-1] < critic["num_layers"], f"taps names layer {settings.taps[-1]} of {critic['num_layers']}."
        )
        found = open_clips(settings.clips).latents.shape[2:]
        wanted = (config["in_channels"], rollout.height, rollout.width)
        require(found == wanted, f"Clips in {settings.clips.folder} are {found}, but the generator's are {wanted}.")

    def captions(self, draws: Draws, purpose: str) -> list[str]:
        return self._real(draws, purpose).captions

    def _real(self, draws: Draws, purpose: str) -> ClipBatch:
        """Real clips; the generator gets their captions."""
        return self.clips.draw(draws, self.settings.rollout.frames, f"{purpose}/clips")

    def logits(
        self, clips: Tensor, times: Tensor, noise: Tensor, embeds: Tensor, nudge: Tensor | float = 0.0
    ) -> Tensor:
        """Verdicts [B, 1] on clips [B, F, C, h, w] noised to timesteps [B, F], and then nudged: large for real ones."""
        noisy = self.score.noised(clips, noise, times) + nudge
        taps: dict[int, Tensor] = dict.fromkeys((*self.settings.taps, TIME_EMBEDDING))  # type: ignore[arg-type]
        self.score.flow(noisy, times, self.score.encode(embeds), taps)
        features = [taps[layer].to(clips.dtype) for layer in self.settings.taps]
        return self.head(features, taps[TIME_EMBEDDING][:, 0].to(clips.dtype))

    def generator_loss(self, scored: Scored, draws: Draws) -> Tensor:
        settings, clips = self.settings, scored.clips
        times, noise = self._noise("generator", draws, clips)
        fake = self.logits(clips, times, noise, scored.embeds)
        real = None
        if settings.relativistic:
            with torch.no_grad():
                real = self.logits(self._clean(draws, "generator"), times, noise, scored.embeds)
        return settings.weight * gan_generator_loss(fake, real)

    def critic_step(self, step: int, parts: list[Draws]) -> Metrics:
        loss = self.learn((self.critic_loss(part) for part in parts), len(parts))
        norms = {f"{name}/norm": self.trainees[name].step(step) for name in ("critic", "head")}
        return {"critic/loss": loss, **norms}

    def critic_loss(self, draws: Draws) -> Tensor:
        """Tell real from rolled-out clips of the same prompts, noised to the same level."""
        settings = self.settings
        scored = self.roll(draws, "critic", gradients=False)
        times, noise = self._noise("critic", draws, scored.clips)
        clips = {"fake": scored.clips, "real": self._clean(draws, "critic")}
        verdicts = {name: self.logits(value, times, noise, scored.embeds) for name, value in clips.items()}
        loss = settings.critic_weight * gan_discriminator_loss(
            verdicts["fake"], verdicts["real"], settings.relativistic
        )
        for name, weight in (("real", settings.r1_weight), ("fake", settings.r2_weight)):
            if weight:  # the slope is taken where the judge looks: at the noised clip
                nudge = settings.penalty_scale * self.noise_like(draws, f"critic/{name} nudge", clips[name])
                nudged = self.logits(clips[name], times, noise, scored.embeds, nudge)
                loss = loss + weight * finite_difference_penalty(verdicts[name], nudged, settings.penalty_scale)
        return loss

    def _noise(self, purpose: str, draws: Draws, clips: Tensor) -> tuple[Tensor, Tensor]:
        settings = self.settings
        times = self.times(draws, f"{purpose}/time", clips, settings.shift, settings.low, settings.high)
        return times, self.noise_like(draws, f"{purpose}/noise", clips)

    def _clean(self, draws: Draws, purpose: str) -> Tensor:
        return self._real(draws, purpose).latents.to(self.processes.device, self.processes.master_dtype)
