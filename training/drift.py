"""How a long video changes: window by window, what the probe reads, how sharp it is and how much moves.

Windows have `probe.WINDOW` frames (two seconds). "Start" and "end" of a video are its first and last three windows.
Generated videos are compared with real clips of the same prompts and length, which never drift.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config import ModelSpec
from training.asked import Prompt
from training.probe import READ, WINDOW, AttributeProbe, WindowReading
from training.world import ATTRIBUTES, FPS

Array = np.ndarray
Row = dict[str, float]
"""Measures of one window by name, means over videos; NaN where nothing could be measured."""

_EDGE_WINDOWS = 3
_SEEN = 0.25
"""Share of a window's frames in which the subject must be seen for its shape, colour and motion to count."""
_QUARTER_LEVEL = 0.25 / 255
"""Added to frame differences (0..1), so that two that are both nothing are the same."""


@dataclass(frozen=True)
class Window:
    """Measures of one window of one video.

    Attributes:
        reading: what the probe reads.
        contrast: standard deviation of the pixels, of 1.
        sharpness: mean difference of neighbours in a row, of 1.
        change: mean difference of a pixel from frame to frame, of 1.
    """

    reading: WindowReading
    contrast: float
    sharpness: float
    change: float


def measure(probe: AttributeProbe, video: Array) -> list[Window]:
    """The windows of a video, uint8 [T, H, W, 3]; a rest is left out unless it is all there is."""
    windows = []
    for start in range(0, max(1, len(video) - WINDOW + 1), WINDOW):
        part = video[start : start + WINDOW]
        pixels = part.astype(np.float32) / 255
        windows.append(
            Window(
                reading=probe.read(part),
                contrast=float(pixels.std()),
                sharpness=float(np.abs(np.diff(pixels, axis=2)).mean()),
                change=float(np.abs(np.diff(pixels, axis=0)).mean()) if len(part) > 1 else 0.0,
            )
        )
    return windows


def rows(videos: Sequence[Sequence[Window]], prompts: Sequence[Prompt]) -> list[Row]:
    """Means over videos, window by window.

    By name: an attribute, `scene`: share of videos that show the value asked for; `scene kept`: share that show what
    their start shows; `visible`: share of frames with a subject; `contrast`, `sharpness` and `change` as in `Window`;
    of prompts whose subject moves, and windows in which it is seen, `speed`, in frame heights a frame, and `frozen`,
    the share in which it rests.
    """
    count = min(len(windows) for windows in videos)
    firsts = [_shown_first(windows[:_EDGE_WINDOWS]) for windows in videos]
    return [_row([windows[index] for windows in videos], prompts, firsts) for index in range(count)]


def _row(windows: Sequence[Window], prompts: Sequence[Prompt], firsts: Sequence[Mapping[str, str]]) -> Row:
    row: Row = {}
    clips = list(zip(windows, prompts, firsts, strict=True))
    for name in ATTRIBUTES:
        asked = [w.reading.attributes.get(name) == getattr(p.params, name) for w, p, _ in clips if name in p.stated]
        row[name] = mean_of(asked)
    for name in READ:
        of_subject = name in ("subject", "colour")
        row[f"{name} kept"] = mean_of(
            w.reading.attributes[name] == first[name]
            for w, _, first in clips
            if w.reading.visible >= _SEEN or not of_subject
        )
    row["visible"] = mean_of(w.reading.visible for w in windows)
    for name in ("contrast", "sharpness", "change"):
        row[name] = mean_of(getattr(w, name) for w in windows)
    moving = [w for w, p, _ in clips if moves(p) and w.reading.visible >= _SEEN]
    row["speed"] = mean_of(w.reading.speed for w in moving)
    row["frozen"] = mean_of(w.reading.attributes["motion"] == "still" for w in moving)
    return row


def _shown_first(windows: Sequence[Window]) -> dict[str, str]:
    """What most of the first windows show."""
    shown = {name: [window.reading.attributes[name] for window in windows] for name in READ}
    return {name: max(values, key=values.count) for name, values in shown.items()}


def moves(prompt: Prompt) -> bool:
    """Whether a prompt states that its subject moves."""
    return "motion" in prompt.stated and prompt.params.motion != "still"


def mean_of(values: Iterable[float]) -> float:
    """The mean of the numbers among the values; NaN if there are none."""
    found = [value for value in values if np.isfinite(value)]
    return float(np.mean(found)) if found else float("nan")


def at_start(series: Sequence[float]) -> float:
    return mean_of(series[: _edge(series)])


def at_end(series: Sequence[float]) -> float:
    return mean_of(series[-_edge(series) :])


def _edge(series: Sequence[float]) -> int:
    return max(1, min(_EDGE_WINDOWS, len(series) // 2))


def parts_of_quality(generated: Sequence[Row], real: Sequence[Row]) -> dict[str, list[float]]:
    """What quality is the mean of, by window, each 0..1.

    `scene`, `time`, `subject` (its shape), `colour` and the like: share of videos that still show what their start
    shows; `visible`: how often a subject is seen, as a share of how often it is in real clips, at most 1; `sharpness`
    and `contrast`: against the start, the smaller by the larger, so that too much is as bad as too little.
    """
    parts = {name: [row[f"{name} kept"] for row in generated] for name in READ}
    there = [min(1.0, row["visible"] / max(mean_of(r["visible"] for r in real), 1e-6)) for row in generated]
    parts["visible"] = there
    for name in ("sharpness", "contrast"):
        series = [max(row[name], 1e-6) for row in generated]
        start = at_start(series)
        parts[name] = [min(value / start, start / value) for value in series]
    return parts


def quality(parts: Mapping[str, Sequence[float]]) -> list[float]:
    """The mean of the parts, by window, 0..1."""
    return [mean_of(values) for values in zip(*parts.values(), strict=True)]


@dataclass(frozen=True)
class Jump:
    """Change of the pixels of one video from frame to frame, as a multiple of the median one around; 1: no jump.

    Attributes:
        there: where the first frame leaves the window.
        elsewhere: where other blocks begin, their mean.
    """

    there: float
    elsewhere: float


def jump(video: Array, spec: ModelSpec) -> Jump | None:
    """How much a video, uint8 [T, H, W, 3], changes where a model of this window may jump; None if it is too short."""
    leaves = spec.frames_in(spec.window_frames // spec.frames_per_block)
    block = spec.temporal_stride * spec.frames_per_block
    if len(video) <= leaves:
        return None
    others = (frame for frame in range(leaves % block, len(video), block) if frame and frame != leaves)
    return Jump(_change(video, leaves, block), mean_of(_change(video, frame, block) for frame in others))


def flicker(jumps: Iterable[Jump | None]) -> dict[str, float] | None:
    """Change of the pixels where the first frame leaves the window: `mean` and `worst` of the videos.

    1: nothing is to be seen. `elsewhere` is the same where other blocks begin: what is more than that is the window's
    doing. None where no video is that long.
    """
    seen = [found for found in jumps if found is not None]
    if not seen:
        return None
    there = [found.there for found in seen]
    return {"mean": float(np.mean(there)), "worst": max(there), "elsewhere": mean_of(found.elsewhere for found in seen)}


def _change(video: Array, frame: int, around: int) -> float:
    """How much changes from the frame before to this one, as a multiple of the median of so many frames around."""
    nearby = video[max(0, frame - 1 - around) : frame + 1 + around].astype(np.float32) / 255
    changes = np.abs(np.diff(nearby, axis=0)).mean(axis=(1, 2, 3)) + _QUARTER_LEVEL
    return float(changes[min(around, frame - 1)] / np.median(changes))


def drift_report(generated: Sequence[Row], real: Sequence[Row]) -> dict[str, Any]:
    """Quality by window and its parts; `relative` is the end's as a fraction of the start's."""
    parts = parts_of_quality(generated, real)
    by_window = quality(parts)
    start, end = at_start(by_window), at_end(by_window)
    return {
        "window_seconds": WINDOW / FPS,
        "quality": by_window,
        "start": start,
        "end": end,
        "relative": end / start,
        "parts": parts,
    }


def motion_report(generated: Sequence[Row], real: Sequence[Row]) -> dict[str, Any]:
    """Motion as a multiple of that of real clips of the same prompts (1: as much), and the share of it that froze.

    `speed` compares how fast subjects move that should, `change` how much all pixels change from frame to frame, each
    at the start and at the end. `frozen` is the share of windows in which a subject rests that should move, and
    `frozen_real` that share in real clips.
    """

    def against(name: str) -> dict[str, float]:
        whole = max(mean_of(row[name] for row in real), 1e-6)
        series = [row[name] / whole for row in generated]
        return {"start": at_start(series), "end": at_end(series)}

    return {
        "speed": against("speed"),
        "change": against("change"),
        "frozen": mean_of(row["frozen"] for row in generated),
        "frozen_real": mean_of(row["frozen"] for row in real),
    }
