"""What happens between the Compare panel and the rest of the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import gradio as gr

from pipeline.compare import Pair
from pipeline.errors import InvalidRequest, SelfForcingError
from web import compare_panel, status
from web.api import MODEL_QUEUE
from web.compare_panel import ComparePanel
from web.comparing import ComparisonFiles
from web.events import Values, refusal, run_buttons, session_of

if TYPE_CHECKING:
    from web.page import Page


def wire_comparison(page: Page, panel: ComparePanel) -> None:
    """Connect the panel's components. To be called inside the page's blocks."""
    events = _CompareEvents(page)
    quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
    # In the queue, though it never waits there: the page shows no errors of events outside of it.
    aside = {**quiet, "queue": True, "concurrency_limit": None}
    # Stop, Stop both and Escape end a comparison like any other run: see the page.
    buttons = [panel.make, panel.stop, page.ui.generate, page.ui.stop]
    asked = [*page.ui.inputs, panel.switch]
    start = page.ui.start.file
    begun = panel.make.click(
        events.begin_both,
        [*asked, start],
        [panel.ticket, panel.status, page.ui.place_timer, *panel.downloads, *buttons],
        trigger_mode="multiple",
        **aside,
    )
    begun.success(None, None, None, js=_HIDE, **quiet)
    comparing = begun.success(
        events.make_both,
        [*asked, panel.ticket, start],
        [panel.status, *panel.downloads],
        concurrency_limit=1,
        concurrency_id=MODEL_QUEUE,
        # Or a click after Stop both, while the stopped comparison comes to its end, would make nothing.
        trigger_mode="multiple",
        show_progress="hidden",
        api_visibility="private",
    )
    waiting = [page.ui.status, panel.status, page.ui.place_timer]
    comparing.then(events.end_both, [panel.ticket], [*waiting, *buttons], **quiet)
    comparing.then(None, [panel.a, panel.b], None, js=_SHOW, **quiet)


class _CompareEvents:
    def __init__(self, page: Page) -> None:
        self._page = page

    def begin_both(self, prompt, seed, fps, seconds, taehv, fp8, compile, switch, start, request: gr.Request) -> Values:
        # Bad input is refused here, before it stands in a queue.
        pair = self._pair(prompt, seed, fps, seconds, taehv, fp8, compile, switch, start)
        expected = self._page.comparer.expected(pair)
        ticket, place = self._page.announce(session_of(request), expected, "comparison")
        timer = gr.Timer(active=place.ahead > 0)
        return ticket.id, status.waiting(place), timer, *self._files(None), *_both(running=True)

    def make_both(
        self, prompt, seed, fps, seconds, taehv, fp8, compile, switch, ticket, start, request: gr.Request
    ) -> Iterator[Values]:
        self._page.generator.wait_for_exchange()
        pair = self._pair(prompt, seed, fps, seconds, taehv, fp8, compile, switch, start)
        try:
            for update in self._page.comparer.run(pair, session_of(request), ticket):
                yield compare_panel.card(update), *self._files(update.files)
        except SelfForcingError as error:
            raise refusal(error) from error

    def end_both(self, ticket: str | None, request: gr.Request) -> Values:
        session = session_of(request)
        ended = self._page.generator.sessions.settle(session, ticket)
        video, both, timer = self._page.waiting(session)
        if ended is not None and both == gr.skip():
            if ended.abandoned:
                both = status.connection_lost()
            elif ended.wanted:
                both = ""  # it is over without a word, so there is nothing that it could be waiting for
        return video, both, timer, *_both(running=self._page.generator.sessions.busy(session))

    def _pair(self, prompt, seed, fps, seconds, taehv, fp8, compile, switch, start) -> Pair:
        checked = self._page.request(prompt, seed, fps, seconds, taehv, fp8, compile, start)
        try:
            if not isinstance(switch, str):
                raise InvalidRequest("Choose the switch to compare.")
            return self._page.comparer.checked_pair(checked, {switch: True}, {switch: False})
        except SelfForcingError as error:
            raise refusal(error) from error

    def _files(self, files: ComparisonFiles | None) -> Values:
        """New values of `ComparePanel.downloads`."""
        paths = (None, None, None) if files is None else (files.both, files.a, files.b)
        return gr.update(visible=files is not None), *paths


def _both(*, running: bool) -> Values:
    """Make both and Stop both, Generate and Stop."""
    return *run_buttons(running=running), *run_buttons(running=running)


_HIDE = "() => { dispatchEvent(new CustomEvent('sf-compared', { detail: null })); return []; }"

_SHOW = """(a, b) => {
    const detail = a?.url && b?.url ? { a: a.url, b: b.url } : null;
    dispatchEvent(new CustomEvent("sf-compared", { detail }));
    return [];
}"""
