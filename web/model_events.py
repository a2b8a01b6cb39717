"""What happens between the Model menu and the rest of the page."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import gradio as gr

from pipeline.errors import SelfForcingError
from web import pieces
from web.api import MODEL_QUEUE
from web.events import Values, refusal

if TYPE_CHECKING:
    from web.models import ModelMenu
    from web.page import Page


def wire_models(page: Page, menu: ModelMenu) -> None:
    """Connect the menu's components. To be called inside the page's blocks."""
    events = _ModelEvents(page, menu)
    quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
    # In the queue, though it never waits there: the page shows no errors of events outside of it.
    aside = {**quiet, "queue": True, "concurrency_limit": None}
    asked, drawn = [menu.choice, menu.seen], [menu.seen, *menu.shown]
    menu.choice.change(events.show, asked, drawn, **aside)
    menu.get.click(events.start_download, asked, drawn, **aside)
    menu.end.click(events.stop_download, asked, drawn, **aside)
    menu.after_switch = events.after_switch
    menu.use.click(events.wait, None, [menu.card, menu.use], **quiet)
    menu.use.click(
        events.switch,
        [menu.choice],
        menu.shown,
        concurrency_id=MODEL_QUEUE,
        concurrency_limit=1,
        show_progress="hidden",
        api_visibility="private",
    ).then(events.show, asked, drawn, **aside)  # a refusal would leave there what was said before
    menu.timer.tick(events.look, asked, [*events.outputs, menu.seen, *menu.shown], **quiet)


class _ModelEvents:
    def __init__(self, page: Page, menu: ModelMenu) -> None:
        self._page = page
        self._menu = menu
        # Not the status: it may hold the video that its visitor has just made.
        kept = (page.ui.arrival, page.ui.status)
        self.outputs = [page.ui.news, *(component for component in page.ui.fitted if component not in kept)]

    def show(self, name: str, seen: str) -> Values:
        return self._done(name, seen, lambda: None)

    def switch(self, name: str) -> Iterator[Values]:
        try:
            yield from self._menu.switch(name)
        except SelfForcingError as error:
            raise refusal(error) from error

    def after_switch(self) -> None:
        self._page.generator.forget_paces()
        self._page.generator.warm_ups.forget()
        self._page.fit_to_model()

    def wait(self) -> Values:
        """What is said at once to whoever wants another model while a video is being made."""
        worker = self._page.worker
        if not worker.busy or worker.exchanging:
            return gr.skip(), gr.skip()
        return self._menu.waiting, gr.update(visible=False)

    def start_download(self, name: str, seen: str) -> Values:
        return self._done(name, seen, lambda: self._menu.start_download(name))

    def stop_download(self, name: str, seen: str) -> Values:
        return self._done(name, seen, self._menu.stop_download)

    def _done(self, name: str, seen: str, action: Callable[[], None]) -> Values:
        """What the menu shows after an action. The next look draws it again: an answer may overtake another."""
        changes = str(seen).partition(":")[0]
        try:
            action()
            return gr.update(value=f"{changes}:"), *self._menu.show(name)
        except SelfForcingError as error:
            raise refusal(error) from error

    def look(self, name: str, seen: str) -> Values:
        """What every open page asks now and then: whether the model is another one, and how a download goes."""
        page = self._page
        new: dict[Any, Any] = dict.fromkeys(self.outputs, gr.skip())
        try:
            shown = self._menu.show(name)
        except SelfForcingError as error:
            raise refusal(error) from error
        # What has not changed is not drawn again, every other second, under somebody's hands.
        changes, drawn = str(page.worker.changes), f"{zlib.crc32(repr(shown).encode()):x}"
        seen_changes, _, seen_drawn = seen.partition(":")
        if drawn == seen_drawn:
            shown = tuple(gr.skip() for _ in shown)
        if changes != seen_changes:
            model = page.model_or_none()
            if model is None:
                new[page.ui.news] = pieces.news(self._why_none())
                new |= {component: gr.update(**settings) for component, settings in page.ui.without_model().items()}
            else:
                fitted = page.ui.fitted_to(model)
                new |= {component: gr.update(**fitted[component]) for component in self.outputs[1:]}
                new[page.ui.news] = pieces.news(f"The model is now {model.name}.")
        return *new.values(), gr.update(value=f"{changes}:{drawn}"), *shown

    def _why_none(self) -> str:
        worker = self._page.worker
        if worker.loaded:
            try:
                worker.wait_ready(timeout=0)
            except SelfForcingError as error:
                return f"There is no model now. {error} Choose one in the Model menu."
            except TimeoutError:  # somebody has just chosen another one
                pass
        return "Another model is being loaded. Videos can be made again in a moment."
