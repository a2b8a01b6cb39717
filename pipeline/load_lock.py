"""One lock for everything that loads weights by `from_pretrained`."""

from __future__ import annotations

import threading

from pipeline.control import checkpoint

LOAD_LOCK = threading.RLock()
"""Held around every `from_pretrained`: while it runs, torch's default dtype is another one for the whole process, and
two that overlap build tensors of the other one's dtype, or leave the wrong default behind."""
POLL_SECONDS = 0.1


class loading_alone:  # noqa: N801 - read as a word: `with loading_alone():`
    """Hold `LOAD_LOCK`. A run that waits for it, because a language model is being loaded, can be stopped meanwhile.

    Raises:
        Cancelled, DeadlineExceeded: the run around this must end; the lock is not held.
    """

    def __enter__(self) -> None:
        while not LOAD_LOCK.acquire(timeout=POLL_SECONDS):
            checkpoint()

    def __exit__(self, *_: object) -> None:
        LOAD_LOCK.release()
