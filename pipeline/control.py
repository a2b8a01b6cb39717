"""Stopping a run from outside: a cancel flag and a deadline, looked at by the model at every denoising step.

A run is stopped by whoever owns it (the model thread, on behalf of a visitor); the code that must notice sits deep
inside the sampler. Between them lies a `ContextVar`, as cancel scopes have it elsewhere, so that `stream(request)`
needs no argument for it and works alike with and without anybody to stop it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from pipeline.errors import Cancelled, DeadlineExceeded


class RunControl:
    """Cancel flag and deadline of one run. Thread-safe: anyone may `cancel()`, the model calls `check()`."""

    def __init__(self, max_seconds: float | None = None) -> None:
        self._cancelled = threading.Event()
        self._max_seconds = max_seconds
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds

    def cancel(self) -> None:
        """Ask the run to end at its next checkpoint. May be called any number of times."""
        self._cancelled.set()

    def check(self) -> None:
        """Raise `Cancelled` or `DeadlineExceeded` if the run must end now."""
        if self._cancelled.is_set():
            raise Cancelled("The run was stopped.")
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise DeadlineExceeded(
                f"The run took longer than the {self._max_seconds:g} s allowed here. Ask for a shorter video."
            )

    @contextmanager
    def active(self) -> Iterator[RunControl]:
        """Make this the control that `checkpoint()` asks, for the code inside the `with`."""
        token = _current.set(self)
        try:
            yield self
        finally:
            _current.reset(token)


_current: ContextVar[RunControl | None] = ContextVar("run_control", default=None)


def checkpoint() -> None:
    """Called by the model at every denoising step; does nothing outside of a controlled run."""
    control = _current.get()
    if control is not None:
        control.check()
