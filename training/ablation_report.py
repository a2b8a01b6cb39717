"""The ablation's results in `docs/ablation.md`: a table, curves, and whether the paper's claim held."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import TrainingError
from training.curves import Panel, draw
from training.document import put_into
from training.drift import mean_of

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""Label of a method -> seed -> scores."""

PICTURE = "images/ablation.svg"
BEGIN, END = "<!-- ablation: begin -->", "<!-- ablation: end -->"
MEASURES = {"following": "prompt following", "quality": "quality", "motion": "motion", "distance": "distance"}
BETTER: dict[str, Callable[[float], float]] = {
    "following": lambda value: value,
    "quality": lambda value: value,
    "motion": lambda value: -abs(value - 1),
    "distance": lambda value: -value,
}
"""What grows as a measure gets better: more of it, as much motion as in real clips, less distance from them."""
PANELS = {
    "quality": "Quality, of 1",
    "following": "Prompt following, of 1",
    "motion": "Subjects' speed, of real clips'",
}
START, REAL = "The start itself", "Real clips"


def _is_trained(label: str) -> bool:
    return not label.startswith((START, REAL))


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def as_table(results: Results) -> str:
    """One row for each method and seed; the measures are given at each mark, separated by slashes."""
    marks = list(next(iter(next(iter(results.values())).values()))["at"])
    when = " / ".join(marks)
    header = ["", *(f"{label} at {when} s" for label in MEASURES.values()), "FPS", "minutes", "steps"]
    table = [header, ["---"] * len(header)]
    for label, seeds in results.items():
        for seed, scores in seeds.items():
            name = f"{label}, seed {seed}" if _is_trained(label) else label
            cells = [" / ".join(number(scores["at"][mark][measure]) for mark in marks) for measure in MEASURES]
            spent = [number(scores.get(name), digits) for name, digits in (("fps", 1), ("minutes", 1), ("steps", 0))]
            table.append([name, *cells, *spent])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in table)


def verdicts(results: Results) -> list[str]:
    """For each Self-Forcing method: against which others it is better at the last mark, in every pair of seeds."""
    selves = [label for label in results if label.startswith("Self-Forcing")]
    others = [label for label in results if label not in (*selves, REAL)]
    last = list(next(iter(next(iter(results.values())).values()))["at"])[-1]

    def values(label: str, measure: str) -> list[float]:
        found = [scores["at"][last][measure] for scores in results[label].values()]
        return [math.nan if value is None else BETTER[measure](value) for value in found]

    lines = []
    for label in selves:
        for measure in BETTER:
            ours = values(label, measure)
            better, worse = [], []
            for other in others:
                theirs = values(other, measure)
                if not all(math.isfinite(value) for value in (*ours, *theirs)):
                    continue
                if min(ours) > max(theirs):
                    better.append(other)
                elif max(ours) < min(theirs):
                    worse.append(other)
            unclear = [other for other in others if other not in (*better, *worse)]
            said = [("better than", better), ("worse than", worse), ("undecided against", unclear)]
            parts = [f"{word} {', '.join(names)}" for word, names in said if names]
            lines.append(
                f"* {label}, {MEASURES[measure]} at {last} s: {'; '.join(parts) or 'nothing to compare with'}."
            )
    return lines


def panels(results: Results) -> tuple[list[Panel], list[float]]:
    """The curves by window, and the seconds they belong to."""
    found = []
    for name, title in PANELS.items():
        curves = {
            label: [[math.nan if v is None else v for v in scores["curves"][name]] for scores in seeds.values()]
            for label, seeds in results.items()
        }
        found.append(Panel(title, curves))
    shortest = min(len(series) for panel in found for curve in panel.curves.values() for series in curve)
    cut = [Panel(p.title, {n: [one[:shortest] for one in c] for n, c in p.curves.items()}) for p in found]
    return cut, next(iter(next(iter(results.values())).values()))["seconds"][:shortest]


def write_report(document: Path, results: Results, options: argparse.Namespace, machine: str) -> None:
    """Put table, verdicts and curves into the document; a document that does not exist is begun.

    Raises:
        TrainingError: it has no place for them, or cannot be written.
    """
    charts, seconds = panels(results)
    budget = f"{options.minutes:g} processor minutes"
    if options.clock is not None:
        budget = f"{options.clock:g} minutes by the clock"
    elif options.steps is not None:
        budget = f"{options.steps} steps"
    spread = mean_of(len(seeds) for label, seeds in results.items() if _is_trained(label))
    text = (
        f"{budget} a run, {spread:g} seeds; {options.prompts} held-out prompts, the same for all. "
        f"Made with `--set {' '.join(options.set)}` on {machine}.\n\n"
        f"{as_table(results)}\n\n![Curves by second]({PICTURE})\n\n" + "\n".join(verdicts(results))
    )
    try:
        picture = document.parent / PICTURE
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_text(draw(charts, seconds, "seconds"), encoding="utf-8")
        if not document.is_file():
            document.write_text(f"# Ablation\n\n{BEGIN}\n{END}\n", encoding="utf-8")
        put_into(document, text, BEGIN, END)
    except OSError as error:
        raise TrainingError(f"The results could not be written to {document}: {error.strerror}.") from error
