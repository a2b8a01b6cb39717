"""One file under two names: a hard link where the disk knows them, or else a symbolic link, or else a copy.

USB sticks and some network disks know no hard links; exFAT knows no links at all.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import Literal

Way = Literal["hard link", "symbolic link", "copy"]

NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV, errno.EINVAL)
"""How a disk says that it knows no links of a kind. All else (no space, no permission, ...) is an error."""
MTIME_SECONDS = 2
"""Finer than that, FAT does not note when a file was written."""


def best_way(folder: Path) -> Way:
    """The best way that works on the disk of a folder, found by trying.

    Raises:
        OSError: nothing can be written there.
    """
    with tempfile.TemporaryDirectory(prefix=".probe-", dir=folder) as place:
        source = Path(place) / "source"
        source.touch()
        for way in ("hard link", "symbolic link"):
            try:
                put(source, Path(place) / way, way)
                return way
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
            except NotImplementedError:  # what Python knows to be impossible on a system
                pass
    return "copy"


def put(source: Path, target: Path, way: Way) -> None:
    """Give a file a second name, or what comes nearest to it. Both may be moved only together."""
    if way == "hard link":
        os.link(source, target)
    elif way == "symbolic link":
        os.symlink(os.path.relpath(source, target.parent), target)
    else:
        shutil.copy2(source, target)


def same_file(one: Path, other: Path) -> bool:
    """Whether two names lead to one file, or the one is a copy that was made by `put` of what the other is now."""
    try:
        if one.samefile(other):
            return True
        first, second = one.stat(), other.stat()
    except OSError:
        return False
    return first.st_size == second.st_size and abs(first.st_mtime - second.st_mtime) <= MTIME_SECONDS
