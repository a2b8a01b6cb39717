"""Contact sheets: videos as rows of a picture, with their captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

Array = np.ndarray
_LABEL_HEIGHT, _GAP = 14, 2


def contact_sheet(videos: Sequence[Array], captions: Sequence[str], columns: int = 8, zoom: int = 1) -> Image.Image:
    """One row for each video, uint8 [T, H, W, 3]: `columns` frames from its first to its last, under its caption."""
    if not videos or len(videos) != len(captions):
        raise ValueError(f"a sheet needs one caption for each video, got {len(captions)} for {len(videos)}")
    _, height, width, _ = videos[0].shape
    cell_height, cell_width = height * zoom, width * zoom
    row_height = _LABEL_HEIGHT + cell_height + _GAP
    sheet = Image.new("RGB", (columns * (cell_width + _GAP), row_height * len(videos)), (24, 24, 28))
    draw = ImageDraw.Draw(sheet)
    for row, (video, caption) in enumerate(zip(videos, captions, strict=True)):
        top = row * row_height
        draw.text((3, top + 1), caption, fill=(230, 230, 230))
        for column, frame in enumerate(np.linspace(0, len(video) - 1, columns).round().astype(int)):
            picture = Image.fromarray(np.ascontiguousarray(video[frame]))
            picture = picture.resize((cell_width, cell_height), Image.Resampling.NEAREST)
            sheet.paste(picture, (column * (cell_width + _GAP), top + _LABEL_HEIGHT))
    return sheet


def save_sheet(path: Path, videos: Sequence[Array], captions: Sequence[str], columns: int = 8, zoom: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(videos, captions, columns, zoom).save(path)
