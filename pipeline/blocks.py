"""What a stream is made of: the facts of a run, known before its first block, and the blocks themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from pipeline.config import GenerationRequest, ModelSpec


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a request comes to on this model: known before the first block, the same on all of them."""

    request: GenerationRequest
    seed: int
    """The seed used: the requested one, or the one that was drawn for -1."""
    fps: float
    num_blocks: int
    num_frames: int
    applied: dict[str, str] = field(default_factory=dict)
    """Option -> what was really done, e.g. {"decoder": "taehv", "precision": "float32", "device": "cpu"}."""
    model: str = ""
    weights_sha256: str = ""

    @property
    def seconds(self) -> float:
        """Length of the finished video."""
        return self.num_frames / self.fps

    @property
    def start_frames(self) -> int:
        """How many frames at the beginning show what the clip starts from."""
        return 0 if self.request.start is None else len(self.request.start.frames)


@dataclass(frozen=True, kw_only=True, eq=False)
class FrameBlock:
    """The frames of one block, ready to be shown."""

    index: int
    frames: np.ndarray
    """uint8 [T, H, W, 3], RGB."""
    start_frame: int
    """Index of `frames[0]` in the video."""
    run: RunInfo
    elapsed: float
    """Seconds from the start of the run until these frames existed."""
    denoise_seconds: float = 0.0
    decode_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class GeneratedVideo:
    """A drained stream."""

    frames: np.ndarray
    """uint8 [T, H, W, 3], RGB."""
    run: RunInfo
    time_to_first_frame: float
    elapsed: float

    @property
    def seed(self) -> int:
        return self.run.seed

    @property
    def fps(self) -> float:
        return self.run.fps


class StreamingPipeline(Protocol):
    """What the model thread, the page and the command line need of a pipeline; tests pass a scripted one."""

    spec: ModelSpec
    takes_start: bool
    """Whether it goes on from a request's `start`. One without this attribute must not be given a request with any."""

    def stream(self, request: GenerationRequest) -> Iterator[FrameBlock]:
        """Yield the blocks of one clip, calling `pipeline.control.checkpoint()` at every denoising step."""

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of the prompt that the model ignores, in order; empty for an open vocabulary."""

    def known_words(self) -> list[str]:
        """The model's whole vocabulary in alphabetical order; empty for an open one."""

    def unavailable_options(self) -> dict[str, str]:
        """Option name (`taehv`, `fp8`, `compile`) -> one sentence why it cannot work here."""

    # What else a pipeline may have, and need not: `preset`, `warm_up()`, `compile_state(request)` and
    # `learning_request(request)`, see `SelfForcingPipeline`; `compiled.waits` and `compiled.on_progress`, see
    # `CompiledRuns`; `close(timeout)`, told when the model is given up.
