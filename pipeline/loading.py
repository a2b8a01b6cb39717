"""How far the loading of a model has come, told by whoever loads to whoever waits.

As with `control.checkpoint`, the two are far apart: a part's file is read deep inside `from_pretrained`, and a page
wants to show it. Between them lies a `ContextVar`, so that loading takes no argument for it and works alike when nobody
waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

LOADED_SHARE = 0.9
"""Share of all the work that is done once everything is read and only a first run is still to come."""


@dataclass(frozen=True)
class LoadingState:
    """What is being done, in words for a user, and the share of the work that lies behind, 0 to 1."""

    stage: str = "Starting"
    share: float = 0.0


def report_loading(stage: str, share: float) -> None:
    """Called by code that loads; does nothing if nobody listens."""
    listener = _listener.get()
    if listener is not None:
        listener(LoadingState(stage, min(1.0, max(0.0, share))))


@contextmanager
def heard_by(listener: Callable[[LoadingState], None]) -> Iterator[None]:
    """Pass what the code inside the `with` reports to `listener`, on the same thread."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


_listener: ContextVar[Callable[[LoadingState], None] | None] = ContextVar("loading_listener", default=None)
