"""Reading what an MP4 file says about itself: just enough to check that it is whole and to find its comment.

It never decodes anything and never trusts a length: a file from a stranger can at worst be refused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import VideoError

_MAX_BOXES = 10_000
_MAX_TEXT_BYTES = 1_000_000


@dataclass(frozen=True)
class Box:
    """One box of an MP4 file; `start` and `end` (exclusive) bound its content in bytes from the start of the file."""

    kind: bytes
    start: int
    end: int


def boxes(file: BinaryIO, start: int, end: int, *, cut: bool = False) -> Iterator[Box]:
    """The boxes that lie side by side between `start` and `end`.

    Args:
        cut: Whether this is only the beginning of something: then the last box may go beyond `end`.

    Raises:
        VideoError: a box is longer than the space it lies in.
    """
    for _ in range(_MAX_BOXES):
        if start >= end:
            return
        file.seek(start)
        header = file.read(16)
        if len(header) < 8:
            raise VideoError("The MP4 file is cut off.")
        size, kind = struct.unpack(">I4s", header[:8])
        content = start + 8
        if size == 1 and len(header) == 16:
            size = struct.unpack(">Q", header[8:])[0]
            content = start + 16
        elif size == 0:
            size = end - start
        if (start + size > end and not cut) or start + size < content:
            raise VideoError("The MP4 file is cut off or damaged.")
        yield Box(kind, content, start + size)
        start += size
    raise VideoError("The MP4 file is damaged: it has too many parts.")


def find(file: BinaryIO, box: Box, *path: bytes) -> Box | None:
    """The first box at `path` below `box`, as in `find(file, moov, b"udta", b"meta")`."""
    for kind in path:
        # `meta` is a full box: four bytes of version and flags come before its children.
        start = box.start + 4 if box.kind == b"meta" else box.start
        found = next((child for child in boxes(file, start, box.end) if child.kind == kind), None)
        if found is None:
            return None
        box = found
    return box


def whole_file(file: BinaryIO) -> Box:
    """The file itself as a box, so that `find` can start from it."""
    return Box(b"file", 0, file.seek(0, 2))


def count_frames(path: Path) -> int:
    """Number of frames of the first track, read from its sample table.

    Raises:
        VideoError: the file is not a complete MP4 file that may be played while it is being downloaded.
    """
    with path.open("rb") as file:
        top = whole_file(file)
        kinds = [box.kind for box in boxes(file, top.start, top.end)]
        if b"moov" not in kinds or b"mdat" not in kinds or kinds.index(b"mdat") < kinds.index(b"moov"):
            raise VideoError("The MP4 file is incomplete.")
        table = find(file, top, b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsz")
        if table is None or table.end - table.start < 12:
            raise VideoError("The MP4 file is damaged: it lists no frames.")
        file.seek(table.start + 8)
        return int(struct.unpack(">I", file.read(4))[0])


def read_comment(path: Path) -> str | None:
    """The file's comment (the iTunes-style tag that players show), or None if it has none.

    The beginning of a file will do: what is made here has its comment there. A camera writes all that a file says of
    itself behind its pictures, so nothing is wrong if the beginning ends among those.

    Raises:
        VideoError: this is no MP4 file, or a damaged one.
    """
    with path.open("rb") as file:
        top = whole_file(file)
        if top.end < 16 or file.seek(0) or file.read(8)[4:] != b"ftyp":
            raise VideoError("This is not an MP4 file.")
        movie = next((box for box in boxes(file, top.start, top.end, cut=True) if box.kind == b"moov"), None)
        data = movie and find(file, movie, b"udta", b"meta", b"ilst", b"\xa9cmt", b"data")
        if data is None:
            return None
        if data.end - data.start > _MAX_TEXT_BYTES:
            raise VideoError("The comment in the MP4 file is too long to be a recipe.")
        file.seek(data.start + 8)  # after the text's type and language
        return file.read(max(0, data.end - data.start - 8)).decode("utf-8", errors="replace")
