"""`python -m pipeline compare "prompt" --a fp8=on --b fp8=off`: the same video twice, side by side, and the PSNR."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.blocks import StreamingPipeline
from pipeline.cli import (
    LoadPipeline,
    SentenceParser,
    Work,
    add_output_arguments,
    add_video_arguments,
    progress_bar,
    read_output,
    read_request,
    run_command,
    say,
    say_unknown_words,
)
from pipeline.compare import Comparison, Pair, read_switches
from pipeline.config import OPTIONS
from pipeline.worker import ModelWorker


def main(argv: Sequence[str] | None = None, load: LoadPipeline | None = None) -> int:
    """Run the command. Arguments and exit code are those of `pipeline.cli.main`."""
    return run_command(argv, parse, read_comparison, comparison_sentence, load)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = SentenceParser(
        prog="python -m pipeline compare",
        description="Make a video twice from the same noise, with different switches, and write both side by side.",
        allow_abbrev=False,
    )
    add_video_arguments(parser)
    names = ", ".join(OPTIONS)
    for side, place in (("a", "left"), ("b", "right")):
        parser.add_argument(
            f"--{side}",
            action="append",
            required=True,
            metavar="NAME=on|off",
            help=f"switches of the {place} video, several with commas between them; {names}; "
            "not named: off, but for those that the device needs on",
        )
    add_output_arguments(parser)
    parser.set_defaults(**dict.fromkeys(OPTIONS, False))
    return parser.parse_args(argv)


def read_comparison(options: argparse.Namespace) -> Work:
    """Check what is asked for; the work is to make both videos."""
    a, b = read_switches("a", options.a), read_switches("b", options.b)
    request = read_request(options)
    Pair.of(request, a, b)  # what is wrong with it is said before the model is loaded
    output = read_output(options, request)

    def work(worker: ModelWorker, pipeline: StreamingPipeline) -> dict[str, Any]:
        needed = replace(request, **getattr(pipeline, "preset", {}))
        return make_both(worker, pipeline, Pair.of(needed, a, b), output)

    return work


def make_both(worker: ModelWorker, pipeline: StreamingPipeline, pair: Pair, output: Path) -> dict[str, Any]:
    """Make both videos and write them side by side. Returns what `--json` prints."""
    from pipeline.side_by_side import write_side_by_side  # here: a bad request does not wait for Pillow

    pair.check(pipeline)
    preset = getattr(pipeline, "preset", {})
    if off := [name for name in preset if not (getattr(pair.a, name) and getattr(pair.b, name))]:
        say(f"There may be too little memory for this without {' and '.join(f'{name}=on' for name in off)}.")
    say_unknown_words(pipeline, pair.a)
    with Comparison(worker, pair) as comparison:
        with progress_bar() as bar:
            for side in comparison.make():
                bar.set_description(f"{'Making' if side.prepare_seconds else 'Preparing'} {side.name}")
                if side.meter is not None:
                    bar.total = 2 * side.meter.run.num_frames
                bar.update(len(comparison.a.frames) + len(comparison.b.frames) - bar.n)
        report = comparison.report()
        with contextlib.closing(write_side_by_side(comparison, report, output)) as pieces:
            for _ in pieces:
                pass
    return {"output": str(output), **report}


def comparison_sentence(result: dict[str, Any]) -> str:
    """What `make_both` made, for people."""
    if result["identical"]:
        difference = "every frame is the same, bit for bit"
    else:
        lowest, frame = result["psnr_lowest"], result["psnr_lowest_frame"]
        difference = f"PSNR {result['psnr']:.2f} dB, lowest {lowest:.2f} dB at frame {frame}"
    sides = "; ".join(
        f"{name}: {facts['label']}, first frame {facts['time_to_first_frame']:.2f} s, {facts['generation_fps']:.1f} FPS"
        for name, facts in (("A", result["a"]), ("B", result["b"]))
    )
    return (
        f"{result['output']}: {result['frames']} frames at {result['fps']:g} FPS, seed {result['seed']}; {difference}; "
        f"{sides}. {result['meaning']}"
    )
