"""The report of `training.evaluate` for people, and its numbers made ready for JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def rounded(value: Any, digits: int = 4) -> Any:
    """The same report with rounded numbers; what is not a number becomes None, so that it stays valid JSON."""
    if isinstance(value, Mapping):
        return {key: rounded(entry, digits) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(entry, digits) for entry in value]
    if isinstance(value, float):
        return round(value, digits) if math.isfinite(value) else None
    return value


def as_table(report: Mapping[str, Any]) -> str:
    """A rounded report as text."""
    names = list(report["prompt_following"])
    lines = [
        f"{report['model']}, {report['prompts']} prompts, {report['combinations']} different combinations",
        "",
        _row("", names),
        *_following(report, names),
    ]
    new = report["held_out_phrasings"]
    if new is not None:
        lines += [f"the {new['prompts']} of them in phrasings that training never has:", *_following(new, names)]
    for name, values in report["by_value"].items():
        if values:
            lines.append(f"{name}: " + ", ".join(f"{value} {count}" for value, count in values.items()))
    if report["drift"] is not None:
        lines += ["", *_long_videos(report["drift"], report["motion"])]
    lines.append("")
    for name, value in report["psnr"].items():
        lines.append(f"{name} decoder: {'none' if value is None else f'{value:.2f} dB'}")
    lines.append(f"decoded from latents of {report['psnr_encoder']}")
    lines.append(f"{report['fps']:.1f} video frames per second")
    lines += [f"Note: {note}" for note in report["notes"]]
    lines += [f"Sheet: {path}" for path in report["sheets"]]
    return "\n".join(lines)


def _following(scores: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """A line for each share of prompts, and below it its standard error."""
    lines = []
    for label, key in (("generated", "prompt_following"), ("real clips", "ceiling"), ("relative", "relative")):
        lines.append(_row(label, [scores[key][name] for name in names]))
        lines.append(_row("  +/-", [scores["standard_error"][key][name] for name in names]))
    return lines


def _long_videos(drift: Mapping[str, Any], motion: Mapping[str, Any]) -> list[str]:
    seconds, parts, real = drift["window_seconds"], drift["parts"], drift["real"]
    lines = [
        f"{drift['prompts']} videos of {drift['seconds']:.0f} s",
        _row("at second", ["quality", "(real)", *parts]),
    ]
    for index, (value, usual) in enumerate(zip(drift["quality"], real["quality"], strict=True)):
        lines.append(_row(f"{index * seconds:.0f}", [value, usual, *(series[index] for series in parts.values())]))
    lines.append(
        f"quality at the end: {_number(drift['relative'])} of the start's (real clips {_number(real['relative'])})"
    )
    for whose, flicker in (("", drift["flicker"]), ("real clips, ", real["flicker"])):
        if flicker is not None:
            lines.append(
                f"{whose}where the first frame leaves the window: {_number(flicker['mean'])} times the usual change "
                f"(worst {_number(flicker['worst'])}; where other blocks begin {_number(flicker['elsewhere'])})"
            )
    lines.append(f"motion, of the {motion['videos']} videos whose subject should move:")
    for name, what in (("speed", "subjects' speed"), ("change", "change of all pixels")):
        ratio = motion[name]
        lines.append(
            f"{what}, of real clips': {_number(ratio['start'])} at the start, {_number(ratio['end'])} at the end"
        )
    frozen, usual = _number(motion["frozen"]), _number(motion["frozen_real"])
    lines.append(f"windows that rest but should move: {frozen} (real clips {usual})")
    return lines


def _row(label: str, cells: Sequence[Any]) -> str:
    return f"{label:<12}" + "".join(f"{cell if isinstance(cell, str) else _number(cell):>10}" for cell in cells)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
