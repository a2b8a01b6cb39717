"""Render the training clips and encode them: `python -m training.data --out training/cache`.

A finished folder holds `latents.npy` float16 [N, F, C, h, w], `masks.npy` uint8 [N, F, h, w] (share of the subject,
0..255), `pixels.npy` uint8 [P, T, H, W, 3] of the first P clips, `params.json`, `pca.npz` and, written last,
`dataset.json`. The last clips of a folder are for validation and never trained on.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from pipeline.errors import WeightsError
from training import console
from training.pca import SPATIAL_STRIDE, TEMPORAL_STRIDE, PatchPCA, mask_patches, psnr, read_pca, to_patches
from training.world import FPS, HEIGHT, NUM_FRAMES, WIDTH, ClipParams, render, sample_params

logger = logging.getLogger(__name__)
Array = np.ndarray

_MARKER = "dataset.json"
_ARRAYS = ("latents.npy", "masks.npy", "pixels.npy")
_CLIP_SEED, _FIT_SEED = 100_000, 5_000_000
_FIT_CLIPS, _SUBJECT_WEIGHT, _SUBJECT_SHARE = 400, 4.0, 0.03


@dataclass(frozen=True)
class DatasetInfo:
    """Sizes of a finished folder."""

    clips: int
    validation: int
    pixel_clips: int
    channels: int
    num_frames: int = NUM_FRAMES
    height: int = HEIGHT
    width: int = WIDTH
    fps: int = FPS

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """F, C, h, w of one clip."""
        frames = (self.num_frames - 1) // TEMPORAL_STRIDE + 1
        return frames, self.channels, self.height // SPATIAL_STRIDE, self.width // SPATIAL_STRIDE


class ClipDataset:
    """A finished folder, opened read-only without loading it into memory.

    Attributes:
        latents: float16 [N, F, C, h, w]; masks: uint8 [N, F, h, w]; pixels: uint8 [P, T, H, W, 3] of the first P clips;
        params: what each clip shows; pca: the encoder; info: the sizes.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        if not (folder / _MARKER).is_file():
            raise FileNotFoundError(f"{folder} holds no finished data set; run python -m training.data --out {folder}")
        self.info = DatasetInfo(**json.loads((folder / _MARKER).read_text()))
        self.latents: Array = np.load(folder / "latents.npy", mmap_mode="r")
        self.masks: Array = np.load(folder / "masks.npy", mmap_mode="r")
        self.pixels: Array = np.load(folder / "pixels.npy", mmap_mode="r")
        self.params = [ClipParams(**entry) for entry in json.loads((folder / "params.json").read_text())]
        self.pca = PatchPCA.load(folder / "pca.npz")

    @property
    def train_indices(self) -> range:
        return range(self.info.clips - self.info.validation)

    @property
    def validation_indices(self) -> range:
        return range(self.info.clips - self.info.validation, self.info.clips)


def training_clip(seed: int) -> tuple[ClipParams, Array, Array]:
    """One clip that training may see: what it shows, frames uint8 [T, H, W, 3] and latent mask float [F, h, w]."""
    params = sample_params(np.random.default_rng(seed), split="train")
    frames, mask, _ = render(params, seed)
    return params, (frames * 255 + 0.5).astype(np.uint8), mask_patches(mask)


def _fit_sample(seed: int) -> tuple[Array, Array]:
    """Half of the patches of two latent frames of a clip, and how much each counts."""
    _, frames, mask = training_clip(seed)
    first = int(np.random.default_rng(seed).integers(len(mask) - 1))
    patches = to_patches(frames)[first : first + 2]
    weights = 1.0 + _SUBJECT_WEIGHT * (mask[first : first + 2] > _SUBJECT_SHARE)
    return patches.reshape(-1, patches.shape[-1])[::2], weights.reshape(-1)[::2].astype(np.float32)


def fit_pca(pool: multiprocessing.pool.Pool, channels: int, clips: int) -> PatchPCA:
    """Fit the latent space to clips of their own seeds; the subject counts more than the background."""
    samples = pool.map(_fit_sample, range(_FIT_SEED, _FIT_SEED + clips), chunksize=10)
    patches = np.concatenate([sample for sample, _ in samples])
    return PatchPCA.fit(patches, np.concatenate([weight for _, weight in samples]), channels)


def _fill(clips: range, folder: Path, pca: PatchPCA, pixel_clips: int) -> list[dict[str, str]]:
    """Render some clips into the arrays of the folder; returns their parameters."""
    latents, masks, pixels = (np.load(folder / f"{name}.partial", mmap_mode="r+") for name in _ARRAYS)
    shown = []
    for clip in clips:
        params, frames, mask = training_clip(_CLIP_SEED + clip)
        latents[clip] = pca.encode(frames)
        masks[clip] = (mask * 255 + 0.5).astype(np.uint8)
        if clip < pixel_clips:
            pixels[clip] = frames
        shown.append(params.to_dict())
    return shown


def build(
    folder: Path,
    info: DatasetInfo,
    processes: int = 2,
    fit_clips: int = _FIT_CLIPS,
    pca: PatchPCA | None = None,
) -> ClipDataset:
    """Render a data set. A folder without the marker, left by a run that was killed, is written anew.

    Args:
        pca: the latent space to encode into; None: fit one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARKER).unlink(missing_ok=True)
    frames, channels, h, w = info.latent_shape
    shapes = {
        "latents.npy": ((info.clips, frames, channels, h, w), np.float16),
        "masks.npy": ((info.clips, frames, h, w), np.uint8),
        "pixels.npy": ((info.pixel_clips, info.num_frames, info.height, info.width, 3), np.uint8),
    }
    for name, (shape, dtype) in shapes.items():
        with (folder / f"{name}.partial").open("wb") as file:
            header = {
                "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
                "fortran_order": False,
                "shape": shape,
            }
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + int(np.prod(shape)) * np.dtype(dtype).itemsize)
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when a worker starts
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        if pca is None:
            pca = fit_pca(pool, info.channels, fit_clips)
            logger.info("fitted the latent space")
        size = 100
        ranges = [range(start, min(start + size, info.clips)) for start in range(0, info.clips, size)]
        work = partial(_fill, folder=folder, pca=pca, pixel_clips=info.pixel_clips)
        params: list[dict[str, str]] = []
        for part in pool.imap(work, ranges):
            params += part
            if len(params) % 1000 == 0:
                logger.info("%d of %d clips", len(params), info.clips)
    pca.save(folder / "pca.npz")
    (folder / "params.json").write_text(json.dumps(params))
    for name in _ARRAYS:
        (folder / f"{name}.partial").replace(folder / name)
    marker = folder / f"{_MARKER}.partial"
    marker.write_text(json.dumps(asdict(info)))
    marker.replace(folder / _MARKER)
    return ClipDataset(folder)


def _read_space(path: Path) -> PatchPCA:
    """A latent space of this world.

    Raises:
        WeightsError: the file holds none, or one of other patches.
    """
    try:
        pca = read_pca(path)
    except (OSError, SafetensorError, TypeError) as error:
        raise WeightsError(f"{path} holds no latent space; weights/probe/pca.safetensors is one.") from error
    size = 3 * TEMPORAL_STRIDE * SPATIAL_STRIDE**2
    if pca.mean.size != size:
        raise WeightsError(f"{path} is of patches with {pca.mean.size} numbers, but this world's have {size}.")
    return pca


def measure(data: ClipDataset, clips: int = 50) -> dict[str, float | list[float]]:
    """Statistics of the latents, and PSNR in dB of decoding validation clips linearly (all pixels, subject pixels)."""
    step = max(1, data.info.clips // 200)
    sample = data.latents[::step].astype(np.float32)
    everything, subject = [], []
    for clip in list(data.validation_indices)[:clips]:
        seed = _CLIP_SEED + clip
        frames, mask, _ = render(data.params[clip], seed)
        decoded = data.pca.decode(data.latents[clip])
        everything.append(psnr(decoded, frames))
        if mask.sum() > 0:
            subject.append(psnr(decoded, frames, mask))
    return {
        "std_per_channel": [round(float(v), 3) for v in sample.std(axis=(0, 1, 3, 4))],
        "std": round(float(sample.std()), 3),
        "psnr": round(float(np.mean(everything)), 2),
        "psnr_subject": round(float(np.mean(subject)), 2),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Render and encode captioned clips of the procedural world.")
    parser.add_argument("--clips", type=int, default=6000)
    parser.add_argument("--out", type=Path, default=Path("training/cache"))
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument(
        "--pca",
        type=Path,
        help="encode into the latent space in this file, as weights/probe/pca.safetensors, instead of fitting one: "
        "networks and decoders trained in it can be used on",
    )
    parser.add_argument("--validation", type=int, default=300)
    parser.add_argument("--pixel-clips", type=int, default=600)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def work() -> None:
        started = time.monotonic()
        pca = _read_space(arguments.pca) if arguments.pca else None
        info = DatasetInfo(
            clips=arguments.clips,
            validation=min(arguments.validation, arguments.clips // 10),
            pixel_clips=min(arguments.pixel_clips, arguments.clips),
            channels=pca.channels if pca else arguments.channels,
        )
        data = build(arguments.out, info, arguments.processes, pca=pca)
        logger.info("%s", json.dumps(measure(data)))
        logger.info("%d clips in %.0f s", info.clips, time.monotonic() - started)

    return console.run(work)


if __name__ == "__main__":
    sys.exit(main())
