"""Judge what a video shows: `python -m training.probe --out weights/probe`.

A small convolutional network, trained on real clips only, reads scene, time, weather, subject and colour from single
frames and finds the subject's pixels. Motion is never classified: it is measured by following the subject's centroid,
which generated clips do not fool. Lengths are in frame heights, speeds in frame heights per frame.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from training.data import ClipDataset
from training.pca import TEMPORAL_STRIDE
from training.tracking import follow, read_motion
from training.world import ATTRIBUTES, HEIGHT, WIDTH, ClipParams, render, sample_params

logger = logging.getLogger(__name__)
Array = np.ndarray

WINDOW = 33
"""Frames of a window: what nine latent frames decode to at the start of a video."""
READ = ("scene", "time", "weather", "subject", "colour")
"""Attributes read by the network; motion comes from the track."""
_OF_SUBJECT = ("subject", "colour")
_HELD_OUT_SEED = 9_000_000
_PERMUTED_SHARE, _DECODED_SHARE, _LATENT_NOISE = 0.3, 0.3, 0.3
_BLOTCH = 8
"""Size of the blotches that augmentation adds, in pixels."""


@dataclass(frozen=True)
class ProbeConfig:
    """Sizes of the network. Frames of another size are resized to `height` x `width` first.

    Half the world's size tells everything apart that a prompt can ask for.
    """

    height: int = HEIGHT // 2
    width: int = WIDTH // 2
    stem: int = 40
    channels: int = 64
    blocks: int = 3
    hidden: int = 96
    visible_cells: float = 1.0
    """Area of the subject, in cells of the last layer, from which on a frame counts as showing it."""


@dataclass
class WindowReading:
    """What one window of a video shows.

    Attributes:
        attributes: read value of every attribute, motion included.
        visible: share of frames in which a subject is seen.
        x, y: [T] centroid of the subject's visible part, NaN where there is none.
        speed: median speed of the subject in the direction it moves.
    """

    attributes: dict[str, str]
    visible: float
    x: Array
    y: Array
    speed: float


class AttributeProbe(nn.Module):
    """Reads single frames."""

    def __init__(self, config: ProbeConfig = ProbeConfig()) -> None:
        super().__init__()
        self.config = config
        width = config.channels
        self.stem = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, config.stem, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(config.stem, width, 4, stride=2, padding=1),
            nn.GELU(),
        )
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(config.blocks))
        self.cover = nn.Conv2d(width, 1, 1)
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Linear(2 * width if name in _OF_SUBJECT else width, config.hidden),
                    nn.GELU(),
                    nn.Linear(config.hidden, len(ATTRIBUTES[name])),
                )
                for name in READ
            }
        )

    def forward(self, frames: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Frames [N, 3, H, W] in 0..1 -> logits [N, values] by attribute, and subject coverage logits [N, H/8, W/8]."""
        x = self._trunk(frames)
        cover = self.cover(x)[:, 0]
        weight = torch.sigmoid(cover)[:, None]
        everywhere = x.mean(dim=(2, 3))
        mean = (x * weight).sum(dim=(2, 3)) / (weight.sum(dim=(2, 3)) + 0.5)
        subject = torch.cat(
            [mean, (x * weight).amax(dim=(2, 3))], dim=1
        )  # the maximum keeps small parts, like a basket
        pooled = {name: subject if name in _OF_SUBJECT else everywhere for name in READ}
        return {name: head(pooled[name]) for name, head in self.heads.items()}, cover

    def _trunk(self, frames: Tensor) -> Tensor:
        x = self.stem(frames * 4.0 - 2.0)
        for block in self.blocks:
            x = x + functional.gelu(block(x))
        return x

    @torch.no_grad()
    def features(self, frames: Array) -> Array:
        """What is in frames uint8 [T, H, W, 3] before anything is read from it: its mean and spread, [T, 2 C]."""
        x = self._trunk(self._prepare(frames))
        return torch.cat([x.mean(dim=(2, 3)), x.std(dim=(2, 3))], dim=1).numpy()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: value.contiguous() for name, value in self.state_dict().items()},
            folder / "probe.safetensors",
        )
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=1))

    @classmethod
    def load(cls, folder: str | Path) -> AttributeProbe:
        """Raises FileNotFoundError when the folder holds no trained probe."""
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} holds no probe; run python -m training.probe --out {folder}")
        probe = cls(ProbeConfig(**json.loads((folder / "config.json").read_text())))
        probe.load_state_dict(load_file(folder / "probe.safetensors"))
        return probe.eval()

    def _prepare(self, frames: Array) -> Tensor:
        """uint8 [T, H, W, 3] -> float [T, 3, height, width] in 0..1."""
        pixels = torch.from_numpy(np.array(frames)).permute(0, 3, 1, 2).float() / 255
        size = (self.config.height, self.config.width)
        return resized(pixels, size)

    @torch.no_grad()
    def read(self, frames: Array) -> WindowReading:
        """Read one window of a video, uint8 [T, H, W, 3]. Its frames vote, each with the visibility of the subject."""
        logits, cover = self(self._prepare(frames))
        coverage = torch.sigmoid(cover)
        area = coverage.sum(dim=(1, 2))
        seen = area > self.config.visible_cells
        votes = (area / 4).clamp(0.02, 1.0)
        attributes = {}
        for name in READ:
            weights = votes if name in _OF_SUBJECT else torch.ones_like(votes)
            summed = (logits[name].log_softmax(-1) * weights[:, None]).sum(dim=0)
            attributes[name] = ATTRIBUTES[name][int(summed.argmax())]
        x, y = follow(coverage.numpy(), seen.numpy())
        motion = read_motion(x, y)
        attributes["motion"] = motion.direction
        return WindowReading(attributes, float(seen.float().mean()), x, y, motion.speed)


def resized(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Frames [N, 3, H, W] at another height and width."""
    return frames if frames.shape[-2:] == size else functional.interpolate(frames, size, mode="area")


def augment(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Make real frames [N, 3, H, W] look a little like generated ones: soft, noisy, slightly off in colour."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    n, _, height, width = frames.shape
    soft = functional.avg_pool2d(frames, 3, stride=1, padding=1, count_include_pad=False)
    softer = functional.avg_pool2d(soft, 3, stride=1, padding=1, count_include_pad=False)
    kind = uniform(n, 1, 1, 1)
    frames = torch.where(kind < 0.3, soft, torch.where(kind < 0.5, softer, frames))
    blotches = normal(n, 3, height // _BLOTCH, width // _BLOTCH)
    blotches = functional.interpolate(blotches, (height, width), mode="bilinear")
    frames = frames * (1 + 0.08 * (2 * uniform(n, 3, 1, 1) - 1)) + 0.04 * (2 * uniform(n, 3, 1, 1) - 1)
    frames = frames + 0.06 * uniform(n, 1, 1, 1) * blotches + 0.06 * uniform(n, 1, 1, 1) * normal(*frames.shape)
    return frames.clamp(0, 1)


@dataclass
class _Batch:
    """Frames [N, 3, H, W], coverage of the subject in each cell [N, h, w], and classes [N] by attribute."""

    frames: Tensor
    cover: Tensor
    classes: dict[str, Tensor]


class _FrameSampler:
    """Random frames of the training clips: most as rendered, some decoded linearly from latents with noise on them."""

    def __init__(self, data: ClipDataset, seed: int, size: tuple[int, int]) -> None:
        self.data, self.rng, self.size = data, np.random.default_rng(seed), size
        self.classes = {n: np.array([ATTRIBUTES[n].index(getattr(p, n)) for p in data.params]) for n in READ}

    def draw(self, size: int) -> _Batch:
        decoded = round(_DECODED_SHARE * size)
        clips = np.concatenate(
            [
                self.rng.integers(len(self.data.train_indices), size=decoded),
                self.rng.integers(min(len(self.data.pixels), len(self.data.train_indices)), size=size - decoded),
            ]
        )
        times = self.rng.integers(self.data.info.num_frames, size=size)
        groups = -(-times // TEMPORAL_STRIDE)  # frame 0 is latent 0, frames 1-4 are latent 1
        frames = self._decoded(clips[:decoded], groups[:decoded], times[:decoded])
        stored = [self.data.pixels[c, t] for c, t in zip(clips[decoded:], times[decoded:], strict=True)]
        frames = np.concatenate([frames, np.stack(stored).astype(np.float32) / 255])
        masks = np.stack([self.data.masks[c, g] for c, g in zip(clips, groups, strict=True)])
        classes = {name: torch.from_numpy(values[clips]) for name, values in self.classes.items()}
        pixels = resized(torch.from_numpy(frames).permute(0, 3, 1, 2), self.size)
        return _Batch(pixels, torch.from_numpy(masks).float() / 255, classes)

    def _decoded(self, clips: Array, groups: Array, times: Array) -> Array:
        latents = np.stack([self.data.latents[c, g] for c, g in zip(clips, groups, strict=True)]).astype(np.float32)
        strength = self.rng.uniform(0, _LATENT_NOISE, (len(latents), 1, 1, 1)).astype(np.float32)
        noisy = latents + strength * self.rng.standard_normal(latents.shape, dtype=np.float32)
        # Decoding them as one clip is right for each group by itself; only the first group gives a single frame.
        frames = self.data.pca.decode(np.concatenate([noisy[:1], noisy]))[1:]
        return frames[np.arange(len(noisy)) * TEMPORAL_STRIDE + (times - 1) % TEMPORAL_STRIDE]


def _loss(probe: AttributeProbe, batch: _Batch, generator: torch.Generator) -> Tensor:
    frames, cover, classes = augment(batch.frames, generator), batch.cover, batch.classes
    # Some frames get other colours, and are asked for the shape alone: so shapes do not hang on colours and scenes.
    true_colours = torch.rand(len(frames), generator=generator) >= _PERMUTED_SHARE
    channels = torch.rand(len(frames), 3, generator=generator).argsort(dim=1)
    permuted = frames[torch.arange(len(frames))[:, None], channels]
    logits, predicted = probe(torch.where(true_colours[:, None, None, None], frames, permuted))
    # A subject that is hardly in the frame cannot be told: it counts as much as there is of it.
    there = (cover.sum(dim=(1, 2)) / 3).clamp(max=1)
    total = 20 * functional.binary_cross_entropy_with_logits(predicted, cover)
    for name in READ:
        loss = functional.cross_entropy(logits[name], classes[name], reduction="none")
        weight = there if name in _OF_SUBJECT else torch.ones_like(there)
        total = total + (loss * (weight if name == "subject" else weight * true_colours)).mean()
    return total


def train(
    data: ClipDataset,
    seconds: float,
    batch_size: int = 96,
    rate: float = 2e-3,
    seed: int = 0,
    max_steps: int = 1500,
) -> AttributeProbe:
    """Train until the steps are done or so much processor time is spent, the rate falling to zero."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    probe = AttributeProbe()
    optimizer = torch.optim.AdamW(probe.parameters(), lr=rate, weight_decay=0.02)
    started = time.process_time()
    sampler = _FrameSampler(data, seed, (probe.config.height, probe.config.width))
    for step in range(max_steps):
        done = max(step / max_steps, (time.process_time() - started) / seconds)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 40) * (1 - done)
        loss = _loss(probe, sampler.draw(batch_size), generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(probe.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            logger.info("step %d loss %.3f", step, loss.item())
    return probe.eval()


def agreement(readings: list[WindowReading], shown: list[ClipParams]) -> dict[str, float]:
    """Share of readings that name what was asked for. Space is not asked for its time of day or weather."""
    scores = {}
    for name in ATTRIBUTES:
        pairs = [(r.attributes[name], getattr(p, name)) for r, p in zip(readings, shown, strict=True) if p.shows(name)]
        scores[name] = float(np.mean([a == b for a, b in pairs])) if pairs else float("nan")
    return scores


def held_out_clips(
    count: int, num_frames: int = WINDOW, seed: int = _HELD_OUT_SEED
) -> Iterator[tuple[ClipParams, Array]]:
    """Real clips, uint8 [T, H, W, 3], of combinations that training never renders."""
    for index in range(count):
        params = sample_params(np.random.default_rng(seed + index), split="held_out")
        frames, _, _ = render(params, seed + index, num_frames)
        yield params, (frames * 255 + 0.5).astype(np.uint8)


def held_out_accuracy(probe: AttributeProbe, clips: int = 300) -> dict[str, float]:
    """How well the probe reads real clips of combinations it was never trained on."""
    shown, readings = [], []
    for params, frames in held_out_clips(clips):
        shown.append(params)
        readings.append(probe.read(frames))
    return agreement(readings, shown) | {"visible": float(np.mean([r.visible for r in readings]))}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the probe that judges videos of the procedural world.")
    parser.add_argument("--data", type=Path, default=Path("training/cache"))
    parser.add_argument("--out", type=Path, default=Path("training/cache/probe"))
    parser.add_argument("--seconds", type=float, default=230, help="processor time")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    from training.judge import save_judge  # which needs this module

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    data = ClipDataset(arguments.data)
    probe = train(data, arguments.seconds)
    report = save_judge(arguments.out, probe, data.pca, held_out_accuracy(probe))
    logger.info("%s", json.dumps(report))


if __name__ == "__main__":
    main()
