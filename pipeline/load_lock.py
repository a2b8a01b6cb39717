"""One lock for everything that loads weights by `from_pretrained`, and for what must not see them being loaded."""

from __future__ import annotations

import threading

from pipeline.control import checkpoint

LOAD_LOCK = threading.RLock()
"""Held around every `from_pretrained`: while it runs, torch's default dtype is another one for the whole process, and
two that overlap build tensors of the other one's dtype, or leave the wrong default behind. Held around compilations,
too: dynamo sets the default again that it found when it began."""
POLL_SECONDS = 0.1


class loading_alone:  # noqa: N801 - read as a word: `with loading_alone():`
    """Hold `LOAD_LOCK`. A run that waits for it, for a language model or a compilation, can be stopped meanwhile.

    Raises:
        Cancelled, DeadlineExceeded: the run around this must end; the lock is not held.
    """

    def __enter__(self) -> None:
        while not LOAD_LOCK.acquire(timeout=POLL_SECONDS):
            checkpoint()

    def __exit__(self, *_: object) -> None:
        LOAD_LOCK.release()
