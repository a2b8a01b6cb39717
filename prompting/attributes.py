"""Reads from a prompt what it states about a small world: `a red balloon rises` states subject, colour and motion.

All it knows of the world are tables: attribute -> value -> the phrases that state it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

Words = tuple[str, ...]
Table = Mapping[str, Sequence[str]]
"""Value -> phrases."""

_Index = dict[str, list[tuple[str, str, Words]]]
"""First word -> (value, phrase, words) of what begins with it."""

VERB = "{verb}"
"""Stands in phrases of motion for any verb of the world."""
ORDER = ("weather", "time", "scene", "subject", "colour", "motion")
"""Weather first and motion last, and no word is read twice: falling snow is no place and no subject that falls."""
_AROUND = ("weather", "time", "scene")
"""What is also understood without its first words: `sunny day` instead of `on a sunny day`."""
_BEFORE_DENIED = frozenset(("a", "an", "any", "the", "in", "on", "at"))
"""What may stand between `without` and what is denied."""
_TOKEN = re.compile(r"[^\W_]+|,")
_SHORTENED_NOT = re.compile(r"n['\u2019]t\b", re.IGNORECASE)


def words_of(text: str) -> Words:
    """A text as a small model's tokenizer splits it: words and commas, in lower case."""
    return tuple(_TOKEN.findall(text.lower()))


_LEADING = frozenset(words_of("a among an at by during from in near of on over the through to under while with"))
"""Words that a phrase begins with and means the same without."""


@dataclass(frozen=True)
class Mention:
    """A value, the phrase of the table that states it, and the places of the words that do."""

    value: str
    phrase: str
    places: range


@dataclass(frozen=True)
class Reading:
    """What was found in `words`."""

    words: Words
    mentions: Mapping[str, tuple[Mention, ...]]
    """Attribute -> what states it, in order. Several mentions name several values, and none is surer than another."""
    denied: Mapping[str, frozenset[str]]
    """Attribute -> the values that are said not to be there."""
    unread: Words
    """The words that no attribute was read from, with "" in the place of those that one was."""


class AttributeReader:
    """Finds phrases in prompts.

    Args:
        tables: for each attribute of `ORDER`, its values and the phrases that state them.
        verbs: what may stand in the place of `VERB`.
        negators: words like `without`, after which a value is denied and not stated.
    """

    def __init__(self, tables: Mapping[str, Table], verbs: Iterable[str], negators: Iterable[str] = ()) -> None:
        self._negators = frozenset(negators)
        verbs = sorted(verbs)
        self._phrases: dict[str, _Index] = {}
        self._cores: dict[str, _Index] = {}
        for name in ORDER:
            filled = {
                (value, phrase.replace(VERB, verb))
                for value, phrases in tables[name].items()
                for phrase in phrases
                for verb in (verbs if VERB in phrase else ("",))
            }
            listed = sorted((value, phrase, words_of(phrase)) for value, phrase in filled)
            self._phrases[name] = _indexed(listed)
            self._cores[name] = _indexed((value, phrase, _core(words)) for value, phrase, words in listed)

    def read(self, text: str) -> Reading:
        """What the text states. Only the longest phrases count for an attribute, the first one of each value."""
        words = words_of(_SHORTENED_NOT.sub(" not", text) if "not" in self._negators else text)
        rest, mentions, denied = list(words), {}, {}
        for name in ORDER:
            if name == "colour":  # it stands beside its subject, whose words have been read
                found = self._colours(words)
                denied[name] = self._denied_colours(words, rest)
            else:
                said_not: dict[str, range] = {}
                found = self._longest(tuple(rest), self._phrases[name], said_not)
                if len(found) != 1 and name in _AROUND:
                    by_core = self._longest(tuple(rest), self._cores[name], said_not)
                    found = by_core if len(by_core) == 1 else found or by_core
                denied[name] = frozenset(said_not)
                for places in said_not.values():
                    _take(rest, range(places.start - 1, places.stop))
            if found:
                mentions[name] = found
            if len(found) == 1:
                _take(rest, found[0].places)
        return Reading(words, mentions, denied, tuple(rest))

    def find(self, name: str, words: Words) -> list[Mention]:
        """All phrases of an attribute in the words that are not denied, wherever they stand; they may overlap."""
        mentions = [Mention(*match) for match in _matches(words, self._phrases[name])]
        return [mention for mention in mentions if not self.is_denied(words, mention.places.start)]

    def is_denied(self, words: Words, place: int) -> bool:
        """Whether a word of denial stands before the one in this place, with no more than articles between them."""
        return self._negator_before(words, place) is not None

    def _longest(self, words: Words, phrases: _Index, denied: dict[str, range]) -> tuple[Mention, ...]:
        found: dict[str, Mention] = {}
        for value, phrase, places in _matches(words, phrases):
            if (negator := self._negator_before(words, places.start)) is not None:
                denied.setdefault(value, range(negator + 1, places.stop))
            elif value not in found or len(places) > len(found[value].places):
                found[value] = Mention(value, phrase, places)
        longest = max((len(mention.places) for mention in found.values()), default=0)
        best = (mention for mention in found.values() if len(mention.places) == longest)
        return tuple(sorted(best, key=lambda mention: mention.places.start))

    def _negator_before(self, words: Words, start: int) -> int | None:
        for place in range(start - 1, max(-1, start - 4), -1):
            if words[place] in self._negators:
                return place
            if words[place] not in _BEFORE_DENIED:
                break
        return None

    def _denied_colours(self, words: Words, rest: list[str]) -> frozenset[str]:
        """Also takes the words that deny them. Of several phrases in one place the longest counts: `dark red`."""
        denied: dict[int, tuple[str, range]] = {}
        for value, _, places in _matches(words, self._phrases["colour"]):
            negator = self._negator_before(words, places.start)
            if negator is not None and all(rest[place] for place in places):
                span = range(negator + 1, places.stop)
                if negator not in denied or len(span) > len(denied[negator][1]):
                    denied[negator] = value, span
        for _, span in denied.values():
            _take(rest, span)
        return frozenset(value for value, _ in denied.values())

    def _colours(self, words: Words) -> tuple[Mention, ...]:
        """The colours beside subjects that are not denied: `a red ball`, `a red colored ball`, `a ball that is red`."""
        found: dict[str, Mention] = {}
        for _, _, noun in _matches(words, self._phrases["subject"]):
            beside = noun.start - 1 if noun.start and words[noun.start - 1] == "colored" else noun.start
            that_is = noun.stop + 2 if words[noun.stop : noun.stop + 2] == ("that", "is") else None
            for value, phrase, places in _matches(words, self._phrases["colour"]):
                if self.is_denied(words, places.start):
                    continue
                if places.stop == beside or places.start == that_is:
                    found.setdefault(value, Mention(value, phrase, places))
        return tuple(sorted(found.values(), key=lambda mention: mention.places.start))


def _core(phrase: Words) -> Words:
    start = next((index for index, word in enumerate(phrase) if word not in _LEADING), 0)
    return phrase[start:]


def _indexed(phrases: Iterable[tuple[str, str, Words]]) -> _Index:
    index: _Index = {}
    for value, phrase, words in phrases:
        index.setdefault(words[0], []).append((value, phrase, words))
    return index


def _matches(words: Words, phrases: _Index) -> Iterator[tuple[str, str, range]]:
    """(value, phrase, places) of everything in the words that is one of the phrases."""
    for start, first in enumerate(words):
        for value, phrase, wanted in phrases.get(first, ()):
            if words[start : start + len(wanted)] == wanted:
                yield value, phrase, range(start, start + len(wanted))


def _take(words: list[str], places: range) -> None:
    for place in places:
        words[place] = ""
