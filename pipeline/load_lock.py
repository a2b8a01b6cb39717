"""One lock for everything that loads weights by `from_pretrained`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.control import checkpoint

LOAD_LOCK = threading.RLock()
"""Held around every `from_pretrained`: while it runs, torch's default dtype is another one for the whole process, and
two that overlap build tensors of the other one's dtype, or leave the wrong default behind."""
POLL_SECONDS = 0.1


@contextmanager
def loading_alone() -> Iterator[None]:
    """Hold `LOAD_LOCK`. A run that waits for it, because a language model is being loaded, can be stopped meanwhile.

    Raises:
        Cancelled, DeadlineExceeded: the run around this must end; the lock is not held.
    """
    while not LOAD_LOCK.acquire(timeout=POLL_SECONDS):
        checkpoint()
    try:
        yield
    finally:
        LOAD_LOCK.release()
