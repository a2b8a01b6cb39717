"""What a model is (`ModelSpec`) and what a visitor asks of it (`GenerationRequest`).

Both are frozen and checked on construction, so that everything behind them may trust what it reads. No size of any
particular model is written here: a spec comes from a model folder's `model_index.json`.
"""

from __future__ import annotations

import html
import json
import math
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

import ftfy

from pipeline.errors import InvalidRequest, OptionUnavailable, WeightsError
from pipeline.start import Start

MAX_PROMPT_CHARS = 2000
_MAX_REPAIRED_CHARS = 4 * MAX_PROMPT_CHARS
"""Longer texts are not repaired: the time for it grows with the square of the nesting, so a hostile text could take
minutes."""
_ENDLESS_REFERENCE = re.compile("&#[0-9]{20,};?")
"""An HTML character code beyond all characters, with more digits than Python may be willing to read."""
MAX_SEED = 2**32 - 1
MAX_VARIANT = 99
"""Highest number of a suggestion for a prompt."""
SECONDS_RANGE = (0.1, 600.0)
FPS_RANGE = (1.0, 60.0)
OPTIONS = ("taehv", "fp8", "compile")
"""What a request switches on or off."""
ATTENTION_NAMES = ("auto", "sdpa", "cudnn", "flash", "efficient", "math", "fa3", "fa2", "sage")
"""What attends: see `attention_backends.py`. `auto` measures."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Everything about a checkpoint that is not a weight. Sizes in pixels, windows in latent frames."""

    name: str
    """Shown to the user and written into each video's recipe."""
    height: int
    width: int
    fps: float
    """Default playback rate; below `native_fps` where the model is too slow for it on most machines."""
    native_fps: float
    """The rate the model was trained at: motion looks natural at this rate."""
    frames_per_block: int
    text_len: int
    denoising_steps: tuple[float, ...]
    """Unwarped steps, noisiest first, on the 0..1000 scale; `shift` warps them."""
    shift: float
    first_block_steps: tuple[float, ...] | None = None
    """Other steps for a clip's first block, which has nothing before it to go by; None: the same."""
    window_frames: int
    """Latent frames that attention may see, the current block and the sink included."""
    sink_frames: int = 0
    """Latent frames at the start of a run that never leave the window."""
    positions: Literal["relative", "absolute"] = "relative"
    """`relative`: the sink moves along just in front of the oldest recent frame. `absolute`: it stays at 0."""
    context_noise: float = 0.0
    """Noise level (0..1000) at which finished blocks are written into the cache."""
    trained_on_pictures: bool = False
    """Whether it has learnt to go on from a block that stands still, which is what a picture to start from becomes."""
    spatial_stride: int = 8
    temporal_stride: int = 4

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise WeightsError(f"The model's settings in model_index.json cannot work: {problem}.")

    def _problems(self) -> Iterator[str]:
        """What is wrong, one sentence part at a time; later checks rely on the earlier ones."""
        for name in ("height", "width", "frames_per_block", "text_len", "spatial_stride", "temporal_stride"):
            if not _is_whole(getattr(self, name), low=1):
                yield f"{name} is {_shown(getattr(self, name))}, but must be a whole number of at least 1"
        for name in ("window_frames", "sink_frames"):
            if not _is_whole(getattr(self, name), low=0):
                yield f"{name} is {_shown(getattr(self, name))}, but must be a whole number of at least 0"
        for name, low, high in (
            ("fps", *FPS_RANGE),
            ("native_fps", *FPS_RANGE),
            ("shift", 1e-3, 1e3),
            ("context_noise", 0.0, 999.0),
        ):
            if not _is_number(getattr(self, name), low, high):
                yield f"{name} is {_shown(getattr(self, name))}, but must be a number from {low:g} to {high:g}"
        for name in ("denoising_steps", "first_block_steps"):
            steps = getattr(self, name)
            if name == "first_block_steps" and steps is None:
                continue
            if not isinstance(steps, tuple) or not steps or not all(_is_number(step, 1, 1000) for step in steps):
                yield f"{name} is {_shown(steps)}, but must be a list of numbers from 1 to 1000"
            if list(steps) != sorted(set(steps), reverse=True):
                yield f"{name} is {_shown(steps)}, but must fall from step to step"
        if not isinstance(self.trained_on_pictures, bool):
            yield f"trained_on_pictures is {_shown(self.trained_on_pictures)}, but must be true or false"
        if self.positions not in ("relative", "absolute"):
            yield f"positions is {_shown(self.positions)}, but must be 'relative' or 'absolute'"
        if self.height % self.spatial_stride or self.width % self.spatial_stride:
            yield f"height {self.height} and width {self.width} are not multiples of {self.spatial_stride}"
        if self.sink_frames % self.frames_per_block or self.window_frames % self.frames_per_block:
            yield (
                f"window_frames {self.window_frames} and sink_frames {self.sink_frames} are not multiples of "
                f"frames_per_block {self.frames_per_block}"
            )
        recent = self.window_frames - self.sink_frames - self.frames_per_block
        if recent < self.frames_per_block:
            yield (
                f"window_frames {self.window_frames} leaves {recent} recent frames beside {self.sink_frames} sink "
                f"frames and the current block, but must leave at least one block of {self.frames_per_block}"
            )

    @classmethod
    def of_folder(cls, folder: Path) -> ModelSpec:
        """Read the spec from a model folder's index; no other file is looked at.

        Raises:
            WeightsError: its index cannot be read, or its settings cannot be used.
        """
        try:
            index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise WeightsError(
                f"The model_index.json of {folder.name!r} cannot be read. Get the model again."
            ) from error
        return cls.from_config(index.get("settings", {}) if isinstance(index, dict) else index)

    @classmethod
    def from_config(cls, config: Any) -> ModelSpec:
        """Read the spec out of the settings in a `model_index.json`.

        Raises:
            WeightsError: naming what is missing, unknown or impossible.
        """
        if not isinstance(config, dict):
            raise WeightsError(f"The settings in model_index.json are {_shown(config)}, but must be an object.")
        values = dict(config)
        unknown = sorted(values.keys() - {field.name for field in fields(cls)})
        if unknown:
            raise WeightsError(f"model_index.json has unknown settings {', '.join(unknown)}.")
        for name in ("denoising_steps", "first_block_steps"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        try:
            return cls(**values)
        except TypeError as error:
            raise WeightsError(f"model_index.json is incomplete: {error}.") from error

    def latent_shape(self, channels: int) -> tuple[int, int, int]:
        """(C, h, w) of one latent frame."""
        return channels, self.height // self.spatial_stride, self.width // self.spatial_stride

    def frames_in(self, num_blocks: int) -> int:
        """Video frames in a clip of `num_blocks` blocks: the first latent frame is one video frame, each other
        one `temporal_stride`."""
        return 1 + self.temporal_stride * (self.frames_per_block * num_blocks - 1)

    def blocks_for(self, seconds: float, fps: float) -> int:
        """The whole number of blocks (at least one) whose length comes nearest to `seconds` at `fps`."""
        latents = (seconds * fps - 1) / self.temporal_stride + 1
        return max(1, math.floor(latents / self.frames_per_block + 0.5))

    def seconds_for(self, num_blocks: int, fps: float) -> float:
        """What to ask for so that it becomes so many blocks, within what may be asked for."""
        low, high = SECONDS_RANGE
        return min(high, max(low, self.frames_in(num_blocks) / fps))

    def blocks_in(self, num_frames: int) -> int:
        """How many whole blocks `num_frames` video frames make, from the first frame of a clip on; 0: too few."""
        latents = (num_frames - 1) // self.temporal_stride + 1
        return max(0, latents // self.frames_per_block)

    @property
    def most_start_blocks(self) -> int:
        """Most blocks of a video that a clip may go on from: what attention can see at once, for more hardly shows."""
        return self.window_frames // self.frames_per_block

    def length(self, seconds: float, fps: float, start: Start | None = None) -> tuple[int, int]:
        """What a clip comes to: blocks to make, and frames of video.

        Args:
            seconds: of what is made; rounded to whole blocks, at least one.
            fps: playback rate.
            start: what the clip starts from. Its frames come first in the video, and `seconds` does not count them.
        """
        if start is None:
            blocks = self.blocks_for(seconds, fps)
            return blocks, self.frames_in(blocks)
        # After what it starts from, every latent frame stands for as many video frames.
        block_frames = self.temporal_stride * self.frames_per_block
        blocks = max(1, math.floor(seconds * fps / block_frames + 0.5))
        return blocks, len(start.frames) + blocks * block_frames

    def start_note(self, start: Start | None) -> str:
        """What a user should know of starting from this; empty: nothing. A block of one frame just is the picture."""
        if start is None or start.kind != "image" or self.frames_per_block == 1 or self.trained_on_pictures:
            return ""
        return "This model was not trained to start from a picture, which may stay still. Frame-wise models do it well."

    def check_start(self, start: Start | None) -> None:
        """Refuse frames to start from that this model does not take.

        Raises:
            InvalidRequest: they have another size, or make no whole blocks.
        """
        if start is None:
            return
        count, height, width = start.frames.shape[:3]
        if (height, width) != (self.height, self.width):
            raise InvalidRequest(
                f"The frames to start from have {width}x{height} pixels, but this model makes {self.width}x"
                f"{self.height}. Choose the file again."
            )
        if start.kind == "video" and self.frames_in(self.blocks_in(count) or 1) != count:
            raise InvalidRequest(
                f"A video of {count} frames cannot be continued: they must make whole blocks, such as "
                f"{self.frames_in(1)}, {self.frames_in(2)} or {self.frames_in(3)} frames. Choose the file again."
            )


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One clip to make. Construction cleans the prompt and refuses whatever the model must never see.

    Raises:
        InvalidRequest: naming the field, the value and the allowed range.
    """

    prompt: str
    seed: int = -1
    """-1 draws a random one; any other value reproduces the clip."""
    seconds: float = 5.0
    """Length of what is made; rounded to whole blocks. What the clip starts from comes on top."""
    fps: float | None = None
    """Playback rate; None takes the model's own. It decides how many frames there are, never what is in them."""
    taehv: bool = False
    fp8: bool = False
    compile: bool = False
    start: Start | None = None
    """A picture, or the end of a video, that the clip goes on from; see `start_file.read_start`."""

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731 - the dataclass is frozen
        put("prompt", checked_prompt(self.prompt))
        put("seed", checked_seed(self.seed))
        put("seconds", checked_number("seconds", self.seconds, *SECONDS_RANGE))
        if self.fps is not None:
            put("fps", checked_number("fps", self.fps, *FPS_RANGE))
        for name in OPTIONS:
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequest(f"{name} is {_shown(getattr(self, name))}, but must be true or false.")
        if not isinstance(self.start, Start | None):
            raise InvalidRequest(f"start is {_shown(self.start)}, but must be a picture or a video that was read.")


def clean_prompt(text: str) -> str:
    """The reference's prompt cleaning (mojibake, HTML entities, white space), then NFC without control characters.

    A text that is far too long for a prompt only loses white space and control characters.
    """
    if len(text) > _MAX_REPAIRED_CHARS:
        text = " ".join(text.split())
    repaired = len(text) <= _MAX_REPAIRED_CHARS
    if repaired:
        text = ftfy.fix_text(text)
        for _ in range(2):
            text = html.unescape(_ENDLESS_REFERENCE.sub("\ufffd", text))
    # Tabs and line breaks are white space to the tokenizer; other control characters are nothing to anybody.
    # A lone surrogate cannot be encoded as UTF-8 and would fail deep inside the tokenizer.
    text = "".join(c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs"))
    return " ".join((unicodedata.normalize("NFC", text) if repaired else text).split())


def checked_prompt(value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"prompt is {_shown(value)}, but must be text.")
    if len(value) > 100 * MAX_PROMPT_CHARS:  # even counting the words of five million characters takes a second
        raise InvalidRequest(f"The prompt has {len(value):,} characters; at most {MAX_PROMPT_CHARS:,} are allowed.")
    text = clean_prompt(value)
    if not text:
        raise InvalidRequest("The prompt is empty. Describe the video in a few words.")
    if len(text) > MAX_PROMPT_CHARS:
        raise InvalidRequest(f"The prompt has {len(text):,} characters; at most {MAX_PROMPT_CHARS:,} are allowed.")
    return text


def checked_seed(value: Any) -> int:
    number = _whole_number(value)
    if number is None or not -1 <= number <= MAX_SEED:
        raise InvalidRequest(
            f"seed is {_shown(value)}, but must be a whole number from 0 to {MAX_SEED}, or -1 for a random one."
        )
    return number


def checked_variant(value: Any) -> int:
    number = _whole_number(value)
    if number is None or not 0 <= number <= MAX_VARIANT:
        raise InvalidRequest(f"variant is {_shown(value)}, but must be a whole number from 0 to {MAX_VARIANT}.")
    return number


def _whole_number(value: Any) -> int | None:
    # JSON has one kind of number: a page's 7 may arrive as 7.0, which is the same seed. 7.5 is not one.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def checked_number(name: str, value: Any, low: float, high: float) -> float:
    if not _is_number(value, low, high):
        raise InvalidRequest(f"{name} is {_shown(value)}, but must be a number from {low:g} to {high:g}.")
    return float(value)


def check_available(request: GenerationRequest, reasons: dict[str, str]) -> None:
    """Refuse a request for an option that cannot work here; `reasons` says why, by option.

    Raises:
        OptionUnavailable: with the reason.
    """
    for option, reason in reasons.items():
        if getattr(request, option, False):
            raise OptionUnavailable(reason)


def _is_whole(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _is_number(value: Any, low: float, high: float) -> bool:
    # `low <= nan` is false, so NaN falls out here without a case of its own.
    return isinstance(value, Real) and not isinstance(value, bool) and low <= value <= high


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # more digits than Python is willing to print, or lists nested too deeply
        return f"a very large {type(value).__name__}"
    return text if len(text) <= 40 else text[:37] + "..."
