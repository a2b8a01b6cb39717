"""What is measured side by side: against the reference mode, and each of our own switches against the default."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks import machine
from benchmarks.agreement import Agreement, compare, difference
from benchmarks.cli import SPEEDUPS
from benchmarks.interleave import Timing, Variant, interleave
from benchmarks.ratios import Ratio, noise, paired_ratio
from benchmarks.session import PROMPT, SEED, Session, thread_count
from benchmarks.watch import Reading, WatchedPipeline
from pipeline.blocks import FrameBlock
from pipeline.compare import psnr, squared_errors
from pipeline.config import GenerationRequest
from pipeline.device import dtype_name, has_bfloat16

OURS, AGAIN, REFERENCE = "ours", "ours again", "reference"
BF16 = ", bfloat16"
EMULATED = "This processor has no bfloat16 arithmetic: it would go by way of float32, many times more slowly."
DISAGREES = "The reference mode does not make the same video as the pipeline in float32, so no ratio is given."
AGREEMENT_BLOCKS = 5


def check_agreement(session: Session) -> Agreement:
    """Whether the reference mode makes the same video in float32."""
    with thread_count(session.threads):
        request = session.request(min(AGREEMENT_BLOCKS, session.scale.clip_blocks))
        return compare(session.pipeline(torch.float32), session.reference(torch.float32), request)


class RatioTable:
    """Makes ratios of timings, and says which of them the machine was too noisy for."""

    def __init__(self, session: Session, timings: Mapping[str, Timing]) -> None:
        self._session = session
        self._timings = timings
        self._load, self._processors = machine.load(), os.cpu_count() or 1

    def row(self, slow: str, fast: str, part: str, control: tuple[str, str] | None = None) -> dict[str, Any]:
        """How many times as long `slow` takes as `fast`.

        Args:
            part: `block`: the transformer, in blocks with one before and one after them; `stream`: whole videos.
            control: two copies of one variant.
        """
        copies = self._ratio(*(control or (OURS, AGAIN)), part, self._session.seconds)
        ratio = self._ratio(slow, fast, part, self._session.seconds)
        wall = self._ratio(slow, fast, part, lambda reading: reading.wall)
        reasons = noise(ratio, copies, self._load, self._processors)
        return {
            "slow": slow,
            "fast": fast,
            "of": part,
            "ratio": None if reasons else ratio.value,
            "too_noisy": reasons,
            "measured": ratio.as_dict(),
            "control": copies.as_dict(),
            "wall": wall.value,
            "load": self._load,
        }

    def milliseconds(self, name: str, part: str) -> float:
        """Median of a block's transformer, or of a video."""
        return 1000 * median(second for times in self._times(name, part, self._session.seconds) for second in times)

    def by_block(self, name: str) -> list[float]:
        """Milliseconds of the transformer: median of each block of the video."""
        rounds = [[1000 * self._session.seconds(r) for r in times] for times in self._timings[name].transformer]
        return [median(times) for times in zip(*rounds, strict=True)]

    def _ratio(self, slow: str, fast: str, part: str, seconds: Callable[[Reading], float]) -> Ratio:
        return paired_ratio(self._times(slow, part, seconds), self._times(fast, part, seconds), SEED)

    def _times(self, name: str, part: str, seconds: Callable[[Reading], float]) -> list[list[float]]:
        timing = self._timings[name]
        if part == "stream":
            return [[sum(map(seconds, times))] for times in timing.total]
        # The first block has no clean pass before it, and the reference's last one none behind it.
        return [[seconds(reading) for reading in times[1:-1]] for times in timing.transformer]


def against_reference(session: Session, agreement: Agreement, until: float = math.inf) -> dict[str, Any]:
    """The ratios of `SPEEDUPS`, and what they rest on.

    All have the same baseline, the reference mode in the dtype that is the device's default; only `block_fp32` has
    float32 on both sides. `stream` decodes with TAEHV, if the model has it, in the dtype that is ours by default and
    the transformer's in the reference mode, and encodes each block.

    Args:
        until: see `interleave`.
    """
    fp32, bf16, base = torch.float32, torch.bfloat16, session.default_dtype
    with_bf16 = has_bfloat16(session.device)
    taehv = {"taehv": session.has_taehv}

    def variants(dtype: torch.dtype, suffix: str) -> dict[str, Variant]:
        ours, reference = session.pipeline(None if dtype == base else dtype), session.reference(dtype)
        found = {OURS + suffix: ours, REFERENCE + suffix: reference, AGAIN + suffix: WatchedPipeline.beside(ours)}
        return {name: Variant(pipeline, taehv, encode=True) for name, pipeline in found.items()}

    groups = [(fp32, ""), (bf16, BF16)] if with_bf16 else [(fp32, "")]
    # A CPU's ratios go from one dtype to the other, and need both at once; a GPU's do not, and it may lack the memory.
    at_once = [groups] if base == fp32 else [[group] for group in groups]
    timings: dict[str, Timing] = {}
    with thread_count(session.ratio_threads):
        requests, rounds, began = _requests(session), session.scale.rounds, time.perf_counter()
        for number, together in enumerate(at_once, 1):
            compared = {name: made for dtype, suffix in together for name, made in variants(dtype, suffix).items()}
            end = began + (until - began) * number / len(at_once)
            timings |= interleave(compared, requests, rounds, session.clock, seed=SEED, until=end)
            if number < len(at_once):
                del compared
                session.forget(fp32)
    table = RatioTable(session, timings)
    default, copies = ("", (OURS, AGAIN)) if base == fp32 else (BF16, (OURS + BF16, AGAIN + BF16))
    rows = {
        "block_fp32": table.row(REFERENCE, OURS, "block"),
        "stream": table.row(REFERENCE + default, OURS + default, "stream", copies),
    }
    if with_bf16:
        copies = (OURS + BF16, AGAIN + BF16)
        rows["block_bf16"] = table.row(REFERENCE + default, OURS + BF16, "block", copies)
        rows["block_bf16_both"] = table.row(REFERENCE + BF16, OURS + BF16, "block", copies)
    speedups = {name: rows[name]["ratio"] if name in rows else None for name in SPEEDUPS}
    reasons = {name: row["too_noisy"] for name, row in rows.items() if row["too_noisy"]}
    if not with_bf16:
        reasons["block_bf16"] = [EMULATED]
    if not agreement.holds:
        speedups = dict.fromkeys(SPEEDUPS)
        reasons = {name: [DISAGREES] for name in SPEEDUPS}
        for row in rows.values():
            row["ratio"] = None
    return {
        "speedup_vs_reference": speedups,
        "why_null": reasons,
        "decoder": "taehv" if session.has_taehv else "vae",
        "threads": session.ratio_threads,
        "rows": rows,
        "block_milliseconds": {name: table.by_block(name) for name in timings},
        "video_milliseconds": {name: table.milliseconds(name, "stream") for name in timings},
    }


def switches(session: Session, until: float = math.inf) -> dict[str, Any]:
    """Each switch alone against the default: how many times as fast, and what it changes in the picture.

    Args:
        until: see `interleave`.
    """
    ours = session.pipeline()
    unavailable = ours.unavailable_options()
    variants = {"separate clean pass": Variant(WatchedPipeline.beside(ours, merge_clean_pass=False))}
    missing: dict[str, str] = {}
    for name in ("taehv", "fp8", "compile"):
        if name in unavailable:
            missing[name] = unavailable[name]
        else:
            beside = WatchedPipeline.beside(ours, own_weights=name == "fp8")
            variants[name] = Variant(beside, {name: True})
    if ours is not (whole := session.pipeline(session.default_dtype)) and session.has_taehv:
        variants["taehv, all in float32"] = Variant(WatchedPipeline.beside(whole), {"taehv": True})
    other = torch.bfloat16 if session.default_dtype == torch.float32 else torch.float32
    if not has_bfloat16(session.device):
        missing["bfloat16"] = EMULATED
    else:
        variants[dtype_name(other)] = Variant(session.pipeline(other))
    rows = against_default(session, variants, until)
    return {"default": dtype_name(session.default_dtype), "rows": rows, "missing": missing}


APPROXIMATE = ("taehv", "fp8", "bfloat16")
"""Names, or parts of names, of the variants that do not compute the same but for rounding."""


def against_default(
    session: Session,
    variants: Mapping[str, Variant],
    until: float = math.inf,
    *,
    changes: Mapping[str, bool] | None = None,
    how_much_faster_is_the_default: bool = False,
) -> dict[str, Any]:
    """Name -> how many times as fast a variant is as the default, and what it changes.

    Args:
        until: see `interleave`.
        changes: what the default's request has switched on.
        how_much_faster_is_the_default: turn the ratios round.
    """
    ours, changes = session.pipeline(), changes or {}
    copies = {OURS: Variant(ours, changes), AGAIN: Variant(WatchedPipeline.beside(ours), changes)}
    compared = copies | dict(variants)
    frames: dict[str, list[np.ndarray]] = {name: [] for name in compared}
    latents: dict[str, list[torch.Tensor]] = {name: [] for name in compared}

    def keep(name: str, block: FrameBlock, made: torch.Tensor) -> None:
        frames[name].append(block.frames)
        latents[name].append(made.float().cpu())

    with thread_count(session.ratio_threads):
        requests, rounds = _requests(session), session.scale.rounds
        timings = interleave(compared, requests, rounds, session.clock, seed=SEED, until=until, on_block=keep)
    table = RatioTable(session, timings)

    def row(name: str, part: str) -> dict[str, Any]:
        return table.row(*((name, OURS) if how_much_faster_is_the_default else (OURS, name)), part)

    return {
        name: {
            "exact": not any(part in name for part in APPROXIMATE),
            "block": row(name, "block"),
            "stream": row(name, "stream"),
            "block_milliseconds": table.by_block(name),
            "default_block_milliseconds": table.by_block(OURS),
            "psnr": picture_psnr(frames[OURS], frames[name]),
            "latents_differ_by": max(map(difference, latents[name], latents[OURS])),
        }
        for name in variants
    }


def picture_psnr(one: Iterable[np.ndarray], other: Iterable[np.ndarray]) -> float | None:
    """PSNR in dB of two videos in pieces, uint8 [T, H, W, 3]; None if they are equal."""
    errors = [error for a, b in zip(one, other, strict=True) for error in squared_errors(a, b)]
    return psnr(math.fsum(errors) / len(errors))


def _requests(session: Session) -> Callable[[int], GenerationRequest]:
    """Another prompt in every round, so that nobody remembers its embedding; numbers say little to any model."""
    return lambda number: session.request(session.scale.blocks, f"{PROMPT}, {number + 2}")
