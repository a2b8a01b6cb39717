"""The segments of streamed videos, which Gradio keeps in memory until a visitor's tab closes.

Somebody who makes one video after the other would fill the machine's memory, and a program that calls without a tab
would never give any of it back. So a visitor's ended streams go when the next one begins, when they are old, and when
all streams together are too large.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from weakref import WeakKeyDictionary

import gradio as gr
from gradio.route_utils import MediaStream

MAX_AGE_SECONDS = 30 * 60
MAX_BYTES = 1_000_000_000


class StreamMemory:
    """Lets go of streams that have ended.

    Args:
        blocks: Whose streams: `pending_streams` is {session: {run: {component: stream}}}.
        clock: Seconds; tests have their own.
    """

    def __init__(
        self,
        blocks: gr.Blocks,
        max_age: float = MAX_AGE_SECONDS,
        max_bytes: int = MAX_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._blocks = blocks
        self._max_age = max_age
        self._max_bytes = max_bytes
        self._clock = clock
        self._ended_at: WeakKeyDictionary[MediaStream, float] = WeakKeyDictionary()

    def forget(self, session: str) -> None:
        """Drop the ended streams of one visitor. May be called on any thread."""
        for run, streams in self._ended_runs(session):
            self._drop(session, run, streams)

    def sweep(self) -> None:
        """Drop ended streams that nobody has had a use for in a long time, and the oldest ones of too many.

        To be called on the event loop, where Gradio adds streams.
        """
        now = self._clock()
        ended = [
            (self._ended_at.setdefault(next(iter(streams.values())), now), session, run, streams)
            for session in list(self._blocks.pending_streams)
            for run, streams in self._ended_runs(session)
        ]
        ended.sort(key=lambda entry: entry[0])
        total = sum(_size(streams) for *_, streams in ended)
        for ended_at, session, run, streams in ended:
            if now - ended_at < self._max_age and total <= self._max_bytes:
                break
            total -= _size(streams)
            self._drop(session, run, streams)
        for session in [session for session, runs in self._blocks.pending_streams.items() if not runs]:
            del self._blocks.pending_streams[session]

    def _ended_runs(self, session: str) -> Iterator[tuple[str, dict[int, MediaStream]]]:
        for run, streams in list(self._blocks.pending_streams.get(session, {}).items()):
            if streams and all(stream.ended for stream in streams.values()):
                yield run, streams

    def _drop(self, session: str, run: str, streams: dict[int, MediaStream]) -> None:
        for stream in streams.values():
            stream.segments.clear()
        self._blocks.pending_streams.get(session, {}).pop(run, None)


def _size(streams: dict[int, MediaStream]) -> int:
    return sum(len(segment["data"]) for stream in streams.values() for segment in stream.segments)
