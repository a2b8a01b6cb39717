"""Comparison with golden tensors recorded from the authors' code, as tests and as a command."""

from __future__ import annotations

from pathlib import Path

from tests.parity import decoders, forward, gradients, losses, rollout, scheduler
from tests.parity.report import Row

CASES = scheduler.CASES | rollout.CASES | forward.CASES | losses.CASES | decoders.CASES | gradients.CASES


def check_file(path: Path) -> list[Row]:
    """Rows of the case whose name the file's name begins with."""
    matches = [name for name in CASES if path.stem == name] or [name for name in CASES if path.stem.startswith(name)]
    # `case8b_...` must not be taken for `case8_...`, nor a renamed copy be refused: fall back to the case's number.
    number = path.stem.split("_")[0]
    matches = matches or [name for name in CASES if name.split("_")[0] == number]
    if not matches:
        raise ValueError(f"{path.name} is not a known case; known are {', '.join(CASES)}")
    return CASES[max(matches, key=len)](path)
