"""How far a download is: bytes, speed and time to go, told to whoever listens, not too often."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

INTERVAL_SECONDS = 0.25
SPEED_WINDOW_SECONDS = 10.0


@dataclass(frozen=True)
class Progress:
    """One moment of a download."""

    stage: str
    """What is being done, in words for a user."""
    done: int
    total: int
    """Bytes, of all files together. What has been fetched before counts as done."""
    speed: float
    """Bytes a second over the last seconds; 0 while nothing comes."""

    @property
    def share(self) -> float:
        return min(1.0, self.done / self.total) if self.total else 1.0

    @property
    def seconds_left(self) -> float | None:
        return (self.total - self.done) / self.speed if self.speed > 0 else None

    def as_dict(self) -> dict[str, Any]:
        left = self.seconds_left
        return asdict(self) | {"speed": round(self.speed), "seconds_left": None if left is None else round(left)}

    def __str__(self) -> str:
        line = f"{self.stage} · {gigabytes(self.done)} of {gigabytes(self.total)}"
        if self.speed > 0:
            line += f" · {gigabytes(self.speed)}/s"
        left = self.seconds_left
        return line if left is None or left < 1 else f"{line} · {duration(left)} left"


Listener = Callable[[Progress], None]


class Meter:
    """Counts bytes and tells a listener.

    Args:
        total: bytes to come, those included that are here already.
        listener: is called a few times a second, and at every new stage.
    """

    def __init__(self, total: int, listener: Listener, clock: Callable[[], float] = time.monotonic) -> None:
        self._total = total
        self._listener = listener
        self._clock = clock
        self._stage = "Starting"
        self._done = 0
        self._told = float("-inf")
        self._arrivals: deque[tuple[float, int]] = deque()
        """When how many bytes came through the network."""

    def stage(self, name: str) -> None:
        self._stage = name
        self._arrivals.clear()  # the pause in between is nobody's speed
        self._tell()

    def skip(self, count: int) -> None:
        """Count bytes that were here before."""
        self._done += count
        self._tell()

    def advance(self, count: int) -> None:
        """Count bytes that have just come; fewer than none if some must come again."""
        self._done += count
        now = self._clock()
        self._arrivals.append((now, count))
        while self._arrivals and self._arrivals[0][0] < now - SPEED_WINDOW_SECONDS:
            self._arrivals.popleft()
        if now - self._told >= INTERVAL_SECONDS:
            self._tell()

    def _tell(self) -> None:
        self._told = self._clock()
        self._listener(Progress(self._stage, self._done, self._total, self._speed()))

    def _speed(self) -> float:
        if len(self._arrivals) < 2:
            return 0.0
        # What came at the first moment came in the time before it, which is not counted.
        count = sum(arrived for _, arrived in self._arrivals) - self._arrivals[0][1]
        seconds = self._arrivals[-1][0] - self._arrivals[0][0]
        return max(0.0, count / seconds) if seconds > 0 else 0.0


def gigabytes(count: float) -> str:
    """Bytes for people, in the units in which disks are sold."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}" if unit == "GB" else f"{count / size:.0f} {unit}"
    return f"{count:.0f} B"


def about(count: float) -> str:
    """An estimated size, no more exact than it is."""
    return f"about {count / 1e9:.1f} GB" if count >= 1e9 else f"about {gigabytes(count)}"


def duration(seconds: float) -> str:
    whole = max(1, round(seconds))
    if whole < 90:
        return f"{whole} s"
    return f"{round(whole / 60)} min" if whole < 5400 else f"{whole / 3600:.1f} h"
