"""Help with prompts: a few words in, a longer prompt out, for a person to read and change before it is used.

Two things can do it: the sentence templates of a model with a small world (`prompting.templates`) and a language
model that the user picks (`prompting.language`). Neither ever touches a request by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Suggestion:
    """A prompt that may be used instead of the one that was asked about, and what there is to say of it."""

    text: str
    notes: tuple[str, ...] = ()
    """Sentences: what was added, what was left out and why."""


class Enhancer(Protocol):
    """What makes suggestions."""

    def enhance(self, prompt: str, variant: int = 0) -> Suggestion:
        """Suggest a longer prompt. The same prompt and variant give the same text, another variant another one.

        Raises:
            InvalidRequest: the prompt is empty or too long, or the variant is not from 0 to `MAX_VARIANT`.
            SelfForcingError: there is no suggestion; says why, and what to do.
        """
