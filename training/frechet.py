"""How far sets of clips are apart, as the probe sees them: the Frechet distance of its features of their frames."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from training.probe import WINDOW, AttributeProbe

Array = np.ndarray

FRAME_STEP = 4
"""Every so-manieth frame counts for the distance; those between are nearly the same."""


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
