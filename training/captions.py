"""Captions of the procedural world: varied phrasings, and what each of them states."""

from __future__ import annotations

import re

import numpy as np

from training.world import ClipParams

MAX_TOKENS = 32
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
    "snow": ("in the snow", "over the snow", "in a snowy forest", "in winter", "on a snowy field", "on snowy hills"),
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
WEATHER_PHRASES: dict[str, tuple[str, ...]] = {
    "clear": ("in clear weather", "in fine weather", "under a clear sky"),
    "rain": (
        "in the rain",
        "in heavy rain",
        "while it rains",
        "while rain falls",
        "in rainy weather",
        "in a rainstorm",
    ),
    "snow": (
        "in falling snow",
        "while it snows",
        "while snow falls",
        "while snowflakes fall",
        "in a snowstorm",
        "in a snowfall",
        "in a blizzard",
    ),
    "fog": ("in the fog", "in thick fog", "in the mist", "in foggy weather", "in a misty haze", "through the fog"),
}
OF_CLEAR_SKIES = (
    "on a sunny day",
    "under a bright sky",
    "in the moonlight",
    "under the moon",
    "under the night sky",
    "under an orange sky",
)
"""Phrases of times of day that are not said in other weather."""
SUBJECT_NOUNS: dict[str, tuple[str, ...]] = {
    "ball": ("ball", "ball", "beach ball", "rubber ball", "sphere"),
    "car": ("car", "car", "car", "automobile", "taxi"),
    "boat": ("boat", "boat", "sailboat", "ship", "sailing boat"),
    "balloon": ("balloon", "balloon", "hot air balloon"),
    "rocket": ("rocket", "rocket", "spaceship", "rocket ship"),
    "star": ("star", "star", "star shape"),
    "bird": ("bird", "bird", "little bird", "songbird"),
}
COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("red", "red", "crimson", "scarlet"),
    "yellow": ("yellow", "yellow", "golden"),
    "green": ("green", "green", "emerald"),
    "blue": ("blue", "blue", "azure"),
    "pink": ("pink", "pink", "rosy"),
    "white": ("white", "white", "pale white"),
}
VERBS: dict[str, tuple[str, ...]] = {
    "ball": ("rolls", "rolling", "bounces", "bouncing", "moves", "moving"),
    "car": ("drives", "driving", "moves", "moving"),
    "boat": ("sails", "sailing", "moves", "moving"),
    "balloon": ("floats", "floating", "drifts", "drifting", "flies", "flying"),
    "rocket": ("flies", "flying", "moves", "moving"),
    "star": ("moves", "moving", "flies", "flying", "glides", "gliding"),
    "bird": ("flies", "flying", "flaps", "flapping", "moves", "moving"),
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
OPENINGS = (
    "a video of",
    "video of",
    "an animation of",
    "a cartoon of",
    "a clip of",
    "a scene with",
    "we see",
    "there is",
    "look at",
)
_FINITE = frozenset(
    word
    for table in (VERBS, MOTION_PHRASES)
    for options in table.values()
    for word in (option.split(" ")[0] for option in options)
    if word.endswith("s")
)
"""Words that a motion begins with and that make a sentence of it."""
_EXTRA_WORDS = ("that", "is", "colored", ",")
_KEEP = {"scene": 0.93, "time": 0.88, "weather": 0.97, "subject": 1.0, "colour": 0.92, "motion": 0.93}
_KEEP_CLEAR = 0.3
"""Fine weather is seldom spoken of: a caption without weather mostly means it."""
_TOKEN = re.compile(r"[a-z]+|,")


def words(caption: str) -> list[str]:
    """A caption as the tokenizer splits it: words and commas, lower-case."""
    return _TOKEN.findall(caption.lower())


def vocabulary() -> list[str]:
    """Every word a caption can hold, sorted."""
    found = {*OPENINGS, *ARTICLES, *_EXTRA_WORDS}
    for table in (SCENE_PHRASES, TIME_PHRASES, WEATHER_PHRASES, SUBJECT_NOUNS, COLOUR_WORDS, VERBS, MOTION_PHRASES):
        for phrases in table.values():
            found.update(phrases)
    return sorted({word for phrase in found for word in words(phrase.replace("{verb}", ""))})


def _choose(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _subject_phrase(params: ClipParams, stated: dict[str, str], rng: np.random.Generator) -> str:
    article, noun = _choose(rng, ARTICLES), _choose(rng, SUBJECT_NOUNS[params.subject])
    colour = _choose(rng, COLOUR_WORDS[params.colour])
    if "colour" not in stated:
        return f"{_fitting(article, noun)} {noun}"
    if rng.random() < 0.06:
        return f"{_fitting(article, noun)} {noun} that is {colour}"
    if rng.random() < 0.06:
        return f"{_fitting(article, colour)} {colour} colored {noun}"
    return f"{_fitting(article, colour)} {colour} {noun}"


def _fitting(article: str, word: str) -> str:
    return "an" if article == "a" and word[:1] in "aeiou" else article


def _join(subject: str, motion: str, scene: str, time: str, weather: str, rng: np.random.Generator) -> str:
    """Put the parts of a caption into one of several orders."""
    around = [time, weather] if rng.random() < 0.5 else [weather, time]
    draw = rng.random()
    if draw < 0.42:
        order = [subject, motion, scene, *around]
    elif draw < 0.54:
        order = [*around, ",", subject, motion, scene]
    elif draw < 0.62:
        order = [scene, ",", subject, motion, *around]
    elif draw < 0.72 and motion.split(" ")[0] not in _FINITE:  # no "we see a ball rolls"
        order = [_choose(rng, OPENINGS), subject, motion, scene, *around]
    elif draw < 0.80:
        order = [subject, scene, *around, ",", motion]
    elif draw < 0.86:
        order = [subject, scene, motion, *around]
    elif draw < 0.92:
        order = [weather, ",", subject, motion, scene, time]
    else:
        shuffled = [part for part in (subject, motion, scene, time, weather) if part.strip()]
        order = [" , ".join(shuffled[int(i)] for i in rng.permutation(len(shuffled)))]
    joined = " ".join(" ".join(order).split())
    return joined.removesuffix(" ,").removeprefix(", ").replace(" ,", ",")


def make_caption(params: ClipParams, rng: np.random.Generator, full: bool = False) -> tuple[str, dict[str, str]]:
    """Describe a clip.

    Args:
        full: state every attribute; otherwise some are left out now and then (never the subject), and clear weather
            mostly.

    Returns:
        the caption, and the attributes it states with their values. Time of day and weather of space are never stated.
    """
    keep = _KEEP | ({"weather": _KEEP_CLEAR} if params.weather == "clear" else {})
    stated = {
        name: value
        for name, value in params.to_dict().items()
        if params.shows(name) and (full or rng.random() < keep[name])
    }
    cloudy = OF_CLEAR_SKIES if params.weather != "clear" else ()
    while True:
        subject = _subject_phrase(params, stated, rng)
        verb = _choose(rng, VERBS[params.subject])
        motion = _choose(rng, MOTION_PHRASES[params.motion]).replace("{verb}", verb) if "motion" in stated else ""
        scene = _choose(rng, SCENE_PHRASES[params.scene]) if "scene" in stated else ""
        time = (
            _choose(rng, tuple(said for said in TIME_PHRASES[params.time] if said not in cloudy))
            if "time" in stated
            else ""
        )
        weather = _choose(rng, WEATHER_PHRASES[params.weather]) if "weather" in stated else ""
        caption = _join(subject, motion, scene, time, weather, rng)
        if len(words(caption)) < MAX_TOKENS:
            return caption, stated
