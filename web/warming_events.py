"""What happens between torch.compile's box, its line below the status, and the warm-up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio as gr

from pipeline.config import OPTIONS, GenerationRequest
from pipeline.errors import SelfForcingError
from web import status
from web.events import Values

if TYPE_CHECKING:
    from web.page import Page


def wire_warming(page: Page) -> None:
    """Connect the line. To be called inside the page's blocks."""
    events = _WarmingEvents(page)
    ui = page.ui
    options = [ui.options[name] for name in OPTIONS]
    outputs = [ui.warming, ui.warming_timer]
    quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
    gr.on(
        [option.change for option in options],
        events.want_compiled,
        options,
        outputs,
        trigger_mode="always_last",
        **quiet,
    )
    page.restoring.success(events.want_compiled, options, outputs, **quiet)  # a box that was never shown tells nothing
    ui.warming_timer.tick(events.ask_warming, options, outputs, **quiet)


class _WarmingEvents:
    def __init__(self, page: Page) -> None:
        self._warm_ups = page.generator.warm_ups

    def want_compiled(self, taehv: Any, fp8: Any, compile: Any) -> Values:
        """A visitor has chosen other options: if torch.compile is among them, it is warmed up for these."""
        request = _request(taehv, fp8, compile)
        if request is None:
            return "", gr.Timer(active=False)
        self._warm_ups.begin(request)
        return self.ask_warming(taehv, fp8, compile)

    def ask_warming(self, taehv: Any, fp8: Any, compile: Any) -> Values:
        """How far it is. The page goes on asking until that cannot change any more."""
        request = _request(taehv, fp8, compile)
        # In this order: what a clip has shown is told by the state as soon as the clip is over.
        learning = request is not None and self._warm_ups.learns(request)
        state = None if request is None else self._warm_ups.state(request)
        if state is None:
            return "", gr.Timer(active=False)
        return status.warming(state, learning=learning), gr.Timer(active=state.state in ("off", "warming"))


def _request(taehv: Any, fp8: Any, compile: Any) -> GenerationRequest | None:
    """A request with these options; None unless they are options, and torch.compile is one of those that are on."""
    try:
        request = GenerationRequest(prompt="a first look around", seed=0, taehv=taehv, fp8=fp8, compile=compile)
    except SelfForcingError:
        return None
    return request if request.compile else None
