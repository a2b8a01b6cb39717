"""The pipelines that a benchmark uses, loaded when they are first wanted, and what is asked of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from benchmarks.machine import product_rate
from benchmarks.roofline import BlockWork, count_work
from benchmarks.watch import Clock, Reading, WatchedPipeline, WatchedReference, clock_for
from pipeline.config import GenerationRequest, ModelSpec
from pipeline.device import default_dtype, taehv_dtype
from pipeline.failures import free_memory
from pipeline.memory import Builders

PROMPT = "a red balloon rises over the mountains at sunset"
SEED = 7


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        rounds, blocks: of what is measured side by side: videos, and blocks of each.
        clips, clip_blocks: of what is measured alone.
        rollout_seconds: of the long video; length_blocks: of the video without a window.
    """

    rounds: int = 7
    blocks: int = 5
    clips: int = 3
    clip_blocks: int = 7
    rollout_seconds: float = 60.0
    length_blocks: int = 20


QUICK = Scale(rounds=5, blocks=3, clips=1, clip_blocks=3, rollout_seconds=5.0, length_blocks=4)
"""Enough to see that everything works; not meant to be published."""


LoadPipeline = Callable[[torch.device, torch.dtype], WatchedPipeline]


@dataclass
class Session:
    """A model on a device.

    Attributes:
        load: loads the model in a dtype.
        builders: of its parts, for counting their work.
        folder: the model folder, for what needs a process of its own; None: such parts cannot be measured.
        threads: of what is measured alone; what is measured side by side on a CPU has one, whose time can be told
            from that of other programs.
        ratio_threads: of what is measured side by side.
    """

    load: LoadPipeline
    builders: Builders
    spec: ModelSpec
    device: torch.device
    folder: str | None
    scale: Scale = field(default_factory=Scale)
    threads: int = 1
    _loaded: dict[torch.dtype | None, WatchedPipeline] = field(default_factory=dict)
    _references: dict[torch.dtype, WatchedReference] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Else a GPU rounds float32 convolutions to ten bits, and two ways to write one differ by more than their sums.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False

    @property
    def default_dtype(self) -> torch.dtype:
        return default_dtype(self.device)

    @property
    def ratio_threads(self) -> int:
        return 1 if self.device.type == "cpu" else self.threads

    @cached_property
    def clock(self) -> Clock:
        return clock_for(self.device)

    def seconds(self, reading: Reading) -> float:
        """The time that ratios are made of: see `watch.py`."""
        return reading.cpu if self.device.type == "cpu" else reading.wall

    def pipeline(self, dtype: torch.dtype | None = None) -> WatchedPipeline:
        """The pipeline, all of it in this dtype; None: as it is by default, TAEHV perhaps in another one."""
        if dtype not in self._loaded:
            self._loaded[dtype] = self._default_pipeline() if dtype is None else self.load(self.device, dtype)
        return self._loaded[dtype]

    def _default_pipeline(self) -> WatchedPipeline:
        whole, rough = self.pipeline(self.default_dtype), taehv_dtype(self.device)
        return whole if rough == self.default_dtype else WatchedPipeline.beside(whole, taehv_dtype=rough)

    def reference(self, dtype: torch.dtype | None = None) -> WatchedReference:
        dtype = dtype or self.default_dtype
        if dtype not in self._references:
            self._references[dtype] = WatchedReference.beside(self.pipeline(dtype))
        return self._references[dtype]

    def forget(self, dtype: torch.dtype) -> None:
        """Let go of what is loaded in a dtype: a GPU may not hold two of them for long."""
        self._loaded.pop(dtype, None)
        self._references.pop(dtype, None)
        free_memory()

    def release_caches(self) -> None:
        """Let go of what earlier runs of the loaded pipelines left behind; the weights stay."""
        for pipeline in (*self._loaded.values(), *self._references.values()):
            pipeline.release()
        free_memory()

    def request(self, blocks: int, prompt: str = PROMPT, **changes: Any) -> GenerationRequest:
        """A video of so many blocks at the model's own rate."""
        seconds = self.spec.seconds_for(blocks, self.spec.fps)
        return replace(GenerationRequest(prompt=prompt, seed=SEED, seconds=seconds), **changes)

    @property
    def has_taehv(self) -> bool:
        return "taehv" in self.builders

    @cached_property
    def work(self) -> BlockWork:
        return count_work(self.builders, self.spec, self.default_dtype)

    def rate(self, threads: int, dtype: torch.dtype | None = None) -> float:
        """FLOP per second of matrix products, as measured now."""
        with thread_count(threads):
            return product_rate(self.device, dtype or self.default_dtype)


@contextmanager
def thread_count(threads: int) -> Iterator[None]:
    """Let torch use so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
