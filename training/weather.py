"""Weather of the procedural world: a veil over the still picture, and what falls or drifts in front of everything.

Falling drops and flakes repeat in space, every fourth of the frame height, and rain also in time: it falls by one such
period in the frames that a latent stands for. So rain is one unchanging pattern to the model, however lively it
looks, and snow two that alternate. Fog drifts and is as before after 32 latents. Lengths are in frame heights.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from training.shapes import Array

WEATHERS = ("clear", "rain", "snow", "fog")

Colour = tuple[float, float, float]
_VEIL: dict[str, dict[str, Colour]] = {
    "rain": {"day": (0.47, 0.53, 0.60), "sunset": (0.55, 0.40, 0.40), "night": (0.10, 0.13, 0.22)},
    "snow": {"day": (0.78, 0.82, 0.88), "sunset": (0.80, 0.62, 0.60), "night": (0.26, 0.30, 0.44)},
    "fog": {"day": (0.86, 0.88, 0.89), "sunset": (0.90, 0.70, 0.58), "night": (0.27, 0.31, 0.40)},
}
_LIGHT = {"day": 1.0, "sunset": 0.92, "night": 0.72}
_PERIOD = 0.25
_REPEATS = {"rain": 4, "snow": 8, "fog": 128}
"""Frames in which what falls has fallen by one period, and a bank of fog has drifted to the place of the next."""
_DROPS = ((0.10, 0.15), (0.43, 0.62), (0.77, 0.33), (0.62, 0.92))
_FLAKES = ((0.06, 0.14, 1.0), (0.31, 0.71, 0.66), (0.55, 0.33, 1.1), (0.82, 0.90, 0.78))
_BANKS = 1
"""Banks of fog along a height."""


def veil(image: Array, weather: str, time: str) -> None:
    """Lay the veil of the weather over a still picture [H, W, 3], in place."""
    if weather == "clear":
        return
    y = ((np.arange(len(image), dtype=np.float32) + 0.5) / len(image))[:, None, None]
    opacity = {
        "rain": 0.62 - 0.30 * y,
        "snow": 0.55 - 0.25 * y,
        "fog": 0.58 + 0.14 * np.sin(np.pi * y),
    }[weather]
    image += opacity * (np.array(_VEIL[weather][time], np.float32) - image)


def add_weather(frames: Array, weather: str, time: str) -> None:
    """Let it rain, snow or drift in front of a clip [T, H, W, 3], in place; the first frame is the pattern's first."""
    if weather == "clear":
        return
    _, height, width, _ = frames.shape
    if weather == "fog":
        colour = np.array(_VEIL["fog"][time], np.float32)
    else:
        colour = np.array((0.86, 0.92, 1.0) if weather == "rain" else (1.0, 1.0, 1.0), np.float32) * _LIGHT[time]
    for t, frame in enumerate(frames):
        phase = t % _REPEATS[weather]
        alpha = _fog(phase, height, width) if weather == "fog" else _falling(weather, phase, height, width)
        frame += alpha[..., None] * (colour - frame)


def _grid(height: int, width: int) -> tuple[Array, Array]:
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    return (y + 0.5) / height, (x + 0.5) / height


def _strength(y: Array, x: Array) -> Array:
    """Where it falls more and where less, so that the repetition does not show."""
    return 0.66 + 0.34 * np.sin(4.3 * x + 1.9 * y) * np.sin(5.1 * y - 2.3 * x + 1.0)


@lru_cache(maxsize=32)
def _falling(weather: str, phase: int, height: int, width: int) -> Array:
    """Opacity [H, W] of drops or flakes in one of the frames after which they repeat."""
    y, x = _grid(height, width)
    # Place within the period, in periods.
    v, u = y / _PERIOD - phase / _REPEATS[weather], x / _PERIOD
    soft = 1.0 / (height * _PERIOD)
    alpha = np.zeros((height, width), np.float32)
    if weather == "rain":
        for cu, cv in _DROPS:
            dv = (v - cv + 0.5) % 1.0 - 0.5
            du = (u - cu + 0.16 * dv + 0.5) % 1.0 - 0.5  # a little aslant
            streak = np.maximum(np.abs(du) - 0.020, (np.abs(dv) - 0.17) * 0.35)
            alpha = np.maximum(alpha, np.clip(0.5 - streak / soft, 0, 1) * 0.50)
    else:
        for cu, cv, size in _FLAKES:
            dv, du = (v - cv + 0.5) % 1.0 - 0.5, (u - cu + 0.5) % 1.0 - 0.5
            alpha = np.maximum(alpha, np.clip(0.5 - (np.hypot(du, dv) - 0.058 * size) / (1.6 * soft), 0, 1) * 0.9)
    return _shared(alpha * _strength(y, x))


@lru_cache(maxsize=_REPEATS["fog"])
def _fog(phase: int, height: int, width: int) -> Array:
    """Opacity [H, W] of banks of fog that drift to the right."""
    y, x = _grid(height, width)
    banks = np.sin(2 * np.pi * (_BANKS * x - phase / _REPEATS["fog"]) + 3.0 * y)
    return _shared(0.17 + 0.13 * banks * np.sin(np.pi * np.clip(y * 1.15, 0, 1)))


def _shared(alpha: Array) -> Array:
    """As the cache keeps it: nobody may write into what everybody reads."""
    alpha = alpha.astype(np.float32, copy=False)
    alpha.setflags(write=False)
    return alpha
