"""Fills a prompt in from the templates of a model that knows one small world. Takes milliseconds and no download.

The world is data: `enhance.json` in the model folder says what there is, how it is called and what goes together.
This module reads what a prompt states, keeps it, adds what it leaves open, and reads its own sentence once more before
it hands it on. What an attribute is called and the order in which they are read and chosen (`ORDER`, `_FILL_ORDER`) are
those of the embedded model's world, and in the code: a file can change their values and phrases, not add an attribute.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import checked_prompt, checked_variant
from pipeline.errors import SelfForcingError, WeightsError
from prompting.attributes import ORDER, VERB, AttributeReader, Mention, Reading, words_of
from prompting.enhancer import Suggestion

TEMPLATES_FILE = "enhance.json"
FORMAT = 1
_FILL_ORDER = ("subject", "scene", "weather", "time", "colour", "motion")
"""What decides most is chosen first."""
_TRIES = 24
"""Sentences that are drawn for each new one, before it is taken that there are no more."""
_SHOWN_WORDS = 12
_NEAR = 2
"""Words that may stand between a colour and its subject: `a red and shiny balloon`."""
_LINKS = frozenset(("is", "in", "that", "was", "colored", ","))
"""Words that may stand between a subject and the colour behind it: `the balloon is red`."""


@dataclass(frozen=True)
class _World:
    """The contents of `enhance.json`."""

    max_words: int
    """Words and commas that the model reads."""
    attributes: Mapping[str, Mapping[str, tuple[str, ...]]]
    """Attribute -> value -> phrases that the model knows. A phrase that stands there twice is said more often."""
    understood: Mapping[str, Mapping[str, tuple[str, ...]]]
    """The same for what people say and the model does not know."""
    verbs: Mapping[str, tuple[str, ...]]
    """Subject -> what it does, for the place of `VERB` in a motion's phrase."""
    never: Mapping[str, Mapping[str, tuple[str, ...]]]
    """Attribute -> value -> other attributes that mean nothing beside it."""
    only_with: Mapping[str, Mapping[str, str]]
    """Phrase -> attribute -> the value without which it is not said."""
    usual: Mapping[str, Mapping[str, Mapping[str, tuple[str, ...]]]]
    """Attribute -> value -> other attribute -> the values that are filled in beside it, as often as they stand here."""
    sentences: tuple[str, ...]
    """With the attributes' names in braces; the colour is part of the subject."""
    negators: tuple[str, ...]
    fillers: frozenset[str]
    """Words that say nothing by themselves."""

    @classmethod
    def from_json(cls, data: Any) -> _World:
        """Raises KeyError, TypeError, ValueError or AttributeError if the data has another shape."""
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}")

        def phrases(table: Any) -> dict[str, tuple[str, ...]]:
            return {value: tuple(_text(phrase) for phrase in options) for value, options in table.items()}

        world = cls(
            max_words=int(data["max_words"]),
            attributes={name: phrases(data["attributes"][name]) for name in ORDER},
            understood={name: phrases(table) for name, table in data["understood"].items()},
            verbs=phrases(data["verbs"]),
            never={name: phrases(table) for name, table in data["never"].items()},
            only_with={phrase: dict(needs.items()) for phrase, needs in data["only_with"].items()},
            usual={
                name: {value: phrases(beside) for value, beside in table.items()}
                for name, table in data["usual"].items()
            },
            sentences=tuple(_text(sentence) for sentence in data["sentences"]),
            negators=tuple(_text(word) for word in data["negators"]),
            fillers=frozenset(_text(word) for word in data["fillers"]),
        )
        if not world.sentences or not all(all(table.values()) and table for table in world.attributes.values()):
            raise ValueError("an empty table")
        if set(world.verbs) != set(world.attributes["subject"]):
            raise ValueError("verbs of other subjects")
        for needs in world.only_with.values():
            if not all(value in world.attributes[name] for name, value in needs.items()):
                raise ValueError("a phrase that needs an unknown value")
        for sentence in world.sentences:
            sentence.format(**dict.fromkeys(ORDER, ""))
        return world


@dataclass(frozen=True)
class _Asked:
    """What a prompt comes to before anything is added."""

    reading: Reading
    stated: dict[str, Mention]
    impossible: dict[str, Mention]
    """What is stated, but means nothing beside something else that is."""
    verb: str
    """What the subject does, if the prompt does not say where to; or ""."""
    denied_verbs: tuple[str, ...]
    """What the subject is said not to do, in the prompt's words. It then rests, unless a motion is stated."""
    unused: tuple[str, ...]
    """Words that there is no place for."""

    def may_do(self, verb: str) -> bool:
        return all(_stem(verb) != _stem(denied) for denied in self.denied_verbs)


class TemplateEnhancer:
    """Makes suggestions from a model folder's templates. Knows nothing of torch; any thread may ask.

    Raises:
        WeightsError: the data are not what such a file holds.
    """

    def __init__(self, data: Any, source: str = TEMPLATES_FILE) -> None:
        try:
            self._world = world = _World.from_json(data)
            heard = {
                name: {
                    value: (*phrases, *world.understood.get(name, {}).get(value, ()))
                    for value, phrases in world.attributes[name].items()
                }
                for name in ORDER
            }
            self._verbs = frozenset(verb for verbs in world.verbs.values() for verb in verbs)
            self._known = {
                name: {
                    phrase.replace(VERB, verb)
                    for phrases in world.attributes[name].values()
                    for phrase in phrases
                    for verb in (self._verbs if VERB in phrase else ("",))
                }
                for name in ORDER
            }
            self._reader = AttributeReader(heard, self._verbs, world.negators)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise WeightsError(f"The {source} is damaged or of another version. Get the model folder again.") from error

    @classmethod
    def from_folder(cls, folder: Path) -> TemplateEnhancer | None:
        """The enhancer of a model folder; None if the folder has none.

        Raises:
            WeightsError: the file cannot be read.
        """
        source = f"{TEMPLATES_FILE} of {folder.name!r}"
        try:
            data = json.loads((folder / TEMPLATES_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise WeightsError(f"The {source} cannot be read. Get the model folder again.") from error
        return cls(data, source)

    @property
    def max_words(self) -> int:
        """The longest suggestion, in words and commas."""
        return self._world.max_words

    @property
    def vocabulary(self) -> frozenset[str]:
        """Every word that a suggestion can hold."""
        world = self._world
        tables = (*world.attributes.values(), world.verbs)
        phrases = [phrase for table in tables for options in table.values() for phrase in options]
        phrases += [sentence.format(**dict.fromkeys(ORDER, "")) for sentence in world.sentences]
        words = {word for phrase in phrases for word in words_of(phrase.replace(VERB, ""))}
        return frozenset(words - {","} | {"a", "an", "the"})

    def enhance(self, prompt: str, variant: int = 0) -> Suggestion:
        """See `Enhancer.enhance`. If there are fewer variants than asked for, they come round again."""
        prompt, variant = checked_prompt(prompt), checked_variant(variant)
        asked = self._understand(prompt)
        found: dict[str, Suggestion] = {}
        for number in range(_TRIES * (variant + 2)):
            text, added = self._draw(asked, random.Random(_seed_of(prompt, number)))
            if text not in ("", prompt, *found) and self._is_true(text, asked, added):
                found[text] = Suggestion(text, tuple(self._notes(asked, added)))
            if len(found) > variant:
                break
        if not found:
            raise SelfForcingError("The templates have no other sentence for this prompt. Put it in other words.")
        return list(found.values())[variant % len(found)]

    # ---- what the prompt says

    def _understand(self, prompt: str) -> _Asked:
        reading = self._reader.read(prompt)
        stated = {name: mentions[0] for name, mentions in reading.mentions.items() if name != "colour"}
        if (colour := self._colour(reading, stated.get("subject"))) is not None:
            stated["colour"] = colour
        never = [
            name
            for decisive, table in self._world.never.items()
            if decisive in stated
            for name in table.get(stated[decisive].value, ())
        ]
        impossible = {name: stated.pop(name) for name in never if name in stated}
        used = {place for mention in (*stated.values(), *impossible.values()) for place in mention.places}
        stems = {_stem(verb) for verb in self._verbs}
        left, denied_verbs = [], []
        for place, word in enumerate(reading.unread):
            if word in ("", ",") or place in used or word in self._world.fillers:
                continue
            if _stem(word) in stems and self._reader.is_denied(reading.words, place):
                denied_verbs.append(word)
            else:
                left.append(word)
        verb = next((word for word in left if word in self._verbs), "")
        if "motion" in stated and not self._with_verb(stated["motion"].value):
            verb = ""
        unused = tuple(dict.fromkeys(word for word in left if word != verb and word not in self._world.negators))
        return _Asked(reading, stated, impossible, verb, tuple(denied_verbs), unused)

    def _colour(self, reading: Reading, subject: Mention | None) -> Mention | None:
        """The colour of the subject that is taken, not of another one or of the sky."""
        if subject is None:
            only = reading.mentions.get("colour", ())
            return only[0] if len(only) == 1 else None
        near = []
        for mention in self._reader.find("colour", reading.words):
            if any(reading.unread[place] == "" for place in mention.places) and mention not in reading.mentions.get(
                "colour", ()
            ):
                continue  # it is a word of something else: `snow white` of snow
            before = reading.unread[mention.places.stop : subject.places.start]
            behind = reading.words[subject.places.stop : mention.places.start]
            if mention.places.stop <= subject.places.start and len(before) <= _NEAR and all(before):
                near.append((len(before), mention))
            elif mention.places.start >= subject.places.stop and behind and set(behind) <= _LINKS:
                near.append((len(behind), mention))
        return min(near, key=lambda pair: (pair[0], -len(pair[1].places)))[1] if near else None

    def _with_verb(self, motion: str) -> list[str]:
        return [phrase for phrase in self._world.attributes["motion"][motion] if VERB in phrase]

    # ---- what it might say

    def _draw(self, asked: _Asked, rng: random.Random) -> tuple[str, dict[str, str]]:
        """A sentence, and the phrases in it, by attribute, that say what the prompt did not; "" if there is none."""
        values = {name: mention.value for name, mention in asked.stated.items()}
        for mention in asked.stated.values():
            values = dict(self._world.only_with.get(mention.phrase, {})) | values
        for name in _FILL_ORDER:
            if name not in values and (options := self._options(name, values, asked)):
                values[name] = rng.choice(options)
        if "subject" not in values:  # the prompt denies every one
            return "", {}
        verbs = self._world.verbs[values["subject"]]
        verb = asked.verb or rng.choice([verb for verb in verbs if asked.may_do(verb)] or verbs)
        said = {name: self._phrase(name, values, asked, rng).replace(VERB, verb) for name in ORDER if name in values}
        added = {name: phrase for name, phrase in said.items() if name not in asked.stated}
        subject = said["subject"] if "colour" not in said else f"{said['colour']} {said['subject']}"
        parts = dict.fromkeys(ORDER, "") | said | {"subject": f"{self._article(asked, subject)} {subject}"}
        return _tidy(rng.choice(self._world.sentences).format(**parts)), added

    def _options(self, name: str, values: Mapping[str, str], asked: _Asked) -> list[str]:
        """What may be filled in for an attribute: what is usual beside the values there are; else anything."""
        world = self._world
        for other, value in values.items():
            if name in world.never.get(other, {}).get(value, ()):
                return []
        possible = [
            value
            for value in world.attributes[name]
            if value not in asked.reading.denied.get(name, ())
            and not any(excluded in values for excluded in world.never.get(name, {}).get(value, ()))
        ]
        if name == "motion" and asked.verb:  # it does something, so it does not rest
            possible = [value for value in possible if self._with_verb(value)]
        elif name == "motion" and asked.denied_verbs:
            possible = [value for value in possible if not self._with_verb(value)] or possible
        usual = possible
        for other, value in values.items():
            beside = world.usual.get(other, {}).get(value, {}).get(name, usual)
            usual = [option for option in beside if option in usual]
            of_option = world.usual.get(name, {})
            usual = [option for option in usual if value in of_option.get(option, {}).get(other, (value,))]
        return usual or possible

    def _phrase(self, name: str, values: Mapping[str, str], asked: _Asked, rng: random.Random) -> str:
        """How a value is said: in the prompt's own words if the model knows them."""
        phrases = self._world.attributes[name][values[name]]
        fitting = [phrase for phrase in phrases if self._may_say(phrase, values)] or list(phrases)
        if name == "motion" and asked.verb:
            fitting = [phrase for phrase in fitting if VERB in phrase] or fitting
        stated = asked.stated.get(name)
        if stated is None:
            return rng.choice(fitting)
        if (
            self._is_known(name, stated)
            and self._may_say(stated.phrase, values)
            and not (name == "motion" and asked.verb)
        ):
            return stated.phrase
        return fitting[0]

    def _may_say(self, phrase: str, values: Mapping[str, str]) -> bool:
        return all(values.get(name) == value for name, value in self._world.only_with.get(phrase, {}).items())

    def _is_known(self, name: str, mention: Mention) -> bool:
        """Whether these are words that the model knows for it, and not others that people have."""
        return mention.phrase in self._known[name]

    def _article(self, asked: _Asked, subject: str) -> str:
        starts = [asked.stated[name].places.start for name in ("subject", "colour") if name in asked.stated]
        first = min(starts, default=0)
        if "subject" in asked.stated and first and asked.reading.words[first - 1] == "the":
            return "the"
        return "an" if subject[0] in "aeiou" else "a"

    # ---- whether it is right, and what to tell

    def _is_true(self, text: str, asked: _Asked, added: Mapping[str, str]) -> bool:
        """Whether the sentence states what the prompt does, and what was added, as a reader understands it."""
        mentions = self._reader.read(text).mentions
        wanted = {name: mention.value for name, mention in asked.stated.items()}
        read = {name: found[0].value for name, found in mentions.items() if len(found) == 1}
        complete = read.keys() == wanted.keys() | added.keys() == mentions.keys()
        kept = all(read.get(name) == value for name, value in wanted.items())
        # Not `under a bright sky under a clear sky`, unless that is what was asked for.
        ends = [phrase.rpartition(" ")[2] for phrase in added.values()]
        ends += {mention.phrase.rpartition(" ")[2] for mention in asked.stated.values()}
        return complete and kept and len(ends) == len(set(ends)) and len(words_of(text)) <= self._world.max_words

    def _notes(self, asked: _Asked, added: Mapping[str, str]) -> Iterator[str]:
        if added:
            yield f"Added: {', '.join(added[name] for name in _FILL_ORDER if name in added)}."
        else:
            yield "Your prompt says everything that this model reads. This is the same in another way."
        foreign = (mention for name, mention in asked.stated.items() if not self._is_known(name, mention))
        if replaced := [f"{_span(asked.reading, mention)} ({mention.value})" for mention in foreign]:
            yield f"Said in this model's words: {', '.join(replaced)}."
        kept_away = [value for name in ORDER for value in sorted(asked.reading.denied.get(name, ()))]
        if kept_away := [*kept_away, *dict.fromkeys(asked.denied_verbs)]:
            yield f"Kept away: {', '.join(kept_away)}."
        if asked.impossible:
            place = " ".join(asked.stated[name].phrase for name in self._world.never if name in asked.stated)
            phrases = ", ".join(_span(asked.reading, mention) for mention in asked.impossible.values())
            yield f"Left out, because it cannot be seen {place}: {phrases}."
        if asked.unused:
            more = " …" if len(asked.unused) > _SHOWN_WORDS else ""
            yield f"Left out, because this model has no place for it: {', '.join(asked.unused[:_SHOWN_WORDS])}{more}."


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError("not a text")
    return value


def _seed_of(prompt: str, number: int) -> int:
    """The same number for the same prompt on every machine."""
    return int.from_bytes(hashlib.blake2s(f"{number}|{prompt}".encode(), digest_size=8).digest(), "big")


def _stem(verb: str) -> str:
    """The same for `flies`, `flying` and `fly`, and for `moves`, `moving` and `move`; a rough rule is enough here."""
    stem = verb.removesuffix("ing") if verb.endswith("ing") else verb.removesuffix("s")
    stem = stem[:-2] + "y" if stem.endswith("ie") else stem.removesuffix("e")
    return stem[:-1] if len(stem) > 2 and stem[-1] == stem[-2] else stem


def _span(reading: Reading, mention: Mention) -> str:
    return " ".join(reading.words[place] for place in mention.places)


def _tidy(sentence: str) -> str:
    """A sentence without the gaps and commas of what is not in it."""
    return " ".join(sentence.split()).replace(" ,", ",").strip(" ,")
