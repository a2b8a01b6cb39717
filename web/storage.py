"""Where finished videos lie until nobody needs them, and what a process leaves on the disk while it lives."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import threading
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

MAX_AGE_SECONDS = 30 * 60
MAX_BYTES = 2_000_000_000
GRACE_SECONDS = 2 * 60
"""How long the videos of a visitor who has left are kept: a phone that is locked for a moment leaves, too."""
KEPT_PER_VISITOR = 3

_LOCK_NAME = "in-use.lock"


class VideoStore:
    """Folders with one video each, below a folder that the web server hands files out of. Thread-safe.

    A folder's name cannot be guessed, and no part of it comes from a visitor.

    Args:
        root: Made when the first video comes.
        max_age: Seconds after which a video goes, whoever it belongs to.
        max_bytes: What all videos together may take; beyond that the oldest go.
        grace: Seconds that the videos of a visitor who has left are kept.
    """

    def __init__(
        self,
        root: Path,
        max_age: float = MAX_AGE_SECONDS,
        max_bytes: int = MAX_BYTES,
        grace: float = GRACE_SECONDS,
    ) -> None:
        self.root = root
        self.max_age = max_age
        self.max_bytes = max_bytes
        self.grace = grace
        self._lock = threading.Lock()
        self._folders: defaultdict[str, list[Path]] = defaultdict(list)

    def new_folder(self, session: str) -> Path:
        """An empty folder for this visitor's next video. The oldest of theirs makes room for it.

        Raises:
            OSError: it cannot be made.
        """
        folder = self.root / secrets.token_hex(16)
        folder.mkdir(parents=True)
        with self._lock:
            folders = self._folders[session]
            folders.append(folder)
            superseded = folders[:-KEPT_PER_VISITOR]
            del folders[:-KEPT_PER_VISITOR]
        for old in superseded:
            shutil.rmtree(old, ignore_errors=True)
        return folder

    def discard(self, session: str, folder: Path) -> None:
        """Remove a folder of which nothing came."""
        with self._lock:
            with suppress(ValueError):
                self._folders[session].remove(folder)
            if not self._folders[session]:
                del self._folders[session]
        shutil.rmtree(folder, ignore_errors=True)

    def leave(self, session: str) -> None:
        """Note that a visitor has left: what is theirs goes with the first sweep after the time of grace."""
        with self._lock:
            folders = self._folders.pop(session, [])
        old_enough = time.time() - self.max_age + self.grace
        for folder in folders:
            with suppress(OSError):  # gone already
                os.utime(folder, (old_enough, min(old_enough, folder.stat().st_mtime)))

    def sweep(self) -> None:
        """Remove what is too old, and the oldest of what is too much."""
        found: list[tuple[float, int, Path]] = []
        with suppress(OSError):
            for folder in self.root.iterdir():
                with suppress(OSError):  # it may be on its way out
                    size = sum(file.stat().st_size for file in folder.iterdir())
                    found.append((folder.stat().st_mtime, size, folder))
        found.sort()
        total = sum(size for _, size, _ in found)
        oldest_allowed = time.time() - self.max_age
        for modified, size, folder in found:
            if modified >= oldest_allowed and total <= self.max_bytes:
                break
            total -= size
            shutil.rmtree(folder, ignore_errors=True)
        with self._lock:
            for session, folders in list(self._folders.items()):
                folders[:] = [folder for folder in folders if folder.exists()]
                if not folders:
                    del self._folders[session]


class TemporaryHome:
    """This process's own folder for everything that does not outlive it. What killed processes left behind is removed.

    Each process locks a file in its folder. The operating system lets go of the lock when the process ends, however it
    ends, so a folder whose lock can be had belongs to nobody.

    Args:
        parent: Default: where the system has temporary files.
    """

    def __init__(self, parent: str | Path | None = None) -> None:
        user = os.getuid() if hasattr(os, "getuid") else ""  # on Windows the temporary folder is the user's own
        base = Path(parent or tempfile.gettempdir()) / f"self-forcing-{user}"
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = base / secrets.token_hex(8)
        self.path.mkdir(mode=0o700)
        self._lock = FileLock(self.path / _LOCK_NAME)
        self._lock.acquire()
        _remove_abandoned(base, keep=self.path)

    def close(self) -> None:
        """Remove the folder and all that is in it."""
        self._lock.release()
        shutil.rmtree(self.path, ignore_errors=True)


def _remove_abandoned(base: Path, keep: Path) -> None:
    for folder in base.iterdir():
        lock_file = folder / _LOCK_NAME
        # A folder without a lock may be one that another process is just setting up.
        if folder == keep or not lock_file.exists():
            continue
        lock = FileLock(lock_file)
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):  # in use
            continue
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)
