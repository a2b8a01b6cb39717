"""Where finished videos lie until nobody needs them, and what a process leaves on the disk while it lives."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from pipeline.errors import VideoError
from web.sessions import Kind

MAX_AGE_SECONDS = 30 * 60
MAX_BYTES = 2_000_000_000
GRACE_SECONDS = 20 * 60
"""How long the videos of a visitor who has left are kept: a phone that is locked, a laptop that sleeps leave, too."""
KEPT_PER_VISITOR = 3
"""Videos, and as many comparisons, of a page. What programs made goes by age: all MCP clients are one visitor."""
UPLOAD_BYTES = 200_000_000
"""What all uploads together may take. They are read at once; Gradio keeps them, and the rests of broken off ones."""

VIDEOS = "videos"
"""Name of the folder with the videos made here, beside the uploads."""

_LOCK_SUFFIX = ".lock"
_OUR_FOLDER = re.compile("[0-9a-f]{32}")
"""The root may be a folder that others use as well: what is named otherwise is theirs."""


class _Shelf(NamedTuple):
    """What belongs together: of it, one visitor's, the newest are kept."""

    session: str
    kind: Kind
    on_page: bool


class VideoStore:
    """Folders with one video or comparison each, below a folder that the web server hands files out of. Thread-safe.

    A folder's name cannot be guessed, and no part of it comes from a visitor.

    Args:
        root: Made when the first video comes.
        max_age: Seconds after which a video goes, unless it is on a page that is open: its buttons are for it.
        max_bytes: What all videos together may take; beyond that the oldest go, whoever they belong to.
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
        self._folders: defaultdict[_Shelf, list[Path]] = defaultdict(list)

    def new_folder(self, session: str, kind: Kind = "video", *, on_page: bool = False) -> Path:
        """An empty folder for this visitor's next video or comparison. On a page, the oldest of theirs makes room.

        Args:
            session: Whose it is.
            kind: What it is for.
            on_page: Whether a page offers it until its visitor leaves. A program takes what it wants at once.

        Raises:
            OSError: it cannot be made.
        """
        folder = self.root / secrets.token_hex(16)
        folder.mkdir(parents=True)
        with self._lock:
            folders = self._folders[_Shelf(session, kind, on_page)]
            folders.append(folder)
            superseded = folders[:-KEPT_PER_VISITOR] if on_page else []
            del folders[: len(superseded)]
        for old in superseded:
            shutil.rmtree(old, ignore_errors=True)
        return folder

    @contextmanager
    def filling(self, session: str, kind: Kind = "video", *, on_page: bool = False) -> Iterator[Path]:
        """As `new_folder`, to be filled inside the `with`. If that is not done to its end, nothing of it is kept.

        Raises:
            VideoError: it cannot be made or written into.
        """
        folder: Path | None = None
        try:
            folder = self.new_folder(session, kind, on_page=on_page)
            yield folder
        except BaseException as error:
            if folder is not None:
                self.discard(folder)
            if isinstance(error, OSError):
                raise VideoError(f"The video could not be written ({error.strerror}).") from error
            raise

    def discard(self, folder: Path) -> None:
        """Remove a folder of which nothing came."""
        with self._lock:
            self._keep_only(lambda kept: kept != folder)
        shutil.rmtree(folder, ignore_errors=True)

    def leave(self, session: str) -> None:
        """Note that a visitor has left: what is theirs goes with the first sweep after the time of grace."""
        with self._lock:
            left = {shelf: self._folders.pop(shelf) for shelf in list(self._folders) if shelf.session == session}
        old_enough = time.time() - self.max_age + self.grace
        for shelf, folders in left.items():
            for folder in folders:
                with suppress(OSError):  # gone already
                    # What was on a page may be older than anything else is let be, and has its time of grace, too.
                    modified = old_enough if shelf.on_page else min(old_enough, folder.stat().st_mtime)
                    os.utime(folder, (old_enough, modified))

    def sweep(self) -> None:
        """Remove what is too old, and the oldest of what is too much."""
        with self._lock:
            on_page = {folder for shelf, folders in self._folders.items() if shelf.on_page for folder in folders}
        for folder in on_page:
            _look_used(folder)
        with suppress(OSError):  # nothing was made yet
            ours = (entry for entry in self.root.iterdir() if _OUR_FOLDER.fullmatch(entry.name))
            _remove_oldest(ours, self.max_age, self.max_bytes, ageless=on_page)
        with self._lock:
            self._keep_only(Path.exists)

    def _keep_only(self, wanted: Callable[[Path], bool]) -> None:
        """Forget the other folders. Holds the lock."""
        for shelf, folders in list(self._folders.items()):
            folders[:] = filter(wanted, folders)
            if not folders:
                del self._folders[shelf]


def sweep_uploads(home: Path, max_age: float = MAX_AGE_SECONDS, max_bytes: int = UPLOAD_BYTES) -> None:
    """Remove what visitors sent long ago, and the oldest of too much of it.

    Args:
        home: Where Gradio puts uploads. Nothing is done unless it is a `TemporaryHome`: Gradio's usual folder belongs
            to all programs of the machine.
    """
    if _lock_of(home).exists():
        _remove_oldest((entry for entry in home.iterdir() if entry.name != VIDEOS), max_age, max_bytes)


def remove_upload(home: Path, path: str | Path) -> None:
    """Remove a file that a visitor sent, if it is one: the server's own videos and what lies elsewhere stay."""
    file, home = Path(path).resolve(), home.resolve()
    if file.is_relative_to(home) and not file.is_relative_to(home / VIDEOS):
        with suppress(OSError):  # gone already
            file.unlink()


def _look_used(folder: Path) -> None:
    """Have Gradio let the files be: it removes what it handed out by the time of a file's last change, of any kind.

    The time of writing stays: a browser that goes on with a download asks whether it is still that file.
    """
    with suppress(OSError):  # gone already
        for file in folder.iterdir():
            about = file.stat()
            os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))


def _remove_oldest(
    entries: Iterable[Path], max_age: float, max_bytes: int, ageless: Collection[Path] = frozenset()
) -> None:
    """Remove files and folders that are older than `max_age`, and the oldest ones until the rest is small enough.

    Those that are `ageless` go only for want of room.
    """
    found: list[tuple[float, int, Path]] = []
    for entry in entries:
        with suppress(OSError):  # it may be on its way out
            found.append((entry.stat().st_mtime, _size(entry), entry))
    found.sort()
    total = sum(size for _, size, _ in found)
    oldest_allowed = time.time() - max_age
    for modified, size, entry in found:
        if (modified >= oldest_allowed or entry in ageless) and total <= max_bytes:
            continue
        total -= size
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            with suppress(OSError):  # Windows does not remove what is being written
                entry.unlink()


def _size(entry: Path) -> int:
    return sum(file.stat().st_size for file in entry.iterdir()) if entry.is_dir() else entry.stat().st_size


class TemporaryHome:
    """This process's own folder for everything that does not outlive it. What killed processes left behind is removed.

    Each process locks a file beside its folder, where no visitor can name it. The operating system lets go of the lock
    when the process ends, however it ends, so a folder whose lock can be had belongs to nobody.

    Args:
        parent: Default: where the system has temporary files.
    """

    def __init__(self, parent: str | Path | None = None) -> None:
        user = os.getuid() if hasattr(os, "getuid") else ""  # on Windows the temporary folder is the user's own
        base = Path(parent or tempfile.gettempdir()) / f"self-forcing-{user}"
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        if user != "" and (base.is_symlink() or base.stat().st_uid != user):
            raise PermissionError(errno.EPERM, "it belongs to somebody else", str(base))
        _remove_abandoned(base)
        self.path = base / secrets.token_hex(8)
        self._lock = FileLock(_lock_of(self.path))
        self._lock.acquire()
        self.path.mkdir(mode=0o700)

    def close(self) -> None:
        """Remove the folder and all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.release()
        _lock_of(self.path).unlink(missing_ok=True)


def _lock_of(home: Path) -> Path:
    return home.with_name(home.name + _LOCK_SUFFIX)


def _remove_abandoned(base: Path) -> None:
    for lock_file in base.glob(f"*{_LOCK_SUFFIX}"):
        lock = FileLock(lock_file)
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):  # in use
            continue
        shutil.rmtree(lock_file.with_suffix(""), ignore_errors=True)
        lock.release()
        with suppress(OSError):
            lock_file.unlink(missing_ok=True)
