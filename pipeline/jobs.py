"""What waits for the model thread: runs, and exchanges of the model. Shared by that thread and by whoever waits."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager

from pipeline.blocks import FrameBlock, StreamingPipeline
from pipeline.config import GenerationRequest
from pipeline.control import RunControl

QUEUE_BLOCKS = 2
"""Finished blocks that wait for their consumer; the model makes at most one more, then rests."""

POLL_SECONDS = 0.5
"""How often a waiting thread looks whether the other side is still there."""


class Job:
    """What the model thread and a run's consumer share."""

    _numbers = itertools.count(1)

    def __init__(self, request: GenerationRequest, max_seconds: float | None) -> None:
        self.id = f"run-{next(self._numbers)}"
        self.request = request
        self.control: RunControl | None = None
        self.stop_asked = False
        self.ended = False
        self._max_seconds = max_seconds
        self._deadline: float | None = None
        self._closed = False
        self._error: BaseException | None = None
        self._blocks: deque[FrameBlock] = deque()
        self._changed = threading.Condition()

    def stop(self) -> None:
        with self._changed:
            self.stop_asked = True
            if self.control is not None:
                self.control.cancel()
            self._changed.notify_all()

    def close(self) -> None:
        self.stop()
        with self._changed:
            self._closed = True
            self._blocks.clear()
            self._changed.notify_all()

    def started(self) -> AbstractContextManager[RunControl]:
        """Begin the run: from here its deadline counts. Returns the context in which the model sees the control."""
        with self._changed:
            self.control = RunControl(self._max_seconds)
            if self._max_seconds is not None:
                self._deadline = time.monotonic() + self._max_seconds
            if self.stop_asked:
                self.control.cancel()
            self.control.check()
        return self.control.active()

    def hand_over(self, block: FrameBlock) -> None:
        """Model side: queue a block, waiting while the consumer is behind, but never for one that has gone."""
        with self._changed:
            while len(self._blocks) >= QUEUE_BLOCKS and not self.stop_asked:
                wait = None if self._deadline is None else self._deadline - time.monotonic()
                if wait is not None and wait <= 0:
                    break
                self._changed.wait(wait)
            if not self._closed:
                self._blocks.append(block)
                self._changed.notify_all()

    def take(self, attend: Callable[[Job], None]) -> FrameBlock | None:
        """Consumer side: the next block, or None at the end. Raises the run's error."""
        with self._changed:
            while not (self._blocks or self.ended or self._closed):
                if not self._changed.wait(POLL_SECONDS):
                    self._changed.release()  # `attend` takes the worker's lock first
                    try:
                        attend(self)
                    finally:
                        self._changed.acquire()
            if self._blocks:
                block = self._blocks.popleft()
                self._changed.notify_all()
                return block
            error, self._error = self._error, None  # whoever catches it may hold this run: it must not hold them
            if error is not None and not self._closed:
                raise error
            return None

    def end(self, error: BaseException | None = None) -> None:
        with self._changed:
            if not self.ended:
                self.ended = True
                self._error = error
                self._changed.notify_all()


class Switch:
    """An exchange of the model, as it stands among the runs."""

    def __init__(self, source: Callable[[], StreamingPipeline]) -> None:
        self.source = source
        self.error: BaseException | None = None
        self._ended = threading.Event()

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def wait(self, seconds: float) -> bool:
        return self._ended.wait(seconds)

    def stop(self) -> None:
        """Loading cannot be interrupted."""

    def end(self, error: BaseException | None = None) -> None:
        if not self.ended:
            self.error = error
            self._ended.set()
