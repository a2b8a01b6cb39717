"""Stage 2, Self-Forcing with distribution matching: `python -m training.dmd --minutes 30`.

The generator rolls out clips on its own outputs, four steps a block, and is pulled towards what a frozen teacher
believes likely and away from what a critic, trained along on the generator's clips, believes likely: the difference
of the two score networks' clean estimates is the gradient (Yin et al. 2024; Huang et al. 2025). No clips of the
data set are used, only captions. Some rollouts are longer than the window, so that the generator learns to live
with a sink and without its beginning.
"""

from __future__ import annotations

import argparse
import copy
import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from pipeline.sampler import TRAIN_STEPS, add_noise, shifted_time
from pipeline.transformer import CausalWanTransformer3DModel, TextKV, block_causal, frame_mask
from training.captions import make_caption
from training.network import (
    NetworkConfig,
    StageClock,
    build_network,
    load_text_encoder,
    run_processes,
    save_atomically,
)
from training.optim import MixedPrecision, WeightAverage
from training.rollout import Rollout, RolloutConfig, last_window
from training.world import sample_params

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DMDConfig:
    """Settings of the stage."""

    minutes: float = 30.0
    text: str = "training/cache/text"
    init: str = "training/cache/base/base.pt"
    out: str = "training/cache/dmd"
    processes: int = 2
    device: str = "cpu"
    """`cpu` or, with one process, `cuda`."""
    seed: int = 0
    latent_shape: tuple[int, int, int] = (16, 8, 14)
    batch: int = 12
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    guidance: float = 2.2
    """Of the teacher, in the form u + guidance * (c - u)."""
    long_share: float = 0.4
    """Share of iterations whose rollouts outgrow the window, and how long those may get, in blocks."""
    long_blocks: tuple[int, int] = (4, 6)
    score_shift: float = 2.0
    """Shift of the noise levels at which scores are compared."""
    score_range: tuple[float, float] = (0.03, 0.97)
    rate: float = 1.5e-4
    critic_rate: float = 3e-4
    critic_steps: int = 2
    """Critic steps an iteration: one on the newest rollout, the others on remembered ones."""
    remembered: int = 6
    critic_warmup: int = 6
    """Iterations before the generator moves, in which the critic gets to know its clips."""
    betas: tuple[float, float] = (0.0, 0.99)
    average_decay: float = 0.98
    flat_until: float = 0.6
    clip: float = 1.0
    checkpoint_minutes: float = 3.0

    def rate_scale(self, step: int, progress: float) -> float:
        decay = 1.0 if progress < self.flat_until else (1 - progress) / (1 - self.flat_until)
        return min(1.0, (step + 1) / 10) * max(0.1, decay)


@dataclass
class Clips:
    """Windows of rolled-out clips [B, F, C, h, w], their captions' embeddings, and whether they are late ones."""

    latents: torch.Tensor
    text: torch.Tensor
    late: bool


class ScoreNetworks:
    """Teacher and critic on whole windows, with the block-causal mask the teacher was trained with."""

    def __init__(
        self, config: DMDConfig, teacher: CausalWanTransformer3DModel, critic: CausalWanTransformer3DModel
    ) -> None:
        self.config = config
        self.teacher, self.critic = teacher, critic
        _, height, width = config.latent_shape
        rows, columns = teacher.token_grid(height, width)
        rollout = config.rollout
        mask = frame_mask(block_causal(rollout.window_frames, rollout.block_frames), rows * columns)
        self.mask = mask.to(teacher.device)

    def levels(self, batch: int, late: bool) -> torch.Tensor:
        """Noise levels [B, F] in 0..1: one a clip; the sink of a late window is context and stays nearly clean."""
        low, high = self.config.score_range
        level = shifted_time(low + (high - low) * torch.rand(batch, 1), self.config.score_shift)
        level = level.repeat(1, self.config.rollout.window_frames)
        if late:
            level[:, : self.config.rollout.sink_frames] = self.config.rollout.context_noise / TRAIN_STEPS
        return level.to(self.teacher.device)

    def scored(self, late: bool) -> slice:
        """The frames a loss is taken on."""
        return slice(self.config.rollout.sink_frames if late else 0, None)

    def flow(
        self, network: CausalWanTransformer3DModel, noisy: torch.Tensor, level: torch.Tensor, text_kv: TextKV
    ) -> torch.Tensor:
        return network(noisy.to(network.dtype), level * TRAIN_STEPS, text_kv, mask=self.mask).float()

    @torch.no_grad()
    def gradient(self, clips: Clips, empty_text: torch.Tensor) -> torch.Tensor:
        """Direction in which the clips' likelihood falls, normalised per clip as in DMD."""
        clean = clips.latents.detach().float()
        level = self.levels(len(clean), clips.late)
        sigma = level[..., None, None, None]
        noisy = add_noise(clean, torch.randn_like(clean), sigma)
        fake = noisy - sigma * self.flow(self.critic, noisy, level, self.critic.encode_text(clips.text))
        both = torch.cat([clips.text, empty_text.expand_as(clips.text)])
        twice = self.flow(self.teacher, noisy.repeat(2, 1, 1, 1, 1), level.repeat(2, 1), self.teacher.encode_text(both))
        with_text, without = twice.chunk(2)
        real = noisy - sigma * (without + self.config.guidance * (with_text - without))
        distance = (clean - real)[:, self.scored(clips.late)].abs().mean((1, 2, 3, 4), keepdim=True)
        return torch.nan_to_num((fake - real) / distance.clamp(min=0.02))

    def critic_loss(self, clips: Clips) -> torch.Tensor:
        """Flow matching on the generator's clips."""
        clean = clips.latents.detach().float()
        level = self.levels(len(clean), clips.late)
        noise = torch.randn_like(clean)
        noisy = add_noise(clean, noise, level[..., None, None, None])
        flow = self.flow(self.critic, noisy, level, self.critic.encode_text(clips.text))
        return (flow - (noise - clean))[:, self.scored(clips.late)].pow(2).mean()


class DMDStage:
    """The stage's state: three networks, two optimisers, the average that will be shipped."""

    def __init__(self, rank: int, config: DMDConfig) -> None:
        self.rank = rank
        self.config = config
        self.path = Path(config.out) / "dmd.pt"
        self.device = torch.device(config.device)
        init = torch.load(config.init, map_location=self.device, weights_only=True)
        self.network_config = NetworkConfig(**init["config"])
        teacher = build_network(self.network_config).to(self.device)
        teacher.load_state_dict(init["average"])
        self.master = copy.deepcopy(teacher)
        self.critic_master = copy.deepcopy(teacher)
        options = {"betas": config.betas, "weight_decay": 0.0}
        self.adam = torch.optim.AdamW(self.master.parameters(), lr=config.rate, **options)
        self.critic_adam = torch.optim.AdamW(self.critic_master.parameters(), lr=config.critic_rate, **options)
        self.average = WeightAverage(list(self.master.parameters()), config.average_decay)
        self.step = 0
        spent = self._load() if self.path.exists() else 0.0
        self.clock = StageClock(config.minutes, spent)

        self.generator = copy.deepcopy(self.master).bfloat16()
        critic = copy.deepcopy(self.critic_master).bfloat16()
        self.precision = MixedPrecision(self.master, self.generator)
        self.critic_precision = MixedPrecision(self.critic_master, critic)
        self.scores = ScoreNetworks(config, teacher.bfloat16().requires_grad_(False), critic)
        self.rollout = Rollout(self.generator, config.rollout, config.latent_shape)
        self.text = load_text_encoder(Path(config.text))
        self.empty_text = self.text.encode([""]).to(self.device, torch.bfloat16)
        self.remembered: list[Clips] = []

    def run(self) -> None:
        config = self.config
        entropy = (config.seed, self.step)
        captions = np.random.default_rng([*entropy, self.rank])
        shared = np.random.default_rng(entropy)  # rollouts of one length and exit step on every process
        torch.manual_seed(int(np.random.SeedSequence([*entropy, self.rank]).generate_state(1)[0]))
        saved = reported = self.clock.spent
        generator_loss = critic_loss = 0.0
        while (progress := self.clock.progress()) < 1:
            warming = self.step < config.critic_warmup
            clips = self._roll_out(captions, shared, gradients=not warming)
            if not warming:
                generator_loss = self._step_generator(clips, progress)
            clips.latents = clips.latents.detach()
            self.remembered = [*self.remembered, clips][-config.remembered :]
            for index in range(config.critic_steps):
                chosen = -1 if index == 0 else int(shared.integers(len(self.remembered)))
                critic_loss = self._step_critic(self.remembered[chosen], progress)
            self.step += 1
            if self.rank == 0 and self.clock.spent - reported > 0.5:
                reported = self.clock.spent
                logger.info(
                    "step %d  %.1f of %.0f min  generator %.4f  critic %.4f  std %.3f",
                    *(self.step, reported, config.minutes, generator_loss, critic_loss, clips.latents.float().std()),
                )
            if self.rank == 0 and self.clock.spent - saved > config.checkpoint_minutes:
                saved = self.clock.spent
                self._save()
        if self.rank == 0:
            self._save()

    def _roll_out(self, captions: np.random.Generator, shared: np.random.Generator, gradients: bool) -> Clips:
        config, rollout = self.config, self.config.rollout
        window_blocks = rollout.window_frames // rollout.block_frames
        late = bool(shared.random() < config.long_share)
        num_blocks = int(shared.integers(config.long_blocks[0], config.long_blocks[1] + 1)) if late else window_blocks
        exit_step = int(shared.integers(len(rollout.denoising_steps)))
        prompts = [make_caption(sample_params(captions, split="train"), captions)[0] for _ in range(config.batch)]
        text = self.text.encode(prompts).to(self.device, torch.bfloat16)
        scored = window_blocks - rollout.sink_frames // rollout.block_frames if late else window_blocks
        with torch.set_grad_enabled(gradients):
            latents = self.rollout(
                self.generator.encode_text(text),
                num_blocks,
                exit_step=exit_step,
                gradient_blocks=scored if gradients else 0,
            )
        return Clips(last_window(latents, rollout), text, late)

    def _step_generator(self, clips: Clips, progress: float) -> float:
        gradient = self.scores.gradient(clips, self.empty_text)
        latents = clips.latents.float()
        target = (latents - gradient).detach()
        loss = 0.5 * (latents - target)[:, self.scores.scored(clips.late)].pow(2).mean()
        loss.backward()
        self.precision.reduce_gradients(self.config.clip)
        self._apply(self.adam, self.config.rate, progress)
        self.average.update()
        self.precision.refresh()
        return loss.item()

    def _step_critic(self, clips: Clips, progress: float) -> float:
        loss = self.scores.critic_loss(clips)
        loss.backward()
        self.critic_precision.reduce_gradients(self.config.clip)
        self._apply(self.critic_adam, self.config.critic_rate, progress)
        self.critic_precision.refresh()
        return loss.item()

    def _apply(self, optimizer: torch.optim.Optimizer, rate: float, progress: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate * self.config.rate_scale(self.step, progress)
        optimizer.step()

    def _save(self) -> None:
        names = [name for name, _ in self.master.named_parameters()]
        state = {
            "config": vars(self.network_config),
            "average": dict(zip(names, self.average.average, strict=True)),
            "master": self.master.state_dict(),
            "critic": self.critic_master.state_dict(),
            "adam": self.adam.state_dict(),
            "critic_adam": self.critic_adam.state_dict(),
            "average_steps": self.average.steps,
            "step": self.step,
            "minutes": self.clock.spent,
        }
        save_atomically(state, self.path)

    def _load(self) -> float:
        state = torch.load(self.path, map_location=self.device, weights_only=True)
        self.master.load_state_dict(state["master"])
        self.critic_master.load_state_dict(state["critic"])
        self.adam.load_state_dict(state["adam"])
        self.critic_adam.load_state_dict(state["critic_adam"])
        self.average.average = [value.clone() for value in state["average"].values()]
        self.average.steps = state["average_steps"]
        self.step = state["step"]
        return state["minutes"]


def stage(rank: int, config: DMDConfig) -> None:
    """One process of the stage."""
    DMDStage(rank, config).run()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.dmd", description=__doc__.splitlines()[0])
    defaults = DMDConfig()
    for name in (
        "minutes",
        "text",
        "init",
        "out",
        "processes",
        "device",
        "seed",
        "batch",
        "guidance",
        "rate",
        "critic_rate",
    ):
        value = getattr(defaults, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = DMDConfig(**vars(options))
    run_processes(stage, config.processes, config)


if __name__ == "__main__":
    main()
