"""From a request to a finished file, told step by step: what page and API both show, each in its own way."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.config import SECONDS_RANGE, GenerationRequest, check_available
from pipeline.errors import InvalidRequest, OptionUnavailable, SelfForcingError, VideoError
from pipeline.meter import RunMeter
from pipeline.recipe import build_recipe
from pipeline.video import Segment, SegmentEncoder
from pipeline.worker import ModelWorker, Run
from web.adapter import AdaptedPipeline, adapted
from web.buffering import MAX_BUFFER_SECONDS, PlaybackBuffer
from web.sessions import Expected, Sessions, Ticket
from web.storage import VideoStore
from web.warming import WarmUps

logger = logging.getLogger(__name__)

DEFAULT_MAX_SECONDS = 60.0
"""Longest video that a visitor may ask for, if whoever starts the page says nothing else."""

DEFAULT_SECONDS = 5.0
"""Length of a video unless its visitor says otherwise."""

TAIL_SECONDS = 0.5
"""Between the last segment and the end of the stream: a player that learns of both at once may never report the end."""

EXCHANGE_POLL_SECONDS = 0.1

Options = tuple[bool, bool, bool]


@dataclass(frozen=True, kw_only=True)
class Update:
    """Something new about a run."""

    state: Literal["starting", "buffering", "generating", "finished", "stopped", "failed"]
    meter: RunMeter
    """What has been made so far. The same object in all updates of a run."""
    segment: Segment | None = None
    """Video to be played after what was played before."""
    file: str | None = None
    """Path of the finished MP4."""
    recipe: dict[str, Any] | None = None
    message: str = ""
    """Of a failure."""

    @property
    def is_last(self) -> bool:
        return self.state in ("finished", "stopped", "failed")


class Generator:
    """Runs the requests of all visitors on one model, and tells each how it goes.

    Args:
        worker: Owns the model.
        store: Where finished videos are put.
        max_seconds: Longest video. A run may take twice as long and a minute more.
    """

    def __init__(self, worker: ModelWorker, store: VideoStore, max_seconds: float = DEFAULT_MAX_SECONDS) -> None:
        self.worker = worker
        self.store = store
        self.max_seconds = max_seconds
        # Well beyond playback speed, so that a slow machine gets its videos done; what nobody reads any more ends, too.
        self.deadline = 2 * max_seconds + 60
        self.sessions = Sessions()
        self.warm_ups = WarmUps(worker)
        self._paces: dict[Options, float] = {}

    @property
    def pipeline(self) -> AdaptedPipeline:
        """The model, for questions that need no computing.

        Raises:
            SelfForcingError: it is still loading, or could not be loaded.
        """
        try:
            return adapted(self.worker.wait_ready(timeout=0))
        except TimeoutError as error:
            stage = self.worker.loading.stage
            raise SelfForcingError(f"The model is not ready yet ({stage.lower()}). Try again in a moment.") from error

    def wait_for_exchange(self) -> None:
        """Wait until the model that is being exchanged is there.

        Whoever stands in the queue has been told that their video will come; and whoever chose the model may have
        closed the page, and with it have freed the place in the queue, while the model is still being loaded.
        """
        until = time.monotonic() + self.deadline
        while self.worker.exchanging and time.monotonic() < until:
            time.sleep(EXCHANGE_POLL_SECONDS)

    def checked_request(self, **fields: Any) -> GenerationRequest:
        """The one place where what a visitor sent becomes a request.

        Raises:
            InvalidRequest, OptionUnavailable: with a sentence for the visitor.
            SelfForcingError: there is no model to ask yet.
        """
        request = GenerationRequest(**fields)
        if request.seconds > self.max_seconds:
            low = SECONDS_RANGE[0]
            raise InvalidRequest(
                f"seconds is {request.seconds:g}, but must be a number from {low:g} to {self.max_seconds:g} here."
            )
        check_available(request, self.pipeline.unavailable_options())
        if request.start is not None:
            model = self.pipeline
            if not model.takes_start or model.spec is None:
                raise OptionUnavailable("This model cannot start from a picture or a video.")
            model.spec.check_start(request.start)
        return request

    def expected(self, *requests: GenerationRequest) -> Expected:
        """Tells how long the model will take for all of them, judging by earlier runs with the same options.

        It knows None if one has had no such run. Of the requests it keeps nothing but numbers: it may be asked as long
        as they wait in the queue, and what a video starts from may be a hundred megabytes of frames.
        """
        try:
            plans = [self.pipeline.plan(request) for request in requests]
        except SelfForcingError:  # the model is gone, as the run will tell
            return lambda: None
        parts = [(_options(plan.request), plan.num_frames - plan.start_frames) for plan in plans]

        def seconds() -> float | None:
            total = 0.0
            for options, frames in parts:
                pace = self._paces.get(options)
                if pace is None:
                    return None
                total += pace * frames
            return total

        return seconds

    def forget_paces(self) -> None:
        """Another model has another pace."""
        self._paces.clear()

    def run(
        self, request: GenerationRequest, session: str, ticket_id: str | None = None, *, streamed: bool = True
    ) -> Iterator[Update]:
        """Make one video, telling what is new. The last update holds the file.

        Args:
            request: What to make.
            session: Whose run it is.
            ticket_id: Of the ticket from `Sessions.expect`, if it was asked.
            streamed: Whether somebody plays the segments. Otherwise there are none, and no time is left to a player.

        Raises:
            SelfForcingError: after the last update, which holds what was made until then, unless what went wrong is
                nothing that anybody foresaw.
        """
        ticket = self.sessions.begin(session, ticket_id, self.expected(request))
        try:
            meter = RunMeter(self.pipeline.plan(request))
            if ticket.stopped:  # while it stood in the queue
                yield Update(state="stopped", meter=meter)
                return
            yield Update(state="starting", meter=meter)
            run = self.worker.submit(request, self.deadline)
            # Leaving this block, for whatever reason and on whatever thread, takes no time and frees the model.
            with run:
                ticket.attach(run)
                try:
                    yield from self._show(run, ticket, session, meter, streamed)
                except SelfForcingError:  # told already
                    raise
                except Exception as error:
                    ticket.finished = True
                    logger.exception("%s failed", run.id)
                    sentence = "Something went wrong while the video was made. Try again."
                    yield Update(state="failed", meter=meter, message=sentence)
                    raise SelfForcingError(sentence) from error
        finally:
            self.sessions.end(session, ticket)

    def _show(self, run: Run, ticket: Ticket, session: str, meter: RunMeter, streamed: bool) -> Iterator[Update]:
        options = _options(run.request)
        buffer = PlaybackBuffer(self._paces.get(options))
        encoder: SegmentEncoder | None = None
        held: list[Segment] = []
        failure: SelfForcingError | None = None
        last_segment = time.monotonic()
        try:
            for block in run:
                encoder = encoder or SegmentEncoder(block.run.fps)
                held.append(encoder.encode(block.frames))
                meter.count(block)
                playing = buffer.may_play(block, meter.frames)
                meter.notes = _pace_notes(buffer, meter)
                if meter.blocks > 1 and (pace := buffer.seconds_per_frame):
                    self._paces[options] = pace
                    ticket.will_take(pace * max(0, meter.run.num_frames - meter.frames))
                if not streamed:
                    held.clear()
                if playing or not streamed:
                    last_segment = time.monotonic()
                    yield Update(state="generating", meter=meter, segment=_joined(held))
                    held.clear()
                else:
                    yield Update(state="buffering", meter=meter)
        except SelfForcingError as error:
            failure = error
            if isinstance(error, VideoError):  # what fails in the model, the model thread has logged
                logger.error("%s could not be encoded", run.id, exc_info=error)
            run.close()
        if ticket.abandoned:
            return
        if held:  # it ended before playback began
            last_segment = time.monotonic()
            yield Update(state="generating", meter=meter, segment=_joined(held))
        file = recipe = None
        if encoder is not None and encoder.num_frames:
            recipe = build_recipe(meter.run, encoder.num_frames)
            try:
                file = self._write(encoder, meter, recipe, session, ticket)
            except VideoError as error:
                logger.error("%s could not be written", run.id, exc_info=error)
                failure = failure or error
        ticket.finished, ticket.has_file = True, file is not None
        if failure is not None:
            yield Update(state="failed", meter=meter, file=file, recipe=recipe, message=str(failure))
        else:
            whole = meter.frames > 0 and (not run.stopped or meter.share == 1.0)
            state: Literal["stopped", "finished"] = "finished" if whole else "stopped"
            yield Update(state=state, meter=meter, file=file, recipe=recipe)
        if streamed:
            time.sleep(max(0.0, last_segment + TAIL_SECONDS - time.monotonic()))
        if failure is not None:
            try:
                raise failure
            finally:
                failure = None  # or the error and this frame, with all its segments, would keep each other alive

    def _write(
        self, encoder: SegmentEncoder, meter: RunMeter, recipe: dict[str, Any], session: str, ticket: Ticket
    ) -> str:
        # The name is the program's own, never the visitor's words; the folder cannot be guessed.
        seed = f"seed{meter.run.seed}-" if meter.run.seed >= 0 else ""
        name = f"self-forcing-{seed}{secrets.token_hex(4)}.mp4"
        with self.store.filling(session, on_page=ticket.announced) as folder:
            encoder.write_mp4(folder / name, recipe)
        return str(folder / name)


def _options(request: GenerationRequest) -> Options:
    """What the pace depends on."""
    return request.taehv, request.fp8, request.compile


def _joined(segments: list[Segment]) -> Segment | None:
    """Several segments as one: they play the same, and the player hears of them once."""
    if len(segments) <= 1:
        return segments[0] if segments else None
    return Segment(
        b"".join(segment.data for segment in segments),
        sum(segment.duration for segment in segments),
        sum(segment.num_frames for segment in segments),
    )


def _pace_notes(buffer: PlaybackBuffer, meter: RunMeter) -> list[str]:
    # Before the second block the pace is a guess: not worth a remark yet.
    if meter.blocks < 2 or not buffer.slower_than_playback or meter.frames == meter.run.num_frames:
        return []
    made, played = f"{meter.generation_fps:.1f}", f"{meter.run.fps:g}"
    pace = f"The model makes {made} frames a second here, fewer than the {played} that are played"
    if not buffer.playing:
        return [f"{pace}, so up to {MAX_BUFFER_SECONDS:g} s of video are collected before playback begins."]
    return [f"{pace}, so playback pauses now and then. The finished video will play smoothly."]
