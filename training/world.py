"""A small procedural world of captioned videos: scene x time x weather x subject x colour x motion.

It is the training set of the embedded model, and its ground truth when that model is judged. Everything is a pure
function of the parameters and a seed. Lengths are in frame heights, speeds in frame heights per frame.
"""

from __future__ import annotations

import hashlib
import math
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

GRID = 1 / 16
"""Subjects stand at half steps of a grid this wide, and what moves goes one step in the frames of a latent."""
_PACE = 4 * GRID
"""What rocks, hops or sways does so once a pace: its place tells how it is turned.

A pace is four latents long. So a subject, which has one size and one speed, has four appearances for each way of
moving (a rolling ball eight), few enough for a small network to learn by heart.
"""
_RADIUS = 4 * GRID
_MARGIN = 4.5 * GRID
"""How far outside the frame a subject's centre gets: the first half step at which it is out of sight."""
_SPEED = GRID / CYCLE
_STARTS_INSIDE, _INSIDE_FRAMES = 0.75, 24
"""Share of the clips in which the subject begins well inside the frame, and how long it stays there at least."""
_ROLL = 0.5 * np.pi / _PACE
"""Radians by which a ball's stripe turns on its way: half a turn, after which it looks the same, in two paces.

That is a third more than rolling without slipping, the nearest that comes back so soon."""
_HOP, _HOVER = 0.15, 0.008
"""How high a ball hops, and how far what rests in the air sways."""
_ROCK = {"boat": 0.08, "balloon": 0.05, "star": 0.12}
"""How far a subject rocks, in radians."""
_ON_GROUND = {"car": 11.5 * GRID, "ball": 10.5 * GRID, "boat": 11.5 * GRID}
_IN_THE_AIR = 6.5 * GRID
"""Heights at which subjects rest or go sideways."""
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
    """Where the subject's centre is: `x`, `y` [T] in frame heights, possibly outside the frame.

    `turn` [T] is the angle by which all of it is turned, clockwise, `roll` [T] that of a ball's stripe.
    """

    x: Array
    y: Array
    turn: Array
    roll: Array


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


def _place(rng: np.random.Generator, low: float, high: float, step: float = GRID) -> float:
    """A random place in low..high, whole steps from the grid's first half step."""
    first, last = math.ceil((low - 0.5 * GRID) / step), math.floor((high - 0.5 * GRID) / step)
    return int(rng.integers(first, last + 1)) * step + 0.5 * GRID


def _axis(rng: np.random.Generator, length: float, direction: int, steps: Array) -> Array:
    """Positions [T] along one axis of `length`: it leaves on one side and comes back on the other, for ever."""
    loop = math.ceil((length + 2 * _MARGIN) / GRID) * GRID
    if rng.random() < _STARTS_INSIDE:
        start = _place(rng, 0.9 * _RADIUS, length - 0.9 * _RADIUS - _SPEED * _INSIDE_FRAMES)
        start = start if direction > 0 else loop - 2 * _MARGIN - start
    else:
        start = _place(rng, -_MARGIN, length + _MARGIN - GRID)  # the last one is the first one
    return (start + _MARGIN + direction * _SPEED * steps) % loop - _MARGIN


def _track(params: ClipParams, rng: np.random.Generator, num_frames: int, aspect: float) -> Track:
    steps = np.arange(num_frames, dtype=np.float32)
    x = np.full(num_frames, _place(rng, 0.4, aspect - 0.4, _PACE), np.float32)
    y = np.full(num_frames, _ON_GROUND.get(params.subject, _IN_THE_AIR), np.float32)
    roll = np.full(num_frames, 0.6, np.float32)
    if params.motion in ("right", "left"):
        x = _axis(rng, aspect, 1 if params.motion == "right" else -1, steps)
        paces, roll = x / _PACE, roll + _ROLL * x
        if params.subject == "ball":
            y = y - _HOP * np.abs(np.sin(np.pi * paces))
    elif params.motion in ("up", "down"):
        y = _axis(rng, 1.0, 1 if params.motion == "down" else -1, steps)
        paces = y / _PACE
    else:
        paces = steps * _SPEED / _PACE
        if params.subject not in _ON_GROUND:
            y = y + _HOVER * np.sin(2 * np.pi * paces)
    turn = _ROCK.get(params.subject, 0.0) * np.sin(2 * np.pi * paces)
    if params.subject == "rocket":
        turn = np.full(num_frames, _HEADING[params.motion])
    return Track(*(of.astype(np.float32) for of in (x, y, turn, roll)))


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
    scale = _RADIUS * height
    side = int(np.ceil(2 * EXTENT * scale)) + 2
    left = np.floor(track.x * height - side / 2).astype(int)
    top = np.floor(track.y * height - side / 2).astype(int)
    grid = np.arange(side, dtype=np.float32) + 0.5
    across = ((grid + (left - track.x * height)[:, None]) / scale).astype(np.float32)[:, None, :]
    down = ((grid + (top - track.y * height)[:, None]) / scale).astype(np.float32)[:, :, None]
    cos, sin = np.cos(track.turn)[:, None, None], np.sin(track.turn)[:, None, None]
    mirror = -1.0 if params.motion == "left" and params.subject in _FACING else 1.0
    steps = np.arange(num_frames, dtype=np.float32)[:, None, None]
    sprite = draw_sprite(
        params.subject,
        params.colour,
        params.time,
        mirror * (across * cos + down * sin),
        down * cos - across * sin,
        softness=1.2 / scale,
        turn=track.roll[:, None, None],
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
