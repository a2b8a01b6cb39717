"""Whose run is whose: so that Stop, or closing the tab, stops a visitor's own runs and nobody else's."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import gradio as gr
from gradio.queueing import Event

from pipeline.worker import Run

Expected = Callable[[], float | None]
Kind = Literal["video", "comparison"]

MAX_EXPECTED = 1000
"""Clicks whose runs have not come yet. Far fewer fit into the queue; more are made up by a program."""


@dataclass(frozen=True)
class Place:
    """Where a click stands in the queue."""

    ahead: int
    """Runs that come before it."""
    seconds: float | None
    """Until it begins, as far as can be told from earlier runs; None if one of those ahead is of unknown length."""


class Ticket:
    """One click on Generate: from the click, through the queue, to the end of the run.

    Args:
        expected: Tells how many seconds its run will take the model, as far as is known when it is asked.
        announced: Whether it is known before its run begins, as a page's click is.
        kind: What it becomes.
    """

    def __init__(self, expected: Expected = lambda: None, *, announced: bool = False, kind: Kind = "video") -> None:
        self.id = secrets.token_hex(8)
        self.kind = kind
        self.announced = announced
        self._expected = expected
        self._done_at: float | None = None
        self._lock = threading.Lock()
        self._run: Run | None = None
        self.stopped = False
        """Whether the visitor wants no more of it."""
        self.abandoned = False
        """Whether nobody is there any more to want anything."""
        self.finished = False
        """Whether its last word is said: stopping it would change nothing."""
        self.has_file = False

    @property
    def wanted(self) -> bool:
        """Whether there is something to wait for, or to stop."""
        return not (self.stopped or self.finished)

    @property
    def remaining_seconds(self) -> float | None:
        """Until its run will be over; None if nobody knows."""
        return self._expected() if self._done_at is None else max(0.0, self._done_at - time.monotonic())

    def will_take(self, seconds: float) -> None:
        """Its run goes on and has this long to go."""
        self._done_at = time.monotonic() + seconds

    def attach(self, run: Run) -> None:
        """Say which run this click has become."""
        with self._lock:
            self._run = run
            stopped, abandoned = self.stopped, self.abandoned
        if abandoned:
            run.close()
        elif stopped:
            run.stop()

    def stop(self, *, abandon: bool = False) -> None:
        """Stop at the next denoising step; with `abandon` nothing is finished or kept."""
        with self._lock:
            self.stopped = True
            self.abandoned = self.abandoned or abandon
            run = self._run
        if run is not None:
            run.close() if abandon else run.stop()


class Sessions:
    """All tickets of all visitors. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[str, tuple[str, Ticket]] = {}
        """Ticket id -> session and ticket, in the order of the clicks."""
        self._active: defaultdict[str, list[Ticket]] = defaultdict(list)
        self._unheard: defaultdict[str, deque[Ticket]] = defaultdict(deque)
        """Announced runs that ended here, of which the visitor's page has not heard yet."""
        self._given_up: OrderedDict[str, Ticket] = OrderedDict()
        """Those of visitors who seemed to have left, by their ids. Some come back: only a connection had broken."""

    def expect(self, session: str, expected: Expected = lambda: None, kind: Kind = "video") -> Ticket:
        """Note that the visitor's next run is on its way."""
        ticket = Ticket(expected, announced=True, kind=kind)
        with self._lock:
            self._waiting[ticket.id] = session, ticket
            while len(self._waiting) > MAX_EXPECTED:  # `begin` does without: an unknown click is a new one
                del self._waiting[next(iter(self._waiting))]
        return ticket

    def awaited(self, session: str) -> Kind | None:
        """What the visitor waits for; None if none of their clicks waits."""
        with self._lock:
            waiting = [ticket for owner, ticket in self._waiting.values() if owner == session and ticket.wanted]
        return waiting[0].kind if waiting else None

    def place(self, session: str, ahead: Sequence[str]) -> Place | None:
        """Where a visitor's click stands if it comes after the runs of these sessions; None if none of theirs waits."""
        with self._lock:
            if not any(owner == session and ticket.wanted for owner, ticket in self._waiting.values()):
                return None
            remaining = [self._remaining(other) for other in ahead]
        return Place(len(ahead), None if None in remaining else sum(part for part in remaining if part is not None))

    def _remaining(self, session: str) -> float | None:
        """How long the run of a session will take. Holds the lock."""
        tickets = [*self._active.get(session, ()), *(t for owner, t in self._waiting.values() if owner == session)]
        if tickets and not any(ticket.wanted for ticket in tickets):
            return 0.0
        return next((ticket.remaining_seconds for ticket in tickets if ticket.wanted), None)

    def begin(self, session: str, ticket_id: str | None = None, expected: Expected = lambda: None) -> Ticket:
        """The ticket of the run that begins now; a new one for a run that was never announced (a program's)."""
        with self._lock:
            owner, ticket = self._waiting.get(ticket_id or "", ("", None))
            if ticket is not None and owner == session:
                del self._waiting[ticket.id]
            else:
                ticket = Ticket(expected)
            self._active[session].append(ticket)
            return ticket

    def end(self, session: str, ticket: Ticket) -> None:
        """Note that a run is over. The visitor's page will `settle` it if it was announced."""
        with self._lock:
            active = self._active[session]
            if ticket in active:
                active.remove(ticket)
            if not active:
                del self._active[session]
            if ticket.announced and not ticket.abandoned:
                self._unheard[session].append(ticket)
            elif ticket.announced:
                self._given_up[ticket.id] = ticket
                while len(self._given_up) > MAX_EXPECTED:
                    self._given_up.popitem(last=False)

    def settle(self, session: str, ticket_id: str | None) -> Ticket | None:
        """The visitor's page says that a click has come to its end. Returns the ticket of the run that did.

        If no run ended, this click's never began: it was refused when its turn came, or the queue was full, or the
        connection gone, after it was noted. Then its ticket is dropped and returned. That of a run given up because its
        visitor seemed to have left is `abandoned`. None: nobody knows the click.
        """
        with self._lock:
            if unheard := self._unheard.get(session):
                ticket = unheard.popleft()
                if not unheard:
                    del self._unheard[session]
                return ticket
            if self._waiting.get(ticket_id or "", ("", None))[0] == session:
                return self._waiting.pop(ticket_id or "")[1]
            return self._given_up.pop(ticket_id or "", None)  # nobody else knows the id

    def busy(self, session: str) -> bool:
        """Whether the visitor has a run that waits or goes on and was not stopped."""
        with self._lock:
            return any(ticket.wanted for ticket in self._of(session))

    def stop(self, session: str, *, abandon: bool = False) -> Literal["running", "waiting", "none"]:
        """Stop everything of this visitor. Returns what there was that had not been stopped before."""
        with self._lock:
            tickets = self._of(session)
            running = any(ticket.wanted for ticket in self._active.get(session, ()))
            if abandon:
                self._unheard.pop(session, None)
        expected = any(ticket.wanted for ticket in tickets)
        for ticket in tickets:
            ticket.stop(abandon=abandon)
        return "running" if running else "waiting" if expected else "none"

    def _of(self, session: str) -> list[Ticket]:
        """Holds the lock."""
        waiting = [ticket for owner, ticket in self._waiting.values() if owner == session]
        return [*waiting, *self._active.get(session, ())]


def sessions_ahead(blocks: gr.Blocks, concurrency_id: str, session: str, *, queued: bool = True) -> list[str]:
    """Whose runs come before a visitor's newest one: those that go on, then those that wait, as Gradio has queued them.

    The queue knows of everybody, of programs too, and nobody can stand in it without taking up one of its places.
    Others of the visitor's own that wait there were stopped, and will be over at once.

    Args:
        queued: Whether the newest one stands in the queue by now.
    """
    running, waiting = _queued(blocks, concurrency_id)
    in_line = [event.session_hash for event in waiting]
    if queued and session in in_line:
        newest = len(in_line) - 1 - in_line[::-1].index(session)
        in_line = in_line[:newest]
    return [*(event.session_hash for event in running), *(other for other in in_line if other != session)]


def limit_queue(blocks: gr.Blocks, concurrency_id: str, most: int) -> None:
    """Refuse runs as Gradio does when a queue is full, but only where `most` runs of this kind wait.

    Gradio's own limit counts and refuses everything that is queued: while runs wait, nobody could choose a file, ask
    for a suggestion, or stop.
    """
    queue = blocks._queue
    push = queue.push

    async def push_if_there_is_room(body: Any, request: Any, username: str | None) -> Any:
        fn = blocks.fns.get(body.fn_index)
        if fn is not None and fn.concurrency_id == concurrency_id and len(_queued(blocks, concurrency_id)[1]) >= most:
            return False, f"Queue is full. Max size is {most} and size is {most}.", "queue_full"
        return await push(body, request, username)

    queue.push = push_if_there_is_room  # type: ignore[method-assign]


def files_in_queue(blocks: gr.Blocks, concurrency_id: str) -> list[str]:
    """Paths that were sent along with the runs that go on or wait, as they were sent: nobody has checked them."""
    events = [event for part in _queued(blocks, concurrency_id) for event in part]
    values = [value for event in events if event.data is not None for value in event.data.data]
    paths = [value.get("path") for value in values if isinstance(value, dict)]
    return [path for path in paths if isinstance(path, str)]


def _queued(blocks: gr.Blocks, concurrency_id: str) -> tuple[list[Event], list[Event]]:
    """What goes on, and what waits."""
    queue = blocks._queue
    jobs = [event for job in queue.active_jobs if job for event in job]
    running = [event for event in jobs if event.concurrency_id == concurrency_id]
    waiting = queue.event_queue_per_concurrency_id.get(concurrency_id)
    return running, list(waiting.queue) if waiting else []
