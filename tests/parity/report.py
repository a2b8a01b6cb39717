"""What a comparison with a golden tensor comes to."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Row:
    """One compared quantity."""

    name: str
    error: float
    """Largest absolute difference; infinite if shapes differ or a value is not finite."""
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # false for NaN


def largest_error(measured: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference, or infinity if the two cannot be compared."""
    if measured.shape != expected.shape:
        return math.inf
    difference = (measured.double() - expected.double()).abs().max().item()
    return difference if math.isfinite(difference) else math.inf
