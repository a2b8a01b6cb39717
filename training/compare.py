"""Do DMD, SiD and GAN improve the network they start from? `python -m training.compare --steps 240 --seeds 0 1`.

Each of them trains from the same start for the same number of steps. Before and after, clips of held-out prompts are
scored: how many attributes of the prompt the probe finds in them, and how far its features of their frames are from
those of real clips of the same prompts (a Frechet distance). The table goes into `docs/training.md`, with the
processor time each run took: other programs on the machine change that little, and the weights not at all.
What is finished is not done again, so a broken comparison goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import SelfForcingPipeline
from pipeline.errors import TrainingError
from training import console
from training.checkpoints import SETTINGS_FILE
from training.evaluate import make_videos, plan_prompts, real_videos, score
from training.export import export
from training.launching import launch, value
from training.probe import READ, WINDOW, AttributeProbe
from training.settings_file import as_plain, first_difference, load_settings
from training.stages import STAGES
from training.world import FPS

logger = logging.getLogger(__name__)
Array = np.ndarray

METHODS = {"dmd": "DMD", "sid": "SiD", "gan": "GAN"}
ATTRIBUTES = (*READ, "motion")
BEGIN, END = "<!-- comparison: begin -->", "<!-- comparison: end -->"
FRAME_STEP = 4
"""Every so-manieth frame counts for the distance; those between are nearly the same."""
EVALUATION_SEED, OTHER_CLIPS = 11, 10**8


def frechet_distance(one: Array, two: Array) -> float:
    """Frechet distance of features [N, D], each set seen as a Gaussian: |m - m'|^2 + tr(C + C' - 2(CC')^1/2)."""
    means = [features.mean(axis=0) for features in (one, two)]
    first, second = (np.cov(features, rowvar=False) for features in (one, two))
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    return float(((means[0] - means[1]) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * cross)


def features(probe: AttributeProbe, videos: Sequence[Array]) -> Array:
    """What the probe sees in the frames of videos, float64 [frames, D]."""
    return np.concatenate([probe.features(video[:WINDOW:FRAME_STEP]) for video in videos]).astype(np.float64)


def judge(run: Path, data: Path, prompts: int) -> dict[str, float]:
    """Scores of a finished stage's network: attributes found, visibility, and the distance to real clips."""
    probe = AttributeProbe.load(data / "probe")
    asked = plan_prompts(prompts, EVALUATION_SEED)
    with tempfile.TemporaryDirectory() as place:
        export(run, data, Path(place) / "model")
        pipeline = SelfForcingPipeline.from_pretrained(Path(place) / "model", device="cpu")
        videos = make_videos(pipeline, asked, WINDOW / FPS)
    scores = score([probe.read(video[:WINDOW]) for video in videos], asked)
    real = real_videos(asked)
    return scores | {"distance": frechet_distance(features(probe, videos), features(probe, real))}


def judge_real(data: Path, prompts: int) -> dict[str, float]:
    """The same scores of real clips, against other real clips of the same prompts: what can be reached at all."""
    probe = AttributeProbe.load(data / "probe")
    asked = plan_prompts(prompts, EVALUATION_SEED)
    others = [replace(prompt, seed=prompt.seed + OTHER_CLIPS) for prompt in asked]
    one, two = real_videos(asked), real_videos(others)
    scores = score([probe.read(video) for video in two], asked)
    return scores | {"distance": frechet_distance(features(probe, two), features(probe, one))}


def train(method: str, seed: int, options: argparse.Namespace) -> Path:
    """Train with a method, unless that is done; returns the run's folder.

    Raises:
        TrainingError: what is there was trained with other settings, or the training failed.
    """
    out = options.out / f"{method}-{seed}"
    settings = options.configs / f"embedded_{method}.toml"
    changes = [value("run.out", out), f"run.seed={seed}", f"run.steps={options.steps}"]
    changes += [value("network.init", options.start), *options.set]
    if method != "gan":
        changes.insert(0, value("score.teacher.init", options.teacher))
    asked = as_plain(load_settings(STAGES[method].settings_kind, settings, changes))
    if (out / SETTINGS_FILE).is_file():
        saved = json.loads((out / SETTINGS_FILE).read_text(encoding="utf-8"))["settings"]
        if difference := first_difference(_learnt(saved), _learnt(asked)):
            raise TrainingError(f"{out} was trained with other settings: {difference}. Take another --out.")
        return out
    logger.info("%s, seed %d", method, seed)
    minutes = launch(method, settings, changes, options.processes)
    _minutes_file(out).write_text(json.dumps(round(minutes, 2)), encoding="utf-8")
    return out


def _learnt(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that change what comes out of a whole run."""
    return settings | {"run": {name: settings["run"][name] for name in ("seed", "steps", "batch", "precision")}}


def _minutes_file(run: Path) -> Path:
    return run.with_name(f"{run.name}-minutes.json")


def judged(run: Path, options: argparse.Namespace) -> dict[str, float]:
    """Scores of a run, remembered in a file as long as its weights are not newer."""
    path = options.out / f"{run.name}-{options.prompts}.json"
    if not path.is_file() or path.stat().st_mtime < (run / SETTINGS_FILE).stat().st_mtime:
        path.write_text(json.dumps(judge(run, options.data, options.prompts)), encoding="utf-8")
    scores = json.loads(path.read_text(encoding="utf-8"))
    spent = _minutes_file(options.out / run.name)
    return scores | ({"minutes": json.loads(spent.read_text(encoding="utf-8"))} if spent.is_file() else {})


def as_table(
    start: Mapping[str, float],
    results: Mapping[str, Mapping[int, Mapping[str, float]]],
    real: Mapping[str, float] | None = None,
) -> str:
    """A Markdown table: the start, each method's seeds with what became better, and real clips for comparison."""

    def following(scores: Mapping[str, float]) -> float:
        return float(np.mean([scores[name] for name in ATTRIBUTES]))

    header = ["", *ATTRIBUTES, "prompt following", "distance to real clips", "improved", "processor minutes"]
    rows = [header, ["---"] * len(header)]

    def row(label: str, scores: Mapping[str, float], improved: str) -> list[str]:
        values = [f"{scores[name]:.2f}" for name in ATTRIBUTES]
        spent = f"{scores['minutes']:.0f}" if "minutes" in scores else ""
        return [label, *values, f"{following(scores):.3f}", f"{scores['distance']:.2f}", improved, spent]

    rows.append(row("ODE start", start, ""))
    for method, seeds in results.items():
        for seed, scores in seeds.items():
            better = [following(scores) > following(start), scores["distance"] < start["distance"]]
            said = {(True, True): "both", (True, False): "following", (False, True): "distance", (False, False): "no"}
            rows.append(row(f"{METHODS[method]}, seed {seed}", scores, said[better[0], better[1]]))
    if real is not None:
        rows.append(row("real clips", real, ""))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def put_into(document: Path, text: str) -> None:
    """Replace what stands between the two marks of a document.

    Raises:
        TrainingError: the marks are not there.
    """
    before, begin, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise TrainingError(f"{document} has no place for the table: the lines {BEGIN} and {END} are missing.")
    document.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Train and judge everything that is not yet; returns the scores."""
    options.out.mkdir(parents=True, exist_ok=True)
    start = judged(options.start, options)
    results = {
        method: {seed: judged(train(method, seed, options), options) for seed in options.seeds}
        for method in options.methods
    }
    caption = (
        f"{options.steps} steps each on {options.processes} processes; {options.prompts} held-out prompts, the "
        "same for all; seeds are those of the training. Processor minutes are those of both cores together.\n"
    )
    real = judge_real(options.data, options.prompts)
    put_into(options.document, f"{caption}\n{as_table(start, results, real)}")
    return {"start": start, **results}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.compare", description=__doc__.splitlines()[0])
    cache = Path("training/cache")
    parser.add_argument("--start", type=Path, default=cache / "ode", help="a finished run of the stage ode")
    parser.add_argument("--teacher", type=Path, default=cache / "base", help="of DMD and SiD")
    parser.add_argument("--data", type=Path, default=cache, help="with text/, vae/, taehv/ and probe/")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="runs and scores")
    parser.add_argument("--configs", type=Path, default=Path("training/configs"), help="the settings files")
    parser.add_argument("--document", type=Path, default=Path("docs/training.md"), help="where the table goes")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument(
        "--steps", type=console.whole_number(1), default=240, help="of the judge; the generator moves in every k-th"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the trainings")
    parser.add_argument("--processes", type=console.whole_number(1), default=2, help="of each training")
    parser.add_argument("--prompts", type=console.whole_number(2), default=96, help="clips that are judged")
    parser.add_argument("--set", nargs="*", default=[], metavar="section.name=value", help="settings of all trainings")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return console.run(lambda: compare(options))


if __name__ == "__main__":
    sys.exit(main())
