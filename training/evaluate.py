"""Score a model folder: `python -m training.evaluate weights/embedded --json`.

Prompts describe combinations that training never rendered, half of them in phrasings that training never had, or they
are the lines of a file. A probe, trained on real clips alone, reads what the videos show; its readings of real clips of
the same prompts are the ceiling. A few long videos show drift (`drift.py`). Nothing is needed but the model and
`weights/probe`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pipeline.config import SECONDS_RANGE, ModelSpec
from training import console
from training.asked import Prompt, plan_long, plan_prompts, plan_scored, read_prompts
from training.drift import drift_report, flicker, jump, measure, motion_report, moves, rows
from training.filming import Crew, Film, Generator, film_with, frames_per_second, real_video
from training.following import by_value, following, score
from training.judge import SHIPPED, Judge, load_judge
from training.probe import WINDOW, AttributeProbe, WindowReading
from training.report import as_table, rounded
from training.sharpness import choose_encoder, decoder_psnr, model_decoders
from training.sheets import save_sheet
from training.world import ATTRIBUTES, FPS, HEIGHT, WIDTH

Array = np.ndarray

SHEET_CLIPS, PSNR_CLIPS, PSNR_SEED, FPS_SECONDS = 24, 20, 900, 5.0


@dataclass(frozen=True)
class ClipReadings:
    """What is read from one clip for each prompt.

    Attributes:
        readings: one for each prompt.
        shown: the first few videos.
        size: height and width of them all.
    """

    readings: list[WindowReading]
    shown: list[Array]
    size: tuple[int, int]


def read_clips(probe: AttributeProbe, videos: Iterable[Array]) -> ClipReadings:
    """The first window of each video, read as it comes: not all of them fit in memory."""
    readings, shown, size = [], [], (0, 0)
    for video in videos:
        readings.append(probe.read(video[:WINDOW]))
        size = (video.shape[1], video.shape[2])
        if len(shown) < SHEET_CLIPS:
            shown.append(video)
    return ClipReadings(readings, shown, size)


def follow_prompts(film: Film, probe: AttributeProbe, prompts: Sequence[Prompt], sheet: Path | None) -> dict[str, Any]:
    """Prompt following on clips of one window (two seconds).

    Returns:
        what `following` does; `held_out_phrasings`, the same of the prompts whose phrasing training never had, with
        their number, or None without any; `combinations`, how many different things the prompts ask for; `seen`: share
        of frames with a subject, and speed, of both; `by_value`.
    """
    generated = read_clips(probe, tqdm(film(prompts, WINDOW / FPS), "clips", len(prompts), disable=None))
    real = [probe.read(real_video(prompt, WINDOW, *generated.size)) for prompt in prompts]
    if sheet is not None:
        save_sheet(sheet, generated.shown, [prompt.caption for prompt in prompts[:SHEET_CLIPS]])
    raw, ceiling = score(generated.readings, prompts), score(real, prompts)
    return {
        **following(generated.readings, real, prompts),
        "held_out_phrasings": _of_new_phrasings(generated.readings, real, prompts),
        "combinations": len({tuple(prompt.asked.items()) for prompt in prompts}),
        "seen": {name: {"generated": raw[name], "real": ceiling[name]} for name in ("visible", "speed")},
        "by_value": {name: by_value(generated.readings, prompts, name) for name in ATTRIBUTES},
        "size": generated.size,
    }


def _of_new_phrasings(
    generated: Sequence[WindowReading], real: Sequence[WindowReading], prompts: Sequence[Prompt]
) -> dict[str, Any] | None:
    new = [clip for clip in zip(generated, real, prompts, strict=True) if clip[2].new_phrasing]
    return {"prompts": len(new), **following(*zip(*new, strict=True))} if new else None


def follow_time(
    film: Film,
    spec: ModelSpec,
    probe: AttributeProbe,
    prompts: Sequence[Prompt],
    seconds: float,
    sheet: Path | None,
) -> dict[str, Any]:
    """`drift` and `motion` of long videos, see `drift.py`; None of them without prompts.

    `drift.real` is the same of real clips: the ceiling. `motion.videos` is the number of videos that motion is read
    from, those whose subject should move.
    """
    if not prompts:
        return {"drift": None, "motion": None}
    generated, real, videos, real_jumps = [], [], [], []
    films = tqdm(film(prompts, seconds), "long videos", len(prompts), disable=None)
    for prompt, video in zip(prompts, films, strict=True):
        videos.append(video)
        generated.append(measure(probe, video))
        clip = real_video(prompt, *video.shape[:3])
        real.append(measure(probe, clip))
        real_jumps.append(jump(clip, spec))
    if sheet is not None:
        save_sheet(sheet, videos, [prompt.caption for prompt in prompts], columns=12)
    shown, asked = rows(generated, prompts), rows(real, prompts)
    length = {"seconds": len(videos[0]) / FPS, "prompts": len(prompts)}
    jumps = [jump(video, spec) for video in videos]
    ceiling = {**drift_report(asked, asked), "flicker": flicker(real_jumps)}
    drift = {**drift_report(shown, asked), "flicker": flicker(jumps), "following": _following(shown), "real": ceiling}
    motion = {"videos": sum(map(moves, prompts)), **motion_report(shown, asked)}
    return {"drift": {**length, **drift}, "motion": motion}


def _following(windows: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """Share of long videos that show what was asked for, by attribute and window."""
    return {name: [row[name] for row in windows] for name in ATTRIBUTES}


def sharpness(folder: Path, judge: Judge, size: tuple[int, int], clips: int) -> dict[str, Any]:
    """`psnr` of both decoders in dB, null for one that the folder does not hold, and what encoded the clips."""
    vae, decoders = model_decoders(folder)
    real = [real_video(prompt, WINDOW, *size) for prompt in plan_prompts(clips, PSNR_SEED)]
    encode, name = choose_encoder(vae, judge.pca, real[0])
    return {"psnr": {"wan": None, "taehv": None, **decoder_psnr(decoders, encode, real)}, "psnr_encoder": name}


def notes(
    generator: Generator, prompts: Sequence[Prompt], size: tuple[int, int], in_file: int | None = None
) -> list[str]:
    """What makes the scores less sure: one sentence each.

    Args:
        in_file: how many prompts the prompt file holds; None: there is none.
    """
    found = []
    if size != (HEIGHT, WIDTH):
        found.append(
            f"The model draws {size[1]}x{size[0]} pixels, but the probe learnt {WIDTH}x{HEIGHT}: frames are resized."
        )
    unknown = sorted({word for prompt in prompts for word in generator.unknown_words(prompt.caption)})
    if unknown:
        found.append(
            f"The model was made for another world: it does not know {len(unknown)} words of the prompts "
            f"({', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''})."
        )
    if not any(prompt.stated for prompt in prompts):
        found.append("No prompt states anything that the probe could read: prompt following is not scored.")
    if in_file is not None and in_file > len(prompts):
        found.append(
            f"The prompt file holds {in_file} prompts, of which only the first {len(prompts)} were scored: "
            f"--prompts {in_file} scores them all."
        )
    return found


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Make the videos and score them; see docs/training.md for what is in the report.

    Raises:
        SelfForcingError: the model, the probe or the prompts cannot be used.
    """
    judge = load_judge(options.probe)
    from transformers.utils import logging as transformers_logging

    from pipeline import SelfForcingPipeline

    transformers_logging.disable_progress_bar()
    generator = SelfForcingPipeline.from_pretrained(options.model)
    in_file = None
    if options.prompts_file is None:
        prompts = plan_scored(options.prompts, options.seed)
        long_prompts = plan_long(options.long_prompts, options.seed + 1)
    else:
        tokenizer, length = generator.text.tokenizer, generator.spec.text_len
        listed = read_prompts(options.prompts_file, tokenizer, length, options.seed)
        in_file, prompts = len(listed), listed[: options.prompts]
        long_prompts = prompts[: options.long_prompts]
    report: dict[str, Any] = {"model": generator.spec.name, "prompts": len(prompts)}
    fps = frames_per_second(generator, prompts[0], min(FPS_SECONDS, options.long_seconds), options.taehv)
    processes = options.processes or (1 if generator.device.type != "cpu" else min(torch.get_num_threads(), 4))
    sheets = [options.sheet, options.sheet.with_stem(f"{options.sheet.stem}_long")][: 2 if long_prompts else 1]
    alone = nullcontext(film_with(generator, options.taehv))
    with alone if processes == 1 else Crew(options.model, processes, options.taehv) as film:
        report |= follow_prompts(film, judge.probe, prompts, sheets[0])
        report |= follow_time(film, generator.spec, judge.probe, long_prompts, options.long_seconds, sheets[-1])
    report |= sharpness(options.model, judge, report["size"], min(PSNR_CLIPS, len(prompts)))
    told = notes(generator, prompts, report.pop("size"), in_file)
    return report | {
        "fps": fps,
        "probe_held_out": judge.held_out,
        "sheets": [str(path) for path in sheets],
        "notes": told,
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate",
        description="Score a model folder: prompt following, drift, motion, sharpness and speed.",
        epilog="Prints a table, writes contact sheets; needs nothing but the model and the probe in weights/probe.",
    )
    count = console.whole_number
    parser.add_argument("model", type=Path, help="the model folder, for example weights/embedded")
    parser.add_argument("--prompts", type=count(1), default=256, help="clips of two seconds to score, one a prompt")
    parser.add_argument(
        "--prompts-file",
        type=Path,
        help="a text file with one prompt a line, instead of held-out combinations and phrasings; what a line states "
        "is read from its words, and only that is scored",
    )
    parser.add_argument("--long-prompts", type=count(0), default=8, help="long videos, for drift and motion; 0: none")
    parser.add_argument("--long-seconds", type=float, default=60.0, help="their length")
    parser.add_argument(
        "--seed", type=count(0), default=1, help="of prompts and videos: the same seed, the same scores"
    )
    parser.add_argument("--taehv", action="store_true", help="decode with TAEHV instead of the Wan VAE")
    parser.add_argument("--probe", type=Path, default=SHIPPED, help="folder of the probe (python -m training.probe)")
    parser.add_argument(
        "--sheet", type=Path, default=Path("outputs/evaluation.png"), help="where the clips' sheet goes"
    )
    parser.add_argument(
        "--processes",
        type=count(0),
        default=0,
        help="processes that make videos side by side, each with the model in memory; 0: one on a GPU, on a CPU one "
        "for each core, at most four",
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object, too, last")
    options = parser.parse_args(argv)
    low, high = SECONDS_RANGE
    if not low <= options.long_seconds <= high:
        parser.error(f"--long-seconds is {options.long_seconds:g}, but must be from {low:g} to {high:g}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, or 2 for what cannot be used."""
    options = parse(argv)

    def work() -> None:
        report = rounded(evaluate(options))
        sys.stdout.write(as_table(report) + "\n")
        if options.json:
            sys.stdout.write(json.dumps(report, allow_nan=False) + "\n")

    return console.run(work)


if __name__ == "__main__":
    sys.exit(main())
