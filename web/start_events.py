"""What happens between the panel for a video's start and the rest of the page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio as gr

from pipeline.errors import SelfForcingError
from web import start_panel
from web.events import Values
from web.start_panel import StartPanel
from web.starts import READERS

if TYPE_CHECKING:
    from web.page import Page


def wire_start(page: Page, panel: StartPanel) -> None:
    """Connect the panel's components. To be called inside the page's blocks."""
    events = _StartEvents(page, panel)
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    numbers = [page.ui.seed, page.ui.fps, page.ui.seconds]
    outputs = [*panel.shown, page.ui.settings_notice]
    panel.file.upload(
        events.choose, [panel.file, *numbers], outputs, concurrency_limit=READERS, concurrency_id="starts", **quiet
    )
    gr.on([panel.file.clear, panel.remove.click], events.forget, numbers, outputs, queue=False, **quiet)


class _StartEvents:
    def __init__(self, page: Page, panel: StartPanel) -> None:
        self._page = page
        self._panel = panel

    def choose(self, path: str | None, seed, fps, seconds) -> Values:
        """Check the file and show what the model will see of it. A bad one does not stay."""
        spec, start, note, kept = None, None, "", gr.skip()
        try:
            model = self._page.generator.pipeline
            spec, start = model.spec, self._page.starts.read(path, model)
        except SelfForcingError as error:
            note, kept = start_panel.refused(str(error)), gr.update(value=None)
        shown = self._panel.show(start, spec, note)
        notice = self._page.settings_notice(seed, fps, seconds, start)
        return kept, *(gr.update(**settings) for settings in shown.values()), notice

    def forget(self, seed, fps, seconds) -> Values:
        shown = self._panel.show(None, None)
        notice = self._page.settings_notice(seed, fps, seconds, None)
        return gr.update(value=None), *(gr.update(**settings) for settings in shown.values()), notice
