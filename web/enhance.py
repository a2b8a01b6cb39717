"""Suggestions for prompts: who makes them for which model, and the box under the prompt that shows one.

A suggestion is shown to be read and changed. It becomes the prompt when its visitor says so, and never by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import gradio as gr

from pipeline.errors import InvalidRequest, OptionUnavailable
from prompting.enhancer import Suggestion
from prompting.language import LanguageEnhancer
from web.adapter import AdaptedPipeline

TEMPLATES, LANGUAGE = "templates", "language"
TITLES = {TEMPLATES: "Templates", LANGUAGE: "Language model"}
_SHOWN_WORDS = 12
_HINT = (
    "<p>This model wants long, detailed prompts: who and what, where, in which light, how it moves. The operator of "
    "this page gets an Enhance button, which writes them out, with <code>python app.py --enhancer</code>.</p>"
)
_LIVE = '<p class="sf-sr" role="status" aria-live="polite"></p>'
"""Is there from the beginning and filled by a script: a region that comes together with its text is often not read."""


class PromptHelp:
    """Asks the model's own templates or the language model, whichever is wanted and there."""

    def __init__(self, language: LanguageEnhancer | None = None) -> None:
        self._language = language
        self._asking: dict[str, threading.Event] = {}
        self._lock = threading.Lock()

    def kinds(self, model: AdaptedPipeline) -> list[str]:
        """What can make suggestions for this model; empty: nothing."""
        return [
            kind for kind, enhancer in ((TEMPLATES, model.enhancer), (LANGUAGE, self._language)) if enhancer is not None
        ]

    def suggest(
        self, model: AdaptedPipeline, prompt: Any, variant: Any = 0, by: Any = "", session: str | None = None
    ) -> Suggestion:
        """A suggestion, by the kind that is named, or else by the first.

        Args:
            session: Whose question it is: the language model answers one of each at a time, so the next one, or `drop`,
                ends it. None: nobody can.

        Raises:
            InvalidRequest, OptionUnavailable: with a sentence for the visitor.
            SelfForcingError: as `Enhancer.enhance` has it.
        """
        if not isinstance(by, str) or by not in ("", *TITLES):
            raise InvalidRequest(f"by must be {TEMPLATES!r} or {LANGUAGE!r}, or left empty for the first that is here.")
        kinds = self.kinds(model)
        if not kinds or by and by not in kinds:
            missing = "no templates" if by == TEMPLATES else "no language model" if by else "nothing"
            raise OptionUnavailable(
                f"There is {missing} here to make suggestions for the prompts of {model.name}. Write the "
                "prompt yourself."
            )
        if (by or kinds[0]) == TEMPLATES:
            assert model.enhancer is not None
            return model.enhancer.enhance(prompt, variant)
        assert self._language is not None
        with self._question(session) as dropped:
            suggestion = self._language.enhance(prompt, variant, dropped)
        if not (ignored := model.unknown_words(suggestion.text)):
            return suggestion
        listed = ", ".join(ignored[:_SHOWN_WORDS]) + (" …" if len(ignored) > _SHOWN_WORDS else "")
        return Suggestion(suggestion.text, (*suggestion.notes, f"This video model ignores: {listed}."))

    def drop(self, session: str) -> None:
        """End the question of a visitor who no longer wants an answer."""
        with self._lock:
            if (dropped := self._asking.pop(session, None)) is not None:
                dropped.set()

    @contextmanager
    def _question(self, session: str | None) -> Iterator[threading.Event]:
        dropped = threading.Event()
        if session is None:
            yield dropped
            return
        with self._lock:
            if (older := self._asking.get(session)) is not None:
                older.set()
            self._asking[session] = dropped
        try:
            yield dropped
        finally:
            with self._lock:
                if self._asking.get(session) is dropped:
                    del self._asking[session]


class SuggestionBox:
    """The Enhance button and what it opens. To be made inside a `gr.Blocks`, under the prompt."""

    def __init__(self) -> None:
        self.button = gr.Button("Enhance", size="sm", elem_id="enhance", min_width=0, visible=False)
        self.by = gr.Radio(
            [(title, kind) for kind, title in TITLES.items()],
            value=TEMPLATES,
            label="Enhance with",
            elem_id="enhance-by",
            visible=False,
        )
        self.hint = gr.HTML(_HINT, elem_id="prompt-hint", padding=False, visible=False)
        with gr.Column(visible=False, min_width=0, elem_id="suggestion-box") as self.box:
            self.text = gr.Textbox(label="Suggestion", lines=3, max_lines=8, elem_id="suggestion")
            self.notes = gr.HTML("", elem_id="suggestion-notes", padding=False)
            with gr.Row(elem_id="suggestion-buttons"):
                self.use = gr.Button("Use this", size="sm", elem_id="suggestion-use", min_width=0)
                self.dismiss = gr.Button("Dismiss", size="sm", elem_id="suggestion-dismiss", min_width=0)
        gr.HTML(_LIVE, elem_id="suggestion-live", padding=False)
        # Which prompt was asked about last, and how often. Not a `gr.State`: it travels with the event.
        self.asked = gr.Button("", visible="hidden", elem_id="enhance-asked")

    def fitted_to(self, kinds: list[str], model: AdaptedPipeline | None = None) -> dict[Any, dict[str, Any]]:
        """Component -> its settings, where these make suggestions for this model; None: there is none."""
        # Whoever has a list of words writes short sentences of those; only a model that reads any text wants long ones.
        wants_more = model is not None and model.spec is not None and not kinds and not model.known_words()
        return {
            self.button: {"visible": bool(kinds)},
            self.by: {"visible": len(kinds) > 1},
            self.hint: {"visible": wants_more},
        }

    @property
    def shown(self) -> list[Any]:
        """The components that change with a suggestion."""
        return [self.box, self.text, self.notes, self.use, self.button]

    def waiting(self) -> tuple[Any, ...]:
        """Values of `shown` while somebody waits for a language model. What stood there before stays."""
        notes = _notes(["The language model is writing. Meanwhile you can generate, or Dismiss this."])
        busy = gr.update(interactive=False)
        return gr.update(visible=True), busy, notes, busy, busy

    def showing(self, suggestion: Suggestion) -> tuple[Any, ...]:
        free = gr.update(interactive=True)
        text = gr.update(value=suggestion.text, interactive=True)
        return gr.update(visible=True), text, _notes(suggestion.notes), free, free

    def failed(self, text: str) -> tuple[Any, ...]:
        """Values of `shown` where no suggestion came; `text` is the one that stood there before, or empty."""
        free = gr.update(interactive=True)
        return gr.update(visible=bool(text)), free, "", free, free

    def closed(self) -> tuple[Any, ...]:
        free = gr.update(interactive=True)
        return gr.update(visible=False), gr.update(value="", interactive=True), "", free, free


def _notes(sentences: Any) -> str:
    lines = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f"<ul>{lines}</ul>" if lines else ""
