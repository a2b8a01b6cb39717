"""What happens between the panel for a video's start and the rest of the page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio as gr

from pipeline.errors import SelfForcingError
from web import start_panel
from web.events import Values
from web.start_panel import StartPanel
from web.starts import READERS
from web.storage import remove_upload

if TYPE_CHECKING:
    from web.page import Page


def wire_start(page: Page, panel: StartPanel) -> None:
    """Connect the panel's components. To be called inside the page's blocks."""
    events = _StartEvents(page, panel)
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    numbers = [page.ui.seed, page.ui.fps, page.ui.seconds]
    outputs = [*panel.shown, page.ui.settings_notice]
    reading = {"concurrency_limit": READERS, "concurrency_id": "starts", **quiet}
    # Another file may be chosen, or this one taken out, while it is read: what is in the field then, counts.
    chosen = panel.file.upload(
        events.choose, [panel.file, *numbers], [panel.checked, *outputs[1:]], trigger_mode="always_last", **reading
    )
    chosen.then(events.settle, [panel.file, panel.checked, *numbers], outputs, **reading)
    gr.on([panel.file.clear, panel.remove.click], events.forget, numbers, outputs, queue=False, **quiet)


class _StartEvents:
    def __init__(self, page: Page, panel: StartPanel) -> None:
        self._page = page
        self._panel = panel

    def choose(self, path: str | None, seed, fps, seconds) -> Values:
        """Check the file and show what the model will see of it, or what is wrong with it."""
        spec, start, note = None, None, ""
        try:
            model = self._page.generator.pipeline
            spec, start = model.spec, self._page.starts.read(path, model, remove=False)
        except SelfForcingError as error:
            note = start_panel.refused(str(error))
        shown = self._panel.show(start, spec, note)
        notice = self._page.settings_notice(seed, fps, seconds, start)
        return (path, not note), *(gr.update(**settings) for settings in shown.values()), notice

    def settle(self, path: str | None, checked: tuple[str | None, bool], seed, fps, seconds) -> Values:
        """Show the file that is in the field by now, if it is another one. A bad one does not stay."""
        if path is None:
            return self.forget(seed, fps, seconds)
        shown_of, good = checked
        if path != shown_of:
            _, *shown = self.choose(path, seed, fps, seconds)
            return gr.skip(), *shown
        if not good:
            remove_upload(self._page.home, path)
        return gr.skip() if good else gr.update(value=None), *(gr.skip() for _ in self._panel.shown)

    def forget(self, seed, fps, seconds) -> Values:
        shown = self._panel.show(None, None)
        notice = self._page.settings_notice(seed, fps, seconds, None)
        return gr.update(value=None), *(gr.update(**settings) for settings in shown.values()), notice
