"""Room for compiled code: where too much of it is kept, what was not used for longest goes.

torch's compiler removes nothing itself. It looks everything up by a hash and makes anew what is missing, but takes what
it finds for whole. So what belongs together goes together, and what a running program may be using stays.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

MAX_BYTES = 2_000_000_000
"""The code of a model's parts takes a few MB, but the C++ headers it is compiled with are kept in a form of 150 MB for
each combination of compiler and switches. This has room for a dozen."""
SPARED_SECONDS = 2 * 24 * 3600
"""What was used more recently stays, however much there is: a program that runs may count on it. Not less than a day,
for file systems usually note no more than one reading a day. Those that note none tell when it was written."""

_TRITON = "triton"
"""Below this, torch keeps a folder for each device, and in it one for each kernel, with all its files."""


@dataclass
class _Entry:
    """Files that belong together.

    Attributes:
        folder: holds nothing else; None: they lie among others.
        used: when one of them was read or written last, in seconds since the epoch.
    """

    folder: Path | None
    files: list[Path] = field(default_factory=list)
    size: int = 0
    used: float = 0.0


def make_room(cache: Path, max_bytes: int = MAX_BYTES, spared_seconds: float = SPARED_SECONDS) -> int:
    """Remove what was not used for longest, until at most `max_bytes` are left or all the rest is spared.

    Other programs may read, write and do the same meanwhile. What cannot be removed stays.

    Returns:
        Bytes removed.
    """
    entries = sorted(_entries(cache), key=lambda entry: entry.used)
    surplus = sum(entry.size for entry in entries) - max_bytes
    spared = time.time() - spared_seconds
    removed = 0
    for entry in entries:
        if removed >= surplus or entry.used > spared:
            break
        with suppress(OSError):
            _remove(entry, cache)
            removed += entry.size
    return removed


def _entries(cache: Path) -> Iterable[_Entry]:
    found: dict[Path, _Entry] = {}
    for parent, _, names in os.walk(cache):
        inside = Path(parent).relative_to(cache).parts
        kernel = cache.joinpath(*inside[:3]) if len(inside) >= 3 and inside[0] == _TRITON else None
        for name in names:
            path = Path(parent, name)
            try:
                status = path.lstat()
            except OSError:  # gone meanwhile
                continue
            if status.st_size == 0 or path.suffix == ".h":
                # A lock that another program may hold; a line that it goes on including, with or without `.h.gch`.
                continue
            # `hash.main.cpp` and `hash.main.so`
            entry = found.setdefault(kernel or Path(parent, name.partition(".")[0]), _Entry(kernel))
            entry.files.append(path)
            entry.size += status.st_size
            entry.used = max(entry.used, status.st_atime, status.st_mtime)
    return found.values()


def _remove(entry: _Entry, cache: Path) -> None:
    if entry.folder is None:
        # One by one: torch makes whichever is missing, with or without the others.
        for path in entry.files:
            path.unlink(missing_ok=True)
        return
    # All at once: Triton takes a kernel for whole if one file of it is there. If this is cut short, what is left is
    # removed as any other files.
    aside = Path(tempfile.mkdtemp(prefix="unused-", dir=cache))
    try:
        os.replace(entry.folder, aside / entry.folder.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
