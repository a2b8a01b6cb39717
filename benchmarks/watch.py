"""Pipelines whose transformer is timed apart from everything else, and clocks for that.

On a CPU the clock is processor time, that of the encoder's processes included (but on Windows, which does not add it
up): other programs can slow it, but not count in it. On a GPU it is the time on the wall, with the device waited for.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from benchmarks.machine import seconds_of_children
from benchmarks.reference import ReferencePipeline, encoder_beside
from benchmarks.reference_decoder import twin
from pipeline.attention_backends import AttentionChoice
from pipeline.generator import SelfForcingPipeline
from pipeline.options import TransformerOptions


@dataclass(frozen=True)
class Reading:
    """Seconds of both clocks."""

    wall: float
    cpu: float

    def __sub__(self, other: Reading) -> Reading:
        return Reading(self.wall - other.wall, self.cpu - other.cpu)


Clock = Callable[[], Reading]


def clock_for(device: torch.device) -> Clock:
    """A clock that waits for the device before it is read."""

    def read() -> Reading:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return Reading(time.perf_counter(), time.process_time() + seconds_of_children())

    return read


class Watched:
    """Keeps of the last block what the transformer took for it and what it made.

    Attributes:
        transformer: seconds, the clean pass included wherever it is done.
        latents: [1, F, C, h, w].
    """

    transformer = Reading(0.0, 0.0)
    latents: torch.Tensor

    def _roll_out(self, *arguments: Any, **keywords: Any) -> Generator[torch.Tensor, None, None]:
        clock = clock_for(self.device)
        rollout = super()._roll_out(*arguments, **keywords)
        while True:
            before = clock()
            latents = next(rollout, None)
            if latents is None:
                return
            self.transformer, self.latents = clock() - before, latents
            yield latents

    def decode(self, latents: torch.Tensor, taehv: bool, first: bool) -> torch.Tensor:
        """Decode a block, the first of a clip or the next one: [1, T, 3, H, W] in [0, 1]."""
        decoder = self._decoders[taehv]
        if first:
            decoder.reset()
        return decoder.decode(latents)

    def release(self) -> None:
        """Let go of the cache and of what the decoders remember; the next run begins with new ones."""
        self._cache = None
        for decoder in self._decoders.values():
            decoder.reset()
        if hasattr(self, "latents"):
            del self.latents

    @property
    def has_taehv(self) -> bool:
        return True in self._decoders


class WatchedPipeline(Watched, SelfForcingPipeline):
    """The pipeline."""

    @classmethod
    def beside(
        cls,
        pipeline: SelfForcingPipeline,
        *,
        merge_clean_pass: bool = True,
        window: tuple[int, int] | None = None,
        own_weights: bool = False,
        attention: AttentionChoice | None = None,
        taehv_dtype: torch.dtype | None = None,
    ) -> Self:
        """Another pipeline with the same weights and a state of its own.

        Args:
            window: of its cache, in latent frames, and how many of them are the sink, if it shall be another.
            own_weights: its transformer is a copy, for switches that change weights.
            attention: what attends; default: what does in the other pipeline.
            taehv_dtype: in which it has a copy of TAEHV, if it shall have one.
        """
        model = pipeline._transformer.apply(fp8=False, compile=False)
        changed = {} if window is None else dict(zip(("window_frames", "sink_frames"), window, strict=True))
        decoders = pipeline._decoders
        taehv = decoders[True].weights if True in decoders else None
        if taehv is not None and taehv_dtype is not None:
            taehv = copy.deepcopy(taehv).to(taehv_dtype)
        return cls(
            replace(pipeline.spec, **changed),
            TransformerOptions(lambda: copy.deepcopy(model) if own_weights else twin(model)),
            encoder_beside(pipeline.text),
            decoders[False].weights,
            taehv,
            merge_clean_pass=merge_clean_pass,
            attention=attention or pipeline.attention,
        )


class WatchedReference(Watched, ReferencePipeline):
    """The reference mode."""
