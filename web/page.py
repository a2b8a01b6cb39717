"""The page: what is on it, and which event does what."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from pipeline.config import SECONDS_RANGE, check_available
from pipeline.errors import InvalidRequest, SelfForcingError, VideoError
from pipeline.recipe import needed_start, read_recipe, settings_from_recipe, start_sentence
from pipeline.start import Start
from pipeline.worker import ModelWorker
from prompting.language import LanguageEnhancer
from web import pieces, status, style
from web.adapter import AdaptedPipeline, adapted
from web.api import MODEL_QUEUE, add_endpoints
from web.body_limit import BodyLimit
from web.compare_events import wire_comparison
from web.comparing import Comparer
from web.enhance import PromptHelp
from web.enhance_events import wire_suggestions
from web.events import Values, refusal, run_buttons, session_of, shown, take_files_only
from web.generation import DEFAULT_MAX_SECONDS, Generator
from web.layout import Layout
from web.model_events import wire_models
from web.models import ModelChoices, ModelMenu
from web.no_relay import NoRelay
from web.sessions import Expected, Kind, Place, Ticket, files_in_queue, limit_queue, sessions_ahead
from web.start_events import wire_start
from web.starts import Starts
from web.storage import VIDEOS, VideoStore, remove_upload, sweep_uploads
from web.streams import StreamMemory
from web.warming_events import wire_warming

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent

QUEUE_SIZE = 16
CACHE_CHECK_SECONDS, CACHE_AGE_SECONDS = 600, 1800
SWEEP_SECONDS = 10
LOADING_POLL_SECONDS = 0.25

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


def build_app(
    pipeline: Any,
    max_seconds: float = DEFAULT_MAX_SECONDS,
    models: ModelChoices | None = None,
    language: LanguageEnhancer | None = None,
    ticked: Collection[str] = (),
) -> gr.Blocks:
    """The whole app around a pipeline, ready for `launch()`.

    Args:
        pipeline: A `StreamingPipeline`, or a `ModelWorker`, which may still be loading one: the page then shows how far
            it is. In a pinch any object with `stream(request)`.
        max_seconds: Longest video that may be asked for. A run may take twice as long and a minute more.
        models: What the Model menu offers; None: there is no menu.
        language: Writes prompts out if a visitor asks for it; None: at most the model's own templates do.
        ticked: Which of `taehv`, `fp8` and `compile` are on for a visitor who comes, where the model has them.
    """
    if isinstance(pipeline, ModelWorker):
        worker = pipeline
    else:
        worker = ModelWorker(adapted(pipeline))
        worker.wait_ready()
    return Page(worker, max_seconds, models, language, ticked).blocks


class Page:
    """Wires the components to a `Generator`."""

    def __init__(
        self,
        worker: ModelWorker,
        max_seconds: float,
        models: ModelChoices | None = None,
        language: LanguageEnhancer | None = None,
        ticked: Collection[str] = (),
    ) -> None:
        self.worker = worker
        self.help = PromptHelp(language)
        self.max_seconds = max_seconds
        self.blocks = gr.Blocks(
            title="Self-Forcing: text to video, live",
            analytics_enabled=False,
            delete_cache=(CACHE_CHECK_SECONDS, CACHE_AGE_SECONDS),
            fill_width=True,
        )
        self.streams = StreamMemory(self.blocks)
        with self.blocks:
            menu = None if models is None else lambda: ModelMenu(models, worker)
            self.ui = Layout(worker.loading, min(max_seconds, SECONDS_RANGE[1]), self.help, menu, ticked)
            self.home = Path(self.ui.download.GRADIO_CACHE)
            self.generator = Generator(worker, VideoStore(self.home / VIDEOS), max_seconds)
            self.comparer = Comparer(self.generator)
            self.starts = Starts(self.home)
            self._wire()
            wire_start(self, self.ui.start)
            wire_suggestions(self)
            wire_warming(self)
            wire_comparison(self, self.ui.compare)
            if self.ui.models is not None:
                wire_models(self, self.ui.models)
            add_endpoints(self)
        for component in self.blocks.blocks.values():
            take_files_only(component)
        # Closed: the plain routes would lead past the queue.
        self.blocks.queue(default_concurrency_limit=1, api_open=False)
        limit_queue(self.blocks, MODEL_QUEUE, QUEUE_SIZE)
        self.fit_to_model()
        # What every start of this page needs, so that `build_app(...).launch()` is the same page as `python app.py`.
        self.blocks.launch = functools.partial(
            self.blocks.launch,
            theme=style.theme(),
            css=style.css(),
            js=style.script(),
            app_kwargs={"middleware": [Middleware(NoRelay), Middleware(BodyLimit)], "lifespan": self._looked_after},
            **LAUNCH_DEFAULTS,
        )

    def fit_to_model(self) -> None:
        """Make the page that visitors get from now on the one for this model."""
        model = self.model_or_none()
        # Without one (it is still loading, or was lost in an exchange) nothing can be made.
        fitted = self.ui.without_model() if model is None else self.ui.fitted_to(model)
        for component, settings in fitted.items():
            for name, value in settings.items():
                setattr(component, name, value)
        if self.ui.models is not None:
            if model is not None:
                self.ui.models.seen.value = str(self.worker.changes)
            self.ui.models.fit()
        self.blocks.config = self.blocks.get_config_file()

    # ---- events

    def _wire(self) -> None:
        ui = self.ui
        buttons = [ui.generate, ui.stop]
        quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
        # In the queue, though they never wait there: the page shows no errors of events outside of it.
        aside = {**quiet, "queue": True, "concurrency_limit": None}
        generating = ui.generate.click(
            self._begin,
            [*ui.inputs, ui.start.file],
            [ui.ticket, ui.status, ui.download, ui.place_timer, *buttons],
            trigger_mode="multiple",
            **aside,
        ).success(
            self._generate,
            [*ui.inputs, ui.ticket, ui.start.file],
            [ui.video, ui.status, ui.download],
            concurrency_limit=1,
            concurrency_id=MODEL_QUEUE,
            trigger_mode="multiple",
            # The usual progress display would lay an opaque layer over the playing video at every update.
            show_progress="hidden",
            api_visibility="private",
        )
        waiting = [ui.status, ui.compare.status, ui.place_timer]
        generating.then(self._end, [ui.ticket], [ui.download, *waiting, *buttons], **quiet)
        generating.then(None, [ui.video], [ui.video], js=_ASK_ONCE_MORE, **quiet)
        generating.then(None, [ui.download], None, js=_TELL_FILE, **quiet)
        ui.use_seed.click(None, None, [ui.seed], js=_SHOWN_SEED, **quiet)
        both = [ui.compare.make, ui.compare.stop]
        gr.on([ui.stop.click, ui.compare.stop.click], self._stop, None, [*waiting, *buttons, *both], **quiet)
        ui.place_timer.tick(self._place, None, waiting, **quiet)
        ui.prompt.change(self._notice, [ui.prompt], [ui.notice], js=_DEBOUNCE, trigger_mode="multiple", **quiet)
        settings = [ui.seed, ui.fps, ui.seconds, ui.start.file]
        gr.on(
            [ui.seed.change, ui.fps.change, ui.seconds.change],
            self._checked_settings,
            settings,
            [ui.settings_notice],
            trigger_mode="always_last",
            **quiet,
        )
        restored = [ui.dropped, *ui.inputs, ui.notice, *ui.start.shown]
        self.restoring = ui.dropped.upload(self._restore, [ui.dropped, ui.start.file], restored, **aside)
        # Fields that were never shown, in a panel that is closed, tell of no change.
        self.restoring.success(self._checked_settings, settings, [ui.settings_notice], **quiet)
        ui.arrival.tick(self._arrive, None, ui.fitted, **quiet)
        self.blocks.unload(self._leave)

    def _arrive(self) -> Values:
        """Tell somebody who came before the model how far it is, then make their page fit it."""
        new: dict[Any, Any] = dict.fromkeys(self.ui.fitted, gr.skip())
        if not self.worker.loaded:
            new[self.ui.status] = status.loading(self.worker.loading)
        elif (model := self.model_or_none()) is not None:
            new |= {component: gr.update(**settings) for component, settings in self.ui.fitted_to(model).items()}
        else:
            try:
                self.worker.wait_ready(timeout=0)
            except SelfForcingError as error:
                new |= {self.ui.status: status.failed(str(error)), self.ui.arrival: gr.Timer(active=False)}
        return tuple(new.values())

    def _begin(self, prompt, seed, fps, seconds, taehv, fp8, compile, start, request: gr.Request) -> Values:
        # Bad input is refused here, before it stands in a queue.
        checked = self.request(prompt, seed, fps, seconds, taehv, fp8, compile, start)
        ticket, place = self.announce(session_of(request), self.generator.expected(checked))
        timer = gr.Timer(active=place.ahead > 0)
        download = gr.update(value=None, interactive=False)
        return ticket.id, status.waiting(place), download, timer, *run_buttons(running=True)

    def announce(self, session: str, expected: Expected, kind: Kind = "video") -> tuple[Ticket, Place]:
        """Note that a click's run is on its way. Returns its ticket and where it stands in the queue."""
        if self.generator.sessions.busy(session):
            raise refusal(InvalidRequest("A video of yours is being made. Stop it first, or wait for its end."))
        ticket = self.generator.sessions.expect(session, expected, kind)
        return ticket, self.place_of(session, queued=False) or Place(0, None)

    def place_of(self, session: str, *, queued: bool = True) -> Place | None:
        ahead = sessions_ahead(self.blocks, MODEL_QUEUE, session, queued=queued)
        return self.generator.sessions.place(session, ahead)

    def waiting(self, session: str) -> Values:
        """What is said of the visitor's click that waits, if one does: status, the Compare panel's status, timer."""
        kind, place = self.generator.sessions.awaited(session), self.place_of(session)
        if place is None:
            return gr.skip(), gr.skip(), gr.Timer(active=False)
        return *_at(kind, status.waiting(place)), gr.Timer(active=True)

    def _place(self, request: gr.Request) -> Values:
        return self.waiting(session_of(request))

    def _generate(
        self, prompt, seed, fps, seconds, taehv, fp8, compile, ticket, start, request: gr.Request
    ) -> Iterator[Values]:
        self.generator.wait_for_exchange()
        checked = self.request(prompt, seed, fps, seconds, taehv, fp8, compile, start)
        session = session_of(request)
        self.streams.forget(session)
        try:
            for update in self.generator.run(checked, session, ticket):
                yield shown(update)
        except SelfForcingError as error:
            raise refusal(error) from error

    def request(self, prompt, seed, fps, seconds, taehv, fp8, compile, start: str | None = None) -> Any:
        """What a visitor sent, checked. What is wrong with it, the visitor is told. `start`: path of an upload."""
        try:
            begun = None if start is None else self.starts.read(start, self.generator.pipeline)
            return self.generator.checked_request(
                prompt=prompt, seed=seed, seconds=seconds, fps=fps, taehv=taehv, fp8=fp8, compile=compile, start=begun
            )
        except SelfForcingError as error:
            raise refusal(error) from error

    def _end(self, ticket: str | None, request: gr.Request) -> Values:
        session = session_of(request)
        ended = self.generator.sessions.settle(session, ticket)
        # After Stop the next click may wait already, while the stopped run comes to its end.
        card, both, timer = self.waiting(session)
        if ended is not None and card == gr.skip():
            if ended.abandoned:
                card = status.connection_lost()
            elif ended.wanted:
                card = status.not_made()  # it is over without a word, and would stand there as if it were still to come
        download = gr.update(interactive=ended is not None and ended.has_file)
        return download, card, both, timer, *run_buttons(running=self.generator.sessions.busy(session))

    def _stop(self, request: gr.Request) -> Values:
        # A run that goes on tells of its end itself, and meanwhile the script says that it stops.
        session = session_of(request)
        kind = self.generator.sessions.awaited(session)
        waited = self.generator.sessions.stop(session) == "waiting"
        cards = _at(kind if waited else None, status.stopped_early())
        return *cards, gr.Timer(active=False), *run_buttons(running=False), *run_buttons(running=False)

    def _leave(self, request: gr.Request) -> None:
        session = session_of(request)
        self.generator.sessions.stop(session, abandon=True)
        self.generator.store.leave(session)

    def _notice(self, prompt: str) -> str:
        return pieces.prompt_notice(prompt, self.model_or_none()) if isinstance(prompt, str) else ""

    def _checked_settings(self, seed, fps, seconds, start: str | None) -> str:
        model = self.model_or_none()
        known = self.starts.known(start, model)
        if start is not None and known is None:  # not worth decoding; what it comes to, nobody knows then
            model = None
        return pieces.settings_notice(seed, fps, seconds, self.max_seconds, model, known)

    def settings_notice(self, seed, fps, seconds, start: Start | None) -> str:
        """What is wrong with the numbers, or what they come to."""
        return pieces.settings_notice(seed, fps, seconds, self.max_seconds, self.model_or_none(), start)

    def _start_or_none(self, path: str | None) -> Start | None:
        with suppress(SelfForcingError):
            return self.starts.read(path, self.generator.pipeline)
        return None

    def model_or_none(self) -> AdaptedPipeline | None:
        with suppress(SelfForcingError):
            return self.generator.pipeline
        return None

    def _restore(self, path: str | None, start: str | None) -> Values:
        """Every setting of a video that was made here. The file itself is not kept.

        What that video began with is in none of its settings: it stays if it is chosen already, or else has to be.
        """
        if path is None:
            return tuple(gr.skip() for _ in range(len(self.ui.inputs) + 2 + len(self.ui.start.shown)))
        # Gradio has checked it, but for what calls itself a stream at some address. It is about to be removed.
        if not Path(path).resolve().is_relative_to(self.home.resolve()):
            raise refusal(VideoError("A file is needed here."))
        try:
            recipe = read_recipe(path)
            restored = settings_from_recipe(recipe)
            model = self.generator.pipeline
            if restored.seconds > self.max_seconds:
                raise InvalidRequest(
                    f"That video has {restored.seconds:g} s; here at most {self.max_seconds:g} s can be made."
                )
            check_available(restored, model.unavailable_options())
        except SelfForcingError as error:
            raise refusal(error) from error
        finally:
            if path != start:  # the same file may be what the next video goes on from
                remove_upload(self.home, path)
        needed, chosen = needed_start(recipe), self._start_or_none(start)
        same = chosen.matches(needed) if chosen and needed else chosen is None and needed is None
        other = recipe.get("model") not in ("", model.name)
        said = f"That video was made by {recipe.get('model')}; this model will make another one." if other else ""
        again = (
            "Generate makes it again." if recipe.get("complete") else "It was stopped early; Generate makes all of it."
        )
        if needed and not same:
            said = f"{said} {start_sentence(needed)} Choose the same file to make it again.".strip()
        if said:
            gr.Warning(said)
        else:
            gr.Info(f"All settings are those of that video. {again}")
        options = (restored.taehv, restored.fp8, restored.compile)
        notice = pieces.prompt_notice(restored.prompt, model)
        panel = self.ui.start.show(chosen if same else None, model.spec)
        kept = gr.skip() if same else gr.update(value=None)
        shown = (kept, *(gr.update(**settings) for settings in panel.values()))
        return None, restored.prompt, restored.seed, restored.fps, restored.seconds, *options, notice, *shown

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
            if self.ui.models is not None:
                await asyncio.to_thread(self.ui.models.downloads.close)

    async def _fit_when_loaded(self) -> None:
        while not self.worker.loaded:
            await asyncio.sleep(LOADING_POLL_SECONDS)
        self.fit_to_model()

    def sweep_uploads(self, **limits: Any) -> None:
        """Remove old uploads, but for those that somebody in the queue waits to start from. `limits`: for tests."""
        self.starts.look_after(files_in_queue(self.blocks, MODEL_QUEUE))
        sweep_uploads(self.home, **limits)

    async def _sweep(self) -> None:
        """Files and segments go by age and by size, whether or not anybody comes."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            try:
                self.streams.sweep()
                await asyncio.to_thread(self.generator.store.sweep)
                await asyncio.to_thread(self.sweep_uploads)
            except Exception:  # or one mishap would be the last sweep
                logger.exception("Old files could not be removed")


def _at(kind: Kind | None, card: str) -> Values:
    """A card at its place, for what it is about: (status, the Compare panel's status)."""
    return tuple(card if kind == place else gr.skip() for place in ("video", "comparison"))


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
