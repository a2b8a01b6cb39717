"""A small procedural world of captioned videos: scene x time x subject x colour x motion.

It is the training set of the embedded model, and its ground truth when that model is judged. Everything is a pure
function of the parameters and a seed. Lengths are in frame heights, speeds in frame heights per frame.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import numpy as np

from training.scenery import SCENES, TIMES, background
from training.shapes import Array
from training.sprites import COLOURS, EXTENT, SUBJECTS, draw_sprite

MOTIONS = ("right", "left", "up", "down", "still")
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "scene": SCENES,
    "time": TIMES,
    "subject": SUBJECTS,
    "colour": COLOURS,
    "motion": MOTIONS,
}
HEIGHT, WIDTH, NUM_FRAMES, FPS = 64, 112, 49, 16

_RADIUS, _RADIUS_SPREAD = 0.25, 0.06
_SPEED_SIDEWAYS, _SPEED_VERTICAL, _SPEED_SPREAD = 0.014, 0.0087, 0.1
_WRAP_SHARE = 0.4
_WRAP_STARTS_VISIBLE = 0.7
_ROLL = 0.05
_GROUND, _BELOW_CENTRE = 0.90, {"car": 0.72, "ball": 0.88, "boat": 0.70}
_FACING = ("car", "boat")
_HELD_OUT_COMBINATIONS, _HELD_OUT_TRIPLES = 0.07, 0.03


@dataclass(frozen=True)
class ClipParams:
    """What a clip shows. Space knows no time of day: there `time` is always "night"."""

    scene: str
    time: str
    subject: str
    colour: str
    motion: str

    def __post_init__(self) -> None:
        for name, values in ATTRIBUTES.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown; choose one of {', '.join(values)}")
        if self.scene == "space" and self.time != "night":
            raise ValueError(f"space has no time of day: use time 'night', not {self.time!r}")

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


class Track(NamedTuple):
    """Where the subject's centre is: `x`, `y` [T] in frame heights (possibly outside the frame), and its radius."""

    x: Array
    y: Array
    radius: float


def all_params() -> list[ClipParams]:
    """Every combination of attributes the world can show."""
    return [
        ClipParams(scene, time, subject, colour, motion)
        for scene in SCENES
        for time in (("night",) if scene == "space" else TIMES)
        for subject in SUBJECTS
        for colour in COLOURS
        for motion in MOTIONS
    ]


def _hash_share(*words: str) -> float:
    """A fixed number in 0..1 for some words, the same on every machine."""
    digest = hashlib.blake2s("|".join(words).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def held_out(params: ClipParams) -> bool:
    """True for the combinations that training never renders, about a tenth of all.

    Whole (subject, colour, scene) triples are among them, so that a score on held-out clips also asks for pictures, not
    only for movements, that were never seen.
    """
    if _hash_share("triple", params.subject, params.colour, params.scene) < _HELD_OUT_TRIPLES:
        return True
    return _hash_share("combination", *params.to_dict().values()) < _HELD_OUT_COMBINATIONS


def sample_params(rng: np.random.Generator, split: Literal["train", "held_out", "any"] = "any") -> ClipParams:
    """Draw what a clip shows, every attribute uniformly."""
    while True:
        values = {name: options[int(rng.integers(len(options)))] for name, options in ATTRIBUTES.items()}
        if values["scene"] == "space":
            values["time"] = "night"
        params = ClipParams(**values)
        if split == "any" or held_out(params) == (split == "held_out"):
            return params


def _axis(rng: np.random.Generator, length: float, radius: float, speed: float, steps: Array, wraps: bool) -> Array:
    """Positions [T] along one axis of `length`, for a subject that moves in the direction of `speed`.

    It stays inside the frame, or leaves on one side and comes back on the other.
    """
    low, high = 0.9 * radius, length - 0.9 * radius
    distance = abs(speed) * len(steps)
    if wraps or high - low < distance:
        margin = EXTENT * radius
        start = rng.uniform(0, length) if rng.random() < _WRAP_STARTS_VISIBLE else rng.uniform(-margin, length + margin)
        return (start + margin + speed * steps) % (length + 2 * margin) - margin
    start = rng.uniform(low, high - distance)
    return start + speed * steps if speed > 0 else low + high - start + speed * steps


def _track(params: ClipParams, rng: np.random.Generator, num_frames: int, aspect: float) -> Track:
    radius = _RADIUS * rng.uniform(1 - _RADIUS_SPREAD, 1 + _RADIUS_SPREAD)
    pace = rng.uniform(1 - _SPEED_SPREAD, 1 + _SPEED_SPREAD)
    wraps = bool(rng.random() < _WRAP_SHARE)
    steps = np.arange(num_frames, dtype=np.float32)
    on_ground = params.subject in _BELOW_CENTRE
    if on_ground:
        rest = _GROUND - radius * _BELOW_CENTRE[params.subject] + rng.uniform(-0.02, 0.02)
    else:
        rest = rng.uniform(0.38, 0.50)
    x = np.full(num_frames, rng.uniform(0.4, aspect - 0.4), np.float32)
    y = np.full(num_frames, rest, np.float32)
    if params.motion in ("right", "left"):
        direction = 1 if params.motion == "right" else -1
        x = _axis(rng, aspect, radius, direction * pace * _SPEED_SIDEWAYS, steps, wraps)
    elif params.motion in ("up", "down"):
        direction = 1 if params.motion == "down" else -1
        y = _axis(rng, 1.0, radius, direction * pace * _SPEED_VERTICAL, steps, wraps)
    elif not on_ground:
        y = y + 0.008 * np.sin(0.2 * steps + rng.uniform(0, 6.28))
    return Track(x.astype(np.float32), y.astype(np.float32), float(radius))


def render(
    params: ClipParams, seed: int, num_frames: int = NUM_FRAMES, height: int = HEIGHT, width: int = WIDTH
) -> tuple[Array, Array, Track]:
    """Render a clip.

    Returns:
        frames float32 [T, H, W, 3] in 0..1, subject mask float32 [T, H, W] in 0..1, and the subject's track.
    """
    rng = np.random.default_rng(seed)
    frames = background(params.scene, params.time, rng, num_frames, height, width)
    mask = np.zeros((num_frames, height, width), np.float32)
    track = _track(params, rng, num_frames, width / height)

    # The sprite is drawn in a small square that follows the subject, then pasted where it overlaps the frame.
    scale = track.radius * height
    side = int(np.ceil(2 * EXTENT * scale)) + 2
    left = np.floor(track.x * height - side / 2).astype(int)
    top = np.floor(track.y * height - side / 2).astype(int)
    grid = np.arange(side, dtype=np.float32) + 0.5
    mirror = -1.0 if params.motion == "left" and params.subject in _FACING else 1.0
    u = (mirror * (grid + (left - track.x * height)[:, None]) / scale).astype(np.float32)[:, None, :]
    v = ((grid + (top - track.y * height)[:, None]) / scale).astype(np.float32)[:, :, None]
    u, v = np.broadcast_to(u, (num_frames, side, side)), np.broadcast_to(v, (num_frames, side, side))
    rolling = {"right": _ROLL, "left": -_ROLL}.get(params.motion, 0.0)
    roll = (0.6 + rolling * np.arange(num_frames, dtype=np.float32))[:, None, None]
    sprite = draw_sprite(params.subject, params.colour, params.time, u, v, 1.2 / scale, roll)

    for t in range(num_frames):
        y0, y1 = max(top[t], 0), min(top[t] + side, height)
        x0, x1 = max(left[t], 0), min(left[t] + side, width)
        if y0 >= y1 or x0 >= x1:
            continue
        inner = (t, slice(y0 - top[t], y1 - top[t]), slice(x0 - left[t], x1 - left[t]))
        alpha = sprite.alpha[inner]
        frames[t, y0:y1, x0:x1] = frames[t, y0:y1, x0:x1] * (1 - alpha[..., None]) + sprite.rgb[inner]
        mask[t, y0:y1, x0:x1] = alpha
    return np.clip(frames, 0.0, 1.0, out=frames), mask, track
