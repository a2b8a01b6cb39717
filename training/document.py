"""Results in a document that people also write in: they stand between two marks, and only what is there is replaced."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import TrainingError


def put_into(document: Path, text: str, begin: str, end: str) -> None:
    """Replace what stands between two lines of a document.

    Raises:
        TrainingError: they are not there.
        OSError: it cannot be read or written.
    """
    before, found_begin, rest = document.read_text(encoding="utf-8").partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise TrainingError(
            f"{document} has no place for the results: the lines {begin} and {end} are missing. Put them where the "
            "results belong."
        )
    document.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
