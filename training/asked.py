"""What a model is asked for when it is judged: held-out combinations in words, or the lines of a prompt file.

Half of what a model is scored on is also phrased as no caption of training is (`phrasings.py`).

A caption states some of the world's attributes; only those are scored. In a prompt file they are read from the words:
`a red balloon rises over the mountains` states scene, subject, colour and motion, and says nothing of the time of day.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, cycle, islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from prompting.attributes import AttributeReader
from training import captions, phrasings
from training.prompts import PromptFile
from training.world import ATTRIBUTES, MOTIONS, ClipParams, all_params, held_out, sample_params

_TRIES = 300
"""Draws from the world, of which the one that fits a caption best is taken."""
_MORE_PHRASES = {
    "weather": {"rain": ("rain falling", "raining"), "snow": ("snow falling", "snowing")},
    "motion": {"still": ("does not move", "not moving")},
}
"""What people say and captions do not."""


def _with_more(name: str, table: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """A table of captions with what else states its values."""
    more = (phrasings.MORE_PHRASES.get(name, {}), _MORE_PHRASES.get(name, {}))
    return {value: (*said, *chain.from_iterable(of.get(value, ()) for of in more)) for value, said in table.items()}


_TABLES: dict[str, dict[str, tuple[str, ...]]] = {
    "scene": captions.SCENE_PHRASES,
    "time": captions.TIME_PHRASES,
    "weather": _with_more("weather", captions.WEATHER_PHRASES),
    "subject": captions.SUBJECT_NOUNS,
    "colour": captions.COLOUR_WORDS,
    "motion": _with_more("motion", captions.MOTION_PHRASES),
}
_READER = AttributeReader(_TABLES, {verb for verbs in captions.VERBS.values() for verb in verbs})


@dataclass(frozen=True)
class Prompt:
    """A caption, a clip that shows what it asks for, the seed of its video, and the attributes that it states.

    Attributes:
        new_phrasing: no caption of training is phrased like it.
    """

    caption: str
    params: ClipParams
    seed: int
    stated: tuple[str, ...] = tuple(ATTRIBUTES)
    new_phrasing: bool = False

    @property
    def asked(self) -> dict[str, str]:
        """The stated attributes with their values."""
        return {name: getattr(self.params, name) for name in self.stated}


def plan_prompts(count: int, seed: int = 0) -> list[Prompt]:
    """Full captions of held-out combinations in training's phrasings, the same ones for the same seed.

    What networks in training are compared by; for the scores of a model see `plan_scored`.
    """
    rng = np.random.default_rng(seed)
    prompts = []
    for index in range(count):
        params = sample_params(rng, split="held_out")
        caption, stated = captions.make_caption(params, rng, full=True)
        prompts.append(Prompt(caption, params, seed * 10_000 + index, tuple(stated)))
    return prompts


def plan_scored(count: int, seed: int = 0) -> list[Prompt]:
    """Held-out combinations, every second one in a phrasing that is held out, too; the same ones for the same seed.

    None comes twice before all have come.
    """
    rng = np.random.default_rng(seed)
    return [_described(params, rng, seed, index) for index, params in enumerate(islice(_drawn_once(rng), count))]


def plan_long(count: int, seed: int = 0) -> list[Prompt]:
    """As `plan_scored`, for long videos: each way to move comes equally often (to one), rest only once.

    A subject that rests tells nothing of whether motion freezes, and there are few of these videos.
    """
    rng = np.random.default_rng(seed)
    drawn = _drawn_once(rng)
    moving = [motion for motion in MOTIONS if motion != "still"]
    prompts = []
    for index, motion in enumerate(islice(chain(MOTIONS, cycle(moving)), count)):
        params = next(params for params in drawn if params.motion == motion)
        prompts.append(_described(params, rng, seed, index))
    return prompts


def _drawn_once(rng: np.random.Generator) -> Iterator[ClipParams]:
    """Held-out combinations without end, as likely as `sample_params` draws them, none twice before all have come."""
    there_are = sum(held_out(params) for params in all_params())
    taken: set[ClipParams] = set()
    while True:
        params = sample_params(rng, split="held_out")
        if params not in taken:
            taken.add(params)
            yield params
        if len(taken) == there_are:
            taken.clear()


def _described(params: ClipParams, rng: np.random.Generator, seed: int, index: int) -> Prompt:
    new = index % 2 == 1
    caption = phrasings.make_phrasing(params, rng) if new else captions.make_caption(params, rng, full=True)[0]
    stated = tuple(name for name in ATTRIBUTES if params.shows(name))
    return Prompt(caption, params, seed * 10_000 + index, stated, new)


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
