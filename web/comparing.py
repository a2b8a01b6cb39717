"""From a pair of requests to a comparison and its files, told step by step: what page and API both show."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Generator as Steps
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.compare import PIECE_FRAMES, Comparison, Pair, Switches
from pipeline.config import GenerationRequest
from pipeline.errors import Cancelled, SelfForcingError, VideoError
from pipeline.meter import RunMeter
from pipeline.side_by_side import write_side, write_side_by_side
from web.generation import Generator
from web.sessions import Expected, Ticket

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ComparisonFiles:
    """Paths of the finished MP4 files."""

    both: str
    a: str | None = None
    b: str | None = None
    """None if nobody wanted each by itself."""


@dataclass(frozen=True, kw_only=True)
class ComparisonUpdate:
    """Something new about a comparison."""

    state: Literal["preparing", "generating", "writing", "finished", "stopped", "failed"]
    side: Literal["A", "B"]
    """Which of the two is at work, or was last."""
    meter: RunMeter | None = None
    """What has been made of it; None before its first block."""
    files: ComparisonFiles | None = None
    report: dict[str, Any] | None = None
    message: str = ""
    """Of a failure."""


class Comparer:
    """Makes the comparisons of all visitors, as `Generator` makes their videos: one model, one queue, one store."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    def checked_pair(self, request: GenerationRequest, a: Switches, b: Switches) -> Pair:
        """The two requests of a comparison.

        Args:
            request: What both have in common, from `Generator.checked_request`.
            a, b: Switch -> whether it is on.

        Raises:
            InvalidRequest, OptionUnavailable: with a sentence for the visitor.
        """
        pair = Pair.of(request, a, b)
        pair.check(self._generator.pipeline)
        self._generator.warm_ups.check(pair.a, pair.b)
        return pair

    def expected(self, pair: Pair) -> Expected:
        """Tells how long the model will take for both videos: see `Generator.expected`."""
        return self._generator.expected(pair.a, pair.b)

    def run(
        self, pair: Pair, session: str, ticket_id: str | None = None, *, sides: bool = True
    ) -> Iterator[ComparisonUpdate]:
        """Make both videos and their files, telling what is new. The last update holds files and report.

        A comparison that is stopped has no files: half of it compares nothing.

        Args:
            pair: What to make.
            session: Whose it is.
            ticket_id: Of the ticket from `Sessions.expect`, if it was asked.
            sides: Whether each side gets a file of its own as well.

        Raises:
            SelfForcingError: after the last update.
        """
        generator = self._generator
        ticket = generator.sessions.begin(session, ticket_id, self.expected(pair))
        side: Literal["A", "B"] = "A"
        try:
            if ticket.stopped:  # while it stood in the queue
                yield ComparisonUpdate(state="stopped", side=side)
                return
            with Comparison(
                generator.worker, pair, generator.deadline, ticket.attach, lambda: ticket.stopped
            ) as comparison:
                for update in self._make(comparison, ticket):
                    side = update.side
                    yield update
                files, report = yield from self._write(comparison, ticket, session, sides)
            ticket.finished, ticket.has_file = True, True
            yield ComparisonUpdate(state="finished", side=side, files=files, report=report)
        except Cancelled:
            ticket.finished = True
            if not ticket.abandoned:
                yield ComparisonUpdate(state="stopped", side=side)
        except SelfForcingError as error:
            ticket.finished = True
            if isinstance(error, VideoError):  # what fails in the model, the model thread has logged
                logger.error("A comparison could not be written", exc_info=error)
            yield ComparisonUpdate(state="failed", side=side, message=str(error))
            raise
        except Exception as error:
            ticket.finished = True
            logger.exception("A comparison failed")
            failure = SelfForcingError("Something went wrong while the videos were compared. Try again.")
            yield ComparisonUpdate(state="failed", side=side, message=str(failure))
            raise failure from error
        finally:
            generator.sessions.end(session, ticket)

    def _make(self, comparison: Comparison, ticket: Ticket) -> Iterator[ComparisonUpdate]:
        for side in comparison.make():
            if side.meter is None:
                yield ComparisonUpdate(state="preparing", side=side.name)
                continue
            meter = side.meter
            if meter.blocks > 1 and meter.generation_fps:
                others = meter.run.num_frames if side is comparison.a else 0
                ticket.will_take(max(0, meter.run.num_frames - meter.frames + others) / meter.generation_fps)
            yield ComparisonUpdate(state="generating", side=side.name, meter=meter)

    def _write(
        self, comparison: Comparison, ticket: Ticket, session: str, sides: bool
    ) -> Steps[ComparisonUpdate, None, tuple[ComparisonFiles, dict[str, Any]]]:
        # Names are the program's own, never the visitor's words; the folder cannot be guessed.
        stem = f"self-forcing-compare-seed{comparison.pair.a.seed}-{secrets.token_hex(4)}"
        yield ComparisonUpdate(state="writing", side="B")
        report = comparison.report()
        with self._generator.store.filling(session, "comparison", on_page=ticket.announced) as folder:
            both, *each = [folder / f"{stem}{side}.mp4" for side in (("", "-a", "-b") if sides else ("",))]
            writing = [write_side_by_side(comparison, report, both)]
            writing += [write_side(side, file) for side, file in zip((comparison.a, comparison.b), each, strict=False)]
            # Both in one picture have as many pixels as the two by themselves.
            written, whole, began = 0, report["frames"] * (4 if sides else 2), time.monotonic()
            for pixels, pieces in zip((2, 1, 1), writing, strict=False):
                for _ in pieces:
                    comparison.check_wanted()
                    written += pixels * PIECE_FRAMES
                    ticket.will_take(max(0, whole - written) * (time.monotonic() - began) / written)
            comparison.check_wanted()
        return ComparisonFiles(*map(str, (both, *each))), report
