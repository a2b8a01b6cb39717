"""Signed distance functions of flat shapes, and their anti-aliased coverage.

All functions take coordinate arrays `x`, `y` (y grows downwards) that broadcast against each other and return the
signed distance to the border: negative inside, positive outside, in the unit of the coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Array = np.ndarray


def coverage(distance: Array, softness: float) -> Array:
    """Share of a pixel inside the shape, 0..1, for an edge that is `softness` units wide."""
    return np.clip(0.5 - distance / np.float32(softness), 0.0, 1.0).astype(np.float32, copy=False)


def circle(x: Array, y: Array, cx: float | Array, cy: float | Array, radius: float) -> Array:
    return np.sqrt((x - cx) ** 2 + (y - cy) ** 2) - radius


def ellipse(x: Array, y: Array, cx: float | Array, cy: float | Array, rx: float, ry: float | Array) -> Array:
    """Approximate: exact on the border, distances scaled by the shorter radius elsewhere."""
    return (np.sqrt(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2) - 1.0) * np.minimum(np.float32(rx), ry)


def box(x: Array, y: Array, cx: float, cy: float, half_width: float, half_height: float, corner: float = 0.0) -> Array:
    """Rectangle around (cx, cy) with corners rounded by `corner`."""
    dx = np.abs(x - cx) - (half_width - corner)
    dy = np.abs(y - cy) - (half_height - corner)
    outside = np.sqrt(np.maximum(dx, 0.0) ** 2 + np.maximum(dy, 0.0) ** 2)
    return outside + np.minimum(np.maximum(dx, dy), 0.0) - corner


def convex(x: Array, y: Array, points: Sequence[tuple[float, float]]) -> Array:
    """Convex polygon, its corners listed clockwise as seen on the screen. Distances beyond corners are lower bounds."""
    distance = None
    for (x0, y0), (x1, y1) in zip(points, [*points[1:], points[0]], strict=True):
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        side = ((x - x0) * (y1 - y0) - (y - y0) * (x1 - x0)) / length
        distance = side if distance is None else np.maximum(distance, side)
    if distance is None:
        raise ValueError("a polygon needs at least three corners, got none")
    return distance


def star(x: Array, y: Array, radius: float, inner: float = 0.5) -> Array:
    """Five-pointed star around the origin, one tip up. `inner` is the radius of the notches relative to the tips."""
    step = np.float32(2 * np.pi / 5)
    angle = np.arctan2(x, -y)
    angle = np.abs(angle - step * np.round(angle / step))
    r = np.sqrt(x**2 + y**2)
    px, py = r * np.cos(angle), r * np.sin(angle)
    half = float(step) / 2
    notch_x, notch_y = radius * inner * np.cos(half), radius * inner * np.sin(half)
    ex, ey = notch_x - radius, notch_y
    return ((px - radius) * ey - py * ex) / float(np.hypot(ex, ey))
