"""The command line: a prompt in, an MP4 file out.

What is wrong with a request is said before anything heavy is imported, in a sentence, and with exit code 2.
"""

from __future__ import annotations

import argparse
import json
import re
import secrets
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

from pipeline.blocks import FrameBlock, RunInfo, StreamingPipeline
from pipeline.config import ATTENTION_NAMES, FPS_RANGE, MAX_SEED, SECONDS_RANGE, GenerationRequest, check_available
from pipeline.errors import InvalidRequest, OptionUnavailable, SelfForcingError, WeightsError
from pipeline.process import ignore_interrupts, leave_at_once, quiet_libraries, terminate_like_interrupt
from pipeline.recipe import build_recipe
from pipeline.start_cli import add_start_arguments, read_start_arguments
from pipeline.video import SegmentEncoder
from pipeline.worker import ModelWorker

EMBEDDED_MODEL = Path(__file__).resolve().parent.parent / "weights" / "embedded"

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def exit_code(error: SelfForcingError) -> int:
    """Of a command that ends with this error: bad input is what whoever asked can put right."""
    bad_input = isinstance(error, InvalidRequest | OptionUnavailable | WeightsError)
    return EXIT_BAD_INPUT if bad_input else EXIT_FAILED


LoadPipeline = Callable[[Path, str | None], StreamingPipeline]


def load_pipeline(folder: Path, device: str | None, memory: str = "auto", attention: str = "auto") -> StreamingPipeline:
    """Load a model folder. Imports torch.

    Args:
        device: None takes the GPU if there is one.
        memory: see `placing.placement_for`.
        attention: see `attention_backends.choose_attention`.
    """
    check_device(device)
    from transformers.utils import logging as transformers_logging

    from pipeline.generator import SelfForcingPipeline
    from pipeline.placing import placement_for

    transformers_logging.disable_progress_bar()  # it counts layers; what is loading here, the program says itself
    placement = placement_for(folder, device, memory)
    return SelfForcingPipeline.from_pretrained(folder, device, placement=placement, attention=attention)


Work = Callable[[ModelWorker, StreamingPipeline], dict[str, Any]]
"""What a command does with the model. Returns what `--json` prints."""


def main(argv: Sequence[str] | None = None, load: LoadPipeline | None = None) -> int:
    """Run the command line. Returns the exit code: 0, 1 (failed), 2 (bad input) or 130 (Ctrl-C).

    Args:
        argv: Arguments without the program's name; default: those of this process.
        load: Loads the model. Tests pass one that needs no weights.
    """
    return run_command(argv, parse, read_video, video_sentence, load)


def run_command(
    argv: Sequence[str] | None,
    parse: Callable[[Sequence[str] | None], argparse.Namespace],
    read: Callable[[argparse.Namespace], Work],
    sentence: Callable[[dict[str, Any]], str],
    load: LoadPipeline | None = None,
) -> int:
    """Run a command that needs the model. Returns the exit code, as `main`.

    Args:
        argv, load: as `main` has them.
        parse: Reads the arguments, among them those of `add_video_arguments` and `add_output_arguments`.
        read: Checks what is asked for, before anything heavy is imported, and returns what is to be done.
        sentence: Says for people what was done.
    """
    worker, verbose = None, False
    try:
        options = parse(argv)
        verbose = options.verbose
        quiet_libraries(options.verbose)
        work = read(options)
        model, device = check_model_folder(options.model), check_device_name(options.device)
        memory = check_memory(options.memory)
        load = load or partial(load_pipeline, memory=memory, attention=options.attention)
        terminate_like_interrupt()
        # Everything said so far came at once; importing torch takes seconds.
        worker = ModelWorker(lambda: load(model, device))
        result = work(worker, worker.wait_ready())
        report(json.dumps(result, allow_nan=False) if options.json else sentence(result))
        code = 0
    except KeyboardInterrupt:
        ignore_interrupts()
        say("Stopped. Nothing was written.")
        code = EXIT_INTERRUPTED
    except SelfForcingError as error:
        code = exit_code(error)
        # There is no log to look into, only what --verbose would have shown.
        hidden = code == EXIT_FAILED and _is_unexplained(error) and not verbose
        say(f"{error} Run again with --verbose to see why." if hidden else str(error))
    except Exception:
        traceback.print_exc()
        code = EXIT_FAILED
    _leave_without_the_model(worker, code)
    return code


def _is_unexplained(error: SelfForcingError) -> bool:
    """Whether the sentence only says that something went wrong in the model or in the encoder, but not what."""
    cause = error.__cause__
    return isinstance(cause, subprocess.CalledProcessError) or (type(error) is SelfForcingError and cause is not None)


def read_video(options: argparse.Namespace) -> Work:
    """Check what is asked for; the work is to make one video."""
    request = read_request(options)
    output = read_output(options, request)
    return lambda worker, pipeline: generate(worker, pipeline, request, output)


def generate(
    worker: ModelWorker, pipeline: StreamingPipeline, request: GenerationRequest, output: Path
) -> dict[str, Any]:
    """Make the video and write it. Returns what `--json` prints."""
    check_available(request, pipeline.unavailable_options())
    request = with_preset(pipeline, request)
    if note := pipeline.spec.start_note(request.start):
        say(note)
    say_unknown_words(pipeline, request)
    began = time.perf_counter()
    encoder: SegmentEncoder | None = None
    first: FrameBlock | None = None
    with worker.submit(request) as run, progress_bar() as bar:
        tell_compiling(pipeline, bar)
        for block in run:
            if encoder is None:
                first, encoder = block, SegmentEncoder(block.run.fps)
                bar.set_description(MAKING, refresh=False)
                bar.reset(block.run.num_frames)
            encoder.encode(block.frames)
            bar.update(len(block.frames))
    if encoder is None or first is None:
        raise SelfForcingError("The model made no video.")
    encoder.write_mp4(output, build_recipe(block.run, encoder.num_frames))
    return _summary(block.run, encoder, output, first.elapsed, time.perf_counter() - began)


def with_preset(pipeline: StreamingPipeline, request: GenerationRequest) -> GenerationRequest:
    """The request with the options that should be on here for want of memory. Says what it switches on."""
    missing = [name for name in getattr(pipeline, "preset", {}) if not getattr(request, name)]
    if missing:
        say(f"There is little memory here, so these are on: {', '.join(f'--{name}' for name in missing)}.")
    return replace(request, **dict.fromkeys(missing, True))


def say_unknown_words(pipeline: StreamingPipeline, request: GenerationRequest) -> None:
    if unknown := pipeline.unknown_words(request.prompt):
        say(f"The model does not know these words and ignores them: {', '.join(unknown)}.")


def _summary(
    run: RunInfo, encoder: SegmentEncoder, output: Path, time_to_first_frame: float, elapsed: float
) -> dict[str, Any]:
    return {
        "output": str(output),
        "frames": encoder.num_frames,
        **({"start_frames": run.start_frames} if run.start_frames else {}),
        "seconds": round(encoder.duration, 4),
        "fps": run.fps,
        "time_to_first_frame": round(time_to_first_frame, 4),
        "elapsed": round(elapsed, 4),
        "seed": run.seed,
        "applied": run.applied,
        "model": run.model,
    }


def video_sentence(result: dict[str, Any]) -> str:
    """What `generate` made, for people."""
    start = f" ({result['start_frames']} of them what it starts from)" if "start_frames" in result else ""
    return (
        f"{result['output']}: {result['frames']} frames{start}, {result['seconds']:.2f} s at {result['fps']:g} FPS, "
        f"seed {result['seed']}, made in {result['elapsed']:.1f} s"
    )


def report(line: str) -> None:
    """Say on standard output what was made."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def say(message: str) -> None:
    sys.stderr.write(message + "\n")


# ---- reading the request


class SentenceParser(argparse.ArgumentParser):
    """Answers a mistake with a sentence of ours instead of a usage line and an exit."""

    def error(self, message: str) -> NoReturn:
        raise InvalidRequest(f"{message[:1].upper()}{message[1:].rstrip('.')}. Try --help.")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = SentenceParser(
        prog="python -m pipeline",
        description="Make a video from a sentence and write it as an MP4 file.",
        epilog="`python -m pipeline enhance --help` tells how to get a longer prompt.",
        allow_abbrev=False,
    )
    add_video_arguments(parser)
    parser.add_argument("--taehv", action="store_true", help="decode with the small TAEHV autoencoder: faster, softer")
    parser.add_argument("--fp8", action="store_true", help="keep the weights in 8 bits: half the memory")
    parser.add_argument("--compile", action="store_true", help="compile the model first; meant for GPUs")
    add_output_arguments(parser)
    return parser.parse_args(argv)


def add_video_arguments(parser: argparse.ArgumentParser) -> None:
    """What to make, and with which model."""
    parser.add_argument("prompt", help="what the video shows")
    parser.add_argument(
        "--model", type=Path, default=EMBEDDED_MODEL, metavar="FOLDER", help="model folder (default: weights/embedded)"
    )
    parser.add_argument(
        "--seed", type=_number, default=-1, help=f"0 to {MAX_SEED}: the same video every time; -1 (default): a new one"
    )
    low, high = SECONDS_RANGE
    parser.add_argument(
        "--seconds",
        type=_number,
        default=5.0,
        help=f"length of the video, {low:g} to {high:g}, rounded to whole blocks (default: 5)",
    )
    low, high = FPS_RANGE
    parser.add_argument("--fps", type=_number, help=f"frame rate, {low:g} to {high:g} (default: the model's own)")
    add_start_arguments(parser)


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Where it is made, where it goes, and how it is told."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one, else cpu)")
    add_memory(parser)
    add_attention(parser)
    parser.add_argument("--output", type=Path, metavar="FILE.mp4", help="default: a name made from prompt and seed")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end instead of a sentence")
    parser.add_argument("--verbose", action="store_true", help="show warnings and the trace of an error")


def _number(text: str) -> float | int:
    # Ranges are GenerationRequest's business, and so is NaN.
    try:
        return int(text)
    except ValueError:
        return float(text)


_number.__name__ = "number"  # argparse names the type in its message


def read_request(options: argparse.Namespace) -> GenerationRequest:
    """The request, with a seed drawn already if none is given: the file's name shows it."""
    request = GenerationRequest(
        prompt=options.prompt,
        seed=options.seed,
        seconds=options.seconds,
        fps=options.fps,
        taehv=options.taehv,
        fp8=options.fp8,
        compile=options.compile,
    )
    seed = secrets.randbelow(MAX_SEED + 1) if request.seed == -1 else request.seed
    if options.image is not None or options.video is not None:
        check_model_folder(options.model)
    return replace(request, seed=seed, start=read_start_arguments(options))


def read_output(options: argparse.Namespace, request: GenerationRequest) -> Path:
    """Where the video goes. Checked now, not after minutes of work."""
    output = options.output if options.output is not None else _free_name(request)
    if output.suffix.lower() != ".mp4":
        raise InvalidRequest(f"The output {_shown(output)} must be a file name that ends in .mp4.")
    if _is_dir(output):
        raise InvalidRequest(f"The output {_shown(output)} is a directory. Give the name of a file in it.")
    if not _is_dir(output.parent):
        raise InvalidRequest(f"The output directory {_shown(output.parent)} does not exist or cannot be read.")
    try:
        output.exists()  # a name that the file system cannot take raises
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise InvalidRequest(f"The output {_shown(output)} cannot be written there ({error.strerror}).") from error
    return output


def _is_dir(path: Path) -> bool:
    """`Path.is_dir`, for a path that may be too long or out of bounds as well: that raises until Python 3.14."""
    try:
        return path.is_dir()
    except OSError:
        return False


def _shown(path: Path) -> str:
    text = str(path)
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def _free_name(request: GenerationRequest) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", request.prompt.lower())[:48].strip("-") or "video"
    stem = f"{slug}-seed{request.seed}"
    names = (f"{stem}{'' if n == 1 else f'-{n}'}.mp4" for n in range(1, 10_000))
    return next(path for path in map(Path, names) if not path.exists())


def check_model_folder(folder: Path) -> Path:
    """Refuse a folder that is no model before torch is imported to find that out."""
    if not _is_dir(folder):
        raise WeightsError(
            f"There is no model folder {_shown(folder)}. {_how_to_get(folder) or 'Pass an existing one with --model.'}"
        )
    try:
        found = (folder / "model_index.json").is_file()
    except OSError as error:
        raise WeightsError(f"The model folder {_shown(folder)} cannot be read ({error.strerror}).") from error
    if not found:
        advice = _how_to_get(folder) or "Pass another one with --model."
        raise WeightsError(f"{_shown(folder)} is not a model folder: it has no model_index.json. {advice}")
    return folder


def _how_to_get(folder: Path) -> str | None:
    from weights.stored import how_to_get  # and with it the hub's library, which takes a second

    return how_to_get(folder)


def add_memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory",
        default="auto",
        metavar="auto|off|GB",
        help="fit the model into the GPU's free memory (auto, the default), or into so many GB; off: load all of it, "
        "whether there is room or not",
    )


def add_attention(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--attention",
        default="auto",
        choices=ATTENTION_NAMES,
        help="what attends (default: auto, on a GPU the fastest exact one, by measuring; sage is approximate)",
    )


def check_memory(text: str) -> str:
    """Raises `InvalidRequest` unless it is `auto`, `off` or a number of GB."""
    number = re.fullmatch(r"\d{1,5}(\.\d+)?", text)
    if text not in ("auto", "off") and (number is None or not float(text)):
        raise InvalidRequest(f"memory is {text!r}, but must be auto, off or a number of GB above 0.")
    return text


def check_device_name(name: str | None) -> str | None:
    if name == "mps":  # parts of the arithmetic are in float64, which Apple's GPUs do not have
        raise InvalidRequest("device is 'mps', but Apple GPUs are not supported yet. Use cpu, which works.")
    if name is not None and not re.fullmatch(r"(cpu|(cuda|xpu)(:\d{1,3})?)", name):
        raise InvalidRequest(f"device is {name!r}, but must be cpu, cuda, cuda:N or xpu.")
    return name


def check_device(name: str | None) -> None:
    """Refuse a device that this machine does not have. Imports torch.

    Raises:
        OptionUnavailable: naming the device and what there is instead.
    """
    if name in (None, "cpu"):
        return
    import torch

    kind, _, number = name.partition(":")
    backend = getattr(torch, kind)
    if not backend.is_available() or int(number or 0) >= backend.device_count():
        raise OptionUnavailable(f"There is no device {name} on this machine (or torch was built without it). Use cpu.")


MAKING = "Making video"


def tell_compiling(pipeline: StreamingPipeline, bar: Any) -> None:
    """Have the bar say how far torch.compile is, for which the first block waits."""

    def tell(state: Any) -> None:
        left = "" if state.seconds_left is None else f", about {state.seconds_left:.0f} s left"
        bar.set_description(f"torch.compile: {state.done} of {state.total}{left}")

    if hasattr(getattr(pipeline, "compiled", None), "on_progress"):
        cast(Any, pipeline).compiled.on_progress = tell


def progress_bar() -> Any:
    from tqdm import tqdm

    return tqdm(total=0, unit="frame", desc=MAKING, file=sys.stderr, leave=False, dynamic_ncols=True)


def _leave_without_the_model(worker: ModelWorker | None, code: int) -> None:
    """End the process if the model does not stop soon: torch cannot be interrupted in the middle of a step."""
    if worker is not None and not worker.close(timeout=2 if code == EXIT_INTERRUPTED else 5):
        leave_at_once(code)
