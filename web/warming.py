"""torch.compile's warm-up, as the page sees it: begun when somebody wants it, asked about as long as it goes on."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from pipeline.config import GenerationRequest
from pipeline.errors import DeadlineExceeded, OptionUnavailable, SelfForcingError
from pipeline.worker import ModelWorker
from web.adapter import adapted

if TYPE_CHECKING:
    from pipeline.compiling import CompileState

LEARNING_SECONDS = 10.0
"""Longest time that a clip for nobody may have the model; the rest is then learnt from visitors' own videos."""

Options = tuple[bool, bool]


class WarmUps:
    """Begins warm-ups of the worker's model.

    What there is to compile shows when the model works. So a short clip is made that nobody sees, in the queue like any
    other; compiling goes on beside whatever the model does next.
    """

    def __init__(self, worker: ModelWorker) -> None:
        self._worker = worker
        self._lock = threading.Lock()
        self._learning: dict[Options, GenerationRequest] = {}
        """Whose clips wait or are being made."""
        self._goes_on = False
        """Whether a thread sees to these."""
        self._too_long: set[Options] = set()
        """Whose last clip was broken off."""

    def state(self, request: GenerationRequest) -> CompileState | None:
        """How far the compiled code for these options is; None if the model does not tell, or is not there."""
        try:
            return adapted(self._worker.wait_ready(timeout=0)).compile_state(request)
        except (SelfForcingError, TimeoutError):
            return None

    def begin(self, request: GenerationRequest) -> None:
        """Have everything compiled that a request with these options needs. Returns at once."""
        state = self.state(request)
        if state is None or not state.to_learn:
            return
        with self._lock:
            self._learning.setdefault(_options(request), request)
            if self._goes_on:
                return
            self._goes_on = True
        threading.Thread(target=self._learn, name="learning", daemon=True).start()

    def forget(self) -> None:
        """What was learnt of a model that is another one now."""
        self._too_long.clear()

    def learns(self, request: GenerationRequest) -> bool:
        """Whether a clip for these options waits or is being made."""
        with self._lock:
            return _options(request) in self._learning

    def check(self, *requests: GenerationRequest) -> None:
        """Begin the warm-up for those that want torch.compile, and refuse them until it is over.

        Raises:
            OptionUnavailable: with the time it will take, if that is known.
        """
        for request in requests:
            if not request.compile:
                continue
            too_long = _options(request) in self._too_long
            self.begin(request)
            state = self.state(request)
            if state is None or state.state not in ("off", "warming"):
                continue
            if too_long and state.to_learn:
                raise OptionUnavailable(
                    "torch.compile needs a video to see what there is to compile, and a short one took longer than "
                    f"{LEARNING_SECONDS:g} s here. Make a video with it first; it is compiled after that."
                )
            raise OptionUnavailable(
                f"torch.compile is warming up ({state.ready_in}), and until then nothing is compiled that could be "
                "compared. Try again then."
            )

    def _learn(self) -> None:
        while True:
            with self._lock:
                if not self._learning:
                    self._goes_on = False
                    return
                options, request = next(iter(self._learning.items()))
            try:
                self._make_clip(request)
                self._too_long.discard(options)
            except DeadlineExceeded:
                self._too_long.add(options)
            except (SelfForcingError, TimeoutError):
                pass  # what fails in the model, the model thread has logged; a visitor's own video will meet it, too
            finally:
                with self._lock:
                    del self._learning[options]

    def _make_clip(self, request: GenerationRequest) -> None:
        model = adapted(self._worker.wait_ready(timeout=0))
        state = model.compile_state(request)
        if state is None or not state.to_learn:  # the clip before this one has shown it, or the model is another one
            return
        with self._worker.submit(model.learning_request(request), max_seconds=LEARNING_SECONDS) as run:
            for _ in run:
                pass


def _options(request: GenerationRequest) -> Options:
    """What makes a difference to what is compiled."""
    return request.taehv, request.fp8
