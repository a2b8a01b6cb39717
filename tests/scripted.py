"""A pipeline without a model: it paints a moving picture with the frame's number in it, at the pace it is told.

The number is a bar code along the lower edge, wide enough to survive enlargement, H.264 and a browser's scaling; so a
test can tell from any picture, wherever it caught it, which frame it is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from pipeline.blocks import FrameBlock, RunInfo
from pipeline.config import GenerationRequest, ModelSpec
from pipeline.control import checkpoint
from prompting.enhancer import Enhancer

CODE_BITS = 12
CODE_HEIGHT = 1 / 6
"""Share of the picture's height that the bar code takes."""
OFF_BY = np.uint8(5)
"""What TAEHV does to every value of a `SwitchedPipeline`'s pictures."""

SPEC = ModelSpec(
    name="scripted",
    height=64,
    width=112,
    fps=16,
    native_fps=16,
    frames_per_block=3,
    text_len=32,
    denoising_steps=(1000, 750, 500, 250),
    shift=5.0,
    window_frames=21,
    sink_frames=3,
)

WORDS = ["a", "at", "ball", "balloon", "blue", "city", "green", "mountains", "ocean", "over", "red", "rises"]
WORDS += ["sunset", "the"]


@dataclass
class ScriptedPipeline:
    """A `StreamingPipeline` that keeps a record of what was asked of it. What a clip starts from it shows as it is."""

    spec: ModelSpec = SPEC
    takes_start: bool = True
    step_seconds: float = 0.0
    """Time per denoising step; a block has `len(spec.denoising_steps)` of them."""
    faults: dict[tuple[int, int], BaseException] = field(default_factory=dict)
    """(block, step) -> raised there, once."""
    unavailable: dict[str, str] = field(default_factory=dict)
    vocabulary: list[str] = field(default_factory=lambda: sorted(WORDS))
    enhancer: Enhancer | None = None
    on_step: Callable[[int, int], None] | None = None
    """Called with (block, step) before each step's checkpoint."""

    requests: list[GenerationRequest] = field(default_factory=list)
    made: list[tuple[int, int]] = field(default_factory=list)
    """(run, block) in the order of their making."""
    intervals: list[tuple[float, float]] = field(default_factory=list)
    """Begin and end of each run on the monotonic clock."""
    stamps: list[list[float]] = field(default_factory=list)
    """Per run: when each block was ready, on the wall clock."""
    threads: set[int] = field(default_factory=set)

    def stream(self, request: GenerationRequest) -> Iterator[FrameBlock]:
        run = len(self.requests)
        self.requests.append(request)
        self.stamps.append([])
        self.threads.add(threading.get_ident())
        begun = time.monotonic()
        try:
            yield from self._blocks(request, run, begun)
        finally:
            self.intervals.append((begun, time.monotonic()))

    def _blocks(self, request: GenerationRequest, run: int, begun: float) -> Iterator[FrameBlock]:
        fps = request.fps or self.spec.fps
        num_blocks, num_frames = self.spec.length(request.seconds, fps, request.start)
        given = [] if request.start is None else list(request.start.frames)
        info = RunInfo(
            request=request,
            seed=request.seed if request.seed >= 0 else 1234567,
            fps=fps,
            num_blocks=num_blocks,
            num_frames=num_frames,
            applied={"decoder": "taehv" if request.taehv else "wan", "device": "cpu", "precision": "float32"},
            model=self.spec.name,
            weights_sha256="0" * 64,
        )
        start = 0
        for index in range(num_blocks):
            block_begun = time.monotonic()
            for step in range(len(self.spec.denoising_steps)):
                if self.on_step:
                    self.on_step(index, step)
                checkpoint()
                if fault := self.faults.pop((index, step), None):
                    raise fault
                time.sleep(self.step_seconds)
            end = num_frames - self.spec.temporal_stride * self.spec.frames_per_block * (num_blocks - index - 1)
            painted = [paint(n, self.spec.height, self.spec.width, info.seed) for n in range(start, end)]
            frames = np.stack([*given, *painted[len(given) :]] if index == 0 else painted)
            self.made.append((run, index))
            now = time.monotonic()
            self.stamps[run].append(time.time())
            yield FrameBlock(
                index=index,
                frames=frames,
                start_frame=start,
                run=info,
                elapsed=now - begun,
                denoise_seconds=now - block_begun,
            )
            start = end

    def unknown_words(self, prompt: str) -> list[str]:
        words = (word.strip(".,!?").lower() for word in prompt.split())
        return [word for word in words if self.vocabulary and word not in self.vocabulary]

    def known_words(self) -> list[str]:
        return self.vocabulary

    def unavailable_options(self) -> dict[str, str]:
        return self.unavailable


@dataclass
class SwitchedPipeline(ScriptedPipeline):
    """A scripted pipeline whose TAEHV shows: every value is off by `OFF_BY`. FP8 changes nothing."""

    first_block: int = 0
    """Where it begins to show."""

    def _blocks(self, request: GenerationRequest, run: int, begun: float) -> Iterator[FrameBlock]:
        for block in super()._blocks(request, run, begun):
            if request.taehv and block.index >= self.first_block:
                low = block.frames < 128
                block = replace(block, frames=np.where(low, block.frames + OFF_BY, block.frames - OFF_BY))
            yield block


def paint(number: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Frame `number`: a sun that rises over moving hills, patches of pure colour, and the bar code. uint8 [H, W, 3]."""
    y, x = np.mgrid[0:height, 0:width]
    x, y = x / width, y / height
    sky = np.stack([0.95 - 0.5 * y, 0.55 + 0.1 * y, 0.45 + 0.5 * y], axis=-1)
    turn = number / 48
    sun = np.hypot((x - 0.3 - 0.4 * (seed % 7) / 7) * width / height, y - 0.55 + 0.3 * min(turn, 1)) < 0.12
    sky[sun] = (1.0, 0.85, 0.35)
    for depth, colour in enumerate([(0.45, 0.4, 0.6), (0.3, 0.3, 0.5), (0.16, 0.18, 0.34)]):
        ridge = 0.55 + 0.1 * depth + 0.06 * np.sin(9 * x + (1 + depth) * turn + 2 * depth + seed % 5)
        sky[y > ridge] = colour
    picture = (sky * 255).astype(np.uint8)
    edge = max(2, height // 8)
    for place, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255)]):
        picture[:edge, place * edge : (place + 1) * edge] = colour
    band = _code_band(height)
    for bit in range(CODE_BITS):
        left, right = bit * width // CODE_BITS, (bit + 1) * width // CODE_BITS
        picture[band, left:right] = 255 if number >> bit & 1 else 0
    return picture


def read_code(picture: np.ndarray) -> int:
    """The number that `paint` put into a picture, uint8 [H, W, 3] of whatever size."""
    height, width = picture.shape[:2]
    band = _code_band(height)
    margin = (band.stop - band.start) // 4  # the outermost rows are blended with the picture above
    row = picture[band.start + margin : band.stop - margin].mean(axis=(0, 2))
    middles = [(2 * bit + 1) * width // (2 * CODE_BITS) for bit in range(CODE_BITS)]
    return sum((row[middle] > 127) << bit for bit, middle in enumerate(middles))


def _code_band(height: int) -> slice:
    return slice(height - int(height * CODE_HEIGHT), height)
