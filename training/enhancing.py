"""What a model folder says about filling prompts in: `python -m training.enhancing weights/embedded` writes it there.

The page's Enhance button reads it. All of it is data: what the world shows, the phrases that captions have for it, and
what usually goes together. A boat may stand in a desert, but nobody who asks for a boat means that.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from prompting.templates import FORMAT, TEMPLATES_FILE
from training import captions, console
from training.world import IN_SPACE

TABLES: dict[str, dict[str, tuple[str, ...]]] = {
    "scene": captions.SCENE_PHRASES,
    "time": captions.TIME_PHRASES,
    "weather": captions.WEATHER_PHRASES,
    "subject": captions.SUBJECT_NOUNS,
    "colour": captions.COLOUR_WORDS,
    "motion": captions.MOTION_PHRASES,
}
UNDERSTOOD: dict[str, dict[str, tuple[str, ...]]] = {
    "scene": {
        "ocean": ("at the seaside", "on a lake", "on a river"),
        "mountains": ("in the alps", "over the peaks"),
        "city": ("in a town", "in the streets", "over the skyline", "above the rooftops"),
        "desert": ("in the sahara",),
        "meadow": ("in a garden", "over the grassland", "over the fields"),
        "snow": ("in the arctic", "on the ice"),
        "space": ("in the cosmos", "in the universe", "in orbit"),
    },
    "time": {
        "day": ("in the afternoon", "in the sunshine", "in the sunlight"),
        "sunset": ("at twilight", "at nightfall", "at golden hour"),
        "night": ("at midnight", "at nighttime"),
    },
    "weather": {
        "clear": ("under a cloudless sky", "with a blue sky"),
        "rain": ("raining", "rain falling", "in a thunderstorm", "in a downpour", "in a drizzle"),
        "snow": ("snowing", "snow falling", "with snowflakes"),
        "fog": ("foggy", "misty", "hazy"),
    },
    "subject": {
        "ball": ("football", "soccer ball", "basketball"),
        "car": ("truck", "van", "bus", "cab"),
        "boat": ("yacht", "ferry", "sailing ship"),
        "balloon": ("airship",),
        "rocket": ("spacecraft", "space shuttle"),
        "bird": ("seagull", "sparrow", "parrot", "eagle", "swan"),
    },
    "colour": {
        "red": ("ruby", "dark red", "bright red"),
        "yellow": ("gold", "bright yellow"),
        "green": ("dark green", "bright green"),
        "blue": ("dark blue", "light blue", "bright blue", "navy"),
        "pink": ("magenta", "light pink"),
        "white": ("snow white",),
    },
    "motion": {
        "right": ("{verb} rightward", "{verb} rightwards"),
        "left": ("{verb} leftward", "{verb} leftwards"),
        "up": ("ascends", "ascending", "takes off", "lifts off", "launches", "launching", "{verb} upwards"),
        "down": ("drops", "dropping", "{verb} downward", "{verb} downwards", "sinks", "lands"),
        "still": ("stands still", "rests", "hovers", "hovering", "parked", "motionless", "not moving"),
    },
}
"""What people say and captions do not. It is put into the world's own words, and the visitor is told."""
USUAL: dict[str, dict[str, dict[str, tuple[str, ...]]]] = {
    "subject": {
        "ball": {"scene": ("meadow", "desert", "snow", "city"), "motion": ("right", "left")},
        "car": {"scene": ("city", "desert", "meadow", "mountains"), "motion": ("right", "left")},
        "boat": {"scene": ("ocean",), "motion": ("right", "left")},
        "balloon": {
            "scene": ("mountains", "meadow", "city", "ocean", "desert"),
            "motion": ("up", "up", "right", "left"),
        },
        "rocket": {"scene": ("space", "space", "mountains", "desert"), "motion": ("up", "up", "right", "left")},
        "star": {"scene": ("space", "mountains", "ocean", "snow"), "motion": ("right", "left", "down")},
        "bird": {"scene": ("ocean", "mountains", "meadow", "city", "snow"), "motion": ("right", "left")},
    },
    "scene": {
        "desert": {"weather": ("clear",)},
        "snow": {"weather": ("clear", "snow", "fog")},
        "ocean": {"weather": ("clear", "clear", "clear", "rain", "fog")},
        "mountains": {"weather": ("clear", "clear", "clear", "snow", "fog")},
        "city": {"weather": ("clear", "clear", "clear", "rain", "fog", "snow")},
        "meadow": {"weather": ("clear", "clear", "clear", "rain", "fog")},
    },
}
"""What is filled in beside a value, as often as it stands here. Where nothing is said, anything goes."""
ONLY_WITH: dict[str, dict[str, str]] = {phrase: {"weather": "clear"} for phrase in captions.OF_CLEAR_SKIES}
"""Phrases that are said only beside another value."""
SENTENCES = (
    "{subject} {motion} {scene} {time} {weather}",
    "{subject} {motion} {scene} {weather} {time}",
    "{time} {weather}, {subject} {motion} {scene}",
    "{scene}, {subject} {motion} {time} {weather}",
    "{weather}, {subject} {motion} {scene} {time}",
    "{weather} {time}, {subject} {motion} {scene}",
)
NEGATORS = ("no", "not", "without", "never")
FILLERS = captions.words(
    "video clip animation cartoon scene picture image movie film footage shot show shows showing see make create "
    "we i you me it its there is are was be been being that this these which who a an the one some with and or but of "
    "in on at by to from for as into onto over under up down above below through near while during where when out "
    "look looks please very so colored coloured color colour sky weather"
)
"""Words that say nothing by themselves: nobody misses them in a sentence that is put in other words."""


def templates() -> dict[str, Any]:
    """The contents of the file, as `prompting.templates` describes them."""
    plurals = {
        value: tuple(f"{noun}s" for noun in dict.fromkeys(nouns)) for value, nouns in captions.SUBJECT_NOUNS.items()
    }
    understood = UNDERSTOOD | {
        "subject": {value: (*UNDERSTOOD["subject"].get(value, ()), *names) for value, names in plurals.items()}
    }
    return {
        "format": FORMAT,
        "max_words": captions.MAX_TOKENS - 1,  # one token is the end
        "attributes": TABLES,
        "understood": understood,
        "verbs": captions.VERBS,
        "never": {"scene": {"space": tuple(IN_SPACE)}},
        "only_with": ONLY_WITH,
        "usual": USUAL,
        "sentences": SENTENCES,
        "negators": NEGATORS,
        "fillers": sorted(set(FILLERS)),
    }


def write(folder: Path) -> Path:
    """Write the file into a model folder and return its path."""
    path = folder / TEMPLATES_FILE
    path.write_text(json.dumps(templates(), indent=1) + "\n", encoding="utf-8")
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.enhancing", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the model folder, for example weights/embedded")
    options = parser.parse_args(argv)
    return console.run(lambda: write(options.folder))


if __name__ == "__main__":
    sys.exit(main())
