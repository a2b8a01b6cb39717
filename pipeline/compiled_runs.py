"""Compiled code in a model's runs: which pieces a request needs, who waits for them, what is said of it.

`compiling.py` compiles pieces, whatever they belong to. Here is what they have to do with requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from pipeline.compiling import CompileState, Piece, failure_sentence
from pipeline.config import GenerationRequest, ModelSpec
from pipeline.control import checkpoint
from pipeline.decoder import StreamDecoder
from pipeline.errors import OptionUnavailable
from pipeline.options import TransformerOptions

LEARNING_BLOCKS, LEARNING_LATENTS = 3, 4
"""Length at least of a clip that shows all kinds of calls twice in a row, see `compiling.Piece`. TAEHV, which decodes a
block at a time, has a full memory from the second one on; the Wan VAE, which decodes a latent frame at a time, from the
third on."""


class CompiledRuns:
    """What of one model's runs is compiled.

    Args:
        spec: what the model is.
        transformer: has the pieces of a block, and the compiler of all pieces.
        decoders: by whether it is TAEHV. A step of each is a piece.
    """

    def __init__(
        self, spec: ModelSpec, transformer: TransformerOptions, decoders: Mapping[bool, StreamDecoder]
    ) -> None:
        self._spec = spec
        self._transformer = transformer
        self.compiler = transformer.compiler
        self.decoder_steps = {taehv: Piece(decoder.plain_step, self.compiler) for taehv, decoder in decoders.items()}
        self.waits = True
        """Whether a run with `compile` waits until everything is compiled; otherwise it is uncompiled until then."""
        self.on_progress: Callable[[CompileState], object] = lambda state: None
        """Told again and again, on the model thread, how far that is."""

    @property
    def failure(self) -> str | None:
        """Why nothing can be compiled any more, in a sentence; None: it can, or may again."""
        return None if self.compiler.may_try_again else self.compiler.failure

    def state(self, request: GenerationRequest) -> CompileState:
        """How far the compiled code is that a request with these options would run, even if it does not ask for it."""
        return self.compiler.state(self._pieces(request))

    def applied(self, request: GenerationRequest, state: CompileState) -> str:
        """What is said of a run that begins in this state."""
        if not request.compile:
            return "off"
        if state.state != "ready" and not self.waits:
            return f"warming up: this run is uncompiled, {state.ready_in}"
        return "on" if self._transformer.compiles(request.fp8) else "the decoder only, because of FP8"

    def learning_request(self, request: GenerationRequest) -> GenerationRequest:
        """A short clip with the options of another; running it is enough to have everything compiled for both."""
        blocks = max(LEARNING_BLOCKS, math.ceil(LEARNING_LATENTS / self._spec.frames_per_block))
        seconds = self._spec.seconds_for(blocks, self._spec.fps)
        return replace(request, seconds=seconds, fps=self._spec.fps, compile=True)

    def prepare(
        self, request: GenerationRequest, stream: Callable[[GenerationRequest], Iterable[object]]
    ) -> CompileState:
        """What a run finds compiled, after it has waited for it if it must; see `complete`."""
        if request.compile:
            self.compiler.try_again()
            if self.waits:
                self.complete(request, stream)
        return self.state(request)

    def install(self, request: GenerationRequest, state: CompileState, decoder: StreamDecoder) -> None:
        """Have a run that begins in this state use what is compiled.

        For the whole run: half of it compiled would be neither.
        """
        decoder.step = self.decoder_steps[request.taehv] if request.compile else None
        self.compiler.learns = not self.waits  # who waits has learnt, and may end the program after this
        for piece in self._pieces(request):
            piece.enabled = state.state == "ready"

    def complete(self, request: GenerationRequest, stream: Callable[[GenerationRequest], Iterable[object]]) -> None:
        """Have everything compiled that a run needs, and wait for it.

        Args:
            stream: makes a clip with this model.

        Raises:
            OptionUnavailable: it cannot be compiled here.
            Cancelled, DeadlineExceeded: from `control.checkpoint`.
        """
        if self.state(request).state == "ready":
            return
        self.waits = False
        try:
            for _ in stream(self.learning_request(request)):
                self.on_progress(self.state(request))
        finally:
            self.waits = True

        def poll() -> None:
            checkpoint()
            self.on_progress(self.state(request))

        self.compiler.wait(poll)
        state = self.state(request)
        if state.state != "ready":
            raise OptionUnavailable(
                state.reason or f"torch.compile got no further than {state.done} of {state.total} parts. Switch it off."
            )

    def _pieces(self, request: GenerationRequest) -> list[Piece]:
        return [*self._transformer.pieces(request.fp8), self.decoder_steps[request.taehv]]


@contextmanager
def telling_compile_failures() -> Iterator[None]:
    """Raise `OptionUnavailable` with a sentence for the user in place of errors of the compiler, not of the model."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise OptionUnavailable(failure_sentence(error)) from error
        raise
