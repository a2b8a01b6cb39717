"""Whose run is whose: so that Stop, or closing the tab, stops a visitor's own runs and nobody else's."""

from __future__ import annotations

import itertools
import secrets
import threading
from collections import Counter, defaultdict
from typing import Literal

from pipeline.worker import Run


class Ticket:
    """One click on Generate: from the click, through the queue, to the end of the run."""

    def __init__(self) -> None:
        self.id = secrets.token_hex(8)
        self._lock = threading.Lock()
        self._run: Run | None = None
        self.stopped = False
        """Whether the visitor wants no more of it."""
        self.abandoned = False
        """Whether nobody is there any more to want anything."""

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

    def expect(self, session: str) -> tuple[str, int]:
        """Note that the visitor's next run is on its way. Returns its ticket's id and how many runs are ahead of it."""
        ticket = Ticket()
        with self._lock:
            tickets = itertools.chain(*self._waiting.values(), *self._active.values())
            ahead = sum(not other.stopped for other in tickets)
            # Nobody misses a stopped one: if its run still comes, `begin` knows what became of it.
            waiting = [other for other in self._waiting[session] if not other.stopped]
            self._waiting[session] = [*waiting, ticket]
        return ticket.id, ahead

    def begin(self, session: str, ticket_id: str | None = None) -> Ticket:
        """The ticket of the run that begins now.

        A run without a `ticket_id` was never announced (an API client's) and gets a new ticket. A ticket that is not
        there any more was stopped, and so is the one returned for it.
        """
        with self._lock:
            ticket = self._taken(session, ticket_id) if ticket_id else Ticket()
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
