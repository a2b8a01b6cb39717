"""Ratios of paired timings, and when a machine is too noisy to give one.

A ratio is the median over pairs: the same block of the same video, made by both variants one right after the other, in
shuffled order. It is published only if all of this holds, else it is null and the reasons are told:

* **control**: two copies of the same variant, measured among the others, come out equal: the median of their ratios
  is within `CONTROL_MEDIAN` of 1, and the middle half of their ratios is no wider than `CONTROL_SPREAD`;
* **best of**: the ratio of the fastest times of both variants differs from the median of the pairs by no more than
  `BEST_DISAGREES`;
* **load**: the machine had no more to do than it has processors.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

CONTROL_MEDIAN, CONTROL_SPREAD, BEST_DISAGREES = 0.05, 0.15, 0.15
BOOTSTRAP_DRAWS = 1000
FEWEST_PAIRS = 5


@dataclass(frozen=True)
class Ratio:
    """How many times as long `slow` takes as `fast`.

    Attributes:
        value: median over the pairs.
        low, high: where the median lies with 95 % (bootstrap over the pairs).
        lower_quartile, upper_quartile: the middle half of the pairs.
        best: ratio of the fastest times.
        pairs: how many.
    """

    value: float
    low: float
    high: float
    lower_quartile: float
    upper_quartile: float
    best: float
    pairs: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def paired_ratio(slow: Sequence[Sequence[float]], fast: Sequence[Sequence[float]], seed: int = 0) -> Ratio:
    """The ratio of two variants.

    Args:
        slow, fast: round -> seconds of each thing that was timed; pairs have the same round and place. The fastest
            times are taken place by place, over the rounds.
        seed: of the bootstrap, so that a report can be made again.

    Raises:
        ValueError: there are no pairs, or times that are not above 0.
    """
    pairs = [(a, b) for one, other in zip(slow, fast, strict=True) for a, b in zip(one, other, strict=True)]
    if not pairs or min(min(pair) for pair in pairs) <= 0:
        raise ValueError(f"no ratio can be made of {len(pairs)} pairs of times, or one of them is not above 0")
    values = [a / b for a, b in pairs]
    draw = random.Random(seed)
    medians = sorted(median(draw.choices(values, k=len(values))) for _ in range(BOOTSTRAP_DRAWS))
    lower, _, upper = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return Ratio(
        value=median(values),
        low=medians[round(0.025 * (BOOTSTRAP_DRAWS - 1))],
        high=medians[round(0.975 * (BOOTSTRAP_DRAWS - 1))],
        lower_quartile=lower,
        upper_quartile=upper,
        best=median(map(min, zip(*slow, strict=True))) / median(map(min, zip(*fast, strict=True))),
        pairs=len(values),
    )


def noise(ratio: Ratio, control: Ratio, load: float, processors: int) -> list[str]:
    """Why this ratio may not be published, in sentences; empty if it may.

    Args:
        control: of two copies of one variant, measured in the same rounds.
        load: the machine's load average after the measurement.
    """
    reasons = []
    if ratio.pairs < FEWEST_PAIRS:
        reasons.append(f"Only {ratio.pairs} pairs were measured; {FEWEST_PAIRS} are needed.")
    if abs(math.log(control.value)) > math.log1p(CONTROL_MEDIAN):
        reasons.append(
            f"Two copies of the same variant differ by a factor of {control.value:.2f}; "
            f"{1 + CONTROL_MEDIAN:g} is allowed."
        )
    spread = (control.upper_quartile - control.lower_quartile) / control.value
    if spread > CONTROL_SPREAD:
        reasons.append(
            f"The middle half of the ratios of two copies of the same variant spreads over {spread:.0%}; "
            f"{CONTROL_SPREAD:.0%} is allowed."
        )
    if abs(ratio.best / ratio.value - 1) > BEST_DISAGREES:
        reasons.append(
            f"The pairs say {ratio.value:.2f} and the fastest times {ratio.best:.2f}; "
            f"they may differ by {BEST_DISAGREES:.0%}."
        )
    if load > processors:
        reasons.append(f"The machine's load is {load:.1f} on {processors} processors.")
    return reasons
