"""What visitors send as the start of a video: checked, read and kept while it is used."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from pathlib import Path

from pipeline.config import ModelSpec
from pipeline.errors import InvalidRequest, OptionUnavailable, SelfForcingError
from pipeline.start import Start
from pipeline.start_file import read_start
from web.adapter import AdaptedPipeline
from web.storage import remove_upload

READERS = 2
"""Files that are read at the same time, whoever asks: decoding takes the cores from the model."""
WAIT_SECONDS = 30.0
"""Longest wait for others' files to be read."""
MAX_WAITING = 6
"""Files that wait. Each of them has one of Gradio's threads, without which no video goes on."""
KEPT_BYTES = 2_000_000_000
"""What frames that stay in memory may take: those of a whole queue. A file is read for its preview, when Generate is
pressed, and when its turn comes; the last time the model waits, so it should be the first that reads."""

_Key = tuple[str, ModelSpec]


class Starts:
    """Reads the files below a folder. Thread-safe: who asks for a file that is being read waits for that.

    Args:
        home: Where Gradio puts uploads. What lies elsewhere is not a visitor's.
        max_bytes: What the frames that are kept may take. Those that nobody asked for longest go first.
    """

    def __init__(self, home: Path, max_bytes: int = KEPT_BYTES) -> None:
        self._home = home
        self._max_bytes = max_bytes
        self._readers = threading.BoundedSemaphore(READERS)
        self._places = threading.BoundedSemaphore(READERS + MAX_WAITING)
        self._lock = threading.Lock()
        self._kept: OrderedDict[_Key, Start] = OrderedDict()
        self._in_flight: dict[_Key, Future[Start]] = {}

    def read(self, path: str | None, model: AdaptedPipeline, *, remove: bool = True) -> Start | None:
        """What a video starts from, cut for this model; None without a file. A bad upload is removed if so asked.

        Raises:
            InvalidRequest: with a sentence for the visitor.
            OptionUnavailable: the model starts from nothing but noise.
            SelfForcingError: too many others' files are being read.
        """
        if path is None:
            return None
        if not self._is_ours(path):
            raise InvalidRequest("A file is needed to start from.")
        if not model.takes_start or model.spec is None:
            raise OptionUnavailable("This model cannot start from a picture or a video.")
        try:
            self._touch(path)
            return self._read_once((path, model.spec))
        except InvalidRequest:
            if remove:
                remove_upload(self._home, path)
            raise
        except OSError as error:
            raise InvalidRequest("The file to start from is gone. Choose it again.") from error

    def known(self, path: str | None, model: AdaptedPipeline | None) -> Start | None:
        """As `read`, but None unless the file has been read already."""
        if not isinstance(path, str) or model is None or model.spec is None:
            return None
        with self._lock:
            return self._kept.get((path, model.spec))

    def look_after(self, waiting: Iterable[str]) -> None:
        """Before old uploads are swept: make those young that runs wait for, and forget those that are gone."""
        for path in waiting:
            if self._is_ours(path):
                with suppress(OSError):
                    self._touch(path)
        with self._lock:
            for key in [key for key in self._kept if not Path(key[0]).exists()]:
                del self._kept[key]

    def _is_ours(self, path: object) -> bool:
        try:
            return isinstance(path, str) and Path(path).resolve().is_relative_to(self._home.resolve())
        except (OSError, ValueError):  # too long a name, or a zero byte in it
            return False

    def _touch(self, path: str) -> None:
        """What is used is not old: uploads go by the age of their folders, Gradio's own by that of the files."""
        os.utime(path)
        if (folder := Path(path).resolve().parent) != self._home.resolve():
            os.utime(folder)

    def _read_once(self, key: _Key) -> Start:
        with self._lock:
            if (start := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
                return start
            reading = self._in_flight.get(key)
            first = reading is None
            if reading is None:
                reading = self._in_flight[key] = Future()
        if first:
            self._read_now(key, reading)
        return reading.result()

    def _read_now(self, key: _Key, reading: Future[Start]) -> None:
        """Give `reading` its frames, or what is wrong with the file."""
        try:
            start = self._read_in_turn(*key)
        except BaseException as error:
            with self._lock:
                del self._in_flight[key]
            reading.set_exception(error)
            return
        with self._lock:
            del self._in_flight[key]
            self._kept[key] = start
            while len(self._kept) > 1 and sum(kept.frames.nbytes for kept in self._kept.values()) > self._max_bytes:
                self._kept.popitem(last=False)
        reading.set_result(start)

    def _read_in_turn(self, path: str, spec: ModelSpec) -> Start:
        with ExitStack() as held:
            for semaphore, seconds in ((self._places, 0.0), (self._readers, WAIT_SECONDS)):
                if not semaphore.acquire(timeout=seconds):
                    raise SelfForcingError("Too many files are being read at this moment. Try again in a minute.")
                held.callback(semaphore.release)
            return read_start(path, spec)
