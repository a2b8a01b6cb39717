"""Follow the subject of a clip and tell where it moves.

Lengths are in frame heights, speeds in frame heights per frame.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Array = np.ndarray

_LAG = 4
"""Displacements are taken over this many frames: single frames move less than the centroid is uncertain."""
_JUMP = 0.25
"""A displacement longer than this is a subject that left on one side and came back on the other."""
_STILL = 0.0028
"""Slower than this is standing still: less than a fifth of the world's speed. What is half outside seems slower."""


class Motion(NamedTuple):
    """One of the world's motions, and the speed along it."""

    direction: str
    speed: float


def follow(coverage: Array, seen: Array) -> tuple[Array, Array]:
    """Centroid of the subject's visible part.

    Args:
        coverage: [T, h, w], the subject's share of each cell.
        seen: bool [T], whether there is a subject to follow.

    Returns:
        x and y, [T] each, NaN in frames where nothing is seen.
    """
    _, h, w = coverage.shape
    total = np.maximum(coverage.sum(axis=(1, 2)), 1e-6)
    columns, rows = (np.arange(w) + 0.5) / h, (np.arange(h) + 0.5) / h
    x = (coverage.sum(axis=1) * columns).sum(axis=1) / total
    y = (coverage.sum(axis=2) * rows).sum(axis=1) / total
    return np.where(seen, x, np.nan), np.where(seen, y, np.nan)


def read_motion(x: Array, y: Array) -> Motion:
    """Motion of a track. Where the subject wraps around the border, or is unseen, there is no displacement to count."""
    dx, dy = x[_LAG:] - x[:-_LAG], y[_LAG:] - y[:-_LAG]
    valid = np.isfinite(dx) & np.isfinite(dy)
    valid[valid] &= np.hypot(dx[valid], dy[valid]) < _JUMP
    if not valid.any():
        return Motion("still", 0.0)
    vx, vy = float(np.median(dx[valid])) / _LAG, float(np.median(dy[valid])) / _LAG
    if max(abs(vx), abs(vy)) < _STILL:
        return Motion("still", float(np.hypot(vx, vy)))
    if abs(vx) > abs(vy):
        return Motion("right" if vx > 0 else "left", abs(vx))
    return Motion("down" if vy > 0 else "up", abs(vy))
