"""Backgrounds of the procedural world: a few fixed layouts for each scene, time and sky, and slow things that move.

Coordinates are in frame heights: y runs 0..1 downwards, x runs 0..width/height. There is little fine detail on purpose:
what a latent cannot hold only adds noise to the training of a small model.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from training.shapes import Array, box, circle, convex, coverage, ellipse
from training.weather import veil

SCENES = ("ocean", "mountains", "city", "desert", "meadow", "snow", "space")
TIMES = ("day", "sunset", "night")
LAYOUTS = 5
"""Fixed layouts for each scene and time."""

Colour = tuple[float, float, float]
_SKY: dict[str, tuple[Colour, Colour]] = {
    "day": ((0.25, 0.56, 0.94), (0.80, 0.92, 1.00)),
    "sunset": ((0.34, 0.20, 0.50), (1.00, 0.60, 0.32)),
    "night": ((0.03, 0.04, 0.16), (0.15, 0.19, 0.42)),
}
_TINT: dict[str, Colour] = {"day": (1.0, 1.0, 1.0), "sunset": (0.92, 0.70, 0.66), "night": (0.30, 0.37, 0.60)}
_HORIZON = {"ocean": 0.54, "mountains": 0.68, "city": 0.82, "desert": 0.64, "meadow": 0.66, "snow": 0.68}
_PLANETS: tuple[Colour, ...] = ((0.80, 0.52, 0.36), (0.36, 0.62, 0.72), (0.72, 0.66, 0.46))
_CLOUD_ROW, _CLOUD_BOTTOM, _CLOUD_SPEED = 0.16, 0.34, 0.002
_WAVE_HEIGHT, _WAVE_SPEED = 0.045, 0.12


class _Canvas:
    """One still picture being painted, back to front."""

    def __init__(self, height: int, width: int, time: str) -> None:
        y, x = np.mgrid[0:height, 0:width].astype(np.float32)
        self.y, self.x = (y + 0.5) / height, (x + 0.5) / height
        self.pixel, self.aspect = 1.0 / height, width / height
        self.tint = np.array(_TINT[time], np.float32)
        self.image = np.zeros((height, width, 3), np.float32)

    def blend(self, alpha: Array, colour: Colour | Array) -> None:
        self.image += alpha[..., None] * (np.asarray(colour, np.float32) - self.image)

    def fill(self, distance: Array, colour: Colour, opacity: float = 1.0) -> None:
        """Paint a shape in the light of the time of day."""
        self.blend(coverage(distance, self.pixel) * opacity, np.asarray(colour, np.float32) * self.tint)

    def glow(self, distance: Array, colour: Colour, opacity: float = 1.0) -> None:
        """Paint a shape that gives its own light."""
        self.blend(coverage(distance, self.pixel) * opacity, colour)

    def hill(self, base: float, amplitude: float, frequency: float, phase: float, colour: Colour) -> None:
        self.fill(base - amplitude * np.sin(frequency * self.x + phase) - self.y, colour)

    def triangle(self, cx: float, base: float, half: float, height: float, colour: Colour) -> None:
        self.fill(convex(self.x, self.y, [(cx - half, base), (cx, base - height), (cx + half, base)]), colour)


def _sky(c: _Canvas, scene: str, time: str, rng: np.random.Generator, clear: bool) -> float | None:
    """Sky, with sun or moon if it is clear; returns where that stands (x, in heights), None if it is hidden."""
    horizon = _HORIZON[scene]
    top, bottom = (np.array(v, np.float32) for v in _SKY[time])
    c.image[:] = top + np.clip(c.y / horizon, 0, 1)[..., None] * (bottom - top)
    light = float(rng.uniform(0.25, c.aspect - 0.25))
    if not clear:
        return None
    if time == "night":
        height = rng.uniform(0.14, 0.20)
        disc = circle(c.x, c.y, light, height, 0.095)
        c.blend(np.exp(-np.maximum(disc, 0) / 0.07) * 0.18, (0.80, 0.84, 1.0))
        c.glow(np.maximum(disc, -circle(c.x, c.y, light + 0.05, height - 0.02, 0.08)), (0.98, 0.96, 0.82))
        return light
    if time == "day":
        height, radius, colour = rng.uniform(0.14, 0.20), 0.09, (1.0, 0.95, 0.55)
    else:
        height, radius, colour = horizon - rng.uniform(0.04, 0.10), 0.15, (1.0, 0.86, 0.46)
    disc = circle(c.x, c.y, light, height, radius)
    c.blend(np.exp(-np.maximum(disc, 0) / 0.12) * 0.45, colour)
    c.glow(disc, colour)
    return light


def _ocean(c: _Canvas, time: str, rng: np.random.Generator, light: float | None) -> None:
    horizon = _HORIZON["ocean"]
    depth = np.clip((c.y - horizon) / (1 - horizon), 0, 1)
    near, far = np.array((0.05, 0.26, 0.50), np.float32), np.array((0.16, 0.52, 0.76), np.float32)
    c.blend(coverage(horizon - c.y, c.pixel), (far + depth[..., None] * (near - far)) * c.tint)
    if light is None:
        return
    shine = {"day": (0.85, 0.97, 1.0), "sunset": (1.0, 0.72, 0.42), "night": (0.55, 0.62, 0.85)}[time]
    path = np.exp(-(((c.x - light) / (0.08 + 0.10 * depth)) ** 2)) * coverage(horizon - c.y, c.pixel)
    c.blend(path * (1 - 0.8 * depth) * 0.5, shine)


def _mountains(c: _Canvas, time: str, rng: np.random.Generator, light: float | None) -> None:
    far = ((0.46, 0.46, 0.60), 0.72, 0.46, 0.50, (0.0, 0.72, 1.40))
    near = ((0.35, 0.38, 0.49), 0.76, 0.28, 0.40, (0.34, 1.12, 1.8))
    for index, (colour, base, height, half, places) in enumerate((far, near)):
        shift = rng.uniform(-0.18, 0.18)
        for place in places:
            peak = height * rng.uniform(0.88, 1.08)
            c.triangle(place + shift, base, half, peak, colour)
            if index == 0:
                cap = 0.34
                c.triangle(place + shift, base - peak * (1 - cap), half * cap, peak * cap, (0.96, 0.97, 1.0))
    c.hill(0.76, 0.015, 3.0, rng.uniform(0, 6.28), (0.30, 0.58, 0.28))


def _city(c: _Canvas, time: str, rng: np.random.Generator, light: float | None) -> None:
    windows = (0.74, 0.86, 0.96) if time == "day" else (1.0, 0.86, 0.44)
    left = -float(rng.uniform(0.02, 0.2))
    while left < c.aspect:
        width, height, grey = rng.uniform(0.24, 0.36), rng.uniform(0.26, 0.58), rng.uniform(0.38, 0.60)
        middle = 0.84 - height / 2
        c.fill(
            box(c.x, c.y, left + width / 2, middle, width / 2 - 0.01, height / 2),
            (grey, grey * 0.97, grey * 1.10),
        )
        rows = max(2, round(height / 0.125))
        for row in range(rows):
            for share in (0.28, 0.72):
                y = 0.84 - height * (row + 0.55) / rows
                c.glow(box(c.x, c.y, left + width * share, y, 0.032, 0.026, 0.006), windows, 0.75)
        left += width
    c.fill(0.84 - c.y, (0.33, 0.33, 0.37))
    c.fill(np.abs(c.y - 0.925) - 0.012, (0.96, 0.92, 0.70))


def _desert(c: _Canvas, time: str, rng: np.random.Generator, light: float | None) -> None:
    c.hill(0.66, 0.05, 2.2, rng.uniform(0, 6.28), (0.88, 0.64, 0.36))
    c.hill(0.82, 0.05, 2.7, rng.uniform(0, 6.28), (0.97, 0.78, 0.48))
    cx, base, green = float(rng.uniform(0.2, c.aspect - 0.2)), 0.80, (0.18, 0.48, 0.25)
    side = float(rng.choice((-1.0, 1.0)))
    arms = (
        (0.0, 0.15, 0.036, 0.16),
        (0.07, 0.12, 0.06, 0.022),
        (0.115, 0.175, 0.025, 0.075),
        (-0.07, 0.09, 0.06, 0.022),
        (-0.115, 0.14, 0.025, 0.07),
    )
    for dx, up, half_width, half_height in arms:
        c.fill(box(c.x, c.y, cx + side * dx, base - up, half_width, half_height, 0.02), green)


def _meadow(c: _Canvas, time: str, rng: np.random.Generator, light: float | None) -> None:
    c.hill(0.66, 0.06, 2.0, rng.uniform(0, 6.28), (0.46, 0.74, 0.34))
    for low, high in ((0.12, 0.70), (1.0, c.aspect - 0.12)):
        cx, base = float(rng.uniform(low, max(low, high))), 0.72
        c.fill(box(c.x, c.y, cx, base - 0.05, 0.022, 0.08), (0.45, 0.30, 0.18))
        c.fill(circle(c.x, c.y, cx, base - 0.19, 0.12), (0.18, 0.50, 0.20))
    c.hill(0.78, 0.04, 2.3, rng.uniform(0, 6.28), (0.34, 0.65, 0.26))


def _snow(c: _Canvas, time: str, rng: np.random.Generator, light: float | None) -> None:
    c.hill(0.68, 0.05, 2.0, rng.uniform(0, 6.28), (0.82, 0.88, 0.96))
    for low, high in ((0.12, 0.55), (0.70, 1.05), (1.2, c.aspect - 0.12)):
        cx = float(rng.uniform(low, max(low, high)))
        for level in range(3):
            half = 0.125 - 0.028 * level
            c.triangle(cx, 0.75 - 0.10 * level, half, 0.17, (0.12, 0.38, 0.29))
        c.triangle(cx, 0.465, 0.028, 0.08, (0.93, 0.96, 1.0))
    c.hill(0.78, 0.03, 2.5, rng.uniform(0, 6.28), (0.96, 0.98, 1.0))


def _space(c: _Canvas, rng: np.random.Generator) -> None:
    c.image[:] = np.array((0.05, 0.03, 0.13), np.float32)
    haze = np.exp(-(((c.x - rng.uniform(0.3, c.aspect - 0.3)) / 0.8) ** 2) - ((c.y - 0.35) / 0.45) ** 2)
    c.blend(haze * 0.7, (0.30, 0.13, 0.46))
    cx, radius = float(rng.uniform(0.3, c.aspect - 0.3)), float(rng.uniform(0.19, 0.26))
    cy = float(rng.uniform(0.16, 0.30))
    colour = _PLANETS[int(rng.integers(len(_PLANETS)))]
    disc = circle(c.x, c.y, cx, cy, radius)
    c.glow(disc, colour)
    c.glow(
        np.maximum(disc, -circle(c.x, c.y, cx - 0.35 * radius, cy - 0.25 * radius, 1.1 * radius)),
        (0, 0, 0.02),
        0.55,
    )
    if rng.random() < 0.6:
        ring = np.abs(ellipse(c.x, c.y, cx, cy, 1.65 * radius, 0.36 * radius)) - 0.014
        c.glow(np.where((c.y < cy) & (disc < 0), 1.0, ring), (0.92, 0.84, 0.70), 0.85)


_LAND = {
    "ocean": _ocean,
    "mountains": _mountains,
    "city": _city,
    "desert": _desert,
    "meadow": _meadow,
    "snow": _snow,
}


@lru_cache(maxsize=512)
def layout(scene: str, time: str, weather: str, variant: int, height: int, width: int) -> Array:
    """The still part of a background, float32 [height, width, 3] in 0..1 (shared and read-only)."""
    rng = np.random.default_rng([SCENES.index(scene), TIMES.index(time), variant])
    canvas = _Canvas(height, width, time)
    if scene == "space":
        _space(canvas, rng)
    else:
        _LAND[scene](canvas, time, rng, _sky(canvas, scene, time, rng, weather == "clear"))
        veil(canvas.image, weather, time)
    canvas.image.setflags(write=False)
    return canvas.image


def background(
    scene: str, time: str, weather: str, rng: np.random.Generator, num_frames: int, height: int, width: int
) -> Array:
    """Background of a clip, float32 [num_frames, height, width, 3], about 0..1.

    `rng` picks one of `LAYOUTS` layouts and where the cloud or the waves start.
    """
    still = layout(scene, time, weather, int(rng.integers(LAYOUTS)), height, width)
    start = float(rng.random())
    frames = np.repeat(still[None], num_frames, axis=0)
    if scene == "ocean":
        _add_waves(frames, time, start)
    elif scene != "space" and time != "night" and weather == "clear":
        _add_cloud(frames, time, start)
    return frames


def _add_waves(frames: Array, time: str, start: float) -> None:
    num_frames, height, width, _ = frames.shape
    first = int(_HORIZON["ocean"] * height) + 1
    x = ((np.arange(width, dtype=np.float32) + 0.5) / height)[None, None, :]
    y = ((np.arange(first, height, dtype=np.float32) + 0.5) / height)[None, :, None]
    t = np.arange(num_frames, dtype=np.float32)[:, None, None]
    swell = np.sin(8 * x + _WAVE_SPEED * t + np.float32(2 * np.pi * start)) * np.sin(24 * y)
    frames[:, first:] += (_WAVE_HEIGHT * np.mean(_TINT[time], dtype=np.float32) * swell)[..., None]


def _add_cloud(frames: Array, time: str, start: float) -> None:
    num_frames, height, width, _ = frames.shape
    rows, margin = int(_CLOUD_BOTTOM * height), 0.3
    x = ((np.arange(width, dtype=np.float32) + 0.5) / height)[None, None, :]
    y = ((np.arange(rows, dtype=np.float32) + 0.5) / height)[None, :, None]
    t = np.arange(num_frames, dtype=np.float32)[:, None, None]
    loop = width / height + 2 * margin
    cx = np.float32(loop) * ((np.float32(start) + _CLOUD_SPEED / loop * t) % 1.0) - np.float32(margin)
    shape = ellipse(x, y, cx, _CLOUD_ROW, 0.21, 0.055)
    for dx, dy, radius in ((-0.06, -0.035, 0.068), (0.06, -0.022, 0.056)):
        shape = np.minimum(shape, circle(x, y, cx + dx, _CLOUD_ROW + dy, radius))
    alpha = (coverage(shape, 1.5 / height) * 0.9)[..., None]
    colour = np.array((1.0, 1.0, 1.0) if time == "day" else (1.0, 0.78, 0.72), np.float32)
    frames[:, :rows] += alpha * (colour - frames[:, :rows])
