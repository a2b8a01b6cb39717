"""Whose run is whose: so that Stop, or closing the tab, stops a visitor's own runs and nobody else's."""

from __future__ import annotations

import itertools
import secrets
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pipeline.worker import Run

Expected = Callable[[], float | None]

MAX_EXPECTED = 100
"""Clicks whose runs have not begun. Far fewer fit into the queue; more come from a program that clicks and leaves."""


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
    """

    _numbers = itertools.count()

    def __init__(self, expected: Expected = lambda: None) -> None:
        self.id = secrets.token_hex(8)
        self.number = next(self._numbers)
        self._expected = expected
        self._done_at: float | None = None
        self._lock = threading.Lock()
        self._run: Run | None = None
        self.stopped = False
        """Whether the visitor wants no more of it."""
        self.abandoned = False
        """Whether nobody is there any more to want anything."""

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
        self._waiting: defaultdict[str, list[Ticket]] = defaultdict(list)
        self._active: defaultdict[str, list[Ticket]] = defaultdict(list)
        self._unheard: Counter[str] = Counter()
        """Runs that ended here, of which the visitor's page has not heard yet."""

    def expect(self, session: str, expected: Expected = lambda: None) -> tuple[str, Place]:
        """Note that the visitor's next run is on its way. Returns its ticket's id and its place in the queue."""
        ticket = Ticket(expected)
        with self._lock:
            # Nobody misses a stopped one: if its run still comes, `begin` knows what became of it.
            waiting = [other for other in self._waiting[session] if not other.stopped]
            self._waiting[session] = [*waiting, ticket]
            self._drop_excess()
            return ticket.id, self._place(ticket)

    def place(self, session: str, ticket_id: str | None) -> Place | None:
        """Where a click stands now; None if it does not wait any more."""
        with self._lock:
            waiting = self._waiting.get(session, ())
            ticket = next((ticket for ticket in waiting if ticket.id == ticket_id and not ticket.stopped), None)
            return ticket and self._place(ticket)

    def _drop_excess(self) -> None:
        """Forget the oldest of too many clicks: their runs were refused or are never coming. Holds the lock."""
        tickets = [(ticket.number, session) for session, waiting in self._waiting.items() for ticket in waiting]
        for _, session in sorted(tickets)[:-MAX_EXPECTED]:
            self._waiting[session].pop(0)
            if not self._waiting[session]:
                del self._waiting[session]

    def _place(self, ticket: Ticket) -> Place:
        """Holds the lock."""
        earlier = (other for other in itertools.chain(*self._waiting.values()) if other.number < ticket.number)
        ahead = [other for other in itertools.chain(earlier, *self._active.values()) if not other.stopped]
        remaining = [other.remaining_seconds for other in ahead]
        seconds = None if None in remaining else sum(part for part in remaining if part is not None)
        return Place(len(ahead), seconds)

    def begin(self, session: str, ticket_id: str | None = None, expected: Expected = lambda: None) -> Ticket:
        """The ticket of the run that begins now.

        A run without a `ticket_id` was never announced (an API client's) and gets a new ticket. A ticket that is not
        there any more was stopped, and so is the one returned for it.
        """
        with self._lock:
            ticket = self._taken(session, ticket_id) if ticket_id else Ticket(expected)
            if ticket is None:
                ticket = Ticket()
                ticket.stopped = True
            self._active[session].append(ticket)
            return ticket

    def end(self, session: str, ticket: Ticket, *, announced: bool = False) -> None:
        """Note that a run is over. With `announced` the visitor's page will `settle` it."""
        with self._lock:
            active = self._active[session]
            if ticket in active:
                active.remove(ticket)
            if not active:
                del self._active[session]
            if announced and not ticket.abandoned:
                self._unheard[session] += 1

    def settle(self, session: str, ticket_id: str | None) -> None:
        """The visitor's page says that a click has come to its end. If no run ended, this click's never came: drop it.

        The queue may have been full, or the connection gone, after the click was noted.
        """
        with self._lock:
            if self._unheard[session] > 0:
                self._unheard[session] -= 1
            else:
                self._taken(session, ticket_id)
            if not self._unheard[session]:
                del self._unheard[session]

    def _taken(self, session: str, ticket_id: str | None) -> Ticket | None:
        """Take a waiting ticket out, if it is there. Holds the lock."""
        waiting = self._waiting.get(session, [])
        ticket = next((ticket for ticket in waiting if ticket.id == ticket_id), None)
        if ticket is not None:
            waiting.remove(ticket)
            if not waiting:
                del self._waiting[session]
        return ticket

    def busy(self, session: str) -> bool:
        """Whether the visitor has a run that waits or goes on and was not stopped."""
        with self._lock:
            tickets = [*self._waiting.get(session, ()), *self._active.get(session, ())]
        return any(not ticket.stopped for ticket in tickets)

    def stop(self, session: str, *, abandon: bool = False) -> Literal["running", "waiting", "none"]:
        """Stop everything of this visitor. Returns what there was that had not been stopped before."""
        with self._lock:
            waiting = list(self._waiting.get(session, ()))
            active = list(self._active.get(session, ()))
            if abandon:
                self._waiting.pop(session, None)
                self._unheard.pop(session, None)
        running = any(not ticket.stopped for ticket in active)
        expected = any(not ticket.stopped for ticket in waiting)
        for ticket in (*waiting, *active):
            ticket.stop(abandon=abandon)
        return "running" if running else "waiting" if expected else "none"
