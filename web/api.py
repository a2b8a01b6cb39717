"""The page's named endpoints, for programs: the same model, queue and limits as for people, plain data instead of HTML.

Each is an event of a component that nobody sees, because what such an event takes and returns is documented by Gradio
on the page's API view, for its client libraries and for MCP.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import gradio as gr

from pipeline.compare import read_switches
from pipeline.config import FPS_RANGE, MAX_PROMPT_CHARS, MAX_SEED, OPTIONS, SECONDS_RANGE, GenerationRequest
from pipeline.errors import InvalidRequest, SelfForcingError
from web.adapter import AdaptedPipeline
from web.comparing import ComparisonUpdate
from web.events import refusal, session_of, shown
from web.generation import DEFAULT_SECONDS, Update

if TYPE_CHECKING:
    from web.page import Page


MODEL_QUEUE = "model"
"""What everything that makes video waits in."""

SIDE_A, SIDE_B = "fp8=on", "fp8=off"
"""What `/compare` compares unless its caller says otherwise."""


def add_endpoints(page: Page) -> None:
    """Add the endpoints to the page's blocks: each method of `Endpoints` is one."""
    endpoints = Endpoints(page)
    video = gr.File(label="MP4", visible=False)
    recipe = gr.JSON(label="Recipe", visible=False)
    report = gr.JSON(label="Report", visible=False)
    sides = [gr.Textbox(label=label, value=value, visible=False) for label, value in (("A", SIDE_A), ("B", SIDE_B))]
    progress = gr.JSON(label="Progress", visible=False)
    answer = gr.JSON(label="Answer", visible=False)
    variant = gr.Number(0, label="Variant", visible=False)
    by = gr.Textbox("", label="By", visible=False)
    text = gr.Textbox(label="Suggestion", visible=False)
    notes = gr.JSON(label="Notes", visible=False)
    model: dict[str, Any] = {"concurrency_id": MODEL_QUEUE, "concurrency_limit": 1, "show_progress": "hidden"}
    aside: dict[str, Any] = {"queue": False, "show_progress": "hidden"}

    def endpoint(name: str, fn: Any, inputs: list[Any], outputs: list[Any], **settings: Any) -> None:
        gr.Button(name, visible=False).click(fn, inputs, outputs, api_name=name, **settings)

    endpoint("generate", endpoints.generate, page.ui.inputs, [video, recipe, progress], **model)
    began = [page.ui.prompt, page.ui.start.file, *page.ui.inputs[1:]]
    endpoint("generate_from", endpoints.generate_from, began, [video, recipe, progress], **model)
    endpoint("stop", endpoints.stop, [], [answer], **aside)
    # Clients go through the queue anyway, where one question would otherwise wait for the other.
    endpoint(
        "enhance", endpoints.enhance, [page.ui.prompt, variant, by], [text, notes], **aside, concurrency_limit=None
    )
    endpoint("options", endpoints.options, [], [answer], **aside)
    endpoint(
        "video_generation_handler_streaming",
        endpoints.video_generation_handler_streaming,
        [page.ui.prompt, page.ui.seed, page.ui.fps],
        [page.ui.video, page.ui.status],
        **model,
    )
    asked = [page.ui.prompt, page.ui.seed, page.ui.fps, page.ui.seconds, *sides]
    endpoint("compare", endpoints.compare, asked, [video, report, progress], **model)


class Endpoints:
    """What programs call. The docstrings are what they read."""

    def __init__(self, page: Page) -> None:
        self._page = page

    def generate(
        self,
        prompt: str,
        seed: float = -1,
        fps: float | None = None,
        seconds: float = DEFAULT_SECONDS,
        taehv: bool = False,
        fp8: bool = False,
        compile: bool = False,
        request: gr.Request = None,  # type: ignore[assignment]  # filled in by Gradio
    ) -> Iterator[tuple[Any, ...]]:
        """Make a video from a sentence. Streams progress while it is made; the last value holds the MP4 and its recipe.

        Args:
            prompt: What the video shows, 1 to 2,000 characters.
            seed: -1 draws a random one; any other whole number reproduces the video.
            fps: Playback rate, 1 to 60; null takes the model's own.
            seconds: Length of the video, rounded to whole blocks.
            taehv: Decode with the small TAEHV autoencoder.
            fp8: Keep the weights in 8 bits.
            compile: Use compiled code. The first request with it begins to compile in the background, and until that is
                done videos are made without; progress and recipe say under applied.compile which it was, and /options
                how far it is.

        Returns:
            The MP4 file, its recipe, and progress: state, block, num_blocks, frames, num_frames, time_to_first_frame,
            generation_fps, playback_fps, seed, applied. File and recipe are null until the end.
        """
        yield from self._generate(prompt, seed, fps, seconds, taehv, fp8, compile, None, request)

    def generate_from(
        self,
        prompt: str,
        start: str,
        seed: float = -1,
        fps: float | None = None,
        seconds: float = DEFAULT_SECONDS,
        taehv: bool = False,
        fp8: bool = False,
        compile: bool = False,
        request: gr.Request = None,  # type: ignore[assignment]  # filled in by Gradio
    ) -> Iterator[tuple[Any, ...]]:
        """Make a video that goes on from a picture or from the end of another video. Otherwise as generate.

        Args:
            prompt: What happens then, 1 to 2,000 characters.
            start: A picture (PNG, JPEG, WEBP; at most 16 megapixels) or a video (MP4, MOV, WebM, MKV; at most a
                minute) of up to 10 MB. Its middle is cut out in the shape of the model's frames. Of a video, the last
                frames are used; /options tells how many.
            seed: -1 draws a random one; any other whole number reproduces the video.
            fps: Playback rate, 1 to 60; null takes the model's own.
            seconds: Length of what is made, rounded to whole blocks. What it starts from comes on top, first.
            taehv: Decode with the small TAEHV autoencoder.
            fp8: Keep the weights in 8 bits.
            compile: Use compiled code. The first request with it begins to compile in the background, and until that is
                done videos are made without; progress and recipe say under applied.compile which it was, and /options
                how far it is.

        Returns:
            As generate: the MP4 file, its recipe (which tells of the start by its hash), and progress.
        """
        if start is None:
            raise refusal(InvalidRequest("start is empty, but must be a picture or a video."))
        yield from self._generate(prompt, seed, fps, seconds, taehv, fp8, compile, start, request)

    def _generate(
        self, prompt, seed, fps, seconds, taehv, fp8, compile, start: str | None, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        self._page.generator.wait_for_exchange()
        checked = self._page.request(prompt, seed, fps, seconds, taehv, fp8, compile, start)
        try:
            for update in self._page.generator.run(checked, session_of(request), streamed=False):
                yield update.file, update.recipe, _progress(update)
        except SelfForcingError as error:
            raise refusal(error) from error

    def stop(self, request: gr.Request) -> dict[str, Any]:
        """Stop this session's runs at the next denoising step. What is finished so far becomes the video.

        Of a comparison nothing is kept.

        Returns:
            {"stopped": "running"}, or "waiting" for one that had not begun, or "none".
        """
        return {"stopped": self._page.generator.sessions.stop(session_of(request))}

    def enhance(
        self,
        prompt: str,
        variant: float = 0,
        by: str = "",
        request: gr.Request = None,  # type: ignore[assignment]  # filled in by Gradio
    ) -> tuple[str, list[str]]:
        """Suggest a longer prompt, which no video is made of until it is sent to generate. Does not wait for videos.

        Args:
            prompt: What the video is to show, 1 to 2,000 characters.
            variant: 0 to 99. Another number gives another suggestion, the same one the same.
            by: "templates" (of a small model) or "language" (a language model); empty: the first that is here.

        Returns:
            The longer prompt, and sentences about it: what was added or left out.
        """
        try:
            suggestion = self._page.help.suggest(
                self._page.generator.pipeline, prompt, variant, by, session_of(request)
            )
        except SelfForcingError as error:
            raise refusal(error) from error
        return suggestion.text, list(suggestion.notes)

    def options(self) -> dict[str, Any]:
        """What can be asked for here: limits and defaults of every field, options that cannot work and why.

        Returns:
            Model, frame size, limits, defaults, unavailable options, start_frames (how many frames of a video, at
            native_fps, generate_from can go on from: one of these numbers, the largest that there are; null: from
            none), notes on options that depend on the machine, how far torch.compile is (state: off, warming, ready or
            failed; done, total, seconds_left, reason) for the default options, the words of a small model (empty: any),
            and what makes suggestions for prompts.
        """
        page = self._page
        try:
            model = page.generator.pipeline
        except SelfForcingError as error:
            raise refusal(error) from error
        spec = model.spec
        longest = min(SECONDS_RANGE[1], page.max_seconds)
        return {
            "model": model.name,
            "width": spec.width if spec else None,
            "height": spec.height if spec else None,
            "native_fps": model.native_fps,
            "limits": {
                "prompt": [1, MAX_PROMPT_CHARS],
                "seed": [-1, MAX_SEED],
                "fps": list(FPS_RANGE),
                "seconds": [SECONDS_RANGE[0], longest],
            },
            "defaults": {
                "seed": -1,
                "fps": model.fps,
                "seconds": min(DEFAULT_SECONDS, longest),
                "taehv": False,
                "fp8": False,
                "compile": False,
                **model.preset,
            },
            "unavailable": model.unavailable_options(),
            "start_frames": _start_frames(model),
            "notes": model.option_notes(),
            "compile": _compile_state(model),
            "known_words": model.known_words(),
            "enhancers": page.help.kinds(model),
        }

    def video_generation_handler_streaming(
        self,
        prompt: str,
        seed: float = -1,
        fps: float | None = None,
        request: gr.Request = None,  # type: ignore[assignment]  # filled in by Gradio
    ) -> Iterator[tuple[Any, ...]]:
        """Make a video of the default length and stream it: the name and values that other projects call.

        Args:
            prompt: What the video shows.
            seed: -1 draws a random one.
            fps: Playback rate; null takes the model's own.

        Returns:
            The video, as a stream while it is made and as an MP4 file at the end, and the status in HTML.
        """
        page = self._page
        seconds = min(DEFAULT_SECONDS, page.max_seconds)
        page.generator.wait_for_exchange()
        checked = page.request(prompt, seed, fps, seconds, *self._preset())
        session = session_of(request)
        page.streams.forget(session)
        try:
            for update in page.generator.run(checked, session):
                video, status, _ = shown(update)
                yield update.file or video, status
        except SelfForcingError as error:
            raise refusal(error) from error

    def compare(
        self,
        prompt: str,
        seed: float = -1,
        fps: float | None = None,
        seconds: float = DEFAULT_SECONDS,
        a: str = SIDE_A,
        b: str = SIDE_B,
        request: gr.Request = None,  # type: ignore[assignment]  # filled in by Gradio
    ) -> Iterator[tuple[Any, ...]]:
        """Make a video twice from the same noise, with different switches, and measure how the two differ.

        Args:
            prompt: What the videos show, 1 to 2,000 characters.
            seed: -1 draws a random one, for both.
            fps: Playback rate, 1 to 60; null takes the model's own.
            seconds: Length of the videos, rounded to whole blocks.
            a: Switches of A: taehv, fp8 and compile, as in "fp8=on,taehv=off". Those not named are off, but for
                those that this device needs on for want of memory.
            b: Switches of B.

        Returns:
            The MP4 file with A at the left and B at the right, the report (psnr in dB, or null where identical is true;
            psnr_lowest, psnr_frames, differs, meaning, and for a and b time_to_first_frame and generation_fps), and
            progress: state, side, frames, num_frames. File and report are null until the end.
        """
        page = self._page
        page.generator.wait_for_exchange()
        checked = page.request(prompt, seed, fps, seconds, *self._preset())
        try:
            pair = page.comparer.checked_pair(checked, read_switches("a", a), read_switches("b", b))
            for update in page.comparer.run(pair, session_of(request), sides=False):
                yield update.files and update.files.both, update.report, _comparison_progress(update)
        except SelfForcingError as error:
            raise refusal(error) from error

    def _preset(self) -> list[bool]:
        """The model's switches as this device needs them, in the order of a request."""
        model = self._page.model_or_none()
        preset = {} if model is None else model.preset
        return [preset.get(name, False) for name in OPTIONS]


def _start_frames(model: AdaptedPipeline) -> list[int] | None:
    if not model.takes_start or model.spec is None:
        return None
    return [model.spec.frames_in(blocks + 1) for blocks in range(model.spec.most_start_blocks)]


def _compile_state(model: AdaptedPipeline) -> dict[str, Any] | None:
    """None for a pipeline that compiles nothing."""
    state = model.compile_state(GenerationRequest(prompt="any", **model.preset))
    return None if state is None else state.as_dict()


def _progress(update: Update) -> dict[str, Any]:
    message = {"message": update.message} if update.message else {}
    return {"state": update.state, **update.meter.as_dict(), **message}


def _comparison_progress(update: ComparisonUpdate) -> dict[str, Any]:
    meter = update.meter
    counts = {} if meter is None else {"frames": meter.frames, "num_frames": meter.run.num_frames}
    message = {"message": update.message} if update.message else {}
    return {"state": update.state, "side": update.side, **counts, **message}
