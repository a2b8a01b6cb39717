"""The benchmark's command line."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline import container
from pipeline.cli import (
    EMBEDDED_MODEL,
    EXIT_INTERRUPTED,
    SentenceParser,
    check_device,
    check_device_name,
    check_model_folder,
    exit_code,
    say,
)
from pipeline.errors import SelfForcingError
from pipeline.process import quiet_libraries

PARTS = {
    "reference": "ratios against what the authors' code does",
    "switches": "each switch against the default, with PSNR",
    "speed": "frames per second, and the limit for them",
    "first_frame": "first frame of a loaded model",
    "cold": "first frame of a new process, peak memory",
    "rollout": "a long video",
    "length": "cost against length",
    "compile": "compiling, the first time and again",
    "encoding": "processor time of encoding",
}
SHARES = {"reference": 0.3, "switches": 0.25, "speed": 0.08, "rollout": 0.08}
"""Of the time, for the parts that are shortened to fit it. The rest is for all others, which take what they take."""
SPEEDUPS = ("block_fp32", "block_bf16", "stream")
"""What is always told, be it null."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns 0, 1 (failed), 2 (bad input) or 130 (Ctrl-C)."""
    try:
        options = parse(argv)
        quiet_libraries(verbose=False)
        folder, device = check_model_folder(options.model), check_device_name(options.device)
        check_device(device)
        result = run(folder, device, options)
        path = publish(result, options)
    except KeyboardInterrupt:
        say("Stopped. Nothing was written.")
        return EXIT_INTERRUPTED
    except SelfForcingError as error:
        say(str(error))
        return exit_code(error)
    if path is not None:
        say(f"Written to {path}.")
    from benchmarks.results import as_text

    sys.stdout.write((json.dumps(result, allow_nan=False) if options.json else as_text(result)) + "\n")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    listed = "; ".join(f"{name}: {what}" for name, what in PARTS.items())
    parser = SentenceParser(
        prog="python -m benchmarks",
        description="Measure how fast a model makes video here, and how many times as fast as the authors' code would.",
        epilog=f"The parts are {listed}.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", type=Path, default=EMBEDDED_MODEL, metavar="FOLDER", help="model folder (default: weights/embedded)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one, else cpu)")
    parser.add_argument("--only", type=_parts, metavar="PART,PART", help="measure these parts only")
    parser.add_argument("--quick", action="store_true", help="short: shows that all works, not to be published")
    parser.add_argument(
        "--minutes",
        type=minutes,
        default=10.0,
        help="a slow machine makes fewer videos, so that all parts take about that long (default: 10)",
    )
    parser.add_argument(
        "--threads",
        type=_threads,
        help="processors for what is measured alone (default: all); ratios on a CPU are of one thread",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where the result is written (default: benchmarks/results, if all parts were measured and not quickly)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object, last on stdout")
    return parser.parse_args(argv)


def _parts(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no part; the parts are {', '.join(PARTS)}")
    return names


def minutes(text: str) -> float:
    """A number of minutes on a command line."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 600:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of minutes above 0, up to 600")
    return value


def _threads(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to 1024")
    return int(text)


def run(folder: Path, device_name: str | None, options: argparse.Namespace) -> dict[str, Any]:
    """Measure what is asked for of the model in a folder."""
    import torch
    from transformers.utils import logging as transformers_logging

    from benchmarks.session import QUICK, Scale, Session
    from benchmarks.watch import WatchedPipeline
    from pipeline.device import chosen_device, default_dtype
    from pipeline.folder import ModelFolder
    from pipeline.memory import builders_of
    from pipeline.placing import placement_for

    transformers_logging.disable_progress_bar()
    placement = placement_for(folder, device_name, "auto")

    def load(device: torch.device, dtype: torch.dtype) -> WatchedPipeline:
        wide = device.type == "cuda" and dtype != default_dtype(device)  # a text encoder of twice the size
        return WatchedPipeline.from_pretrained(
            folder, device, dtype, replace(placement, text_encoder="offload") if wide else placement
        )

    session = Session(
        load=load,
        builders=builders_of(folder),
        spec=placement.fitted(ModelFolder(folder).spec),
        device=chosen_device(device_name),
        folder=str(folder),
        scale=QUICK if options.quick else Scale(),
        threads=options.threads or container.processors(),
    )
    return measure(session, options.only or list(PARTS), quick=options.quick, seconds=60 * options.minutes)


def measure(
    session: Any,
    names: Sequence[str],
    *,
    quick: bool = False,
    seconds: float = math.inf,
    note: Callable[[str], None] = say,
) -> dict:
    """Measure the named parts. Returns the result as it is written and printed.

    Args:
        seconds: what all parts together should take: those of `SHARES` make fewer videos, but one at least.
    """
    import torch

    from benchmarks import alone, fresh, machine, side_by_side
    from benchmarks.results import SCHEMA, plain

    agreement = None

    def reference(until: float) -> dict[str, Any]:
        nonlocal agreement
        agreement = side_by_side.check_agreement(session)
        return side_by_side.against_reference(session, agreement, until)

    work: Mapping[str, Callable[[float], dict[str, Any]]] = {
        "reference": reference,
        "switches": lambda until: side_by_side.switches(session, until),
        "speed": lambda until: alone.speed(session, until),
        "first_frame": lambda _: alone.first_frame(session),
        "cold": lambda _: fresh.cold(session),
        "rollout": lambda until: alone.rollout(session, until),
        "length": lambda _: alone.length(session),
        "compile": lambda _: fresh.compiling(session),
        "encoding": lambda _: alone.encoding(session),
    }
    before, parts = machine.load(), {}
    missing = {name: "It was not asked for." for name in PARTS if name not in names}
    for name, measured in work.items():
        if name in missing:
            continue
        note(f"Measuring {PARTS[name]}")
        try:
            parts[name] = measured(time.perf_counter() + SHARES.get(name, 1.0) * seconds)
        except fresh.ProcessFailed as error:
            missing[name] = str(error)
        except torch.OutOfMemoryError:
            missing[name] = "The memory of the GPU does not suffice for it."
        if session.device.type == "cuda":
            # Float32 was for this part, and the next one may start a process that loads the model once more.
            session.forget(torch.float32)
            session.release_caches()
    compared = parts.get("reference")
    result = {
        "schema": SCHEMA,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": quick,
        "model": {"name": session.spec.name, "height": session.spec.height, "width": session.spec.width},
        "machine": machine.describe(session.device, session.threads),
        "load": [before, machine.load()],
        "scale": asdict(session.scale),
        "agreement": agreement and agreement.as_dict(),
        "speedup_vs_reference": compared["speedup_vs_reference"] if compared else dict.fromkeys(SPEEDUPS),
        "why_null": compared["why_null"] if compared else dict.fromkeys(SPEEDUPS, [missing["reference"]]),
        "parts": parts,
        "not_measured": missing,
    }
    return plain(result)


def publish(result: dict[str, Any], options: argparse.Namespace) -> Path | None:
    """Write the result if it is asked for, or is a whole one."""
    from benchmarks.results import FOLDER, write

    if options.out is None and (options.quick or options.only):
        return None
    return write(result, options.out or FOLDER)
