"""The subjects of the procedural world: flat sprites with clearly different outlines, drawn by distance functions.

Coordinates `u` (right) and `v` (down) are in units of the subject's radius, zero at its centre. What moves within a
sprite (wheels, wings, the flame) comes back every four frames, which is what a latent stands for: it looks alive and
costs the model nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from training.shapes import Array, box, circle, convex, coverage, ellipse, star

SUBJECTS = ("ball", "car", "boat", "balloon", "rocket", "star", "bird")
COLOURS = ("red", "yellow", "green", "blue", "pink", "white")
EXTENT = 1.12
"""No sprite that is not turned reaches further than this many radii from its centre, along either axis."""

_RGB = {
    "red": (0.92, 0.11, 0.13),
    "yellow": (1.00, 0.87, 0.10),
    "green": (0.12, 0.74, 0.22),
    "blue": (0.12, 0.36, 0.97),
    "pink": (1.00, 0.46, 0.76),
    "white": (0.97, 0.97, 0.97),
}
_BRIGHTNESS = {"day": 1.0, "sunset": 0.97, "night": 0.92}
CYCLE = 4
"""Frames after which wheels, wings and flames are as before: those of a latent."""
_DARK, _GLASS, _WOOD = (0.11, 0.11, 0.14), (0.80, 0.93, 1.0), (0.45, 0.29, 0.16)


class Sprite:
    """A stack of shapes over nothing: `rgb` [..., 3] premultiplied with `alpha` [...]."""

    def __init__(self, u: Array, v: Array, softness: float, turn: Array, phase: Array, moves: bool) -> None:
        self.u, self.v, self.softness = u, v, softness
        self.turn, self.phase, self.moves = turn, phase, moves
        self.rgb = np.zeros((*u.shape, 3), np.float32)
        self.alpha = np.zeros(u.shape, np.float32)

    def paint(self, distance: Array, colour: Array | tuple[float, float, float]) -> None:
        """Put a shape on top."""
        a = coverage(distance, self.softness)
        self.rgb += a[..., None] * (np.asarray(colour, np.float32) - self.rgb)
        self.alpha += a * (1 - self.alpha)

    def shade(self, distance: Array, colour: Array | tuple[float, float, float], opacity: float) -> None:
        """Colour a part of what is already there; the outline stays."""
        a = (coverage(distance, self.softness) * opacity)[..., None]
        self.rgb += a * (np.asarray(colour, np.float32) * self.alpha[..., None] - self.rgb)


def _ball(s: Sprite, c: Array) -> None:
    s.paint(circle(s.u, s.v, 0, 0, 0.88), c * 0.66)
    s.paint(circle(s.u, s.v, 0, 0, 0.80), c)
    stripe = np.abs(s.u * np.cos(s.turn) + s.v * np.sin(s.turn)) - 0.13
    s.shade(np.maximum(stripe, circle(s.u, s.v, 0, 0, 0.80)), c * 0.45, 0.9)
    s.shade(circle(s.u, s.v, -0.32, -0.36, 0.17), (1.0, 1.0, 1.0), 0.75)


def _car(s: Sprite, c: Array) -> None:
    s.paint(convex(s.u, s.v, [(-0.76, -0.04), (-0.48, -0.66), (0.32, -0.66), (0.70, -0.04)]), c * 0.66)
    s.paint(convex(s.u, s.v, [(-0.52, -0.14), (-0.36, -0.50), (-0.06, -0.50), (-0.06, -0.14)]), _GLASS)
    s.paint(convex(s.u, s.v, [(0.06, -0.14), (0.06, -0.50), (0.24, -0.50), (0.48, -0.14)]), _GLASS)
    s.paint(box(s.u, s.v, 0, 0.14, 1.08, 0.34, 0.16), c * 0.66)
    s.paint(box(s.u, s.v, 0, 0.14, 1.00, 0.27, 0.12), c)
    for wheel in (-0.58, 0.58):
        s.paint(circle(s.u, s.v, wheel, 0.44, 0.28), _DARK)
        s.paint(circle(s.u, s.v, wheel, 0.44, 0.17), (0.75, 0.75, 0.78))
        # Two spokes are as before after half a turn: a cycle is half a turn.
        angle = np.pi * s.phase / CYCLE if s.moves else 0.0
        spoke = np.abs((s.u - wheel) * np.sin(angle) - (s.v - 0.44) * np.cos(angle)) - 0.035
        s.paint(np.maximum(spoke, circle(s.u, s.v, wheel, 0.44, 0.17)), _DARK)
    s.shade(circle(s.u, s.v, 0.96, 0.06, 0.10), (1.0, 1.0, 0.75), 1.0)


def _boat(s: Sprite, c: Array) -> None:
    s.paint(box(s.u, s.v, -0.06, -0.25, 0.05, 0.66), _WOOD)
    s.paint(convex(s.u, s.v, [(0.04, 0.24), (0.04, -0.90), (0.84, 0.24)]), c * 0.75 + 0.25)
    s.paint(convex(s.u, s.v, [(-0.78, 0.24), (-0.16, -0.74), (-0.16, 0.24)]), c * 0.6 + 0.4)
    s.paint(convex(s.u, s.v, [(-1.08, 0.30), (1.08, 0.30), (0.72, 0.84), (-0.72, 0.84)]), c * 0.66)
    s.paint(convex(s.u, s.v, [(-0.94, 0.38), (0.94, 0.38), (0.66, 0.76), (-0.66, 0.76)]), c)


def _balloon(s: Sprite, c: Array) -> None:
    for rope in (-0.14, 0.14):
        s.paint(box(s.u, s.v, rope, 0.66, 0.035, 0.16), _DARK)
    s.paint(convex(s.u, s.v, [(-0.56, 0.06), (0.56, 0.06), (0.17, 0.58), (-0.17, 0.58)]), c * 0.66)
    s.paint(ellipse(s.u, s.v, 0, -0.30, 0.76, 0.74), c * 0.66)
    s.paint(ellipse(s.u, s.v, 0, -0.30, 0.68, 0.66), c)
    s.shade(ellipse(s.u, s.v, 0, -0.30, 0.27, 0.66), c * 0.5 + 0.5, 0.7)
    s.paint(box(s.u, s.v, 0, 0.90, 0.22, 0.14, 0.04), _WOOD)


def _rocket(s: Sprite, c: Array) -> None:
    if s.moves:
        flame = 0.29 + 0.06 * np.cos(2 * np.pi * s.phase / CYCLE)
        s.paint(ellipse(s.u, s.v, 0, 0.74, 0.20, flame), (1.0, 0.56, 0.10))
        s.paint(ellipse(s.u, s.v, 0, 0.70, 0.10, 0.65 * flame), (1.0, 0.93, 0.42))
    s.paint(convex(s.u, s.v, [(-0.62, 0.70), (-0.26, 0.06), (0.26, 0.06), (0.62, 0.70)]), c * 0.60)
    s.paint(ellipse(s.u, s.v, 0, -0.16, 0.44, 0.93), c * 0.66)
    s.paint(ellipse(s.u, s.v, 0, -0.16, 0.36, 0.84), c)
    s.paint(circle(s.u, s.v, 0, -0.30, 0.18), _GLASS)
    s.paint(circle(s.u, s.v, 0, -0.30, 0.10), (0.25, 0.42, 0.62))


def _star(s: Sprite, c: Array) -> None:
    s.paint(star(s.u, s.v, 1.04, 0.52), c * 0.70)
    s.paint(star(s.u, s.v, 0.88, 0.52), c)
    s.shade(star(s.u, s.v, 0.46, 0.52), (1.0, 1.0, 1.0), 0.35)


def _bird(s: Sprite, c: Array) -> None:
    s.paint(convex(s.u, s.v, [(-1.02, -0.16), (-0.50, -0.02), (-0.50, 0.26), (-1.04, 0.22)]), c * 0.60)
    s.paint(ellipse(s.u, s.v, -0.08, 0.12, 0.66, 0.36), c * 0.66)
    s.paint(ellipse(s.u, s.v, -0.08, 0.12, 0.59, 0.29), c)
    s.paint(convex(s.u, s.v, [(0.72, -0.20), (1.08, -0.06), (0.72, 0.06)]), (1.0, 0.66, 0.10))
    s.paint(circle(s.u, s.v, 0.52, -0.10, 0.31), c * 0.66)
    s.paint(circle(s.u, s.v, 0.52, -0.10, 0.25), c)
    s.paint(circle(s.u, s.v, 0.60, -0.16, 0.08), _DARK)
    lift = 0.62 * np.cos(2 * np.pi * s.phase / CYCLE)  # the wing's tip, up and down about the shoulder
    wing = _wing(s.u, s.v, lift + 0.08)
    s.paint(wing - 0.06, c * 0.52)
    s.paint(wing, c * 0.80)


def _wing(u: Array, v: Array, lift: Array) -> Array:
    """A drop from the shoulder to a tip that is `lift` above it."""
    tip_u, tip_v = -0.34, 0.02 - lift
    along = np.clip(((u - 0.02) * (tip_u - 0.02) + (v - 0.02) * (tip_v - 0.02)) / (0.36**2 + (tip_v - 0.02) ** 2), 0, 1)
    return np.hypot(u - 0.02 - along * (tip_u - 0.02), v - 0.02 - along * (tip_v - 0.02)) - (0.24 - 0.16 * along)


_DRAW: dict[str, Callable[[Sprite, Array], None]] = {
    "ball": _ball, "car": _car, "boat": _boat, "balloon": _balloon, "rocket": _rocket, "star": _star, "bird": _bird,
}  # fmt: skip


def draw_sprite(
    subject: str,
    colour: str,
    time: str,
    u: Array,
    v: Array,
    *,
    softness: float,
    turn: Array,
    phase: Array,
    moves: bool,
) -> Sprite:
    """Draw a subject.

    Args:
        softness: width of its edges in radii.
        turn: angle of the ball's stripe.
        phase: frames into the cycle of what comes back every `CYCLE` frames.
        moves: whether wheels turn and flames burn.
    """
    sprite = Sprite(u, v, softness, turn, phase, moves)
    _DRAW[subject](sprite, np.array(_RGB[colour], np.float32) * np.float32(_BRIGHTNESS[time]))
    return sprite
