"""Held-out phrasings: training's captions cannot be phrased like them, and they state what is meant."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from training import captions, phrasings
from training.asked import stated_in
from training.phrasings import FRAMES, fill, make_phrasing
from training.world import ATTRIBUTES, ClipParams, all_params, held_out, sample_params

TOKENIZER = Path(__file__).resolve().parent.parent / "weights" / "embedded" / "tokenizer"
START, END = "<", ">"
THERE_IS = "thereis"
"""Read as one word: no other `is` of training stands before an article or a verb."""
Pairs = set[tuple[str, str]]


def read(text: str) -> list[str]:
    """The words of a text, `there is` as one."""
    return captions.words(text.replace("there is", THERE_IS))


def side_by_side(phrase: str) -> Pairs:
    """The pairs of words that stand side by side in a phrase."""
    return set(pairwise(read(phrase)))


@dataclass(frozen=True)
class Ends:
    """The words that phrases, any of which may stand in one place, begin and end with."""

    first: frozenset[str]
    last: frozenset[str]

    @classmethod
    def of(cls, phrases: Iterable[str]) -> Ends:
        said = [read(phrase) for phrase in phrases]
        return cls(frozenset(words[0] for words in said), frozenset(words[-1] for words in said))


def between(sentence: Sequence[Ends]) -> Iterator[Pairs]:
    """For each place where two parts of a sentence meet, its start and end included: the pairs of words that can."""
    start, end = (Ends(frozenset([mark]), frozenset([mark])) for mark in (START, END))
    for left, right in pairwise([start, *sentence, end]):
        yield set(product(left.last, right.first))


def parts_of_captions() -> dict[str, list[str]]:
    """All phrases, and some more, that training's captions have in the places of `captions._join`."""
    nouns = {noun for said in captions.SUBJECT_NOUNS.values() for noun in said}
    colours = {colour for said in captions.COLOUR_WORDS.values() for colour in said}
    verbs = {verb for said in captions.VERBS.values() for verb in said}
    named = [f"{c} {n}" for c in colours for n in nouns] + [f"{c} colored {n}" for c in colours for n in nouns]
    named += [f"{n} that is {c}" for c in colours for n in nouns] + [*nouns]
    return {
        "SUBJECT": [f"{article} {name}" for article in {*captions.ARTICLES, "an"} for name in named],
        "MOTION": [p.replace("{verb}", v) for said in captions.MOTION_PHRASES.values() for p in said for v in verbs],
        "SCENE": [phrase for said in captions.SCENE_PHRASES.values() for phrase in said],
        "TIME": [phrase for said in captions.TIME_PHRASES.values() for phrase in said],
        "WEATHER": [phrase for said in captions.WEATHER_PHRASES.values() for phrase in said],
    }


@pytest.fixture(scope="module")
def met_in_training() -> Pairs:
    """Every pair of words that can stand side by side in a caption of training, its start and end included."""
    parts, rng = parts_of_captions(), np.random.default_rng(0)
    orders = set()
    for left_out in range(16):  # a caption may leave out anything but the subject
        names = [
            name if left_out >> i & 1 == 0 else "" for i, name in enumerate(("MOTION", "SCENE", "TIME", "WEATHER"))
        ]
        orders |= {captions._join("SUBJECT", *names, rng) for _ in range(500)}
    assert all(any(order.startswith(opening) for order in orders) for opening in captions.OPENINGS)
    met = set().union(*(side_by_side(phrase) for phrases in parts.values() for phrase in phrases))
    ends = {name: Ends.of(phrases) for name, phrases in parts.items()}
    for order in orders:
        words = re.findall(r"\w+|,", order.replace("there is", THERE_IS))  # names are upper-case
        met |= set().union(*between([ends.get(word) or Ends.of([word]) for word in words]))
    return met


def various() -> list[ClipParams]:
    """Clips that show, together, every value, and every subject with every colour and motion."""
    first = ClipParams("city", "day", "clear", "car", "red", "right")
    named = [{name: value} for name in ("scene", "time", "weather") for value in ATTRIBUTES[name] if value != "space"]
    for name in ("colour", "motion"):
        named += [{"subject": subject, name: value} for subject in ATTRIBUTES["subject"] for value in ATTRIBUTES[name]]
    return [replace(first, **values) for values in named] + [replace(first, scene="space", time="night")]


def test_the_pairs_of_training_are_all_it_has(met_in_training: Pairs) -> None:
    rng = np.random.default_rng(1)
    for index in range(1000):
        said = [START, *read(captions.make_caption(sample_params(rng), rng, full=index % 2 == 0)[0]), END]
        assert set(pairwise(said)) <= met_in_training, " ".join(said)


@pytest.mark.parametrize("without", [(), ("{time}", "{weather}")], ids=["elsewhere", "in space"])
@pytest.mark.parametrize("frame", FRAMES)
def test_words_meet_in_every_frame_that_never_meet_in_training(
    frame: str, without: tuple[str, ...], met_in_training: Pairs
) -> None:
    shown = various()
    sentence = [
        Ends.of(phrase for params in shown for phrase in phrasings.phrases(part[1:-1], params))
        if part.startswith("{")
        else Ends.of([part])
        for part in frame.replace("there is", THERE_IS).split()
        if part not in without
    ]
    assert any(pairs.isdisjoint(met_in_training) for pairs in between(sentence))


def test_they_state_all_that_is_shown_in_words_the_shipped_tokenizer_knows() -> None:
    tokenizer, rng = AutoTokenizer.from_pretrained(TOKENIZER), np.random.default_rng(2)
    said = []
    for index, params in enumerate(filter(held_out, all_params())):
        shown = {name: value for name, value in params.to_dict().items() if params.shows(name)}
        for frame in (FRAMES[index % len(FRAMES)], FRAMES[(index + 5) % len(FRAMES)]):
            caption = fill(frame, params, rng)
            assert stated_in(caption) == shown, caption
            said.append(caption)
    read = tokenizer(said).input_ids
    assert not any(tokenizer.unk_token_id in ids for ids in read)
    assert 20 < max(map(len, read)) <= captions.MAX_TOKENS


@pytest.mark.parametrize("name", ["does", "doing", "place", "subject", "scene", "time", "weather"])
def test_there_is_a_phrase_for_everything(name: str) -> None:
    for params in various():
        assert bool(phrasings.phrases(name, params)) == params.shows(name)


def test_untrue_skies_are_not_spoken_of() -> None:
    fog = ClipParams("city", "night", "fog", "car", "red", "right")
    assert "under the moon" in phrasings.phrases("time", replace(fog, weather="clear"))
    assert not set(phrasings.phrases("time", fog)) & set(captions.OF_CLEAR_SKIES)


def test_a_seed_gives_a_phrasing() -> None:
    params = ClipParams("city", "night", "fog", "car", "red", "right")
    said = [[make_phrasing(params, np.random.default_rng(seed)) for seed in range(40)] for _ in range(2)]
    assert said[0] == said[1] and len(set(said[0])) > 20
