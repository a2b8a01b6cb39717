"""Phrasings that training never has: the same words in other sentences, to judge whether a model reads or remembers.

Captions of training put the parts of a sentence side by side or between commas. Here other words stand between them
(`we see`, `that`, `is`, `while it`, `with`), or they stand in an order of their own. In every frame there are two
parts, or a word and a part, that meet here and never in a caption of training, whatever phrases are taken; a test goes
through all of them. Every word is one of training's, so that nothing is asked of the tokenizer that it cannot know.
"""

from __future__ import annotations

import numpy as np

from training import captions
from training.world import ClipParams

FRAMES: tuple[str, ...] = (
    "{scene} {time} we see {subject} {doing} {weather}",
    "{time} {scene} there is {subject} that {does} {weather}",
    "{subject} is {doing} {scene} {time} {weather}",
    "{weather} {subject} is {doing} {scene} {time}",
    "{subject} that is {doing} {time} {weather} {scene}",
    "look at {subject} {scene} {weather} while it {does} {time}",
    "we see {place} {time} {weather} with {subject} {doing}",
    "a video with {subject} that {does} {scene} {weather} {time}",
    "a cartoon of {place} {weather} {time} with {subject} that {does}",
    "there is {subject} {scene} {time} , it is {doing} {weather}",
    "{doing} {scene} {time} is {subject} {weather}",
    "{weather} {time} {scene} {subject} {does}",
)
"""Sentences with a place for each part.

`{does}` and `{doing}` state the motion (`rises`, `rising`), `{place}` the scene as a noun."""
ARTICLES = ("a", "the", "one")
PLACES: dict[str, tuple[str, ...]] = {
    "ocean": ("the ocean", "the sea", "the waves"),
    "mountains": ("the mountains", "a mountain"),
    "city": ("a city", "the city", "a city street"),
    "desert": ("a desert", "the desert", "the sand dunes"),
    "meadow": ("a meadow", "a field", "the park"),
    "snow": ("a snowy forest", "a snowy field", "snowy hills"),
    "space": ("outer space", "the galaxy"),
}
MORE_PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "weather": {
        "clear": ("with a clear sky",),
        "rain": ("with rain falling", "with heavy rain"),
        "snow": ("with snow falling", "with falling snow"),
        "fog": ("with thick fog", "with mist"),
    },
    "motion": {
        "right": ("goes right", "going to the right", "goes from left to right", "going from left to right"),
        "left": ("goes left", "going to the left", "goes from right to left", "going from right to left"),
        "up": ("goes upward", "going upward"),
    },
}
"""Ways to state a value that are not in the tables of captions."""


def phrases(name: str, params: ClipParams) -> tuple[str, ...]:
    """All that can stand in the place `{name}` of a frame when this is shown; nothing where it means nothing."""
    if name == "subject":
        return _subjects(params)
    if name == "place":
        return PLACES[params.scene]
    if name in ("does", "doing"):
        return _motions(params, "s" if name == "does" else "ing")
    if not params.shows(name):
        return ()
    table = {
        "scene": captions.SCENE_PHRASES,
        "time": captions.TIME_PHRASES,
        "weather": captions.WEATHER_PHRASES,
    }[name]
    value = getattr(params, name)
    untrue = captions.OF_CLEAR_SKIES if params.weather != "clear" else ()
    said = tuple(phrase for phrase in table[value] if phrase not in untrue)
    return said + MORE_PHRASES.get(name, {}).get(value, ())


def _subjects(params: ClipParams) -> tuple[str, ...]:
    colours, nouns = captions.COLOUR_WORDS[params.colour], captions.SUBJECT_NOUNS[params.subject]
    return tuple(
        f"{'an' if article == 'a' and colour[0] in 'aeiou' else article} {colour} {noun}"
        for article in ARTICLES
        for colour in colours
        for noun in nouns
    )


def _motions(params: ClipParams, ending: str) -> tuple[str, ...]:
    """The phrases of a motion whose first word ends like this: those with `that` or `not` would not fit the frames."""
    filled = (
        phrase.replace("{verb}", verb)
        for phrase in (
            *captions.MOTION_PHRASES[params.motion],
            *MORE_PHRASES["motion"].get(params.motion, ()),
        )
        for verb in (captions.VERBS[params.subject] if "{verb}" in phrase else ("",))
    )
    return tuple(phrase for phrase in filled if phrase.split()[0].endswith(ending))


def make_phrasing(params: ClipParams, rng: np.random.Generator) -> str:
    """Describe a clip, all its attributes, as no caption of training does."""
    return fill(FRAMES[int(rng.integers(len(FRAMES)))], params, rng)


def fill(frame: str, params: ClipParams, rng: np.random.Generator) -> str:
    """A frame with a phrase by chance in each of its places."""
    parts = []
    for part in frame.split():
        options = phrases(part[1:-1], params) if part.startswith("{") else (part,)
        if options:
            parts.append(options[int(rng.integers(len(options)))])
    return " ".join(parts).replace(" ,", ",")
