"""`python -m benchmarks.gpu`: all that a GPU is needed for, with random weights in the real shapes, in one call.

Goes from the most important to the least, leaves out what there is no time for, and prints a table last. Nothing is
begun after `--minutes`; what still runs half a minute later is stopped at its next denoising step and told as not
measured. Only what has no steps (making weights, a compilation that has begun) can take longer. `--small` does the same
on any machine, in a size that says nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging

from benchmarks import alone, machine, side_by_side
from benchmarks.cli import minutes
from benchmarks.interleave import Variant
from benchmarks.random_model import RandomModel, published, small
from benchmarks.results import SCHEMA, aligned, number, plain
from benchmarks.session import QUICK, Scale, Session
from benchmarks.watch import WatchedPipeline, WatchedReference
from pipeline.attention_backends import AttentionChoice, AttentionShapes, choose_attention
from pipeline.cli import (
    EXIT_BAD_INPUT,
    SentenceParser,
    check_device,
    check_device_name,
    exit_code,
    say,
)
from pipeline.control import RunControl
from pipeline.device import chosen_device
from pipeline.errors import DeadlineExceeded, OptionUnavailable, SelfForcingError
from pipeline.failures import free_memory
from pipeline.process import quiet_libraries

SCALE = Scale(rounds=5, blocks=7, clips=3, clip_blocks=7, rollout_seconds=60.0, length_blocks=14)
AGREEMENT_BLOCKS = 2
"""In float32 at full size, which takes a GPU many times as long."""
FORCED = ("flash", "cudnn")
"""Attention backends that are also measured by force."""
LEAST_SECONDS = 20.0
"""What must be left for a part to be begun."""
GRACE_SECONDS = 30.0
"""How long after the time is over a part may still finish."""
ROLLOUT_WINDOW = 12
"""Latent frames of the long video's window, a sink of one block included: what the memory plans shrink it to."""
Part = Callable[[Session, float], dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run all of it. Returns 0, 1 (failed) or 2 (bad input)."""
    try:
        options = parse(argv)
        quiet_libraries(verbose=False)
        diffusers_logging.set_verbosity_error()
        device_name = check_device_name(options.device)
        check_device(device_name)
        if device_name is None and not torch.cuda.is_available() and not options.small:
            raise OptionUnavailable("There is no GPU here. --small tries the same on the CPU, without saying much.")
        result = run(chosen_device(device_name), options)
    except OSError as error:
        say(f"The result cannot be written to {options.out} ({error.strerror}).")
        return EXIT_BAD_INPUT
    except SelfForcingError as error:
        say(str(error))
        return exit_code(error)
    sys.stdout.write(as_text(result) + "\n")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = SentenceParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", default="self-forcing-dmd", help="entry of the manifest whose shapes are taken")
    parser.add_argument("--small", action="store_true", help="tiny shapes, for trying it out anywhere")
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: cuda if there is one, else cpu)")
    parser.add_argument("--minutes", type=minutes, default=7.0, help="nothing is begun after that (default: 7)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where the result is written")
    return parser.parse_args(argv)


def run(device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """All parts, as far as the time allows; `options.out` is written anew after each one.

    Raises:
        OSError: it cannot be written.
    """
    began = time.perf_counter()
    builders, spec = (small if options.small else published)(options.model)
    session = Session(
        load=RandomModel(builders, spec).load,
        builders=builders,
        spec=spec,
        device=device,
        folder=None,
        scale=replace(QUICK, rounds=1) if options.small else SCALE,
        threads=os.cpu_count() or 1,
    )
    parts: dict[str, Any] = {}
    missing = dict.fromkeys(PARTS, "It was not reached.")
    before = machine.gpu_state()

    def result() -> dict[str, Any]:
        return plain(
            {
                "schema": SCHEMA,
                "made": datetime.now(UTC).isoformat(timespec="seconds"),
                "quick": options.small,
                "random_weights": True,
                "model": {"name": spec.name, "height": spec.height, "width": spec.width},
                "machine": machine.describe(device, session.threads),
                "gpu_state": [before, machine.gpu_state()],
                "scale": asdict(session.scale),
                "seconds": time.perf_counter() - began,
                "parts": parts,
                "not_measured": missing,
            }
        )

    for name, part in PARTS.items():
        left = 60 * options.minutes - (time.perf_counter() - began)
        say(f"{time.perf_counter() - began:.0f} s: {name}")
        try:
            if left < LEAST_SECONDS and not options.small:
                raise DeadlineExceeded
            with RunControl(max(0.0, left) + GRACE_SECONDS).active():
                parts[name] = part(session, time.perf_counter() + 0.6 * left)
            del missing[name]
        except DeadlineExceeded:
            missing[name] = "There was no time left."
        except Exception as error:  # such as an option that this GPU or torch lacks; the others go on
            said = str(error).strip().partition("\n")[0][:200]
            missing[name] = f"{type(error).__name__}: {said}" if said else type(error).__name__
        free_memory()
        if options.out is not None:
            text = json.dumps(result(), indent=1, allow_nan=False)
            options.out.write_text(text + "\n", encoding="utf-8")
    return result()


def agreement(session: Session, until: float) -> dict[str, Any]:
    """Whether the reference makes the same video, in float32 and full size; the float32 weights go again."""
    try:  # no name for them here, which would hold them
        found = side_by_side.compare(
            session.pipeline(torch.float32), session.reference(torch.float32), session.request(AGREEMENT_BLOCKS)
        )
    finally:
        session.forget(torch.float32)
    return found.as_dict()


def references(session: Session, until: float) -> dict[str, Any]:
    """The reference with the same attention and with each of torch's, so that attention and design are not mixed."""
    ours = session.pipeline()
    named = {
        f"reference{suffix}": Variant(WatchedReference.beside(ours, attention=choice), {"taehv": session.has_taehv})
        for suffix, choice in attention_choices(ours).items()
    }
    return side_by_side.against_default(
        session, named, until, changes={"taehv": session.has_taehv}, how_much_faster_is_the_default=True
    )


def attention(session: Session, until: float) -> dict[str, Any]:
    """The default with each of torch's kernels forced, and without the merged clean pass."""
    ours = session.pipeline()
    named = {
        f"attention{suffix}": Variant(WatchedPipeline.beside(ours, attention=choice))
        for suffix, choice in attention_choices(ours).items()
        if suffix
    }
    named["separate clean pass"] = Variant(WatchedPipeline.beside(ours, merge_clean_pass=False))
    return side_by_side.against_default(session, named, until)


def switches(session: Session, until: float) -> dict[str, Any]:
    """TAEHV, compile, FP8, and all of them together."""
    ours, unavailable = session.pipeline(), session.pipeline().unavailable_options()
    chosen = [("taehv",), ("taehv", "compile"), ("fp8",), ("taehv", "fp8", "compile")]
    named = {
        " + ".join(names): Variant(WatchedPipeline.beside(ours, own_weights="fp8" in names), dict.fromkeys(names, True))
        for names in chosen
        if not set(names) & unavailable.keys()
    }
    return side_by_side.against_default(session, named, until)


def optimised(session: Session, until: float) -> dict[str, Any]:
    """What the targets are about: compiled, in 8 bits, and with attention in 8 bits, each with TAEHV."""
    ours = session.pipeline()
    unavailable = ours.unavailable_options()
    ways: dict[str, alone.Way] = {}
    for names in (("compile",), ("compile", "fp8")):
        if not set(names) & unavailable.keys():
            changes = {"taehv": session.has_taehv} | dict.fromkeys(names, True)
            pipeline = WatchedPipeline.beside(ours, own_weights="fp8" in names)
            ways[" + ".join(names)] = alone.Way(pipeline, changes, dtype_limits="fp8" not in names)
    if not ways:
        return {"unavailable": unavailable}
    if (rough := forced(ours, "sage")) is not None:
        name, way = list(ways.items())[-1]
        pipeline = WatchedPipeline.beside(ours, own_weights="fp8" in name, attention=rough)
        ways[f"{name} + sage"] = replace(way, pipeline=pipeline, dtype_limits=False)
    seconds = {}
    for name, way in ways.items():  # here, and not in the first video: it is a figure of its own
        request = session.request(3, **way.changes)
        for _ in way.pipeline.stream(replace(request, compile=False)):
            pass
        began = time.perf_counter()
        way.pipeline.compiled.complete(request, way.pipeline.stream)
        seconds[name] = time.perf_counter() - began
    return alone.speed(session, until, ways) | {"compiling_seconds": seconds, "unavailable": unavailable}


def rollout(session: Session, until: float) -> dict[str, Any]:
    """A minute with a window: does it stay as fast as it begins? And what memory it takes besides what is loaded."""
    spec = session.spec
    window = max(ROLLOUT_WINDOW // spec.frames_per_block, 3) * spec.frames_per_block
    narrow = replace(spec, window_frames=window, sink_frames=spec.frames_per_block)
    pipeline = WatchedPipeline.beside(session.pipeline(), window=(window, spec.frames_per_block))
    gpu, resident = session.device.type == "cuda", 0
    if gpu:
        session.release_caches()
        resident = torch.cuda.memory_allocated(session.device)
        torch.cuda.reset_peak_memory_stats(session.device)
    there = replace(session, load=lambda device, dtype: pipeline, spec=narrow, _loaded={}, _references={})
    found = alone.rollout(there, until)
    peak = torch.cuda.max_memory_allocated(session.device) if gpu else 0
    return found | {
        "window_frames": window,
        "gpu_memory_of_weights": resident if gpu else None,
        "peak_gpu_memory_besides": peak - resident if gpu else None,
    }


PARTS: dict[str, Part] = {
    "agreement": agreement,
    "speed": lambda session, until: alone.speed(session, until),
    "first_frame": lambda session, until: alone.first_frame(session, session.has_taehv),
    "reference": references,
    "optimised": optimised,
    "switches": switches,
    "rollout": rollout,
    "attention": attention,
    "encoding": lambda session, until: alone.encoding(session),
    "length": lambda session, until: alone.length(session),
}


def attention_choices(pipeline: WatchedPipeline) -> dict[str, AttentionChoice]:
    """Suffix of a variant's name -> what attends: as by default, and by force. torch's `flash` is FlashAttention 2, as
    theirs is on an H200."""
    choices = {f", {name}": forced(pipeline, name) for name in FORCED}
    return {"": pipeline.attention} | {name: choice for name, choice in choices.items() if choice is not None}


def forced(pipeline: WatchedPipeline, name: str) -> AttentionChoice | None:
    """An attention backend in a model's shapes; None if this device has none."""
    transformer = pipeline._transformer
    shapes = AttentionShapes.of(transformer.config, pipeline.spec)
    try:
        return choose_attention(name, shapes, transformer.device, transformer.dtype)
    except OptionUnavailable:
        return None


def as_text(result: dict[str, Any]) -> str:
    """The table."""
    parts, rows = result["parts"], [["what", "FPS or ratio", "95 %, or limit", "block ms, first / last", "picture"]]
    optimised = parts.get("optimised", {})
    for name, row in (parts.get("speed", {}).get("rows", {}) | optimised.get("rows", {})).items():
        limit = "" if row["limit_fps"] is None else f"limit {row['limit_fps']:.1f}, reached {row['of_limit']:.0%}"
        rows.append([f"sustained, {name}", number(row["fps"], 1, " FPS"), limit, "", ""])
        rows.append([f"last block, {name}", number(row["last_block_fps"], 1, " FPS"), "", "", ""])
    for name, seconds in optimised.get("compiling_seconds", {}).items():
        rows.append([f"compiling, {name}", number(seconds, 1, " s"), "", "", ""])
    for part in ("reference", "switches", "attention"):
        told_of = "times the {}" if part == "reference" else "{}: times the default"
        for name, row in parts.get(part, {}).items():
            for of in ("block", "stream"):
                found, times = row[of]["measured"], row["block_milliseconds"]
                told = f"{times[0]:.0f} / {times[-1]:.0f}" if of == "block" else ""
                psnr = "equal" if row["psnr"] is None else number(row["psnr"], 1, " dB")
                between = f"{found['low']:.2f} to {found['high']:.2f}" + ("" if row[of]["ratio"] else ", too noisy")
                rows.append([told_of.format(f"{name}, {of}"), number(found["value"]), between, told, psnr])
    first, long = parts.get("first_frame", {}), parts.get("rollout", {})
    for name, value in first.items():
        if name != "threads":
            rows.append([f"first frame, {name.replace('_', ' ')}", number(value, 3, " s"), "", "", ""])
    if long:
        title = f"{long['seconds']:.0f} s, window {long['window_frames']}"
        rows.append([title, number(long["fps"], 1, " FPS"), f"end of start {long['end_of_start']:.2f}", "", ""])
        if long["gpu_memory_of_weights"] is not None:
            for name, key in (("weights", "gpu_memory_of_weights"), ("besides, peak", "peak_gpu_memory_besides")):
                rows.append([f"GPU memory, {name}", number(long[key] / 2**30, 1, " GB"), "", "", ""])
    if encoded := parts.get("encoding"):
        rows.append(["encoding a frame", number(encoded["cpu_milliseconds_a_frame"], 2, " ms CPU"), "", "", ""])
    agreed = parts.get("agreement")
    verdict = "not checked" if agreed is None else ("the same video" if agreed["holds"] else "ANOTHER video")
    return "\n".join(
        [
            *(f"{name}: not measured. {reason}" for name, reason in result["not_measured"].items()),
            f"GPU before and after: {result['gpu_state'][0]} | {result['gpu_state'][1]}",
            f"{result['seconds']:.0f} s, random weights, {result['model']['width']} x {result['model']['height']}; "
            f"the reference makes {verdict}.",
            *aligned(rows),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
