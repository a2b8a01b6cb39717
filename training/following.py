"""Prompt following: how often clips show what their prompts state, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from training.asked import Prompt
from training.probe import WindowReading
from training.world import ATTRIBUTES

Scores = dict[str, float]
"""A number for each attribute, NaN for what no prompt states."""


def score(readings: Sequence[WindowReading], prompts: Sequence[Prompt]) -> Scores:
    """Share of readings that name what the prompt states, by attribute, 0..1; NaN for what none states.

    Also `visible`, the share of frames with a subject, and `speed`, the mean speed of subjects that should move, in
    frame heights a frame.
    """
    pairs = list(zip(readings, prompts, strict=True))
    scores = {}
    for name in ATTRIBUTES:
        right = [r.attributes.get(name) == getattr(p.params, name) for r, p in pairs if name in p.stated]
        scores[name] = float(np.mean(right)) if right else float("nan")
    moving = [r.speed for r, p in pairs if "motion" in p.stated and p.params.motion != "still"]
    scores["visible"] = float(np.mean([reading.visible for reading in readings]))
    scores["speed"] = float(np.mean(moving)) if moving else float("nan")
    return scores


def by_value(readings: Sequence[WindowReading], prompts: Sequence[Prompt], name: str) -> dict[str, str]:
    """For each value of one attribute: how many were right, of how many."""
    counts: dict[str, list[bool]] = {}
    for reading, prompt in zip(readings, prompts, strict=True):
        if name in prompt.stated:
            asked = getattr(prompt.params, name)
            counts.setdefault(asked, []).append(reading.attributes.get(name) == asked)
    return {value: f"{sum(right)}/{len(right)}" for value, right in sorted(counts.items())}


def standard_error(share: float, count: int) -> float:
    """Of a share of `count` prompts, 0..1; NaN if there are none.

    Computed as if one more prompt had been right and one more wrong: 256 of 256 are no certainty.
    """
    if not count:
        return float("nan")
    likely = (share * count + 1) / (count + 2)
    return float(np.sqrt(likely * (1 - likely) / (count + 2)))


def following(
    generated: Sequence[WindowReading], real: Sequence[WindowReading], prompts: Sequence[Prompt]
) -> dict[str, dict[str, Any]]:
    """What generated clips show, what real clips of the same prompts do, and both compared.

    Returns:
        `prompt_following`, `ceiling` (the same of real clips) and `relative`, the one divided by the other, each by
        attribute; `standard_error`, of these three by their names. That of `relative` takes both for independent.
    """
    raw, ceiling = score(generated, prompts), score(real, prompts)
    counts = {name: sum(name in prompt.stated for prompt in prompts) for name in ATTRIBUTES}
    shares = {
        "prompt_following": {name: raw[name] for name in ATTRIBUTES},
        "ceiling": {name: ceiling[name] for name in ATTRIBUTES},
    }
    errors = {
        key: {name: standard_error(share, counts[name]) for name, share in by_name.items()}
        for key, by_name in shares.items()
    }
    whole = {name: max(ceiling[name], 1e-6) for name in ATTRIBUTES}
    relative = {name: raw[name] / whole[name] for name in ATTRIBUTES}
    errors["relative"] = {
        name: float(np.hypot(errors["prompt_following"][name], relative[name] * errors["ceiling"][name])) / whole[name]
        for name in ATTRIBUTES
    }
    return {**shares, "relative": relative, "standard_error": errors}
