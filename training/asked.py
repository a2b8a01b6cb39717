"""What a model is asked for when it is judged: captions of held-out combinations, or the lines of a prompt file.

A caption states some of the world's attributes; only those are scored. In a prompt file they are read from the words:
`a red balloon rises over the mountains` states scene, subject, colour and motion, and says nothing of the time of day.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from training import captions
from training.prompts import PromptFile
from training.world import ATTRIBUTES, ClipParams, sample_params

_TRIES = 300
"""Draws from the world, of which the one that fits a caption best is taken."""
_LEADING = frozenset(captions.words("a among an at by during from in near of on over the through to under while with"))
"""Words that a phrase begins with and means the same without."""
_SUBJECT_TABLES = {"subject": captions.SUBJECT_NOUNS, "colour": captions.COLOUR_WORDS}

_PLACES_AND_TIMES = ("weather", "time", "scene")
_MORE_PHRASES = {"weather": {"rain": ("rain falling", "raining"), "snow": ("snow falling", "snowing")}}
"""What people say and captions do not."""

Words = tuple[str, ...]


@dataclass(frozen=True)
class Prompt:
    """A caption, a clip that shows what it asks for, the seed of its video, and the attributes that it states."""

    caption: str
    params: ClipParams
    seed: int
    stated: tuple[str, ...] = tuple(ATTRIBUTES)


def plan_prompts(count: int, seed: int = 0) -> list[Prompt]:
    """Full captions of held-out combinations, the same ones for the same seed."""
    rng = np.random.default_rng(seed)
    prompts = []
    for index in range(count):
        params = sample_params(rng, split="held_out")
        caption, stated = captions.make_caption(params, rng, full=True)
        prompts.append(Prompt(caption, params, seed * 10_000 + index, tuple(stated)))
    return prompts


def read_prompts(path: Path, tokenizer: PreTrainedTokenizerBase, length: int, seed: int = 0) -> list[Prompt]:
    """The prompts of a file, one a line. What a line leaves open, the clip it is compared with has by chance.

    Raises:
        TrainingDataError: the file cannot be read or is empty, or a line is empty or too long for the text encoder.
    """
    rng = np.random.default_rng(seed)
    prompts = []
    for index, caption in enumerate(PromptFile(path, tokenizer, length).prompts):
        params, stated = _fitting_clip(stated_in(caption), rng)
        prompts.append(Prompt(caption, params, seed * 10_000 + index, stated))
    return prompts


def stated_in(caption: str) -> dict[str, str]:
    """The attributes that a caption states, read from its words. Where it could mean two values, it states neither."""
    words = rest = tuple(captions.words(caption))
    found = {}
    # Weather first and motion last, and no word is read twice: falling snow is no place and no subject that falls.
    for name in ("weather", "time", "scene", "subject", "colour", "motion"):
        if name == "colour":  # it stands beside its subject
            value, places = _colour(words), set()
        else:
            phrases = _phrases(name)
            value, places = _longest(rest, phrases)
            if value is None and name in _PLACES_AND_TIMES:
                # A phrase without its first words: `sunny day` instead of `on a sunny day`.
                value, places = _longest(rest, [(value, _core(phrase)) for value, phrase in phrases])
        if value is not None:
            found[name] = value
            rest = tuple("" if index in places else word for index, word in enumerate(rest))
    return {name: found[name] for name in ATTRIBUTES if name in found}


def _phrases(name: str) -> list[tuple[str, Words]]:
    """Pairs of a value and a phrase that states it, with every verb of the world in the place of `{verb}`."""
    table = _SUBJECT_TABLES.get(name) or getattr(captions, f"{name.upper()}_PHRASES")
    verbs = sorted({verb for options in captions.VERBS.values() for verb in options})
    phrases = set()
    for value, options in table.items():
        for phrase in (*options, *_MORE_PHRASES.get(name, {}).get(value, ())):
            for verb in verbs if "{verb}" in phrase else ("",):
                phrases.add((value, tuple(captions.words(phrase.replace("{verb}", verb)))))
    return sorted(phrases)


def _core(phrase: Words) -> Words:
    start = next((index for index, word in enumerate(phrase) if word not in _LEADING), 0)
    return phrase[start:]


def _spans(words: Words, phrase: Words) -> Iterator[int]:
    """Where in the words a phrase begins."""
    return (start for start in range(len(words) - len(phrase) + 1) if words[start : start + len(phrase)] == phrase)


def _longest(words: Words, phrases: Iterable[tuple[str, Words]]) -> tuple[str | None, set[int]]:
    """The value whose phrase is the longest in the words, and where it stands; None if two are equally long."""
    matches: dict[str, set[int]] = {}
    for value, phrase in phrases:
        for start in _spans(words, phrase):
            if len(phrase) > len(matches.get(value, ())):
                matches[value] = set(range(start, start + len(phrase)))
    best = [value for value, places in matches.items() if len(places) == max(map(len, matches.values()))]
    return (best[0], matches[best[0]]) if len(best) == 1 else (None, set())


def _colour(words: Words) -> str | None:
    """The colour beside the subject: `a red ball`, `a red colored ball`, `a ball that is red`."""
    found = set()
    for _, noun in _phrases("subject"):
        for start in _spans(words, noun):
            before = tuple(word for word in words[:start] if word != "colored")
            after = words[start + len(noun) :]
            for value, phrase in _phrases("colour"):
                if before[-len(phrase) :] == phrase or after[: len(phrase) + 2] == ("that", "is", *phrase):
                    found.add(value)
    return found.pop() if len(found) == 1 else None


def _fitting_clip(stated: dict[str, str], rng: np.random.Generator) -> tuple[ClipParams, tuple[str, ...]]:
    """A clip that shows what is stated, and those of the stated attributes that the world can show together."""

    def agreement(params: ClipParams) -> int:
        return sum(getattr(params, name) == value for name, value in stated.items())

    # The scene decides what else there can be (space has no time of day), so it counts more than all others.
    def fit(params: ClipParams) -> tuple[bool, int]:
        return params.scene == stated.get("scene", params.scene), agreement(params)

    params = max((sample_params(rng) for _ in range(_TRIES)), key=fit)
    shown = []
    for name, value in stated.items():
        try:
            params = replace(params, **{name: value})
        except ValueError:
            continue
        shown.append(name)
    return params, tuple(shown)
