"""The finished comparison as files: both videos in one picture with their names above them, and each by itself."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.compare import PIECE_FRAMES, Comparison, Side
from pipeline.recipe import build_comparison_recipe, build_recipe
from pipeline.video import SegmentEncoder

GAP = 4
"""Pixels between the two pictures. Even, as H.264 wants the whole."""
_BACKGROUND, _INK = (16, 20, 30), (236, 238, 242)
_FINER = 4
_SMALLEST_FONT = 7 * _FINER


def write_side_by_side(comparison: Comparison, report: dict[str, Any], path: Path) -> Iterator[None]:
    """Write A at the left and B at the right as one MP4, with a strip above that names them and covers nothing.

    The report goes into the file as well. Yields after each piece; the file is there at the end.

    Raises:
        VideoError: it could not be written; then nothing is left behind.
    """
    assert comparison.a.meter is not None
    encoder = SegmentEncoder(comparison.a.meter.run.fps)
    for a, b in comparison.pieces():
        encoder.encode(joined(a, b, comparison.a.label, comparison.b.label))
        yield
    encoder.write_mp4(path, build_comparison_recipe(report))


def write_side(side: Side, path: Path) -> Iterator[None]:
    """Write one side as an MP4 of its own, with its recipe, like any other video made here. Yields after each piece.

    Raises:
        VideoError: as `write_side_by_side`.
    """
    assert side.meter is not None
    encoder = SegmentEncoder(side.meter.run.fps)
    for frames in side.frames.pieces(PIECE_FRAMES):
        encoder.encode(frames)
        yield
    encoder.write_mp4(path, build_recipe(side.meter.run, encoder.num_frames))


def joined(a: np.ndarray, b: np.ndarray, label_a: str, label_b: str) -> np.ndarray:
    """Frames of A and B, uint8 [T, H, W, 3] each, as one picture, uint8 [T, H', W', 3] with even H' and W'.

    `label_a` and `label_b` say what is particular to each.
    """
    length, height, width = a.shape[:3]
    name_a, name_b = strip(f"A: {label_a}", height, width), strip(f"B: {label_b}", height, width)
    top = len(name_a)
    whole = np.empty((length, _even(top + height), _even(2 * width + GAP), 3), np.uint8)
    whole[:] = _BACKGROUND
    for left, frames, name in ((0, a, name_a), (width + GAP, b, name_b)):
        whole[:, :top, left : left + width] = name
        whole[:, top : top + height, left : left + width] = frames
    return whole


@lru_cache(maxsize=8)
def strip(text: str, height: int, width: int) -> np.ndarray:
    """A line of text above frames of this size (pixels), as large as it fits: uint8 [h, width, 3]."""
    bar = _even(min(36, max(14, height // 9)))
    # Drawn large and reduced: a font of ten pixels would move every letter to a whole pixel, some onto the next one.
    picture = Image.new("RGB", (width * _FINER, bar * _FINER), _BACKGROUND)
    draw = ImageDraw.Draw(picture)
    margin = bar * _FINER // 4
    size = (bar - 3) * _FINER
    while size > _SMALLEST_FONT and draw.textlength(text, ImageFont.load_default(size)) > picture.width - 2 * margin:
        size -= _FINER
    draw.text((margin, picture.height / 2), text, fill=_INK, font=ImageFont.load_default(size), anchor="lm")
    return np.asarray(picture.resize((width, bar), Image.Resampling.LANCZOS))


def _even(number: int) -> int:
    return number + number % 2
