"""What happens between the Enhance button, the suggestion and the prompt. None of it waits for the video model."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import gradio as gr

from pipeline.config import MAX_VARIANT
from pipeline.errors import Cancelled, InvalidRequest, SelfForcingError
from web.enhance import LANGUAGE
from web.events import Values, refusal, session_of

if TYPE_CHECKING:
    from web.page import Page


def wire_suggestions(page: Page) -> None:
    """Connect the components of the suggestion. To be called inside the page's blocks."""
    events = _SuggestionEvents(page)
    box, prompt = page.ui.suggestion, page.ui.prompt
    quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
    # In the queue, though they never wait there: the page shows no errors of events outside of it.
    aside = {**quiet, "queue": True, "concurrency_limit": None}
    box.button.click(events.ask, [prompt, box.by, box.text, box.asked], [box.asked, *box.shown], **aside)
    box.use.click(events.take, [box.text], [prompt, *box.shown], **aside).success(
        None, None, None, js=_focus("#prompt textarea"), **quiet
    )
    box.notes.change(None, [box.notes], None, js=_ANNOUNCE, **quiet)
    box.dismiss.click(events.dismiss, None, box.shown, **quiet).then(None, None, None, js=_focus("#enhance"), **quiet)
    page.blocks.unload(events.leave)


_ANNOUNCE = """html => {
  const told = new DOMParser().parseFromString(html ?? "", "text/html").querySelectorAll("li");
  const region = document.querySelector("#suggestion-live [role=status]");
  if (region) region.textContent = [...told].map(line => line.textContent).join(" ");
  return [];
}"""
"""Tells a screen reader the notes. They are parsed, not shown: nothing in them runs."""


class _SuggestionEvents:
    def __init__(self, page: Page) -> None:
        self._page = page
        self._box = page.ui.suggestion

    def ask(self, prompt: str, by: str, text: str, asked: str, request: gr.Request) -> Iterator[Values]:
        variant, asked = _next_variant(asked, f"{by}|{prompt}")
        help = self._page.help
        try:
            model = self._page.generator.pipeline
            kinds = help.kinds(model)
            by = by if len(kinds) > 1 else ""  # with one kind there is no choice on the page
            if (by or kinds[:1]) in (LANGUAGE, [LANGUAGE]):
                yield gr.skip(), *self._box.waiting()
            suggestion = help.suggest(model, prompt, variant, by, session_of(request))
        except Cancelled:  # Dismiss, or the next question, has drawn the box already
            yield tuple(gr.skip() for _ in range(1 + len(self._box.shown)))
        except SelfForcingError as error:
            yield gr.skip(), *self._box.failed(text)
            raise refusal(error) from error
        else:
            yield asked, *self._box.showing(suggestion)

    def take(self, text: str) -> Values:
        if not isinstance(text, str) or not text.strip():
            raise refusal(InvalidRequest("The suggestion is empty. Dismiss it, or press Enhance again."))
        return text, *self._box.closed()

    def dismiss(self, request: gr.Request) -> Values:
        self._page.help.drop(session_of(request))
        return self._box.closed()

    def leave(self, request: gr.Request) -> None:
        self._page.help.drop(session_of(request))


def _next_variant(asked: Any, question: str) -> tuple[int, str]:
    """The number of the variant to show now, and what to remember for the next time."""
    key = f"{zlib.crc32(question.encode(errors='replace')):x}"
    last, _, count = str(asked).partition(":")
    variant = (int(count) + 1) % (MAX_VARIANT + 1) if last == key and count.isdecimal() else 0
    return variant, f"{key}:{variant}"


def _focus(selector: str) -> str:
    # The button that was pressed is gone; the keyboard goes on from here.
    return f"() => {{ document.querySelector('{selector}')?.focus(); return []; }}"
