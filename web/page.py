"""The page: what is on it, and which event does what."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from pipeline.config import FPS_RANGE, SECONDS_RANGE, check_available
from pipeline.errors import InvalidRequest, SelfForcingError
from pipeline.recipe import read_recipe, request_from_recipe
from pipeline.worker import ModelWorker
from web import pieces, status, style
from web.adapter import AdaptedPipeline, adapted
from web.api import add_endpoints
from web.body_limit import BodyLimit
from web.events import Values, refusal, session_of, shown
from web.generation import DEFAULT_MAX_SECONDS, DEFAULT_SECONDS, Generator
from web.player import live_video
from web.storage import VideoStore
from web.streams import StreamMemory

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES_FILE = ROOT / "examples" / "prompts.json"

QUEUE_SIZE = 16
CACHE_CHECK_SECONDS, CACHE_AGE_SECONDS = 600, 1800
SWEEP_SECONDS = 60
LOADING_POLL_SECONDS = 0.25
PLACE_POLL_SECONDS = 1.0

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
        pipeline: A `StreamingPipeline`, or a `ModelWorker`, which may still be loading one: the page then shows how far
            it is. In a pinch any object with `stream(request)`.
        max_seconds: Longest video that may be asked for. A run may take twice as long and a minute more.
    """
    if isinstance(pipeline, ModelWorker):
        worker = pipeline
    else:
        worker = ModelWorker(adapted(pipeline))
        worker.wait_ready()
    return Page(worker, max_seconds).blocks


class Page:
    """Builds the components and wires them to a `Generator`."""

    def __init__(self, worker: ModelWorker, max_seconds: float) -> None:
        self.worker = worker
        self.max_seconds = max_seconds
        self.blocks = gr.Blocks(
            title="Self-Forcing: text to video, live",
            analytics_enabled=False,
            delete_cache=(CACHE_CHECK_SECONDS, CACHE_AGE_SECONDS),
            fill_width=True,
        )
        self.streams = StreamMemory(self.blocks)
        with self.blocks:
            self._lay_out()
            self.generator = Generator(worker, VideoStore(Path(self.download.GRADIO_CACHE) / "videos"), max_seconds)
            self._wire()
            add_endpoints(self)
        self.blocks.queue(max_size=QUEUE_SIZE, default_concurrency_limit=1)
        self._fitted = False
        if worker.loaded:
            self._fit_to_model()
        # What every start of this page needs, so that `build_app(...).launch()` is the same page as `python app.py`.
        self.blocks.launch = functools.partial(
            self.blocks.launch,
            theme=style.theme(),
            css=style.css(),
            js=style.script(),
            app_kwargs={"middleware": [Middleware(BodyLimit)], "lifespan": self._looked_after},
            **LAUNCH_DEFAULTS,
        )

    # ---- layout

    def _lay_out(self) -> None:
        """Everything as it is while there is no model yet; `_fit_to_model` knows the rest."""
        self.header = gr.HTML(pieces.header(None), elem_id="header", padding=False)
        with gr.Row(elem_id="columns", equal_height=False):
            with gr.Column(scale=5, min_width=320, elem_id="inputs"):
                with gr.Column(elem_id="ask"):
                    self.prompt = gr.Textbox(
                        label="Prompt",
                        placeholder=f"Describe the video, for example: {_examples()[0]}",
                        lines=3,
                        max_lines=8,
                        elem_id="prompt",
                    )
                    self.notice = gr.HTML("", elem_id="notice", padding=False)
                    with gr.Row(elem_id="buttons"):
                        self.generate = gr.Button(
                            "Generate", variant="primary", size="lg", elem_id="generate", interactive=False
                        )
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
                    # Or dropped anywhere on the page: the script hands the file to this button.
                    self.dropped = gr.UploadButton(
                        "Take all settings from a video made here", file_types=[".mp4"], size="sm", elem_id="restore"
                    )
                    with gr.Accordion("Words", open=False, elem_id="words", visible=False) as self.words:
                        self.word_list = gr.HTML("", padding=False)
            with gr.Column(scale=7, min_width=320, elem_id="result"):
                self.video = live_video(label="Video", show_label=False, elem_id="video")
                with gr.Row(elem_id="under-video"):
                    gr.HTML(pieces.PLAYER_BUTTONS, elem_id="player", padding=False)
                    self.download = gr.DownloadButton("Download MP4", interactive=False, size="sm", elem_id="download")
                self.status = gr.HTML(
                    status.loading(self.worker.loading),
                    label="Status",
                    show_label=False,
                    elem_id="status",
                    padding=False,
                )
                # Carries a click's ticket from one event to the next. Not a `gr.State`: that is read when an event
                # begins, and by then may hold a later click's; this travels with the event. API clients do not see it.
                self.ticket = gr.Button("", visible="hidden", elem_id="ticket")
                # Pressed by the script: a button in HTML cannot set a component's value.
                self.use_seed = gr.Button("", visible="hidden", elem_id="use-seed")
        self.place_timer = gr.Timer(PLACE_POLL_SECONDS, active=False)

    def _lay_out_settings(self) -> None:
        low, high = SECONDS_RANGE
        longest = min(high, self.max_seconds)
        fps_low, fps_high = FPS_RANGE
        # Numbers, not sliders: what is typed arrives as it is, and the request says what is wrong with it.
        with gr.Row(elem_id="numbers"):
            self.seed = gr.Number(label="Seed", info="-1: random", value=-1, step=1, min_width=90, elem_id="seed")
            self.fps = gr.Number(label="Target FPS", info=f"{fps_low:g} to {fps_high:g}", step=1, min_width=90)
            self.seconds = gr.Number(
                label="Length (s)",
                info=f"{low:g} to {longest:g}",
                value=min(DEFAULT_SECONDS, longest),
                step=0.5,
                min_width=90,
            )
        self.settings_notice = gr.HTML("", elem_id="settings-notice", padding=False)
        self.options = {
            name: gr.Checkbox(label=label, info=info, elem_id=f"option-{name}")
            for name, (label, info) in OPTIONS.items()
        }

    def _fitted_settings(self, model: AdaptedPipeline) -> dict[Any, dict[str, Any]]:
        """Component -> what of it depends on the model."""
        words = model.known_words()
        unavailable = model.unavailable_options()
        fitted = {
            self.header: {"value": pieces.header(model)},
            self.status: {"value": status.idle(pieces.describe(model))},
            self.generate: {"interactive": True},
            self.fps: {
                "value": model.fps,
                "info": f"{FPS_RANGE[0]:g} to {FPS_RANGE[1]:g}; natural: {model.native_fps:g}",
            },
            self.settings_notice: {"value": self._checked_settings(-1, model.fps, self.seconds.value)},
            self.words: {"label": f"The {len(words)} words this model knows", "visible": bool(words)},
            self.word_list: {"value": pieces.word_list(words)},
        }
        for name, option in self.options.items():
            if name in unavailable:
                fitted[option] = {"info": unavailable[name], "interactive": False}
        return fitted

    def _fit_to_model(self) -> None:
        """Make the page that visitors get from now on the one for this model."""
        if self._fitted:
            return
        self._fitted = True
        with suppress(SelfForcingError):  # whoever started the program is told why there is none
            for component, settings in self._fitted_settings(self.generator.pipeline).items():
                for name, value in settings.items():
                    setattr(component, name, value)
            self.blocks.config = self.blocks.get_config_file()

    # ---- events

    def _wire(self) -> None:
        self.inputs = [self.prompt, self.seed, self.fps, self.seconds]
        self.inputs += [self.options[name] for name in ("taehv", "fp8", "compile")]
        buttons = [self.generate, self.stop]
        quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
        # In the queue, though they never wait there: the page shows no errors of events outside of it.
        aside = {**quiet, "queue": True, "concurrency_limit": None}
        generating = self.generate.click(
            self._begin,
            self.inputs,
            [self.ticket, self.status, self.download, self.place_timer, *buttons],
            trigger_mode="multiple",
            **aside,
        ).success(
            self._generate,
            [*self.inputs, self.ticket],
            [self.video, self.status, self.download],
            concurrency_limit=1,
            concurrency_id="model",
            trigger_mode="multiple",
            # The usual progress display would lay an opaque layer over the playing video at every update.
            show_progress="hidden",
            api_visibility="private",
        )
        generating.then(self._end, [self.download, self.ticket], [self.download, self.place_timer, *buttons], **quiet)
        generating.then(None, [self.video], [self.video], js=_ASK_ONCE_MORE, **quiet)
        generating.then(None, [self.download], None, js=_TELL_FILE, **quiet)
        self.use_seed.click(None, None, [self.seed], js=_SHOWN_SEED, **quiet)
        self.stop.click(self._stop, None, [self.status, *buttons], **quiet)
        self.place_timer.tick(self._place, [self.ticket], [self.status, self.place_timer], **quiet)
        self.prompt.change(self._notice, [self.prompt], [self.notice], js=_DEBOUNCE, trigger_mode="multiple", **quiet)
        gr.on(
            [self.seed.change, self.fps.change, self.seconds.change],
            self._checked_settings,
            [self.seed, self.fps, self.seconds],
            [self.settings_notice],
            trigger_mode="always_last",
            **quiet,
        )
        self.dropped.upload(self._restore, [self.dropped], [self.dropped, *self.inputs, self.notice], **aside)
        if not self.worker.loaded:
            fitted = [self.header, self.status, self.generate, self.fps, self.settings_notice, self.words]
            self.fitted = [*fitted, self.word_list, *self.options.values()]
            self.blocks.load(self._arrive, None, self.fitted, **aside)
        self.blocks.unload(self._leave)

    async def _arrive(self) -> AsyncIterator[Values]:
        """Tell somebody who came before the model how far it is, then make their page fit it."""
        waits = {component: gr.skip() for component in self.fitted}
        while not self.worker.loaded:
            yield tuple({**waits, self.status: status.loading(self.worker.loading)}.values())
            await asyncio.sleep(LOADING_POLL_SECONDS)
        try:
            model = self.generator.pipeline
        except SelfForcingError as error:
            yield tuple({**waits, self.status: status.failed(str(error))}.values())
            return
        fitted = {component: gr.update(**new) for component, new in self._fitted_settings(model).items()}
        yield tuple({**waits, **fitted}.values())

    def _begin(self, prompt, seed, fps, seconds, taehv, fp8, compile, request: gr.Request) -> Values:
        # Bad input is refused here, before it stands in a queue.
        checked = self.request(prompt, seed, fps, seconds, taehv, fp8, compile)
        ticket, place = self.generator.sessions.expect(
            session_of(request), lambda: self.generator.expected_seconds(checked)
        )
        timer = gr.Timer(active=place.ahead > 0)
        return ticket, status.waiting(place), gr.update(value=None, interactive=False), timer, *_buttons(running=True)

    def _place(self, ticket: str | None, request: gr.Request) -> Values:
        place = self.generator.sessions.place(session_of(request), ticket)
        if place is None:
            return gr.skip(), gr.Timer(active=False)
        return status.waiting(place), gr.skip()

    def _generate(
        self, prompt, seed, fps, seconds, taehv, fp8, compile, ticket, request: gr.Request
    ) -> Iterator[Values]:
        checked = self.request(prompt, seed, fps, seconds, taehv, fp8, compile)
        session = session_of(request)
        self.streams.forget(session)
        try:
            for update in self.generator.run(checked, session, ticket):
                yield shown(update)
        except SelfForcingError as error:
            raise refusal(error) from error

    def request(self, prompt, seed, fps, seconds, taehv, fp8, compile) -> Any:
        """What a visitor sent, checked. What is wrong with it, the visitor is told."""
        try:
            return self.generator.checked_request(
                prompt=prompt, seed=seed, seconds=seconds, fps=fps, taehv=taehv, fp8=fp8, compile=compile
            )
        except SelfForcingError as error:
            raise refusal(error) from error

    def _end(self, file: str | None, ticket: str | None, request: gr.Request) -> Values:
        session = session_of(request)
        self.generator.sessions.settle(session, ticket)
        running = self.generator.sessions.busy(session)
        return gr.update(interactive=file is not None), gr.Timer(active=False), *_buttons(running=running)

    def _stop(self, request: gr.Request) -> Values:
        told = {"running": status.stopping(), "waiting": status.stopped_early(), "none": gr.skip()}
        return told[self.generator.sessions.stop(session_of(request))], *_buttons(running=False)

    def _leave(self, request: gr.Request) -> None:
        session = session_of(request)
        self.generator.sessions.stop(session, abandon=True)
        self.generator.store.leave(session)

    def _notice(self, prompt: str) -> str:
        return pieces.prompt_notice(prompt, self._model_or_none()) if isinstance(prompt, str) else ""

    def _checked_settings(self, seed, fps, seconds) -> str:
        return pieces.settings_notice(seed, fps, seconds, self.max_seconds, self._model_or_none())

    def _model_or_none(self) -> AdaptedPipeline | None:
        with suppress(SelfForcingError):
            return self.generator.pipeline
        return None

    def _restore(self, path: str | None) -> Values:
        """Every setting of a video that was made here. The file itself is not kept."""
        if path is None:
            return tuple(gr.skip() for _ in range(len(self.inputs) + 2))
        try:
            recipe = read_recipe(path)
            restored = request_from_recipe(recipe)
            model = self.generator.pipeline
            if restored.seconds > self.max_seconds:
                raise InvalidRequest(
                    f"That video has {restored.seconds:g} s; here at most {self.max_seconds:g} s can be made."
                )
            check_available(restored, model.unavailable_options())
        except SelfForcingError as error:
            raise refusal(error) from error
        finally:
            Path(path).unlink(missing_ok=True)
        other = recipe.get("model") not in ("", model.name)
        said = f"That video was made by {recipe.get('model')}; this model will make another one." if other else ""
        if said:
            gr.Warning(said)
        else:
            gr.Info("All settings are those of that video. Generate makes it again.")
        options = (restored.taehv, restored.fp8, restored.compile)
        notice = pieces.prompt_notice(restored.prompt, model)
        return None, restored.prompt, restored.seed, restored.fps, restored.seconds, *options, notice

    # ---- while the server runs

    @asynccontextmanager
    async def _looked_after(self, app: Any) -> AsyncIterator[None]:
        """What goes on beside the visitors' events as long as the server runs."""
        tasks = [asyncio.create_task(self._fit_when_loaded()), asyncio.create_task(self._sweep())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()

    async def _fit_when_loaded(self) -> None:
        while not self.worker.loaded:
            await asyncio.sleep(LOADING_POLL_SECONDS)
        self._fit_to_model()

    async def _sweep(self) -> None:
        """Files and segments go by age and by size, whether or not anybody comes."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            self.streams.sweep()
            await asyncio.to_thread(self.generator.store.sweep)


# Typing asks the server once it pauses. An older question that was overtaken never gets its answer, which is fine.
_DEBOUNCE = """(text) => new Promise((resolve) => {
    clearTimeout(window.selfForcingTyping);
    window.selfForcingTyping = setTimeout(() => resolve(text), 250);
})"""


# When a look at the playlist finds the end, hls.js does not cancel the next look that it planned before; a second does.
_ASK_ONCE_MORE = "(video) => new Promise((resolve) => setTimeout(() => resolve(video && { ...video }), 400))"


# For browsers that cannot play a stream: the script shows them the file.
_TELL_FILE = "(file) => { dispatchEvent(new CustomEvent('sf-file', { detail: file?.url ?? null })); return []; }"
_SHOWN_SEED = "() => Number(document.querySelector('[data-use-seed]').dataset.useSeed)"


def _buttons(*, running: bool) -> tuple[Any, Any]:
    return gr.update(visible=not running), gr.update(visible=running)


def _examples() -> list[str]:
    return json.loads(EXAMPLES_FILE.read_text(encoding="utf-8"))
