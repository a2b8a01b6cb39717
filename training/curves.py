"""Line charts as SVG, without a plotting library: a few panels of named curves over a common axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = (
    *("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#7f7f7f", "#000000"),
    *("#9c755f", "#332288", "#b5a000"),
)
"""Most are told apart by colour-blind people, too: Okabe and Ito's, then a brown, an indigo and an olive."""
_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP, _LINE = 360, 200, 48, 30, 44, 18


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        title: what is shown.
        curves: name -> one series for each repetition (seed); thin lines, with their mean as a thick one.
    """

    title: str
    curves: Mapping[str, Sequence[Sequence[float]]]


def draw(panels: Sequence[Panel], x: Sequence[float], x_label: str, columns: int = 2) -> str:
    """The panels as one SVG picture with a common legend; NaN leaves a gap."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    lines = math.ceil(len(names) / columns)
    rows = math.ceil(len(panels) / columns)
    cell_width, cell_height = _LEFT + _WIDTH + 16, _TOP + _HEIGHT + _GAP
    width, height = columns * cell_width, rows * cell_height + lines * _LINE + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="11"><rect width="{width}" height="{height}" fill="white"/>'
    ]
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        parts.append(f'<g transform="translate({column * cell_width + _LEFT} {row * cell_height + _TOP})">')
        parts += _panel(panel, x, x_label, colours)
        parts.append("</g>")
    for index, name in enumerate(names):
        row, column = divmod(index, columns)
        left, top = column * cell_width + _LEFT, rows * cell_height + row * _LINE + 8
        parts.append(f'<path d="M{left} {top}h24" stroke="{colours[name]}" stroke-width="2"/>')
        parts.append(f'<text x="{left + 30}" y="{top + 4}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _panel(panel: Panel, x: Sequence[float], x_label: str, colours: Mapping[str, str]) -> list[str]:
    values = [v for series in panel.curves.values() for one in series for v in one if math.isfinite(v)]
    top = max([1.0, *values])
    last = max(x) or 1.0
    digits = 0 if last >= 20 else 1

    def place(second: float, value: float) -> str:
        return f"{second / last * _WIDTH:.1f} {_HEIGHT * (1 - value / top):.1f}"

    parts = [f'<text x="0" y="-10" font-weight="bold">{escape(panel.title)}</text>']
    for step in range(5):
        value = top * step / 4
        level = _HEIGHT * (1 - step / 4)
        parts.append(f'<path d="M0 {level}h{_WIDTH}" stroke="#dddddd"/>')
        parts.append(f'<text x="-6" y="{level + 4}" text-anchor="end">{value:.2f}</text>')
        second = last * step / 4
        parts.append(
            f'<text x="{_WIDTH * step / 4}" y="{_HEIGHT + 15}" text-anchor="middle">{second:.{digits}f}</text>'
        )
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT + 30}" text-anchor="middle">{escape(x_label)}</text>')
    for name, repetitions in panel.curves.items():
        means = [_mean(values) for values in zip(*repetitions, strict=True)]
        several = len(repetitions) > 1
        for series, stroke in [*((one, 0.7) for one in repetitions if several), (means, 2.0)]:
            points = [place(s, v) if math.isfinite(v) else "" for s, v in zip(x, series, strict=True)]
            runs = " ".join(f"M{' L'.join(run.split(','))}" for run in ",".join(points).split(",,") if run.strip(","))
            parts.append(f'<path d="{runs}" fill="none" stroke="{colours[name]}" stroke-width="{stroke}"/>')
    return parts


def _mean(values: Sequence[float]) -> float:
    found = [value for value in values if math.isfinite(value)]
    return sum(found) / len(found) if found else math.nan
