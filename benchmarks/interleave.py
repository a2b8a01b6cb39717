"""Several variants side by side in one process: block by block, in an order that is shuffled for every block."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from benchmarks.watch import Clock, Reading, Watched
from pipeline.blocks import FrameBlock
from pipeline.config import GenerationRequest
from pipeline.video import SegmentEncoder


@dataclass
class Variant:
    """One of the things that are compared.

    Attributes:
        pipeline: a watched one.
        changes: made to the request, as in {"taehv": True}.
        encode: whether blocks are encoded to segments, as the page and the command line do.
    """

    pipeline: Watched
    changes: Mapping[str, bool] = field(default_factory=dict)
    encode: bool = False

    def stream(self, request: GenerationRequest) -> Iterator[FrameBlock]:
        encoder: SegmentEncoder | None = None
        for block in self.pipeline.stream(request):
            if self.encode:
                encoder = encoder or SegmentEncoder(block.run.fps)
                encoder.encode(block.frames)
            yield block


@dataclass(frozen=True)
class Timing:
    """What one variant took.

    Attributes:
        transformer, total: round -> block -> seconds; `total` is all from text to frames, or to the segment.
    """

    transformer: list[list[Reading]]
    total: list[list[Reading]]


Requests = Callable[[int], GenerationRequest]
"""Round -> what all variants make in it."""


def interleave(
    variants: Mapping[str, Variant],
    requests: Requests,
    rounds: int,
    clock: Clock,
    *,
    seed: int = 0,
    until: float = math.inf,
    on_block: Callable[[str, FrameBlock, torch.Tensor], None] = lambda *_: None,
) -> dict[str, Timing]:
    """Make `rounds` videos with every variant, and one before them that does not count.

    Args:
        requests: rounds are counted from 0; the one before them is -1.
        seed: of the shuffling.
        until: no round but the first is begun after this time of `time.perf_counter`.
        on_block: is told of every block of round 0, with its latents, while nothing is timed.
    """
    draw = random.Random(seed)
    timings = {name: Timing([], []) for name in variants}
    for number in range(-1, rounds):
        if number > 0 and time.perf_counter() > until:
            break
        base = requests(number)
        streams = {name: variant.stream(replace(base, **variant.changes)) for name, variant in variants.items()}
        found: dict[str, list[tuple[Reading, Reading]]] = {name: [] for name in variants}
        left = list(variants)
        while left:
            draw.shuffle(left)
            for name in list(left):
                variant = variants[name]
                before = clock()
                block = next(streams[name], None)
                took = clock() - before
                if block is None:
                    left.remove(name)
                    continue
                found[name].append((variant.pipeline.transformer, took))
                if number == 0:
                    on_block(name, block, variant.pipeline.latents)
        if number >= 0:
            for name, blocks in found.items():
                timings[name].transformer.append([transformer for transformer, _ in blocks])
                timings[name].total.append([total for _, total in blocks])
    return timings
