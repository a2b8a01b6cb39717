"""Train the decoders and encoders: `python -m training.decoders --kind wan --minutes 22 --out
training/cache/decoder_wan`.

The latents are given (a principal component analysis of patches), so both halves are plain regressions:
decoders from latents to frames, encoders from frames to latents. A linear decoder is fitted first, which
takes seconds, and the real one begins as that. Time is counted in minutes of the processor, so that a busy
machine changes how long a run takes and not what comes out.

The result is an ordinary diffusers folder in float16, of `AutoencoderKLWan` or of `TAEHV`.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.device import has_bfloat16
from pipeline.taehv import TAEHV
from training import console
from training.codecs import Codec, TaehvCodec, WanCodec
from training.data import ClipDataset
from training.decoder_batches import Batch, Batches, Part, Phase
from training.decoder_scores import measure, pictures
from training.network import save_atomically
from training.optim import Muon, WeightAverage
from training.pca import SPATIAL_STRIDE, TEMPORAL_STRIDE
from training.sheets import save_sheet

logger = logging.getLogger(__name__)


PHASES = (
    Phase("linear", 0.10, samples=4, latents=3, crop=(4, 7)),
    Phase("decoder", 0.36, samples=3, latents=3, crop=(4, 7)),
    Phase("decoder", 0.44, samples=2, latents=4),
    Phase("encoder", 0.10, samples=6, latents=3, crop=(4, 7)),
)


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Settings of a run."""

    kind: Literal["wan", "taehv"]
    minutes: float
    """Of processor time."""
    data: Path
    out: Path
    device: str = "cpu"
    init: Path | None = None
    """A folder of this kind to start from; the linear part is left out then."""
    phases: tuple[Phase, ...] = PHASES
    seed: int = 0
    matrix_rate: float = 0.002
    other_rate: float = 2e-3
    warmup_steps: int = 20
    flat: float = 0.5
    """Share of a part's time at the full rate; then it falls linearly."""
    average: float = 0.99
    latent_noise: float = 0.1
    """Largest noise on a sample's latents, in each channel's standard deviations: generated latents are not
    perfect."""
    subject_weight: float = 4.0
    first_share: float = 0.25
    """Samples that begin with the clip."""
    held_out: int = 100
    """Clips with pixels, the last ones, that are never trained on."""
    checkpoint_seconds: float = 120.0


class Trainer:
    """One run: its networks, its place in the plan, and what a checkpoint must hold to go on from there."""

    def __init__(self, config: DecoderConfig) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.data = ClipDataset(config.data)
        self.codec = build(config.kind, self.data.info.channels)
        self.linear = self.codec.linear()
        self.phases = config.phases
        if config.init is not None:
            state = load_file(config.init / "diffusion_pytorch_model.safetensors")
            self.codec.module.load_state_dict(state)
            kept = [phase for phase in config.phases if phase.part != "linear"]
            total = sum(phase.share for phase in kept)
            self.phases = tuple(replace(phase, share=phase.share / total) for phase in kept)
        self.networks = nn.ModuleDict({"codec": self.codec.module, "linear": self.linear})
        self.device = torch.device(config.device)
        self.networks.to(self.device)
        self.batches = Batches(
            self.data,
            held_out=config.held_out,
            first_group=self.codec.first_group,
            subject_weight=config.subject_weight,
            first_share=config.first_share,
            seed=config.seed,
        )
        sample = self.data.latents[:: max(1, len(self.data.latents) // 200)].astype(np.float32)
        self.deviation = torch.from_numpy(sample.std(axis=(0, 1, 3, 4))).view(1, 1, -1, 1, 1).to(self.device)
        self.minutes, self.steps, self.part_steps = 0.0, 0, 0
        self.part: Part | None = None
        self.checkpoint = config.out / "checkpoint.pt"
        if self.checkpoint.exists():
            self._load(torch.load(self.checkpoint, map_location=self.device, weights_only=True))

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
        for phase in self.phases:
            if spent < before + phase.share:
                shares = [(other.part, other.share) for other in self.phases]
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
        batch = self.batches.draw(phase).to(self.device)
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
        for group in self.muon.param_groups:
            group["lr"] = self.config.matrix_rate * rate
        self.muon.step()
        self.average.update()
        self.steps += 1
        self.part_steps += 1
        return error

    def _decoder_loss(self, batch: Batch) -> tuple[Tensor, float]:
        noise = self.config.latent_noise * torch.rand_like(batch.latents[:, :1, :1, :1, :1]) * self.deviation
        latents = batch.latents + noise * torch.randn_like(batch.latents)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=has_bfloat16(self.device)):
            frames = self.linear(latents) if self.part == "linear" else self.codec.decode(latents)
        difference, weights = frames.float() - batch.frames, batch.pixel_weights
        absolute = (difference.abs() * weights).mean()
        squared = (difference.pow(2) * weights).mean()
        edges = (difference.diff(dim=-1).abs() * weights[..., 1:]).mean()
        edges = edges + (difference.diff(dim=-2).abs() * weights[..., 1:, :]).mean()
        loss = (absolute + 4 * squared + 0.5 * edges) / weights.mean()
        return loss, difference.detach().pow(2).mean().item()

    def _encoder_loss(self, batch: Batch) -> tuple[Tensor, float]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=has_bfloat16(self.device)):
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
        torch.set_rng_state(state["random"][1].cpu())
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
    """A fresh codec of the embedded model's size, with the strides of its latents.

    The last stage is where the time goes: it has the most pixels, and is kept narrow for that. Frames are doubled
    late, so that the stages before work on fewer of them.
    """
    stages = 3
    patch_size = SPATIAL_STRIDE // 2**stages
    if kind == "taehv":
        return TaehvCodec(
            TAEHV(
                latent_channels=channels,
                decoder_widths=(128, 96, 48, 32),
                encoder_width=32,
                latent_limit=9.0,
                patch_size=patch_size,
            )
        )
    colours = 3 * patch_size**2
    vae = AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=16,
        z_dim=channels,
        dim_mult=[1, 2, 6, 6],
        num_res_blocks=1,
        temperal_downsample=[True, True, False],
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
        in_channels=colours,
        out_channels=colours,
        patch_size=patch_size if patch_size > 1 else None,
        scale_factor_temporal=TEMPORAL_STRIDE,
        scale_factor_spatial=SPATIAL_STRIDE,
    )
    return WanCodec(vae)


def _matrices_and_others(parameters: list[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Convolutions wide on both sides, which Muon steps as matrices, and everything else."""
    matrices = [p for p in parameters if p.ndim >= 4 and p.shape[0] >= 8 and p[0].numel() >= 8]
    chosen = {id(p) for p in matrices}
    return matrices, [p for p in parameters if id(p) not in chosen]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.decoders", description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=("wan", "taehv"), required=True)
    parser.add_argument("--minutes", type=float, required=True, help="of processor time")
    parser.add_argument("--data", type=Path, default=Path("training/cache"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint and the scores")
    parser.add_argument("--export", type=Path, help="folder of the result; by default OUT/model")
    parser.add_argument("--init", type=Path, help="folder of a model of this kind to go on from")
    parser.add_argument("--matrix-rate", type=float, default=DecoderConfig.matrix_rate)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=console.whole_number(1), default=1, help="of torch, on the CPU")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    config = DecoderConfig(
        kind=options.kind,
        minutes=options.minutes,
        data=options.data,
        out=options.out,
        init=options.init,
        matrix_rate=options.matrix_rate,
        device=options.device,
    )
    trainer = Trainer(config)
    trainer.run()
    trainer.export(options.export or options.out / "model")
    trainer.networks.cpu()
    count = len(trainer.data.pixels)
    scores = measure(trainer.codec, trainer.data, range(count - min(24, config.held_out), count))
    logger.info("%s", json.dumps(scores))
    (options.out / "scores.json").write_text(json.dumps(scores))
    shown = range(count - min(8, config.held_out), count)
    captions = [f"clip {clip}: original above, decoded below" for clip in shown]
    save_sheet(options.out / "sheet.png", pictures(trainer.codec, trainer.data, shown), captions)


if __name__ == "__main__":
    main()
