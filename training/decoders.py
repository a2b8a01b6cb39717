"""Train the decoders and encoders: `python -m training.decoders --kind wan --minutes 14 --out training/cache/decoder_wan`.

The latents are given (a principal component analysis of patches), so both halves are plain regressions: decoders from
latents to frames, encoders from frames to latents. A linear decoder is fitted first, which takes seconds, and the real one
begins as that. Time is counted in minutes of the processor, so that a busy machine changes how long a run takes and not
what comes out.

The result is an ordinary diffusers folder in float16, of `AutoencoderKLWan` or of `TAEHV`.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from pipeline.taehv import TAEHV
from training.codecs import Codec, TaehvCodec, WanCodec
from training.data import ClipDataset
from training.network import save_atomically
from training.optim import Muon, WeightAverage
from training.sheets import save_sheet

logger = logging.getLogger(__name__)


Part = Literal["linear", "decoder", "encoder"]


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


PHASES = (
    Phase("linear", 0.03, samples=8, latents=3, crop=(4, 7)),
    Phase("decoder", 0.42, samples=6, latents=3, crop=(4, 7)),
    Phase("decoder", 0.43, samples=2, latents=4),
    Phase("encoder", 0.12, samples=6, latents=3, crop=(4, 7)),
)


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Settings of a run."""

    kind: Literal["wan", "taehv"]
    minutes: float
    """Of processor time."""
    data: Path
    out: Path
    phases: tuple[Phase, ...] = PHASES
    seed: int = 0
    matrix_rate: float = 0.02
    other_rate: float = 2e-3
    warmup_steps: int = 20
    flat: float = 0.5
    """Share of a part's time at the full rate; then it falls linearly."""
    average: float = 0.99
    latent_noise: float = 0.15
    """Largest noise on a sample's latents, in each channel's standard deviations: generated latents are not perfect."""
    subject_weight: float = 2.0
    first_share: float = 0.25
    """Samples that begin with the clip."""
    held_out: int = 100
    """Clips with pixels, the last ones, that are never trained on."""
    checkpoint_seconds: float = 120.0


@dataclass(frozen=True)
class Batch:
    """Latents [B, F, C, h, w], the frames of their groups [B, T, 3, H, W] in 0..1, weights of pixels and of latents."""

    latents: Tensor
    frames: Tensor
    pixel_weights: Tensor
    latent_weights: Tensor


class Batches:
    """Draws samples from the clips whose pixels are stored."""

    def __init__(self, data: ClipDataset, config: DecoderConfig, first_group: int) -> None:
        self._data, self._config, self._first_group = data, config, first_group
        self._stride = (data.info.num_frames - 1) // (data.info.latent_shape[0] - 1)
        self._clips = len(data.pixels) - config.held_out
        if self._clips < 1:
            raise ValueError(
                f"the data set stores pixels of {len(data.pixels)} clips and {config.held_out} of them are held out; "
                "nothing is left to train on"
            )
        self.random = np.random.default_rng(config.seed)

    def draw(self, phase: Phase) -> Batch:
        count, _, height, width = self._data.info.latent_shape
        crop_height, crop_width = phase.crop or (height, width)
        scale = self._data.info.height // height
        rows: list[tuple[np.ndarray, ...]] = []
        for clip in self.random.integers(self._clips, size=phase.samples):
            starts = self.random.random() < self._config.first_share
            start = 0 if starts else int(self.random.integers(1, count - phase.latents + 1))
            top = int(self.random.integers(height - crop_height + 1))
            left = int(self.random.integers(width - crop_width + 1))
            cells = np.s_[..., top : top + crop_height, left : left + crop_width]
            groups = np.arange(start, start + phase.latents)
            # Group g > 0 holds `stride` frames up to frame stride * g; the first latent may stand for the last only.
            times = np.arange(self._stride * start - self._first_group + 1, self._stride * groups[-1] + 1).clip(0)
            area = np.s_[
                times[0] : times[-1] + 1,
                top * scale : (top + crop_height) * scale,
                left * scale : (left + crop_width) * scale,
            ]
            mask = self._data.masks[clip, groups][cells] > 5
            # A latent from the middle of a clip does not stand for one frame: that frame is context only.
            whole = np.ones(phase.latents, np.float32)
            whole[0] = start == 0 or self._first_group == self._stride
            rows.append((self._data.latents[clip, groups][cells], self._data.pixels[clip][area][times - times[0]], mask, whole))
        latents, frames, mask, whole = (torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))
        weights = (1 + self._config.subject_weight * mask.float()) * whole[..., None, None]
        weights = F.interpolate(weights, scale_factor=float(scale)).repeat_interleave(self._stride, 1)
        return Batch(
            latents.float(),
            frames.permute(0, 1, 4, 2, 3).float() / 255,
            weights[:, -frames.shape[1] :, None],
            whole[..., None, None, None],
        )


class Trainer:
    """One run: its networks, its place in the plan, and what a checkpoint must hold to go on from there."""

    def __init__(self, config: DecoderConfig) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.data = ClipDataset(config.data)
        self.codec = build(config.kind, self.data.info.channels)
        self.linear = self.codec.linear()
        self.networks = nn.ModuleDict({"codec": self.codec.module, "linear": self.linear})
        self.batches = Batches(self.data, config, self.codec.first_group)
        sample = self.data.latents[:: max(1, len(self.data.latents) // 200)].astype(np.float32)
        self.deviation = torch.from_numpy(sample.std(axis=(0, 1, 3, 4))).view(1, 1, -1, 1, 1)
        self.minutes, self.steps, self.part_steps = 0.0, 0, 0
        self.part: Part | None = None
        self.checkpoint = config.out / "checkpoint.pt"
        if self.checkpoint.exists():
            self._load(torch.load(self.checkpoint, weights_only=False))

    def run(self) -> None:
        """Train to the end of the budget, writing a checkpoint every few minutes."""
        written, started, before = time.monotonic(), time.process_time(), self.minutes
        error = 0.0
        while (place := self._place()) is not None:
            phase, progress = place
            if phase.part != self.part:
                self._leave()
                self._enter(phase.part)
            error += max(0.02, 1 / (self.part_steps + 1)) * (self._step(phase, progress) - error)
            self.minutes = before + (time.process_time() - started) / 60
            if self.steps % 100 == 0:
                logger.info("%s step %d %.2f min error %.5f", self.part, self.steps, self.minutes, error)
            if time.monotonic() - written > self.config.checkpoint_seconds:
                self.save()
                written = time.monotonic()
        self._leave()
        self.save()

    def _place(self) -> tuple[Phase, float] | None:
        """The current phase, and how far its part has come; None at the end."""
        spent, before = self.minutes / self.config.minutes, 0.0
        for phase in self.config.phases:
            if spent < before + phase.share:
                shares = [(other.part, other.share) for other in self.config.phases]
                start = sum(share for _, share in shares[: [part for part, _ in shares].index(phase.part)])
                return phase, (spent - start) / sum(share for part, share in shares if part == phase.part)
            before += phase.share
        return None

    def _enter(self, part: Part) -> None:
        """Begin a part: its parameters, fresh optimisers and a fresh average."""
        self.part, self.part_steps = part, 0
        self.parameters = list(self._parameters(part))
        matrices, others = _matrices_and_others(self.parameters)
        # Muon steps matrices: a convolution is one with a row for each output, sharing its memory.
        self.matrices = [(parameter, nn.Parameter(parameter.data.flatten(1))) for parameter in matrices]
        self.muon = Muon([flat for _, flat in self.matrices])
        self.adam = torch.optim.AdamW(others, lr=self.config.other_rate, betas=(0.9, 0.99), weight_decay=0.0)
        self.average = WeightAverage(self.parameters, self.config.average)
        logger.info("%s: %d parameters", part, sum(parameter.numel() for parameter in self.parameters))

    def _leave(self) -> None:
        """End a part: its average is its result."""
        if self.part is None:
            return
        self.average.copy_to(self.parameters)
        if self.part == "linear":
            self.codec.begin_as(self.linear)
        self.part = None

    def _parameters(self, part: Part) -> Iterator[nn.Parameter]:
        for name, parameter in self.networks.named_parameters():
            encodes = name.startswith(("codec.encoder.", "codec.quant_conv."))
            own = "linear" if name.startswith("linear.") else "encoder" if encodes else "decoder"
            if own == part:
                yield parameter

    def _step(self, phase: Phase, progress: float) -> float:
        """One update; returns the mean squared error of what the part predicts."""
        rate = min(1.0, (self.part_steps + 1) / self.config.warmup_steps)
        rate *= min(1.0, max(0.01, (1 - progress) / (1 - self.config.flat)))
        batch = self.batches.draw(phase)
        loss, error = self._encoder_loss(batch) if phase.part == "encoder" else self._decoder_loss(batch)
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = self.config.other_rate * rate
        self.adam.step()
        for parameter, flat in self.matrices:
            flat.grad = parameter.grad.flatten(1)
        self.muon.step(self.config.matrix_rate * rate)
        self.average.update()
        self.steps += 1
        self.part_steps += 1
        return error

    def _decoder_loss(self, batch: Batch) -> tuple[Tensor, float]:
        noise = self.config.latent_noise * torch.rand(len(batch.latents), 1, 1, 1, 1) * self.deviation
        latents = batch.latents + noise * torch.randn_like(batch.latents)
        with torch.autocast("cpu", torch.bfloat16):
            frames = self.linear(latents) if self.part == "linear" else self.codec.decode(latents)
        difference, weights = frames.float() - batch.frames, batch.pixel_weights
        absolute = (difference.abs() * weights).mean()
        squared = (difference.pow(2) * weights).mean()
        edges = (difference.diff(dim=-1).abs() * weights[..., 1:]).mean()
        edges = edges + (difference.diff(dim=-2).abs() * weights[..., 1:, :]).mean()
        loss = (absolute + 4 * squared + 0.5 * edges) / weights.mean()
        return loss, difference.detach().pow(2).mean().item()

    def _encoder_loss(self, batch: Batch) -> tuple[Tensor, float]:
        with torch.autocast("cpu", torch.bfloat16):
            latents = self.codec.encode(batch.frames)
        weights = batch.latent_weights
        error = ((latents.float() - batch.latents).pow(2) * weights).mean() / weights.mean()
        return error, error.item()

    def save(self) -> None:
        """Write the checkpoint."""
        state: dict[str, Any] = {
            "networks": self.networks.state_dict(),
            "minutes": self.minutes,
            "steps": self.steps,
            "random": (self.batches.random.bit_generator.state, torch.get_rng_state()),
            "part": self.part,
        }
        if self.part is not None:
            state |= {
                "part_steps": self.part_steps,
                "average": (self.average.steps, self.average.average),
                "adam": self.adam.state_dict(),
                "muon": self.muon.state_dict(),
            }
        save_atomically(state, self.checkpoint)

    def _load(self, state: dict[str, Any]) -> None:
        self.networks.load_state_dict(state["networks"])
        self.minutes, self.steps = state["minutes"], state["steps"]
        self.batches.random.bit_generator.state = state["random"][0]
        torch.set_rng_state(state["random"][1])
        if state["part"] is not None:
            self._enter(state["part"])
            self.part_steps = state["part_steps"]
            self.average.steps, self.average.average = state["average"]
            self.adam.load_state_dict(state["adam"])
            self.muon.load_state_dict(state["muon"])
        logger.info("going on from %.2f min, step %d", self.minutes, self.steps)

    def export(self, folder: Path) -> None:
        """Write the result as a diffusers folder in float16."""
        self.codec.module.eval().half().save_pretrained(folder)
        self.codec.module.float()


def build(kind: str, channels: int) -> Codec:
    """A fresh codec of the embedded model's size."""
    if kind == "taehv":
        return TaehvCodec(TAEHV(latent_channels=channels, decoder_widths=(64, 32, 16, 16), encoder_width=16, latent_limit=9.0))
    vae = AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=16,
        z_dim=channels,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    )
    return WanCodec(vae)


@torch.no_grad()
def measure(codec: Codec, data: ClipDataset, clips: range, block: int = 3) -> tuple[dict[str, float], list[np.ndarray]]:
    """Scores over held-out clips, decoded block by block as the pipeline does, and originals above decoded clips."""
    decoder = codec.stream()
    scores: dict[str, list[float]] = {name: [] for name in ("psnr", "psnr_subject", "psnr_linear", "psnr_round_trip", "latent_mse")}
    pictures: list[np.ndarray] = []
    for clip in clips:
        frames = torch.from_numpy(data.pixels[clip]).permute(0, 3, 1, 2)[None].float() / 255
        latents = torch.from_numpy(data.latents[clip])[None].float()

        def stream(latents: Tensor) -> Tensor:
            decoder.reset()
            return torch.cat([decoder.decode(part) for part in latents.split(block, 1)], 1)

        decoded = stream(latents)
        encoded = codec.encode_clip(frames)
        mask = torch.from_numpy(data.masks[clip] > 5).float()[None]
        mask = F.interpolate(mask, scale_factor=8.0).repeat_interleave(4, 1)[:, 3:, None]
        linear = torch.from_numpy(data.pca.decode(data.latents[clip])).permute(0, 3, 1, 2)[None]
        scores["psnr"].append(_psnr(decoded, frames))
        if mask.any():
            scores["psnr_subject"].append(_psnr(decoded, frames, mask))
        scores["psnr_linear"].append(_psnr(linear, frames))
        scores["psnr_round_trip"].append(_psnr(stream(encoded), frames))
        scores["latent_mse"].append((encoded - latents).pow(2).mean().item())
        both = torch.cat([frames, decoded], 3)[0].permute(0, 2, 3, 1)
        pictures.append((both * 255 + 0.5).to(torch.uint8).numpy())
    return {name: round(float(np.mean(values)), 4) for name, values in scores.items()}, pictures


def _psnr(frames: Tensor, reference: Tensor, weights: Tensor | None = None) -> float:
    error = (frames - reference).pow(2)
    mean = error.mean() if weights is None else (error * weights).sum() / weights.expand_as(error).sum()
    return float(-10 * mean.clamp_min(1e-12).log10())


def _matrices_and_others(parameters: list[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Convolutions wide on both sides, which Muon steps as matrices, and everything else."""
    matrices = [p for p in parameters if p.ndim >= 4 and p.shape[0] >= 8 and p[0].numel() >= 8]
    chosen = {id(p) for p in matrices}
    return matrices, [p for p in parameters if id(p) not in chosen]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the decoder and encoder of one autoencoder class.")
    parser.add_argument("--kind", choices=("wan", "taehv"), required=True)
    parser.add_argument("--minutes", type=float, required=True, help="of processor time")
    parser.add_argument("--data", type=Path, default=Path("training/cache"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--export", type=Path, help="folder of the result; by default OUT/model")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    config = DecoderConfig(kind=arguments.kind, minutes=arguments.minutes, data=arguments.data, out=arguments.out)
    trainer = Trainer(config)
    trainer.run()
    trainer.export(arguments.export or arguments.out / "model")
    clips = range(len(trainer.data.pixels) - min(24, config.held_out), len(trainer.data.pixels))
    scores, pictures = measure(trainer.codec, trainer.data, clips)
    (arguments.out / "scores.json").write_text(json.dumps(scores))
    save_sheet(arguments.out / "sheet.png", pictures[:8], ["original above, decoded below"] * len(pictures[:8]))
    logger.info("%s", json.dumps(scores))


if __name__ == "__main__":
    main()
