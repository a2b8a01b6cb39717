"""The model thread: one long-lived thread owns the model, everybody else talks to it through queues.

A generator that holds a model cannot be handed to a web server as it is: the server drives it from several threads and
closes it on the thread of its event loop, in the middle of whatever the model is doing. So the model never leaves the
thread it was loaded on. A `Run` is the other end: an iterator of blocks that can be stopped, closed or simply dropped
without the model ever waiting for its consumer for longer than the run's deadline.

    worker = ModelWorker(lambda: SelfForcingPipeline.from_pretrained(folder))
    with worker.submit(GenerationRequest(prompt="a red balloon")) as run:
        for block in run:
            show(block.frames)

This module knows nothing of torch: it imports in milliseconds and works with any `StreamingPipeline`.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Self, cast

from pipeline import failures
from pipeline.blocks import FrameBlock, StreamingPipeline
from pipeline.config import GenerationRequest
from pipeline.errors import Cancelled, InvalidRequest, SelfForcingError
from pipeline.jobs import POLL_SECONDS, Job, Switch
from pipeline.loading import LoadingState, heard_by

logger = logging.getLogger(__name__)


class ModelWorker:
    """Owns a pipeline and runs one request at a time, in the order of submission.

    Args:
        pipeline: A `StreamingPipeline`, or a function that loads one. The function is called on the model thread, at
            once; `wait_ready` tells how it went, and runs submitted meanwhile wait for it.
    """

    def __init__(self, pipeline: StreamingPipeline | Callable[[], StreamingPipeline]) -> None:
        self._source = pipeline
        self._pipeline: StreamingPipeline | None = None
        self._load_error: BaseException | None = None
        self._loaded = threading.Event()
        self._loading = LoadingState()
        self._changes = 0
        self._lock = threading.Condition()
        self._waiting: deque[Job | Switch] = deque()
        self._current: Job | Switch | None = None
        self._closed = False
        self._thread = self._started_thread()

    def wait_ready(self, timeout: float | None = None) -> StreamingPipeline:
        """Return the loaded pipeline.

        Raises:
            TimeoutError: it is still loading after `timeout` seconds.
            SelfForcingError: it could not be loaded.
        """
        if not self._loaded.wait(timeout):
            raise TimeoutError("The model is still loading.")
        if self._load_error is not None:
            raise failures.again(self._load_error)
        return cast(StreamingPipeline, self._pipeline)

    @property
    def loaded(self) -> bool:
        """Whether loading is over, well or badly: `wait_ready` will not wait."""
        return self._loaded.is_set()

    @property
    def loading(self) -> LoadingState:
        """What loading reported last."""
        return self._loading

    @property
    def changes(self) -> int:
        """Counts up whenever an exchange of the model begins and whenever one ends."""
        return self._changes

    @property
    def exchanging(self) -> bool:
        """Whether an exchange of the model waits or goes on."""
        with self._lock:
            return any(isinstance(job, Switch) for job in (*self._waiting, self._current))

    @property
    def busy(self) -> bool:
        """Whether a run has the model now."""
        return self._current is not None

    def submit(self, request: GenerationRequest, max_seconds: float | None = None) -> Run:
        """Queue one clip. Returns at once; the clip is made whether or not the returned run is being read.

        Args:
            request: What to make.
            max_seconds: Longest time the run may have the model, counted from its own start. After that its iteration
                raises `DeadlineExceeded`.
        """
        job = Job(request, max_seconds)
        with self._lock:
            if self._closed:
                raise SelfForcingError("The model has been shut down. Start the program again.")
            self._waiting.append(job)
            self._revive()
            self._lock.notify_all()
        return Run(self, job)

    def switch(self, source: Callable[[], StreamingPipeline]) -> None:
        """Exchange the model for another one, after the runs that wait already, and return when that is done.

        The old one is given up before the new one is loaded: there may be no room for both. If the new one cannot be
        loaded, the old one is loaded again; if that fails, too, there is none until one is chosen that loads.

        Raises:
            InvalidRequest: another exchange waits or goes on.
            SelfForcingError: the new model could not be loaded; says so if the old one is lost.
        """
        switch = Switch(source)
        with self._lock:
            if self._closed:
                raise SelfForcingError("The model has been shut down. Start the program again.")
            if any(isinstance(job, Switch) for job in (*self._waiting, self._current)):
                raise InvalidRequest("The model is being exchanged already. Wait until that is done.")
            self._waiting.append(switch)
            self._revive()
            self._lock.notify_all()
        while not switch.wait(POLL_SECONDS):
            self._attend(switch)
        if switch.error is not None:
            raise failures.again(switch.error)

    def close(self, timeout: float | None = 5.0) -> bool:
        """Stop the current run, refuse the waiting ones, end the thread and what the pipeline does beside its runs.

        Returns whether all that ended within `timeout` seconds; None waits as long as it takes.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            self._closed = True
            jobs = [*self._waiting, *([self._current] if self._current else [])]
            self._waiting.clear()
            self._lock.notify_all()
        for job in jobs:
            job.stop()
            if job is not self._current:
                job.end(Cancelled("The model was shut down before this run began."))
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        return _closed(self._pipeline, left) and not self._thread.is_alive()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # ---- on the model thread

    def _started_thread(self) -> threading.Thread:
        # A daemon: a program that wants to end must not wait for a model in the middle of a long step.
        thread = threading.Thread(target=self._work, name="model", daemon=True)
        thread.start()
        return thread

    def _work(self) -> None:
        if self._pipeline is None:  # also if an earlier thread lost it
            self._load()
        while (job := self._next_job()) is not None:
            try:
                if isinstance(job, Switch):
                    self._exchange(job)
                else:
                    self._run(job)
            finally:
                with self._lock:
                    self._current = None
            del job  # or it would keep the last run's blocks alive until the next one comes

    def _load(self) -> None:
        try:
            self._load_error = self._try_to_load()
        finally:
            self._loaded.set()

    def _try_to_load(self) -> BaseException | None:
        try:
            source = self._source
            with heard_by(lambda state: setattr(self, "_loading", state)):
                self._pipeline = source if hasattr(source, "stream") else cast(Any, source)()
        except SelfForcingError as error:
            failures.clear_traces(error)
            return error
        except BaseException as error:  # SystemExit from deep inside a library must not end whoever waits for us
            logger.exception("The model could not be loaded")
            return failures.load_failure(error)
        return None

    def _exchange(self, switch: Switch) -> None:
        before = self._source
        failure: BaseException | None = failures.thread_died()  # unless it is known better
        self._loaded.clear()
        self._load_error = failure
        self._changes += 1
        try:
            failure = self._load_error = self._load_instead(switch.source)
            if failure is not None:
                self._load_error = self._load_instead(before)
                if self._load_error is not None:
                    failure = failures.both_failures(failure, self._load_error)
        finally:
            self._changes += 1
            self._loaded.set()
            switch.end(failure)

    def _load_instead(self, source: Any) -> BaseException | None:
        """Give up the model, if there is one, and load another. Returns what went wrong."""
        self._loading = LoadingState()
        # A compilation that goes on holds memory that the next model is planned with, which waits for it anyway.
        _closed(self._pipeline, None)
        self._source, self._pipeline = source, None
        try:
            failures.free_memory()
        except BaseException as error:  # a device that broke says so at the first question of any kind
            logger.error("The memory of the model before could not be freed", exc_info=error)
            return failures.load_failure(error)
        return self._try_to_load()

    def _next_job(self) -> Job | Switch | None:
        with self._lock:
            while not self._waiting:
                if self._closed:
                    return None
                self._lock.wait()
            self._current = self._waiting.popleft()
            return self._current

    def _run(self, job: Job) -> None:
        error: BaseException | None = None
        try:
            if self._load_error is not None:
                raise failures.again(self._load_error)
            with job.started() as control:
                stream = cast(StreamingPipeline, self._pipeline).stream(job.request)
                try:
                    for block in stream:
                        job.hand_over(block)
                        if not _is_last(block):
                            control.check()
                finally:
                    # The model's own cleanup must happen here and now, on this thread.
                    if (close := getattr(stream, "close", None)) is not None:
                        close()
        except Cancelled:
            pass
        except BaseException as caught:  # SystemExit and the like, too: the thread outlives every run
            error = failures.presentable(caught, job.id)
        job.end(error)

    # ---- when the thread itself is gone

    def _revive(self) -> None:
        """Start a new thread if the old one died: nothing in a run can do that, but others can. Holds the lock."""
        if not self._thread.is_alive() and not self._closed:
            logger.error("The model thread was gone; starting a new one")
            if self._current is not None:
                self._current.end(failures.thread_died())
                self._current = None
            self._thread = self._started_thread()

    def _attend(self, job: Job | Switch) -> None:
        """Called by whoever waits for `job`: a job that nobody works on any more must not be waited for."""
        with self._lock:
            if self._thread.is_alive() or job.ended:
                return
            if job in self._waiting:
                self._revive()
            else:
                job.end(failures.thread_died())


class Run:
    """One request on its way through the model: an iterator of `FrameBlock`.

    Iterating raises the run's error, once, after the blocks made before it. A stopped run ends without an error.
    Dropping the last reference to a run closes it.
    """

    def __init__(self, worker: ModelWorker, job: Job) -> None:
        self._worker = worker
        self._job = job
        # The job, not the run, is what the model thread holds; so a forgotten run is noticed here.
        weakref.finalize(self, job.close).atexit = False

    @property
    def id(self) -> str:
        """Short name of this run, as in the log."""
        return self._job.id

    @property
    def request(self) -> GenerationRequest:
        return self._job.request

    @property
    def stopped(self) -> bool:
        """Whether `stop` or `close` was called."""
        return self._job.stop_asked

    @property
    def begun(self) -> bool:
        """Whether the model has taken this run up."""
        return self._job.control is not None

    @property
    def ended(self) -> bool:
        """Whether the model is done with this run; blocks may still wait to be read."""
        return self._job.ended

    def stop(self) -> None:
        """End at the next denoising step. Blocks already made still arrive. Returns at once."""
        self._job.stop()

    def close(self) -> None:
        """As `stop`, and throw away what was not read. Returns at once."""
        self._job.close()

    def __iter__(self) -> Iterator[FrameBlock]:
        return self

    def __next__(self) -> FrameBlock:
        block = self._job.take(self._worker._attend)
        if block is None:
            raise StopIteration
        return block

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _closed(pipeline: StreamingPipeline | None, timeout: float | None = 0.0) -> bool:
    """Have a pipeline end what it does beside its runs. Returns whether nothing goes on after `timeout` seconds; None
    waits for that."""
    close = getattr(pipeline, "close", None)
    return True if close is None else bool(close(timeout))


def _is_last(block: FrameBlock) -> bool:
    return 0 < block.run.num_blocks <= block.index + 1  # 0: nobody knows how many there will be
