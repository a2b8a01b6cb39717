"""What a model is asked for when it is judged: captions of held-out combinations, or the lines of a prompt file.

A caption states some of the world's attributes; only those are scored. In a prompt file they are read from the words:
`a red balloon rises over the mountains` states scene, subject, colour and motion, and says nothing of the time of day.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline.attributes import AttributeReader
from training import captions
from training.prompts import PromptFile
from training.world import ATTRIBUTES, ClipParams, sample_params

_TRIES = 300
"""Draws from the world, of which the one that fits a caption best is taken."""
_MORE_PHRASES = {"weather": {"rain": ("rain falling", "raining"), "snow": ("snow falling", "snowing")}}
"""What people say and captions do not."""
_TABLES: dict[str, dict[str, tuple[str, ...]]] = {
    "scene": captions.SCENE_PHRASES,
    "time": captions.TIME_PHRASES,
    "weather": {
        value: (*phrases, *_MORE_PHRASES["weather"].get(value, ()))
        for value, phrases in captions.WEATHER_PHRASES.items()
    },
    "subject": captions.SUBJECT_NOUNS,
    "colour": captions.COLOUR_WORDS,
    "motion": captions.MOTION_PHRASES,
}
_READER = AttributeReader(_TABLES, {verb for verbs in captions.VERBS.values() for verb in verbs})


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
    mentions = _READER.read(caption).mentions
    return {name: mentions[name][0].value for name in ATTRIBUTES if len(mentions.get(name, ())) == 1}


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
