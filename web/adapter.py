"""One shape for every pipeline: what a pipeline does not tell about itself is filled in here, and nowhere else.

The real pipeline tells everything. A pipeline written for a test or an experiment may have no more than
`stream(request)`, yielding objects with `frames`; the page works with that, it only has less to show.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline.blocks import FrameBlock, RunInfo
from pipeline.config import GenerationRequest, ModelSpec
from prompting.enhancer import Enhancer

if TYPE_CHECKING:
    from pipeline.compiling import CompileState

DEFAULT_FPS = 16.0


def adapted(pipeline: Any) -> AdaptedPipeline:
    """`pipeline` with everything the page asks of one."""
    return pipeline if isinstance(pipeline, AdaptedPipeline) else AdaptedPipeline(pipeline)


class AdaptedPipeline:
    """A complete `StreamingPipeline` around whatever `pipeline` is."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        spec = getattr(pipeline, "spec", None)
        self.spec: ModelSpec | None = spec if isinstance(spec, ModelSpec) else None
        self.name = str(getattr(spec, "name", "model"))
        self.fps = float(getattr(spec, "fps", DEFAULT_FPS))
        """Playback rate that a request gets if it names none."""
        self.native_fps = float(getattr(spec, "native_fps", self.fps))
        self.takes_start = self.spec is not None and bool(getattr(pipeline, "takes_start", False))
        """Whether it goes on from a picture or a video. One that does not say so would leave it out in silence."""
        self.enhancer: Enhancer | None = getattr(pipeline, "enhancer", None)
        """Fills prompts in from the model's own templates; None: it has none."""
        if hasattr(getattr(pipeline, "compiled", None), "waits"):
            pipeline.compiled.waits = False  # a page's visitors stand in a queue

    @property
    def preset(self) -> dict[str, bool]:
        """Options that should be on here, for want of memory."""
        return dict(getattr(self._pipeline, "preset", {}))

    def option_notes(self) -> dict[str, str]:
        """Option -> what it is on this machine, for pipelines that tell."""
        notes = getattr(self._pipeline, "option_notes", None)
        return {} if notes is None else dict(notes())

    def stream(self, request: GenerationRequest) -> Iterator[FrameBlock]:
        if request.fps is None:
            request = replace(request, fps=self.fps)
        began = time.perf_counter()
        shown = 0
        stream = self._pipeline.stream(request)
        try:
            for index, block in enumerate(stream):
                complete = self._completed(block, request, index, shown, time.perf_counter() - began)
                shown += len(complete.frames)
                yield complete
        finally:
            if (close := getattr(stream, "close", None)) is not None:
                close()

    def plan(self, request: GenerationRequest) -> RunInfo:
        """What a request comes to, as far as it can be known. `num_blocks` and `num_frames` are 0 if it cannot."""
        fps = request.fps or self.fps
        num_blocks, num_frames = self.spec.length(request.seconds, fps, request.start) if self.spec else (0, 0)
        return RunInfo(
            request=request,
            seed=request.seed,
            fps=fps,
            num_blocks=num_blocks,
            num_frames=num_frames,
            model=self.name,
        )

    def unknown_words(self, prompt: str) -> list[str]:
        ask = getattr(self._pipeline, "unknown_words", None)
        return list(ask(prompt)) if ask else []

    def known_words(self) -> list[str]:
        ask = getattr(self._pipeline, "known_words", None)
        return list(ask()) if ask else []

    def unavailable_options(self) -> dict[str, str]:
        ask = getattr(self._pipeline, "unavailable_options", None)
        return dict(ask()) if ask else {}

    def compile_state(self, request: GenerationRequest) -> CompileState | None:
        """How far the compiled code for a request with these options is; None if the pipeline compiles nothing."""
        ask = getattr(self._pipeline, "compile_state", None)
        return ask(request) if ask else None

    def learning_request(self, request: GenerationRequest) -> GenerationRequest:
        """A short clip that shows what there is to compile."""
        return self._pipeline.learning_request(request)

    def _completed(
        self, block: Any, request: GenerationRequest, index: int, start_frame: int, elapsed: float
    ) -> FrameBlock:
        if isinstance(block, FrameBlock):
            return block
        run = getattr(block, "run", None)
        return FrameBlock(
            index=index,
            frames=block.frames,
            start_frame=start_frame,
            run=run if isinstance(run, RunInfo) else self.plan(request),
            elapsed=float(getattr(block, "elapsed", elapsed)),
        )
