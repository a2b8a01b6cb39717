"""Files that a killed program or a full disk leaves whole: as they were before, or as they were to be."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from pipeline.errors import InvalidSettings


def claim_folder(name: str, folder: Path) -> None:
    """Make a folder and write in it, for a moment, before hours are spent on what shall go there.

    Args:
        name: of the setting that names the folder.

    Raises:
        InvalidSettings: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        raise InvalidSettings(f"{name} {folder} cannot be written to ({error.strerror or error}).") from error


def write_whole(path: Path, text: str) -> None:
    """Write a text file beside its place and move it there when it is on the disk."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # others may write the same one at this moment
    try:
        partial.write_text(text, encoding="utf-8")
        settle(partial)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    settle(path.parent)


def settle(path: Path) -> None:
    """Wait until a file's contents, or a folder's list of names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not path.is_dir() or error.errno != errno.EINVAL:  # some network file systems have no such call for folders
            raise
    finally:
        os.close(handle)
