"""Two runs that differ in nothing but the model's switches, and what the difference comes to.

Both have the prompt, the seed and with it all noise in common. Each is preceded by a short clip that nobody sees, with
the same switches: loading weights anew, casting or compiling them is told as `prepare_seconds` and is part of neither
first frame, and what the side before left behind (weights in 8 bits, say) costs the next one nothing. Nothing is
encoded while the model works, so that both are timed on the same machine.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np

from pipeline.blocks import FrameBlock, StreamingPipeline
from pipeline.config import MAX_SEED, OPTIONS, GenerationRequest, ModelSpec, check_available
from pipeline.errors import Cancelled, InvalidRequest, SelfForcingError
from pipeline.frame_file import FrameFile, free_bytes
from pipeline.meter import RunMeter
from pipeline.worker import ModelWorker, Run

DECODER_SWITCHES = ("taehv",)
"""Those that act after the transformer: they cannot change the latents."""

PREPARED_BLOCKS = 2
"""Length of the clip before each run: the second block is the first one that reads the cache."""
MAX_FRAME_BYTES = 2_000_000_000
"""What the frames of both sides together may take on the disk while they are compared."""
PIECE_FRAMES = 16

Switches = Mapping[str, bool]

_STOPPED = "The comparison was stopped. It needs both videos, so nothing of it is kept."

_MEANING = {
    "transformer": "Only the transformer differs; both sides are decoded in the same way.",
    "decoder": "Only the decoder differs; the transformer works alike on both sides.",
    "transformer and decoder": "Transformer and decoder both differ; this does not tell which of them matters more.",
}


def read_switches(side: str, texts: str | Sequence[str]) -> dict[str, bool]:
    """`"fp8=on,taehv=off"`, or several such texts, as {"fp8": True, "taehv": False}. `side` is for the message.

    Raises:
        InvalidRequest: something is not name=on or name=off, or a name is unknown or there twice.
    """
    switches: dict[str, bool] = {}
    parts = [part.strip() for text in ([texts] if isinstance(texts, str) else texts) for part in str(text).split(",")]
    for part in parts:
        name, _, value = (piece.strip().lower() for piece in part.partition("="))
        if name not in OPTIONS or value not in ("on", "off"):
            raise InvalidRequest(
                f"{side} has {part[:40]!r}, but must be name=on or name=off, with commas between several. "
                f"The names are {', '.join(OPTIONS)}."
            )
        if name in switches:
            raise InvalidRequest(f"{side} names {name} twice.")
        switches[name] = value == "on"
    return switches


@dataclass(frozen=True)
class Pair:
    """The two requests of a comparison: equal but for their switches."""

    a: GenerationRequest
    b: GenerationRequest

    @classmethod
    def of(cls, request: GenerationRequest, a: Switches, b: Switches) -> Self:
        """`request` twice, with different switches; what a side does not name is as in the request.

        A seed of -1 is drawn here, once, for both.

        Raises:
            InvalidRequest: the sides are equal, or name something that is no switch.
        """
        if unknown := {*a, *b} - set(OPTIONS):
            raise InvalidRequest(f"The sides name {sorted(unknown)}, but can differ in {', '.join(OPTIONS)} only.")
        if request.seed == -1:
            request = replace(request, seed=secrets.randbelow(MAX_SEED + 1))
        pair = cls(replace(request, **a), replace(request, **b))
        if not pair.differs:
            raise InvalidRequest("A and B are the same. Choose a switch that is on for one and off for the other.")
        return pair

    @property
    def differs(self) -> tuple[str, ...]:
        """The switches in which the sides differ."""
        return tuple(name for name in OPTIONS if getattr(self.a, name) != getattr(self.b, name))

    @property
    def differs_in(self) -> str:
        """Which part of the model differs: "transformer", "decoder", or "transformer and decoder"."""
        decoder = [name in DECODER_SWITCHES for name in self.differs]
        return "decoder" if all(decoder) else "transformer and decoder" if any(decoder) else "transformer"

    @property
    def meaning(self) -> str:
        """One sentence on what a difference between the videos can come from."""
        return _MEANING[self.differs_in]

    def label(self, request: GenerationRequest) -> str:
        """What is particular to one side, as in "fp8 on"."""
        return ", ".join(f"{name} {'on' if getattr(request, name) else 'off'}" for name in self.differs)

    def check(self, pipeline: StreamingPipeline) -> None:
        """Refuse what this model on this machine cannot do, before anything is made.

        Raises:
            OptionUnavailable: with the reason.
            InvalidRequest: the videos are too long to be compared, or the disk is too full.
        """
        for request in (self.a, self.b):
            check_available(request, pipeline.unavailable_options())
        if not isinstance(spec := pipeline.spec, ModelSpec):
            return
        _, num_frames = spec.length(self.a.seconds, self.a.fps or spec.fps, self.a.start)
        size = 2 * num_frames * spec.height * spec.width * 3
        takes = f"Two videos of {num_frames} frames take {size / 1e9:.1f} GB while they are compared"
        if size > MAX_FRAME_BYTES:
            raise InvalidRequest(f"{takes}; at most {MAX_FRAME_BYTES / 1e9:g} GB are allowed. Ask for fewer seconds.")
        if size > (free := free_bytes()):
            raise InvalidRequest(f"{takes}, but only {free / 1e9:.1f} GB of the disk are free. Ask for fewer seconds.")


class Side:
    """One of the two runs: its request, its frames and how fast they came."""

    def __init__(self, name: Literal["A", "B"], request: GenerationRequest, label: str) -> None:
        self.name = name
        self.request = request
        self.label = label
        self.frames = FrameFile(MAX_FRAME_BYTES // 2)  # `Pair.check` cannot foretell the length of every pipeline
        self.meter: RunMeter | None = None
        """None until the first block is there."""
        self.prepare_seconds = 0.0

    def take(self, block: FrameBlock) -> None:
        self.frames.append(block.frames)
        if self.meter is None:
            self.meter = RunMeter(block.run)
        self.meter.count(block)

    @property
    def facts(self) -> dict[str, Any]:
        """For the report. The run is over."""
        assert self.meter is not None
        return {
            "label": self.label,
            **{name: getattr(self.request, name) for name in OPTIONS},
            "applied": dict(self.meter.run.applied),
            "prepare_seconds": round(self.prepare_seconds, 4),
            "time_to_first_frame": round(self.meter.time_to_first_frame, 4),
            "generation_fps": round(self.meter.model_fps, 2),
        }


class Comparison:
    """Makes both sides of a pair, one after the other, on the thread that owns the model.

    Usage:
        with Comparison(worker, pair) as comparison:
            for side in comparison.make():
                show(side.name, side.meter)
            print(comparison.report())

    Args:
        worker: Owns the model.
        pair: What to make. `Pair.check` has been asked.
        max_seconds: Longest time a side may have the model; None: no limit.
        on_run: Is told of each run as it is submitted, so that it can be stopped.
        stopped: Whether nobody wants the comparison any more. Asked between the pieces of what comes after the runs.
    """

    def __init__(
        self,
        worker: ModelWorker,
        pair: Pair,
        max_seconds: float | None = None,
        on_run: Callable[[Run], None] = lambda run: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.pair = pair
        self.a = Side("A", pair.a, pair.label(pair.a))
        self.b = Side("B", pair.b, pair.label(pair.b))
        self._worker = worker
        self._max_seconds = max_seconds
        self._on_run = on_run
        self._stopped = stopped

    def make(self) -> Iterator[Side]:
        """Make both videos. Yields the side at work: before and after its preparation, and after each of its blocks.

        Raises:
            Cancelled: a run was stopped. There is nothing to compare then.
            SelfForcingError: as `Run` raises it.
        """
        spec = self._worker.wait_ready().spec
        for side in (self.a, self.b):
            yield side
            for block in self._run(_preparation(side.request, spec), self._max_seconds):
                side.prepare_seconds = block.elapsed
            yield side
            left = None if self._max_seconds is None else max(1.0, self._max_seconds - side.prepare_seconds)
            for block in self._run(side.request, left):
                side.take(block)
                yield side
        self._check_whole()

    def report(self) -> dict[str, Any]:
        """What the comparison comes to. Valid JSON: the PSNR of equal frames, which is infinite, is null.

        Raises:
            Cancelled: it was stopped.
        """
        assert self.a.meter is not None and self.b.meter is not None
        errors = self._errors()
        frames = [psnr(error) for error in errors]
        identical = not any(errors)
        worst = int(np.argmax(errors))
        run = self.a.meter.run
        return {
            "identical": identical,
            "psnr": psnr(float(np.mean(errors))),
            "psnr_lowest": frames[worst],
            "psnr_lowest_frame": None if identical else worst,
            "psnr_frames": frames,
            "differs": list(self.pair.differs),
            "differs_in": self.pair.differs_in,
            "meaning": self.pair.meaning,
            "a": self.a.facts,
            "b": self.b.facts,
            "prompt": run.request.prompt,
            "seed": run.seed,
            "start": None if run.request.start is None else run.request.start.describe(),
            "frames": len(errors),
            "seconds": round(len(errors) / run.fps, 4),
            "fps": run.fps,
            "model": run.model,
        }

    def pieces(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The frames of A and of B, some at a time, each uint8 [T, H, W, 3].

        Raises:
            Cancelled: it was stopped.
        """
        for pair in zip(self.a.frames.pieces(PIECE_FRAMES), self.b.frames.pieces(PIECE_FRAMES), strict=True):
            self.check_wanted()
            yield pair

    def check_wanted(self) -> None:
        """Raises `Cancelled` if it was stopped."""
        if self._stopped():
            raise Cancelled(_STOPPED)

    def close(self) -> None:
        self.a.frames.close()
        self.b.frames.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _run(self, request: GenerationRequest, max_seconds: float | None) -> Iterator[FrameBlock]:
        with self._worker.submit(request, max_seconds) as run:
            self._on_run(run)
            yield from run
            if run.stopped:
                raise Cancelled(_STOPPED)

    def _check_whole(self) -> None:
        a, b = self.a.meter, self.b.meter
        if a is None or b is None or len(self.a.frames) != len(self.b.frames):
            raise SelfForcingError("The model made videos of different length, which cannot be compared.")
        if (a.run.model, a.run.weights_sha256) != (b.run.model, b.run.weights_sha256):
            raise SelfForcingError("The model was exchanged between the two videos. Compare once more.")

    def _errors(self) -> list[float]:
        """Mean squared error of each frame, 0 to 255²."""
        return [error for a, b in self.pieces() for error in squared_errors(a, b)]


def compare(source: StreamingPipeline | ModelWorker, request: GenerationRequest, a: Switches, b: Switches) -> dict:
    """Make `request` with the switches of `a` and with those of `b`. Returns `Comparison.report()`.

    Args:
        source: The model, or the worker that owns it already.
        request: Its own switches hold where a side names none.
        a, b: Switch -> whether it is on, as in {"fp8": True}.

    Raises:
        InvalidRequest, OptionUnavailable: before anything is made.
        SelfForcingError: the model failed.
    """
    pair = Pair.of(request, a, b)
    worker = source if isinstance(source, ModelWorker) else ModelWorker(source)
    try:
        pair.check(worker.wait_ready())
        with Comparison(worker, pair) as comparison:
            for _ in comparison.make():
                pass
            return comparison.report()
    finally:
        if worker is not source:
            worker.close()


def squared_errors(a: np.ndarray, b: np.ndarray) -> list[float]:
    """Mean squared error of each frame: uint8 [T, H, W, 3] twice -> T numbers from 0 to 255²."""
    # One frame at a time, and in 32 bits: squares of bytes overflow in 16, and a piece of large frames is much memory.
    return [float(np.mean(np.square(left.astype(np.int32) - right))) for left, right in zip(a, b, strict=True)]


def psnr(error: float) -> float | None:
    """Peak signal-to-noise ratio in dB of a mean squared error of 8-bit values; None if there is no error at all."""
    return round(10 * math.log10(255**2 / error), 3) if error else None


def _preparation(request: GenerationRequest, spec: Any) -> GenerationRequest:
    """The clip before a run: as the run, but of one or two blocks."""
    if not isinstance(spec, ModelSpec):
        return replace(request, seconds=min(request.seconds, 1.0))
    seconds = spec.seconds_for(PREPARED_BLOCKS, request.fps or spec.fps)
    return replace(request, seconds=min(request.seconds, seconds))
