"""What is measured of the pipeline alone: frames per second, their limit, first frames, long videos, encoding."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, median, quantiles
from typing import Any

from benchmarks.session import Session, thread_count
from benchmarks.watch import WatchedPipeline
from pipeline.blocks import FrameBlock
from pipeline.config import GenerationRequest
from pipeline.device import dtype_name
from pipeline.generator import SelfForcingPipeline
from pipeline.video import SegmentEncoder

PROMPTS = ("a blue car drives along a snowy road at night", "a white bird flies over the sea on a sunny day")
"""For measuring first frames: one that was not asked for before, and again the same."""


@dataclass(frozen=True)
class Way:
    """One way to make a video.

    Attributes:
        pipeline: that makes it.
        changes: to the request, as in {"taehv": True}.
        dtype_limits: whether the limit of the model's dtype is one for it: what multiplies in 8 bits may be faster.
    """

    pipeline: SelfForcingPipeline
    changes: Mapping[str, bool] = field(default_factory=dict)
    dtype_limits: bool = True


def decoders(session: Session) -> dict[str, Way]:
    """The default, with each decoder."""
    names = ("vae", "taehv")[: 1 + session.has_taehv]
    return {name: Way(session.pipeline(), {"taehv": name == "taehv"}) for name in names}


def speed(session: Session, until: float = math.inf, ways: Mapping[str, Way] | None = None) -> dict[str, Any]:
    """Frames per second in whole videos, clean pass and decoding included.

    Args:
        until: no video but the first of each way is begun after this time of `time.perf_counter`.
        ways: by name; default: `decoders`.
    """
    rate, scale = session.rate(session.threads), session.scale
    rows = {}
    with thread_count(session.threads):
        for name, way in (decoders(session) if ways is None else ways).items():
            request = session.request(scale.clip_blocks, **way.changes)
            _block_seconds(way.pipeline, request)
            clips = [_block_seconds(way.pipeline, request)]
            while len(clips) < scale.clips and time.perf_counter() <= until:
                clips.append(_block_seconds(way.pipeline, request))
            decoder = "taehv" if request.taehv else "vae"
            limit = [session.work.block(block, decoder) / rate for block in range(scale.clip_blocks)]
            rows[name] = clip_figures(session, clips, limit if way.dtype_limits else None)
    return {
        "threads": session.threads,
        "dtype": dtype_name(session.default_dtype),
        "product_gflops": rate / 1e9,
        "blocks": scale.clip_blocks,
        "clips": min(len(row["fps_of_each"]) for row in rows.values()),
        "rows": rows,
    }


def clip_figures(session: Session, clips: Sequence[Sequence[float]], limit: Sequence[float] | None) -> dict[str, Any]:
    """Figures of several videos of the same length.

    Args:
        clips: video -> block -> seconds.
        limit: block -> the least seconds possible, by `roofline.py`; None: not known.
    """
    blocks = len(clips[0])
    frames, later = session.spec.frames_in(blocks), session.spec.temporal_stride * session.spec.frames_per_block
    sustained = median(frames / sum(clip) for clip in clips)
    last = median(later / clip[-1] for clip in clips) if blocks > 1 else None
    usual = [seconds for clip in clips for seconds in clip[1:]] or [clip[0] for clip in clips]
    limit_fps = None if limit is None else frames / sum(limit)
    last_limit = None if limit is None or blocks == 1 else later / limit[-1]
    return {
        "fps": sustained,
        "fps_of_each": [frames / sum(clip) for clip in clips],
        "limit_fps": limit_fps,
        "of_limit": None if limit_fps is None else sustained / limit_fps,
        "last_block_fps": last,
        "last_block_limit_fps": last_limit,
        "last_block_of_limit": None if last is None or last_limit is None else last / last_limit,
        "measurement_wrong": limit_fps is not None and sustained > limit_fps,
        "times_playback": sustained / session.spec.native_fps,
        "block_seconds_median": median(usual),
        "block_seconds_worst": max(usual),
        "jitter_p95": (quantiles(usual, n=20, method="inclusive")[-1] if len(usual) > 1 else usual[0]) / median(usual),
    }


def first_frame(session: Session, taehv: bool = False) -> dict[str, Any]:
    """Seconds to the first frames of a loaded model, for a new prompt and for one that it remembers."""
    pipeline, found = session.pipeline(), {"new_prompt": [], "cached_prompt": []}
    with thread_count(session.threads):
        _first(pipeline, session.request(1, taehv=taehv))
        for index in range(max(1, session.scale.clips)):
            prompt = f"{PROMPTS[index % len(PROMPTS)]}, {index}"
            for name in found:
                found[name].append(_first(pipeline, session.request(1, prompt, taehv=taehv)))
    return {"threads": session.threads, **{name: median(seconds) for name, seconds in found.items()}}


def rollout(session: Session, until: float = math.inf) -> dict[str, Any]:
    """A long video: does it get slower?

    Args:
        until: the video ends with the block that is made at this time of `time.perf_counter`.
    """
    spec = session.spec
    asked = spec.blocks_for(session.scale.rollout_seconds, spec.native_fps)
    request = session.request(asked, taehv=session.has_taehv)
    with thread_count(session.threads):
        seconds = _block_seconds(session.pipeline(), request, until)
    blocks = len(seconds)
    later = spec.temporal_stride * spec.frames_per_block
    full = -(-spec.window_frames // spec.frames_per_block)  # the first blocks see fewer frames and are faster
    part = max(1, (blocks - full) // 5)
    start, end = seconds[full : full + part] or seconds[-1:], seconds[-part:]
    return {
        "seconds": spec.frames_in(blocks) / spec.native_fps,
        "blocks": blocks,
        "cut_short": blocks < asked,
        "decoder": "taehv" if session.has_taehv else "vae",
        "fps": spec.frames_in(blocks) / sum(seconds),
        "fps_with_window_full": later / median(start),
        "fps_at_end": later / median(end),
        "end_of_start": median(start) / median(end),
        "block_seconds": seconds,
    }


def length(session: Session) -> dict[str, Any]:
    """What a longer video costs with the model's window, and if every block saw all before it."""
    blocks, spec = session.scale.length_blocks, session.spec
    everything = WatchedPipeline.beside(session.pipeline(), window=(blocks * spec.frames_per_block, 0))
    request = session.request(blocks, taehv=session.has_taehv)
    found: dict[str, list[float]] = {}
    with thread_count(session.threads):
        for name, pipeline in {"window": session.pipeline(), "everything": everything}.items():
            found[name] = []
            for _ in pipeline.stream(request):
                found[name].append(pipeline.transformer.wall)
    frames = [(block + 1) * spec.frames_per_block for block in range(blocks)]
    return {"latent_frames": frames, "transformer_seconds": found}


def encoding(session: Session) -> dict[str, Any]:
    """Processor time of encoding a frame to a segment, that of the encoder's process included."""
    with thread_count(session.threads):
        blocks = list(session.pipeline().stream(session.request(session.scale.clip_blocks)))
    encoder, cpu, wall = SegmentEncoder(blocks[0].run.fps), [], []
    for block in blocks:
        before = session.clock()
        encoder.encode(block.frames)
        took = session.clock() - before
        cpu.append(1000 * took.cpu / len(block.frames))
        wall.append(1000 * took.wall / len(block.frames))
    return {"cpu_milliseconds_a_frame": mean(cpu), "wall_milliseconds_a_frame": mean(wall)}


def _block_seconds(pipeline: SelfForcingPipeline, request: GenerationRequest, until: float = math.inf) -> list[float]:
    """Seconds on the wall for each block, from the request on to frames in main memory; one block at least."""
    ends = [0.0]
    for block in pipeline.stream(request):
        ends.append(block.elapsed)
        if time.perf_counter() > until:
            break
    return [end - begin for begin, end in zip(ends, ends[1:], strict=False)]


def _first(pipeline: SelfForcingPipeline, request: GenerationRequest) -> float:
    began = time.perf_counter()
    block: FrameBlock = next(iter(pipeline.stream(request)))
    assert len(block.frames)
    return time.perf_counter() - began
