"""Captions of the procedural world: varied phrasings, and what each of them states."""

from __future__ import annotations

import re

import numpy as np

from training.world import ClipParams

MAX_TOKENS = 24
"""Longest caption in tokens, the end token included."""

SCENE_PHRASES: dict[str, tuple[str, ...]] = {
    "ocean": ("on the ocean", "over the ocean", "over the sea", "at sea", "on the water", "on the waves"),
    "mountains": (
        "in the mountains",
        "over the mountains",
        "in front of the mountains",
        "near the mountains",
        "over a mountain",
    ),
    "city": (
        "in a city",
        "in the city",
        "over the city",
        "on a city street",
        "downtown",
        "among the buildings",
    ),
    "desert": ("in a desert", "in the desert", "over the desert", "over the sand dunes", "near a cactus"),
    "meadow": ("in a meadow", "over a meadow", "in a field", "on the grass", "in the park", "over the hills"),
    "snow": ("in the snow", "over the snow", "in a snowy forest", "in winter", "on a snowy field"),
    "space": (
        "in space",
        "in outer space",
        "through space",
        "among the stars",
        "near a planet",
        "in the galaxy",
    ),
}
TIME_PHRASES: dict[str, tuple[str, ...]] = {
    "day": (
        "on a sunny day",
        "during the day",
        "in the daytime",
        "by day",
        "in the morning",
        "at noon",
        "under a bright sky",
    ),
    "sunset": (
        "at sunset",
        "during sunset",
        "in the evening",
        "at dusk",
        "under an orange sky",
        "at sundown",
    ),
    "night": (
        "at night",
        "by night",
        "in the moonlight",
        "under the night sky",
        "in the dark",
        "under the moon",
    ),
}
SUBJECT_NOUNS: dict[str, tuple[str, ...]] = {
    "ball": ("ball", "ball", "beach ball", "sphere"),
    "car": ("car", "car", "car", "automobile"),
    "boat": ("boat", "boat", "sailboat", "ship"),
    "balloon": ("balloon", "balloon", "hot air balloon"),
    "rocket": ("rocket", "rocket", "spaceship", "rocket ship"),
    "star": ("star", "star", "star shape"),
}
COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("red", "red", "crimson"),
    "yellow": ("yellow", "yellow", "golden"),
    "green": ("green", "green", "emerald"),
    "blue": ("blue",),
    "pink": ("pink",),
    "white": ("white",),
}
VERBS: dict[str, tuple[str, ...]] = {
    "ball": ("rolls", "rolling", "moves", "moving"),
    "car": ("drives", "driving", "moves", "moving"),
    "boat": ("sails", "sailing", "moves", "moving"),
    "balloon": ("floats", "floating", "drifts", "drifting", "flies", "flying"),
    "rocket": ("flies", "flying", "moves", "moving"),
    "star": ("moves", "moving", "flies", "flying"),
}
MOTION_PHRASES: dict[str, tuple[str, ...]] = {
    "right": (
        "{verb} right",
        "{verb} to the right",
        "{verb} from left to right",
        "going right",
        "goes to the right",
    ),
    "left": (
        "{verb} left",
        "{verb} to the left",
        "{verb} from right to left",
        "going left",
        "goes to the left",
    ),
    "up": (
        "rises",
        "rising",
        "rises up",
        "rising up",
        "going up",
        "goes up",
        "{verb} up",
        "{verb} upward",
        "taking off",
        "climbing",
    ),
    "down": (
        "falls",
        "falling",
        "falls down",
        "descends",
        "descending",
        "going down",
        "goes down",
        "{verb} down",
        "sinking",
        "landing",
    ),
    "still": (
        "standing still",
        "is still",
        "stays still",
        "resting",
        "hovering in place",
        "that does not move",
        "is not moving",
    ),
}
ARTICLES = ("a", "a", "a", "the", "one", "")
OPENINGS = ("a video of", "video of", "an animation of", "a cartoon of", "a clip of", "we see", "there is")
_EXTRA_WORDS = ("that", "is", "and", "colored", ",")
_KEEP = {"scene": 0.92, "time": 0.88, "subject": 1.0, "colour": 0.92, "motion": 0.92}
_TOKEN = re.compile(r"[a-z]+|,")


def words(caption: str) -> list[str]:
    """A caption as the tokenizer splits it: words and commas, lower-case."""
    return _TOKEN.findall(caption.lower())


def vocabulary() -> list[str]:
    """Every word a caption can hold, sorted."""
    found = {*OPENINGS, *ARTICLES, *_EXTRA_WORDS}
    for table in (SCENE_PHRASES, TIME_PHRASES, SUBJECT_NOUNS, COLOUR_WORDS, VERBS, MOTION_PHRASES):
        for phrases in table.values():
            found.update(phrases)
    return sorted({word for phrase in found for word in words(phrase.replace("{verb}", ""))})


def _choose(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _subject_phrase(params: ClipParams, stated: dict[str, str], rng: np.random.Generator) -> str:
    article, noun = _choose(rng, ARTICLES), _choose(rng, SUBJECT_NOUNS[params.subject])
    if "colour" not in stated:
        return f"{article} {noun}"
    colour = _choose(rng, COLOUR_WORDS[params.colour])
    if rng.random() < 0.06:
        return f"{article} {noun} that is {colour}"
    if rng.random() < 0.06:
        return f"{article} {colour} colored {noun}"
    return f"{article} {colour} {noun}"


def _join(subject: str, motion: str, scene: str, time: str, rng: np.random.Generator) -> str:
    """Put the parts of a caption into one of several orders."""
    draw = rng.random()
    if draw < 0.46:
        order = [subject, motion, scene, time]
    elif draw < 0.58:
        order = [time and f"{time} ,", subject, motion, scene]
    elif draw < 0.68:
        order = [scene and f"{scene} ,", subject, motion, time]
    elif draw < 0.78:
        order = [_choose(rng, OPENINGS), subject, motion, scene, time]
    elif draw < 0.86:
        order = [subject, scene, time and f"{time} ,", motion]
    elif draw < 0.92:
        order = [subject, scene, motion, time]
    else:
        shuffled = [part for part in (subject, motion, scene, time) if part.strip()]
        order = [" , ".join(shuffled[int(i)] for i in rng.permutation(len(shuffled)))]
    return " ".join(" ".join(order).split()).removesuffix(" ,").replace(" ,", ",")


def make_caption(params: ClipParams, rng: np.random.Generator, full: bool = False) -> tuple[str, dict[str, str]]:
    """Describe a clip.

    Args:
        full: state every attribute; otherwise some are left out now and then (never the subject).

    Returns:
        the caption, and the attributes it states with their values. The time of day of space is never stated.
    """
    stated = {name: value for name, value in params.to_dict().items() if full or rng.random() < _KEEP[name]}
    if params.scene == "space":
        stated.pop("time", None)
    while True:
        subject = _subject_phrase(params, stated, rng)
        verb = _choose(rng, VERBS[params.subject])
        motion = _choose(rng, MOTION_PHRASES[params.motion]).replace("{verb}", verb) if "motion" in stated else ""
        scene = _choose(rng, SCENE_PHRASES[params.scene]) if "scene" in stated else ""
        time = _choose(rng, TIME_PHRASES[params.time]) if "time" in stated else ""
        caption = _join(subject, motion, scene, time, rng)
        if len(words(caption)) < MAX_TOKENS:
            return caption, stated
