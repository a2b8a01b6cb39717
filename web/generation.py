"""From a click on Generate to the last update of the page."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import gradio as gr

from pipeline.config import SECONDS_RANGE, GenerationRequest, check_available
from pipeline.errors import InvalidRequest, SelfForcingError, VideoError
from pipeline.recipe import build_recipe
from pipeline.video import Segment, SegmentEncoder
from pipeline.worker import ModelWorker, Run
from web import status
from web.adapter import AdaptedPipeline
from web.buffering import PlaybackBuffer
from web.sessions import Sessions, Ticket

logger = logging.getLogger(__name__)

DEFAULT_MAX_SECONDS = 60.0
"""Longest video that a visitor may ask for, if whoever starts the page says nothing else."""

TAIL_SECONDS = 0.5
"""Between the last segment and the end of the stream: a player that learns of both at once may never report the end."""

Update = tuple[Any, str, Any]
"""New values of video, status and download."""


class Generator:
    """Runs the requests of all visitors on one model, and tells each visitor's page how it goes.

    Args:
        worker: Owns the model.
        pipeline: The same model, for questions that need no computing.
        folder: Where finished videos are put: a folder that the web server hands files out of.
        max_seconds: Longest video. A run may take twice as long and a minute more.
    """

    def __init__(
        self, worker: ModelWorker, pipeline: AdaptedPipeline, folder: Path, max_seconds: float = DEFAULT_MAX_SECONDS
    ) -> None:
        self.worker = worker
        self.pipeline = pipeline
        self.folder = folder
        self.max_seconds = max_seconds
        # Well beyond playback speed, so that a slow machine gets its videos done; what nobody reads any more ends, too.
        self.deadline = 2 * max_seconds + 60
        self.sessions = Sessions()
        self._paces: dict[tuple[bool, bool, bool], float] = {}

    def checked_request(self, **fields: Any) -> GenerationRequest:
        """The one place where what a visitor sent becomes a request.

        Raises:
            InvalidRequest, OptionUnavailable: with a sentence for the visitor.
        """
        request = GenerationRequest(**fields)
        if request.seconds > self.max_seconds:
            low = SECONDS_RANGE[0]
            raise InvalidRequest(
                f"seconds is {request.seconds:g}, but must be a number from {low:g} to {self.max_seconds:g} here."
            )
        check_available(request, self.pipeline.unavailable_options())
        return request

    def run(self, request: GenerationRequest, session: str, ticket_id: str | None = None) -> Iterator[Update]:
        """Make one video, yielding what changes on the page. `ticket_id` is that of `Sessions.expect`, if it was asked.

        A run that fails half-way still yields the file of what was made, then raises.
        """
        ticket = self.sessions.begin(session, ticket_id)
        try:
            if ticket.stopped:  # while it stood in the queue
                yield gr.skip(), gr.skip(), gr.skip()
                return
            yield gr.skip(), status.waiting(0), None
            run = self.worker.submit(request, self.deadline)
            # Leaving this block, for whatever reason and on whatever thread, takes no time and frees the model.
            with run:
                ticket.attach(run)
                yield from self._show(run, ticket)
        finally:
            self.sessions.end(session, ticket, announced=bool(ticket_id))

    def _show(self, run: Run, ticket: Ticket) -> Iterator[Update]:
        request = run.request
        options = (request.taehv, request.fp8, request.compile)
        meter = status.RunMeter(self.pipeline.plan(request))
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
                if playing:
                    last_segment = time.monotonic()
                    yield _joined(held), status.generating(meter), gr.skip()
                    held.clear()
                else:
                    yield gr.skip(), status.generating(meter, buffering=True), gr.skip()
        except SelfForcingError as error:
            failure = error
            run.close()
        if ticket.abandoned:
            return
        if buffer.seconds_per_frame and meter.blocks > 1:
            self._paces[options] = buffer.seconds_per_frame
        if held:  # it ended before playback began
            last_segment = time.monotonic()
            yield _joined(held), status.generating(meter), gr.skip()
        file = None
        if encoder is not None and encoder.num_frames:
            try:
                file = self._write(encoder, meter)
            except VideoError as error:
                failure = failure or error
        # None adds nothing to the stream, but names it once more. So Gradio names it again at the very end, and the
        # player asks at once for the playlist that says so; otherwise it would ask 5 s after the last segment.
        video = None if encoder is not None and encoder.num_frames else gr.skip()
        if failure is not None:
            yield video, status.failed(str(failure), meter), file
        elif encoder is None:
            yield video, status.stopped_early(), file
        else:
            yield video, status.finished(meter, stopped=run.stopped), file
        time.sleep(max(0.0, last_segment + TAIL_SECONDS - time.monotonic()))
        if failure is not None:
            raise gr.Error(str(failure), print_exception=False)

    def _write(self, encoder: SegmentEncoder, meter: status.RunMeter) -> str:
        # The name is the program's own, never the visitor's words; the folder cannot be guessed.
        name = secrets.token_hex(4)
        seed = f"seed{meter.run.seed}-" if meter.run.seed >= 0 else ""
        folder = self.folder / secrets.token_hex(16)
        try:
            folder.mkdir(parents=True)
            path = folder / f"self-forcing-{seed}{name}.mp4"
            encoder.write_mp4(path, build_recipe(meter.run, encoder.num_frames))
        except OSError as error:
            raise VideoError(f"The video could not be written ({error.strerror}).") from error
        except VideoError:
            with suppress(OSError):
                folder.rmdir()
            raise
        return str(path)


def _joined(segments: list[Segment]) -> Segment:
    """Several segments as one: they play the same, and the player hears of them once."""
    if len(segments) == 1:
        return segments[0]
    return Segment(
        b"".join(segment.data for segment in segments),
        sum(segment.duration for segment in segments),
        sum(segment.num_frames for segment in segments),
    )


def _pace_notes(buffer: PlaybackBuffer, meter: status.RunMeter) -> list[str]:
    # Before the second block the pace is a guess: not worth a remark yet.
    if meter.blocks < 2 or not buffer.slower_than_playback or meter.frames == meter.run.num_frames:
        return []
    note = (
        f"The model makes {meter.generation_fps:.1f} frames a second here, fewer than the {meter.run.fps:g} that are "
        "played, so playback pauses now and then. The finished video will play smoothly."
    )
    return [note]
