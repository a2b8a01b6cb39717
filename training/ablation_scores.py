"""What the ablation measures of a trained network: long rollouts, read window by window."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pipeline import SelfForcingPipeline
from pipeline.folder import INDEX_FILE
from training.asked import Prompt
from training.drift import Row, mean_of, measure, parts_of_quality, quality, rows
from training.export import export
from training.filming import film_together, frames_per_second, real_video
from training.frechet import features, frechet_distance
from training.network import load_network
from training.probe import WINDOW, AttributeProbe
from training.settings import NetworkSettings
from training.world import ATTRIBUTES, FPS

Array = np.ndarray

SPAN = 2
"""Windows before a mark that count for it: about four seconds."""
OTHER_CLIPS = 10**8


@dataclass(frozen=True)
class Seen:
    """What is kept of one video for each prompt.

    Attributes:
        rows: measures by window, means over videos.
        features: mark in seconds -> features of frames just before it, float64 [frames, D].
    """

    rows: list[Row]
    features: dict[float, Array]


def model_folder(
    run: Path, template: Path, folder: Path, steps: int | None = None, clean_context: bool = False
) -> Path:
    """Put a run's network into a copy of the template's model folder; returns the copy.

    Args:
        steps: denoising steps to sample with, evenly spaced; None: those of the template.
        clean_context: finished blocks are context without noise; otherwise with the template's.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder)
    shutil.rmtree(folder / "transformer")
    load_network(NetworkSettings(init=str(run))).half().save_pretrained(folder / "transformer")
    index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    if steps is not None:
        index["settings"]["denoising_steps"] = [1000 * (steps - step) / steps for step in range(steps)]
    if clean_context:
        index["settings"]["context_noise"] = 0.0
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return folder


def make_template(ode: Path, data: Path, folder: Path) -> Path:
    """A model folder with the decoders and the sampler's settings that all methods share."""
    if not (folder / INDEX_FILE).is_file():
        export(ode, data, folder)
    return folder


def save_seen(seen: Seen, path: Path) -> None:
    """Write what was seen, whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        arrays = {f"{mark:g}": found for mark, found in seen.features.items()}
        np.savez_compressed(file, rows=json.dumps(seen.rows), **arrays)
    partial.replace(path)


def load_seen(path: Path) -> Seen:
    with np.load(path) as file:
        return Seen(json.loads(str(file["rows"])), {float(mark): file[mark] for mark in file.files if mark != "rows"})


def windows_at(mark: float, count: int) -> range:
    """The windows just before a mark in seconds, of a video of `count` windows."""
    end = min(count, max(1, round(mark * FPS / WINDOW)))
    return range(max(0, end - SPAN), end)


def see(probe: AttributeProbe, videos: Any, prompts: Sequence[Prompt], marks: Sequence[float]) -> Seen:
    """Read videos, each as it comes: all of them do not fit in memory."""
    measured, found = [], {mark: [] for mark in marks}
    for video in videos:
        measured.append(measure(probe, video))
        for mark in marks:
            spans = [video[w * WINDOW : (w + 1) * WINDOW] for w in windows_at(mark, len(measured[-1]))]
            found[mark].append(features(probe, spans))
    return Seen(rows(measured, prompts), {mark: np.concatenate(parts) for mark, parts in found.items()})


def see_real(
    probe: AttributeProbe, prompts: Sequence[Prompt], marks: Sequence[float], shape: tuple[int, int, int], other: bool
) -> Seen:
    """The same of rendered clips of the prompts; `other` takes other clips of the same prompts.

    Args:
        shape: frames, height and width.
    """
    moved = [Prompt(p.caption, p.params, p.seed + OTHER_CLIPS * other, p.stated) for p in prompts]
    return see(probe, (real_video(prompt, *shape) for prompt in moved), prompts, marks)


def score_run(
    folder: Path, probe: AttributeProbe, prompts: Sequence[Prompt], real: Seen, seconds: Sequence[float], device: str
) -> dict[str, Any]:
    """Roll out to the last mark; see `summary` for what comes back."""
    videos = tqdm(film_together(folder, device)(prompts, seconds[-1]), folder.name, len(prompts), disable=None)
    return summary(see(probe, videos, prompts, seconds), real)


def speed(folder: Path, prompt: Prompt, seconds: float) -> float:
    """Frames a second of one stream alone, on the CPU."""
    return frames_per_second(SelfForcingPipeline.from_pretrained(folder, device="cpu"), prompt, seconds)


def summary(seen: Seen, real: Seen) -> dict[str, Any]:
    """Curves by window, and what they are at the marks.

    `quality` as in `drift.py`, 0..1; `following`, share of the prompts' attributes that are shown, 0..1; `motion`,
    speed of subjects as a multiple of real clips'; at the marks also `distance`, a Frechet distance of the probe's
    features of frames from those of real clips at the same time.
    """
    count = min(len(seen.rows), len(real.rows))
    usual = max(mean_of(row["speed"] for row in real.rows), 1e-6)
    curves = {
        "quality": quality(parts_of_quality(seen.rows[:count], real.rows[:count])),
        "following": [mean_of(row[name] for name in ATTRIBUTES) for row in seen.rows[:count]],
        "motion": [row["speed"] / usual for row in seen.rows[:count]],
    }
    at = {}
    for mark in seen.features:
        span = windows_at(mark, count)
        at[f"{mark:g}"] = {name: mean_of(series[i] for i in span) for name, series in curves.items()} | {
            "distance": frechet_distance(seen.features[mark], real.features[mark])
        }
    return {"seconds": [(index + 0.5) * WINDOW / FPS for index in range(count)], "curves": curves, "at": at}
