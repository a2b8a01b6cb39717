"""torch.compile's warm-up, as the page sees it: begun when somebody wants it, asked about as long as it goes on."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from pipeline.config import GenerationRequest
from pipeline.errors import OptionUnavailable, SelfForcingError
from pipeline.worker import ModelWorker
from web.adapter import adapted

if TYPE_CHECKING:
    from pipeline.compiling import CompileState

LEARNING_SECONDS = 10.0
"""Longest time that a clip for nobody may take; the rest is then learnt from visitors' own videos."""


class WarmUps:
    """Begins warm-ups of the worker's model.

    What there is to compile shows when the model works. So a short clip is made that nobody sees, in the queue like any
    other; compiling goes on beside whatever the model does next.
    """

    def __init__(self, worker: ModelWorker) -> None:
        self._worker = worker
        self._lock = threading.Lock()
        self._learning = False
        """Whether the clip waits or is being made."""

    def state(self, request: GenerationRequest) -> CompileState | None:
        """How far the compiled code for these options is; None if the model does not tell, or is not there."""
        try:
            return adapted(self._worker.wait_ready(timeout=0)).compile_state(request)
        except (SelfForcingError, TimeoutError):
            return None

    def begin(self, request: GenerationRequest) -> None:
        """Have everything compiled that a request with these options needs. Returns at once."""
        state = self.state(request)
        with self._lock:
            if state is None or state.state != "off" or self._learning:
                return
            self._learning = True
        threading.Thread(target=self._learn, args=(request,), name="learning", daemon=True).start()

    def check(self, *requests: GenerationRequest) -> None:
        """Begin the warm-up for those that want torch.compile, and refuse them until it is over.

        Raises:
            OptionUnavailable: with the time it will take, if that is known.
        """
        for request in requests:
            if not request.compile:
                continue
            self.begin(request)
            state = self.state(request)
            if state is not None and state.state in ("off", "warming"):
                raise OptionUnavailable(
                    f"torch.compile is warming up ({state.ready_in}), and until then nothing is compiled that could be "
                    "compared. Try again then."
                )

    def _learn(self, request: GenerationRequest) -> None:
        try:
            clip = adapted(self._worker.wait_ready(timeout=0)).learning_request(request)
            with self._worker.submit(clip) as run:
                for block in run:
                    if block.elapsed > LEARNING_SECONDS:
                        break
        except (SelfForcingError, TimeoutError):
            pass  # what fails in the model, the model thread has logged; a visitor's own video will meet it, too
        finally:
            self._learning = False
