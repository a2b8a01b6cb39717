"""The page: what is on it, and which event does what."""

from __future__ import annotations

import functools
import json
import secrets
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from pipeline.config import FPS_RANGE, MAX_PROMPT_CHARS, SECONDS_RANGE
from pipeline.errors import SelfForcingError
from pipeline.worker import ModelWorker
from web import status, style
from web.adapter import AdaptedPipeline
from web.body_limit import BodyLimit
from web.generation import DEFAULT_MAX_SECONDS, Generator, Update
from web.player import live_video

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES_FILE = ROOT / "examples" / "prompts.json"

DEFAULT_SECONDS = 5.0
QUEUE_SIZE = 16
CACHE_CHECK_SECONDS, CACHE_AGE_SECONDS = 600, 1800

LAUNCH_DEFAULTS: dict[str, Any] = {
    "server_name": "127.0.0.1",
    "share": False,
    "show_error": False,
    "allowed_paths": [],
    "blocked_paths": [str(ROOT / "weights")],
    "max_file_size": "10mb",
    "strict_cors": True,
    "ssr_mode": False,
    "pwa": False,
    "run_history": False,
    "enable_monitoring": False,
    "app_kwargs": {"middleware": [Middleware(BodyLimit)]},
    "footer_links": ["api", "settings"],
}

OPTIONS = {
    "compile": ("torch.compile", "Compiles the model before the first frame; faster on long videos."),
    "fp8": ("FP8 quantization", "Keeps the weights in 8 bits: about half the memory, slightly different pictures."),
    "taehv": ("TAEHV VAE", "Decodes with a small autoencoder: faster, a bit softer."),
}


def build_app(pipeline: Any, max_seconds: float = DEFAULT_MAX_SECONDS) -> gr.Blocks:
    """The whole app around a pipeline, ready for `launch()`.

    Args:
        pipeline: A `StreamingPipeline`, or a `ModelWorker` that has loaded one, or in a pinch any object with
            `stream(request)`.
        max_seconds: Longest video that may be asked for. A run may take twice as long and a minute more.
    """
    worker = pipeline if isinstance(pipeline, ModelWorker) else None
    model = AdaptedPipeline(worker.wait_ready() if worker else pipeline)
    worker = worker or ModelWorker(model)
    page = Page(worker, model, max_seconds)
    return page.blocks


class Page:
    """Builds the components and wires them to a `Generator`."""

    def __init__(self, worker: ModelWorker, model: AdaptedPipeline, max_seconds: float) -> None:
        self.model = model
        self.max_seconds = max_seconds
        self.blocks = gr.Blocks(
            title="Self-Forcing: text to video, live",
            analytics_enabled=False,
            delete_cache=(CACHE_CHECK_SECONDS, CACHE_AGE_SECONDS),
            fill_width=True,
        )
        with self.blocks:
            self._lay_out()
            self.generator = Generator(worker, model, Path(self.download.GRADIO_CACHE) / "videos", max_seconds)
            self._wire()
        self.blocks.queue(max_size=QUEUE_SIZE, default_concurrency_limit=1)
        # What every start of this page needs, so that `build_app(...).launch()` is the same page as `python app.py`.
        self.blocks.launch = functools.partial(
            self.blocks.launch, theme=style.theme(), css=style.css(model.spec), js=style.script(), **LAUNCH_DEFAULTS
        )

    # ---- layout

    def _lay_out(self) -> None:
        gr.HTML(_header(self.model), elem_id="header", padding=False)
        with gr.Row(elem_id="columns", equal_height=False):
            with gr.Column(scale=5, min_width=320, elem_id="inputs"):
                with gr.Column(elem_id="ask"):
                    self.prompt = gr.Textbox(
                        label="Prompt",
                        placeholder=f"Describe the video, for example: {_examples()[0]}",
                        lines=3,
                        max_lines=8,
                        max_length=MAX_PROMPT_CHARS,
                        elem_id="prompt",
                    )
                    self.notice = gr.HTML("", elem_id="notice", padding=False)
                    with gr.Row(elem_id="buttons"):
                        self.generate = gr.Button("Generate", variant="primary", size="lg", elem_id="generate")
                        self.stop = gr.Button("Stop", variant="stop", size="lg", elem_id="stop", visible=False)
                with gr.Column(elem_id="more"):
                    with gr.Accordion("Advanced", open=False, elem_id="advanced"):
                        self._lay_out_settings()
                    gr.Examples(
                        examples=[[prompt] for prompt in _examples()],
                        inputs=[self.prompt],
                        label="Try one of these",
                        cache_examples=False,
                        examples_per_page=20,
                        elem_id="examples",
                        api_visibility="private",
                    )
                    if words := self.model.known_words():
                        with gr.Accordion(f"The {len(words)} words this model knows", open=False, elem_id="words"):
                            gr.HTML(_word_list(words), padding=False)
            with gr.Column(scale=7, min_width=320, elem_id="result"):
                self.video = live_video(label="Video", show_label=False, elem_id="video")
                self.status = gr.HTML(
                    status.idle(_describe(self.model)),
                    label="Status",
                    show_label=False,
                    elem_id="status",
                    padding=False,
                )
                # Carries a click's ticket from one event to the next. Not a `gr.State`: that is read when an event
                # begins, and by then may hold a later click's; this travels with the event. API clients do not see it.
                self.ticket = gr.Button("", visible="hidden", elem_id="ticket")
                self.download = gr.DownloadButton("Download MP4", interactive=False, elem_id="download")

    def _lay_out_settings(self) -> None:
        low, high = SECONDS_RANGE
        longest = min(high, self.max_seconds)
        fps_low, fps_high = FPS_RANGE
        # Numbers, not sliders: what is typed arrives as it is, and the request says what is wrong with it.
        with gr.Row(elem_id="numbers"):
            self.seed = gr.Number(label="Seed", info="-1: random", value=-1, step=1, min_width=90)
            self.fps = gr.Number(
                label="Target FPS", info=f"{fps_low:g} to {fps_high:g}", value=self.model.fps, step=1, min_width=90
            )
            self.seconds = gr.Number(
                label="Length (s)",
                info=f"{low:g} to {longest:g}",
                value=min(DEFAULT_SECONDS, longest),
                step=0.5,
                min_width=90,
            )
        unavailable = self.model.unavailable_options()
        self.options = {
            name: gr.Checkbox(
                label=label,
                info=unavailable.get(name, info),
                interactive=name not in unavailable,
                elem_id=f"option-{name}",
            )
            for name, (label, info) in OPTIONS.items()
        }

    # ---- events

    def _wire(self) -> None:
        options = [self.options[name] for name in ("taehv", "fp8", "compile")]
        inputs = [self.prompt, self.seed, self.fps, self.seconds, *options]
        buttons = [self.generate, self.stop]
        quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
        generating = self.generate.click(
            self._begin,
            inputs,
            [self.ticket, self.status, self.download, *buttons],
            trigger_mode="multiple",
            # In the queue, though it never waits there: the page shows no errors of events outside of it.
            **{**quiet, "queue": True, "concurrency_limit": None},
        ).success(
            self._generate,
            [*inputs, self.ticket],
            [self.video, self.status, self.download],
            api_name="generate",
            concurrency_limit=1,
            concurrency_id="model",
            trigger_mode="multiple",
            # The usual progress display would lay an opaque layer over the playing video at every update.
            show_progress="hidden",
        )
        generating.then(self._end, [self.download, self.ticket], [self.download, *buttons], **quiet)
        generating.then(None, [self.video], [self.video], js=_ASK_ONCE_MORE, **quiet)
        self.stop.click(
            self._stop, None, [self.status, *buttons], **{**quiet, "api_visibility": "public"}, api_name="stop"
        )
        self.prompt.change(self._notice, [self.prompt], [self.notice], js=_DEBOUNCE, trigger_mode="multiple", **quiet)
        self.blocks.unload(self._leave)

    def _begin(self, prompt, seed, fps, seconds, taehv, fp8, compile, request: gr.Request) -> tuple[Any, ...]:
        # Bad input is refused here, before it stands in a queue.
        self._request(prompt, seed, fps, seconds, taehv, fp8, compile)
        ticket, ahead = self.generator.sessions.expect(_session(request))
        return ticket, status.waiting(ahead), gr.update(value=None, interactive=False), *_buttons(running=True)

    def _generate(
        self,
        prompt: str,
        seed: float = -1,
        fps: float | None = None,
        seconds: float = DEFAULT_SECONDS,
        taehv: bool = False,
        fp8: bool = False,
        compile: bool = False,
        ticket: str | None = None,
        request: gr.Request = None,  # type: ignore[assignment]  # filled in by Gradio
    ) -> Iterator[Update]:
        """Make a video. Streams it while it is made, with a status in HTML; the last value is the MP4 file."""
        checked = self._request(prompt, seed, fps, seconds, taehv, fp8, compile)
        yield from self.generator.run(checked, _session(request), ticket)

    def _request(self, prompt, seed, fps, seconds, taehv, fp8, compile) -> Any:
        try:
            return self.generator.checked_request(
                prompt=prompt, seed=seed, seconds=seconds, fps=fps, taehv=taehv, fp8=fp8, compile=compile
            )
        except SelfForcingError as error:
            raise gr.Error(str(error), title="This cannot be made", print_exception=False) from error

    def _end(self, file: str | None, ticket: str | None, request: gr.Request) -> tuple[Any, ...]:
        self.generator.sessions.settle(_session(request), ticket)
        running = self.generator.sessions.busy(_session(request))
        return gr.update(interactive=file is not None), *_buttons(running=running)

    def _stop(self, request: gr.Request) -> tuple[Any, ...]:
        """Stop this session's runs at the next denoising step; what is made so far becomes the video."""
        told = {"running": status.stopping(), "waiting": status.stopped_early(), "none": gr.skip()}
        return told[self.generator.sessions.stop(_session(request))], *_buttons(running=False)

    def _leave(self, request: gr.Request) -> None:
        self.generator.sessions.stop(_session(request), abandon=True)

    def _notice(self, prompt: str) -> str:
        return _notice(self.model.unknown_words(prompt[:MAX_PROMPT_CHARS]) if isinstance(prompt, str) else [])


# Typing asks the server once it pauses. An older question that was overtaken never gets its answer, which is fine.
_DEBOUNCE = """(text) => new Promise((resolve) => {
    clearTimeout(window.selfForcingTyping);
    window.selfForcingTyping = setTimeout(() => resolve(text), 250);
})"""


# When a look at the playlist finds the end, hls.js does not cancel the next look that it planned before; a second does.
_ASK_ONCE_MORE = "(video) => new Promise((resolve) => setTimeout(() => resolve(video && { ...video }), 400))"


def _session(request: gr.Request | None) -> str:
    # A call without a session (the plain HTTP API) is a visitor of its own.
    return getattr(request, "session_hash", None) or secrets.token_hex(8)


def _buttons(*, running: bool) -> tuple[Any, Any]:
    return gr.update(visible=not running), gr.update(visible=running)


def _examples() -> list[str]:
    return json.loads(EXAMPLES_FILE.read_text(encoding="utf-8"))


def _describe(model: AdaptedPipeline) -> str:
    spec = model.spec
    return f"{spec.name} · {spec.width}×{spec.height} at {spec.fps:g} FPS" if spec else "The model is loaded."


_MARK = """
<svg class="sf-mark" viewBox="0 0 32 32" aria-hidden="true">
  <defs><linearGradient id="sf-dusk" x2="1" y2="1"><stop stop-color="#ea580c"/><stop offset="1" stop-color="#db2777"/>
  </linearGradient></defs>
  <rect width="32" height="32" rx="9" fill="url(#sf-dusk)"/><path d="M12 9.5v13l11-6.5z" fill="#fff"/>
</svg>
"""


def _header(model: AdaptedPipeline) -> str:
    return (
        f"{_MARK}<h1>Self-Forcing</h1><p>Type a sentence. The video plays while it is still being made.</p>"
        f'<span class="sf-model">{escape(model.name)}</span>'
    )


def _notice(unknown: list[str]) -> str:
    if not unknown:
        return ""
    words = ", ".join(f"<b>{escape(word)}</b>" for word in unknown[:12]) + (" …" if len(unknown) > 12 else "")
    return f'<p role="status">Not known to this model, so it ignores: {words}</p>'


def _word_list(words: list[str]) -> str:
    return f'<ul class="sf-words">{"".join(f"<li>{escape(word)}</li>" for word in words)}</ul>'
