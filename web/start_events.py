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
        events.choose, [panel.file, *numbers], [panel.bad, *outputs[1:]], trigger_mode="always_last", **reading
    )
    chosen.then(events.settle, [panel.file, panel.bad, *numbers], outputs, **reading)
    gr.on([panel.file.clear, panel.remove.click], events.forget, numbers, outputs, queue=False, **quiet)


class _StartEvents:
    def __init__(self, page: Page, panel: StartPanel) -> None:
        self._page = page
        self._panel = panel

    def choose(self, path: str | None, seed, fps, seconds) -> Values:
        """Check the file and show what the model will see of it, or what is wrong with it."""
        spec, start, note, bad = None, None, "", None
        try:
            model = self._page.generator.pipeline
            spec, start = model.spec, self._page.starts.read(path, model, remove=False)
        except SelfForcingError as error:
            note, bad = start_panel.refused(str(error)), path
        shown = self._panel.show(start, spec, note)
        notice = self._page.settings_notice(seed, fps, seconds, start)
        return bad, *(gr.update(**settings) for settings in shown.values()), notice

    def settle(self, path: str | None, bad: str | None, seed, fps, seconds) -> Values:
        """Show the file that is in the field by now. A bad one does not stay."""
        if path is None:
            return self.forget(seed, fps, seconds)
        if path == bad:
            remove_upload(self._page.home, path)
            return gr.update(value=None), *(gr.skip() for _ in range(len(self._panel.shown)))
        _, *shown = self.choose(path, seed, fps, seconds)
        return gr.skip(), *shown

    def forget(self, seed, fps, seconds) -> Values:
        shown = self._panel.show(None, None)
        notice = self._page.settings_notice(seed, fps, seconds, None)
        return gr.update(value=None), *(gr.update(**settings) for settings in shown.values()), notice
