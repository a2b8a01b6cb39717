"""Stage 1, diffusion forcing: `python -m training.base --minutes 60`.

Flow matching in which every block of a clip has a noise level of its own, so that one network learns both to
denoise a block and to go on from clean ones. A length curriculum makes this affordable: single frames first (a
picture costs a ninth of a clip and teaches scenes, shapes and colours), then first blocks, then whole windows.

A window is what the model sees in a rollout: either the beginning of a clip, or, as it will be once the sink is in
use, the clip's first block followed by two blocks from anywhere later in it, at the positions the cache gives them.
"""

from __future__ import annotations

import argparse
import copy
import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.sampler import TRAIN_STEPS, add_noise, shifted_time
from pipeline.text import TextEncoder
from pipeline.transformer import CausalWanTransformer3DModel, block_causal, frame_mask
from training.captions import make_caption
from training.data import ClipDataset
from training.network import (
    NetworkConfig,
    StageClock,
    build_network,
    load_text_encoder,
    matrices_and_rest,
    run_processes,
    save_atomically,
)
from training.optim import MixedPrecision, Muon, WeightAverage

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """Settings of the stage; shares and rates are those that worked in trials of a few minutes each."""

    minutes: float = 60.0
    data: str = "training/cache"
    text: str = "training/cache/text"
    out: str = "training/cache/base"
    init: str = ""
    """Start from the averaged weights of this checkpoint instead of fresh ones."""
    processes: int = 2
    device: str = "cpu"
    """`cpu` or, with one process, `cuda`."""
    seed: int = 0
    network: NetworkConfig = field(default_factory=NetworkConfig)
    block_frames: int = 3
    window_blocks: int = 3
    frames_per_step: int = 108
    """Latent frames a process handles per step, whatever their arrangement."""
    curriculum: tuple[tuple[float, tuple[float, float, float]], ...] = (
        (0.0, (0.92, 0.08, 0.0)),
        (0.40, (0.25, 0.45, 0.30)),
        (0.55, (0.10, 0.18, 0.72)),
    )
    """From this progress on: share of steps on single frames, first blocks, windows."""
    shifts: tuple[float, float, float] = (1.6, 2.2, 3.0)
    """How strongly noise levels lean to noise, for the three arrangements: longer ones need more."""
    later_frames: float = 0.5
    """Share of single frames that are not a clip's first."""
    later_windows: float = 0.4
    """Share of windows that begin with the sink block."""
    clean_blocks: float = 0.2
    clean_level: float = 0.12
    """Blocks shown nearly clean, as context, and the highest noise level of those."""
    caption_drop: float = 0.1
    """Share of clips without a caption, for guidance of the teacher."""
    subject_weight: float = 3.0
    """Extra loss weight on the subject's surroundings, gone at 90 % of the stage."""
    matrix_rate: float = 1e-2
    rate: float = 2e-3
    flat_until: float = 0.55
    """Rates are constant up to here, then fall linearly to 1 %."""
    warmup_steps: int = 40
    average_decay: float = 0.997
    clip: float = 1.0
    checkpoint_minutes: float = 3.0

    def rate_scale(self, step: int, progress: float) -> float:
        decay = 1.0 if progress < self.flat_until else (1 - progress) / (1 - self.flat_until)
        return min(1.0, (step + 1) / self.warmup_steps) * max(0.01, decay)

    def shares(self, progress: float) -> tuple[float, float, float]:
        return [shares for begin, shares in self.curriculum if progress >= begin][-1]


@dataclass
class Windows:
    """A batch of clean latents and what is known about them."""

    clean: torch.Tensor
    """[B, F, C, h, w]"""
    subject: torch.Tensor
    """Share of the subject, [B, F, h, w], 0..1."""
    text: torch.Tensor
    given: torch.Tensor
    """[B, blocks], true where a block is context by construction (the sink) and not to be learnt."""

    def to(self, device: torch.device) -> Windows:
        return Windows(*(tensor.to(device) for tensor in (self.clean, self.subject, self.text, self.given)))


class WindowSampler:
    """Draws windows of one frame, one block or several blocks from the data set, with fresh captions."""

    def __init__(self, config: BaseConfig, data: ClipDataset, text: TextEncoder, seed: int) -> None:
        self.config = config
        self.data = data
        self.text = text
        self.rng = np.random.default_rng(seed)

    def draw(self, frames: int) -> Windows:
        config, rng = self.config, self.rng
        batch = config.frames_per_step // frames
        block = min(frames, config.block_frames)
        clips = rng.integers(len(self.data.train_indices), size=batch)
        total = self.data.info.latent_shape[0]
        given = torch.zeros(batch, frames // block, dtype=torch.bool)
        index = np.tile(np.arange(frames), (batch, 1))
        if frames == 1:
            later = rng.random(batch) < config.later_frames
            index[later, 0] = rng.integers(1, total, later.sum())
        elif frames > config.block_frames:
            later = rng.random(batch) < config.later_windows
            start = rng.integers(block, total - (frames - block) + 1, batch)
            index[later, block:] = start[later, None] + np.arange(frames - block)
            given[:, 0] = torch.from_numpy(later)
        clean = np.stack([self.data.latents[clip, wanted] for clip, wanted in zip(clips, index, strict=True)])
        subject = np.stack([self.data.masks[clip, wanted] for clip, wanted in zip(clips, index, strict=True)])
        captions = [
            "" if rng.random() < config.caption_drop else make_caption(self.data.params[clip], rng)[0] for clip in clips
        ]
        return Windows(
            torch.from_numpy(clean).float(),
            torch.from_numpy(subject).float() / 255,
            self.text.encode(captions),
            given,
        )


def noise_levels(batch: int, blocks: int, shift: float) -> torch.Tensor:
    """Noise levels [batch, blocks] in 0..1, on the CPU: evenly spread over the batch, then shifted towards noise."""
    order = torch.stack([torch.randperm(batch) for _ in range(blocks)], dim=1)
    return shifted_time((order + torch.rand(batch, blocks)) / batch, shift)


def diffusion_forcing_loss(
    network: CausalWanTransformer3DModel, windows: Windows, config: BaseConfig, progress: float
) -> tuple[torch.Tensor, float]:
    """The weighted loss to step on, and the plain mean squared error of the flow for the log."""
    clean = windows.clean
    batch, frames, _, height, width = clean.shape
    blocks = windows.given.shape[1]
    shift = config.shifts[0 if frames == 1 else 1 if blocks == 1 else 2]
    level = noise_levels(batch, blocks, shift).to(clean.device)
    context = (torch.rand(batch, blocks, device=clean.device) < config.clean_blocks) | windows.given
    context[:, -1] = False  # the last block is context to nobody
    level = torch.where(context, torch.rand_like(level) * config.clean_level, level)
    level = level.repeat_interleave(frames // blocks, 1)
    learnt = (~context).float().repeat_interleave(frames // blocks, 1)

    noise = torch.randn_like(clean)
    noisy = add_noise(clean, noise, level[..., None, None, None])
    rows, columns = network.token_grid(height, width)
    mask = None
    if blocks > 1:
        mask = frame_mask(block_causal(frames, config.block_frames), rows * columns).to(clean.device)
    dtype = network.dtype
    flow = network(noisy.to(dtype), level * TRAIN_STEPS, network.encode_text(windows.text.to(dtype)), mask=mask)
    error = (flow.float() - (noise - clean)).pow(2)

    emphasis = config.subject_weight * max(0.0, 1 - progress / 0.9)
    near_subject = F.max_pool2d((windows.subject > 0.04).float(), 3, stride=1, padding=1)
    weight = 1 + emphasis * near_subject.unsqueeze(2)
    per_frame = (error * (weight / weight.mean())).mean((2, 3, 4))
    plain = error.detach().mean((2, 3, 4))
    return (per_frame * learnt).sum() / learnt.sum(), ((plain * learnt).sum() / learnt.sum()).item()


class BaseStage:
    """The stage's state: master and working network, optimisers, average, clock."""

    def __init__(self, rank: int, config: BaseConfig) -> None:
        self.rank = rank
        self.config = config
        self.path = Path(config.out) / "base.pt"
        self.device = torch.device(config.device)
        self.master = build_network(config.network, config.seed).to(self.device)
        matrices, rest = matrices_and_rest(self.master)
        self.muon = Muon(matrices)
        self.adam = torch.optim.AdamW(rest, lr=config.rate, betas=(0.9, 0.98), weight_decay=0.0)
        self.average = WeightAverage(list(self.master.parameters()), config.average_decay)
        self.step = 0
        spent = 0.0
        if self.path.exists():
            spent = self._load(torch.load(self.path, map_location=self.device, weights_only=True))
        elif config.init:
            state = torch.load(config.init, map_location=self.device, weights_only=True)
            self.master.load_state_dict(state["average"])
            self.average = WeightAverage(list(self.master.parameters()), config.average_decay)
        self.clock = StageClock(config.minutes, spent)
        self.worker = copy.deepcopy(self.master).bfloat16()
        self.precision = MixedPrecision(self.master, self.worker)

    def run(self) -> None:
        config = self.config
        text = load_text_encoder(Path(config.text))
        # Another seed for every resumption: the same batches again would be the worst choice.
        sampler = WindowSampler(
            config, ClipDataset(config.data), text, hash((config.seed, self.rank, self.step)) % 2**32
        )
        arrangement = np.random.default_rng([config.seed, self.step])  # the same on every process
        torch.manual_seed(hash((config.seed, self.rank, self.step)) % 2**32)
        lengths = (1, config.block_frames, config.block_frames * config.window_blocks)
        losses: dict[int, float] = {}
        saved = reported = self.clock.spent
        began, first_step = time.monotonic(), self.step
        while (progress := self.clock.progress()) < 1:
            frames = int(arrangement.choice(lengths, p=config.shares(progress)))
            loss, plain = diffusion_forcing_loss(self.worker, sampler.draw(frames).to(self.device), config, progress)
            loss.backward()
            self._step(progress)
            losses[frames] = plain if frames not in losses else 0.97 * losses[frames] + 0.03 * plain
            if self.rank == 0 and self.clock.spent - reported > 0.5:
                reported = self.clock.spent
                shown = " ".join(f"{length}: {value:.4f}" for length, value in sorted(losses.items()))
                rate = (time.monotonic() - began) / max(1, self.step - first_step)
                logger.info(
                    "step %d  %.1f of %.0f min  loss %s  %.2f s", self.step, reported, config.minutes, shown, rate
                )
            if self.rank == 0 and self.clock.spent - saved > config.checkpoint_minutes:
                saved = self.clock.spent
                self._save()
        if self.rank == 0:
            self._save()

    def _step(self, progress: float) -> None:
        self.precision.reduce_gradients(self.config.clip)
        scale = self.config.rate_scale(self.step, progress)
        for group in self.adam.param_groups:
            group["lr"] = self.config.rate * scale
        self.adam.step()
        self.muon.step(self.config.matrix_rate * scale)
        self.average.update()
        self.precision.refresh()
        self.step += 1

    def _save(self) -> None:
        names = [name for name, _ in self.master.named_parameters()]
        state: dict[str, Any] = {
            "config": asdict(self.config.network),
            "average": dict(zip(names, self.average.average, strict=True)),
            "master": self.master.state_dict(),
            "adam": self.adam.state_dict(),
            "muon": self.muon.state_dict(),
            "step": self.step,
            "minutes": self.clock.spent,
        }
        save_atomically(state, self.path)

    def _load(self, state: dict[str, Any]) -> float:
        self.master.load_state_dict(state["master"])
        self.adam.load_state_dict(state["adam"])
        self.muon.load_state_dict(state["muon"])
        self.average.average = [value.clone() for value in state["average"].values()]
        self.average.steps = self.step = state["step"]
        return state["minutes"]


def stage(rank: int, config: BaseConfig) -> None:
    """One process of the stage."""
    BaseStage(rank, config).run()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.base", description=__doc__.splitlines()[0])
    defaults = BaseConfig()
    for name in ("minutes", "data", "text", "out", "init", "processes", "device", "seed", "frames_per_step"):
        value = getattr(defaults, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = BaseConfig(**vars(options))
    run_processes(stage, config.processes, config)


if __name__ == "__main__":
    main()
