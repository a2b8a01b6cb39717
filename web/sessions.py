"""Whose run is whose: so that Stop, or closing the tab, stops a visitor's own runs and nobody else's."""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Literal

from pipeline.worker import Run


class Ticket:
    """One click on Generate: from the click, through the queue, to the end of the run."""

    def __init__(self) -> None:
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

    def expect(self, session: str) -> int:
        """Note that the visitor's next run is on its way. Returns how many runs are ahead of it."""
        with self._lock:
            ahead = sum(map(len, self._waiting.values())) + sum(map(len, self._active.values()))
            self._waiting[session].append(Ticket())
            return ahead

    def begin(self, session: str) -> Ticket:
        """The ticket of the run that begins now: the oldest expected one, or a new one if none was announced."""
        with self._lock:
            waiting = self._waiting.get(session)
            ticket = waiting.pop(0) if waiting else Ticket()
            if not waiting:
                self._waiting.pop(session, None)
            self._active[session].append(ticket)
            return ticket

    def end(self, session: str, ticket: Ticket) -> None:
        with self._lock:
            active = self._active[session]
            if ticket in active:
                active.remove(ticket)
            if not active:
                del self._active[session]

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
        running = any(not ticket.stopped for ticket in active)
        expected = any(not ticket.stopped for ticket in waiting)
        for ticket in (*waiting, *active):
            ticket.stop(abandon=abandon)
        return "running" if running else "waiting" if expected else "none"
