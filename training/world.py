"""A small procedural world of captioned videos: scene x time x weather x subject x colour x motion.

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
from training.sprites import COLOURS, CYCLE, EXTENT, SUBJECTS, draw_sprite
from training.weather import WEATHERS, add_weather

MOTIONS = ("right", "left", "up", "down", "still")
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "scene": SCENES,
    "time": TIMES,
    "weather": WEATHERS,
    "subject": SUBJECTS,
    "colour": COLOURS,
    "motion": MOTIONS,
}
HEIGHT, WIDTH, NUM_FRAMES, FPS = 128, 224, 73, 16
IN_SPACE = {"time": "night", "weather": "clear"}
"""Space has no time of day and no weather: these stand for it there, and captions say nothing of them."""

_RADIUS, _RADIUS_SPREAD = 0.25, 0.06
_SPEED_SIDEWAYS, _SPEED_VERTICAL, _SPEED_SPREAD = 0.014, 0.0095, 0.1
_STARTS_INSIDE, _INSIDE_FRAMES = 0.75, 24
"""Share of the clips in which the subject begins well inside the frame, and how long it stays there at least."""
_ROLL, _HOP, _HOP_FRAMES = 0.05, 0.15, 16
_ROCK, _ROCK_FRAMES = {"boat": 0.10, "balloon": 0.07, "star": 0.16}, 32
"""How far a subject rocks, in radians, and how long once takes."""
_GROUND, _BELOW_CENTRE = 0.90, {"car": 0.72, "ball": 0.88, "boat": 0.70}
_FACING = ("car", "boat", "bird")
_HEADING = {"right": 0.5 * np.pi, "left": -0.5 * np.pi, "up": 0.0, "down": np.pi, "still": 0.0}
"""Where a rocket points, from upright, clockwise."""
_HELD_OUT_COMBINATIONS, _HELD_OUT_TRIPLES = 0.07, 0.03


@dataclass(frozen=True)
class ClipParams:
    """What a clip shows. In space `time` and `weather` are those of `IN_SPACE`."""

    scene: str
    time: str
    weather: str
    subject: str
    colour: str
    motion: str

    def __post_init__(self) -> None:
        for name, values in ATTRIBUTES.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown; choose one of {', '.join(values)}")
        for name, value in IN_SPACE.items() if self.scene == "space" else ():
            if getattr(self, name) != value:
                raise ValueError(f"space has no {name} of its own: use {value!r}, not {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, str]:
        return asdict(self)

    def shows(self, name: str) -> bool:
        """Whether an attribute means anything here."""
        return self.scene != "space" or name not in IN_SPACE


class Track(NamedTuple):
    """Where the subject's centre is: `x`, `y` [T] in frame heights (possibly outside the frame), and its radius.

    `turn` [T] is the angle by which all of it is turned, clockwise.
    """

    x: Array
    y: Array
    radius: float
    turn: Array


def all_params() -> list[ClipParams]:
    """Every combination of attributes the world can show."""
    return [
        ClipParams(scene, time, weather, subject, colour, motion)
        for scene in SCENES
        for time in ((IN_SPACE["time"],) if scene == "space" else TIMES)
        for weather in ((IN_SPACE["weather"],) if scene == "space" else WEATHERS)
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
            values |= IN_SPACE
        params = ClipParams(**values)
        if split == "any" or held_out(params) == (split == "held_out"):
            return params


def _axis(rng: np.random.Generator, length: float, radius: float, speed: float, steps: Array) -> Array:
    """Positions [T] along one axis of `length`: it leaves on one side and comes back on the other, for ever."""
    margin = EXTENT * radius
    start = rng.uniform(-margin, length + margin)
    if rng.random() < _STARTS_INSIDE:
        room = length - 1.8 * radius - abs(speed) * _INSIDE_FRAMES
        start = 0.9 * radius + rng.uniform(0, 1) * max(room, 0.0)
        start = start if speed > 0 else length - start
    return (start + margin + speed * steps) % (length + 2 * margin) - margin


def _track(params: ClipParams, rng: np.random.Generator, num_frames: int, aspect: float) -> Track:
    radius = _RADIUS * rng.uniform(1 - _RADIUS_SPREAD, 1 + _RADIUS_SPREAD)
    pace = rng.uniform(1 - _SPEED_SPREAD, 1 + _SPEED_SPREAD)
    phase = rng.uniform(0, 2 * np.pi)
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
        x = _axis(rng, aspect, radius, direction * pace * _SPEED_SIDEWAYS, steps)
        if params.subject == "ball":
            y = y - _HOP * np.abs(np.sin(np.pi * steps / _HOP_FRAMES + phase))
    elif params.motion in ("up", "down"):
        direction = 1 if params.motion == "down" else -1
        y = _axis(rng, 1.0, radius, direction * pace * _SPEED_VERTICAL, steps)
    elif not on_ground:
        y = y + 0.008 * np.sin(0.2 * steps + phase)
    turn = _ROCK.get(params.subject, 0.0) * np.sin(2 * np.pi * steps / _ROCK_FRAMES + phase)
    if params.subject == "rocket":
        turn = np.full(num_frames, _HEADING[params.motion])
    return Track(x.astype(np.float32), y.astype(np.float32), float(radius), turn.astype(np.float32))


def render(
    params: ClipParams, seed: int, num_frames: int = NUM_FRAMES, height: int = HEIGHT, width: int = WIDTH
) -> tuple[Array, Array, Track]:
    """Render a clip.

    Returns:
        frames float32 [T, H, W, 3] in 0..1, subject mask float32 [T, H, W] in 0..1, and the subject's track.
    """
    rng = np.random.default_rng(seed)
    frames = background(params.scene, params.time, params.weather, rng, num_frames, height, width)
    mask = np.zeros((num_frames, height, width), np.float32)
    track = _track(params, rng, num_frames, width / height)

    # The sprite is drawn in a small square that follows the subject, then pasted where it overlaps the frame.
    scale = track.radius * height
    side = int(np.ceil(2 * EXTENT * scale)) + 2
    left = np.floor(track.x * height - side / 2).astype(int)
    top = np.floor(track.y * height - side / 2).astype(int)
    grid = np.arange(side, dtype=np.float32) + 0.5
    across = ((grid + (left - track.x * height)[:, None]) / scale).astype(np.float32)[:, None, :]
    down = ((grid + (top - track.y * height)[:, None]) / scale).astype(np.float32)[:, :, None]
    cos, sin = np.cos(track.turn)[:, None, None], np.sin(track.turn)[:, None, None]
    mirror = -1.0 if params.motion == "left" and params.subject in _FACING else 1.0
    steps = np.arange(num_frames, dtype=np.float32)[:, None, None]
    rolling = {"right": _ROLL, "left": -_ROLL}.get(params.motion, 0.0)
    sprite = draw_sprite(
        params.subject,
        params.colour,
        params.time,
        mirror * (across * cos + down * sin),
        down * cos - across * sin,
        softness=1.2 / scale,
        turn=0.6 + rolling * steps,
        phase=steps % CYCLE,
        moves=params.motion != "still",
    )

    for t in range(num_frames):
        y0, y1 = max(top[t], 0), min(top[t] + side, height)
        x0, x1 = max(left[t], 0), min(left[t] + side, width)
        if y0 >= y1 or x0 >= x1:
            continue
        inner = (t, slice(y0 - top[t], y1 - top[t]), slice(x0 - left[t], x1 - left[t]))
        alpha = sprite.alpha[inner]
        frames[t, y0:y1, x0:x1] = frames[t, y0:y1, x0:x1] * (1 - alpha[..., None]) + sprite.rgb[inner]
        mask[t, y0:y1, x0:x1] = alpha
    add_weather(frames, params.weather, params.time)
    return np.clip(frames, 0.0, 1.0, out=frames), mask, track
