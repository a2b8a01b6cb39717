"""Requests as an attacker writes them: whatever is sent becomes a sound request or an `InvalidRequest`, and quickly."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from pipeline import SelfForcingPipeline
from pipeline.config import MAX_PROMPT_CHARS, MAX_SEED, GenerationRequest, clean_prompt
from pipeline.errors import InvalidRequest, VideoError
from pipeline.recipe import RECIPE_FORMAT, RECIPE_VERSION, request_from_recipe
from tests.small import write_model_folder

# ---- V1: hostile prompts

EMPTY = "The prompt is empty"
TOO_LONG = "The prompt has .* at most 2,000 are allowed"
NOT_TEXT = "prompt is .* but must be text"
HUGE = 200_000
"""About as much as fits into the largest request the page accepts, and as long as a prompt may be before cleaning."""

ACCEPTED: list[tuple[str, str]] = [
    ("  a  red\n\tballoon ", "a red balloon"),
    ("x", "x"),
    ("x" * 2000, "x" * 2000),
    (" " * 9000 + "cat" + "\n" * 9000, "cat"),
    ("a\x00b\x07c\x7f", "abc"),
    ("a\x1b[31mred\x1b[0m", "ared"),
    ("caf\u0065\u0301", "café"),
    ("e" + "\u0301" * 1000, "é" + "\u0301" * 999),
    ("😀" * 2000, "😀" * 2000),
    ("👩‍👩‍👧‍👦 🏳️‍🌈", "👩‍👩‍👧‍👦 🏳️‍🌈"),
    ("أحمر بالون", "أحمر بالون"),
    ("\u202eright to left", "\u202eright to left"),
    ("一只红色的气球", "一只红色的气球"),
    ("赤い風船\u3000空", "赤い風船 空"),
    ("schÃ¶n", "schön"),
    ("&amp;lt;b&amp;gt; &#38;#39;", "<b> '"),
    ("<script>alert(1)</script>", "<script>alert(1)</script>"),
    ("{} {0} {prompt.__class__} %s %n ${PATH}", "{} {0} {prompt.__class__} %s %n ${PATH}"),
    ("../../etc/passwd", "../../etc/passwd"),
    ("'; DROP TABLE prompts; --", "'; DROP TABLE prompts; --"),
    ("a\ud800b\udfffc", "a�b�c"),
    ("a&#xD800;b", "a�b"),
    ("&#" + "9" * 5000 + ";", "�"),
    ("&" + "amp;" * 1999, "&"),
]
REFUSED: list[tuple[Any, str]] = [
    ("", EMPTY),
    (" " * HUGE, EMPTY),
    ("\n\t\u3000\xa0", EMPTY),
    ("\x00\x08", EMPTY),
    ("x" * 2001, TOO_LONG),
    ("x " * 1001, TOO_LONG),
    ("x" * 5_000_000, TOO_LONG),
    ("a" + "\u0301\u0327" * (HUGE // 2 - 1), TOO_LONG),
    ("&" + "amp;" * (HUGE // 4 - 1), TOO_LONG),
    ("&#" + "9" * (HUGE - 3) + ";", TOO_LONG),
    ("\ud800" * HUGE, EMPTY),
    ("Ã" * HUGE, TOO_LONG),
    (None, NOT_TEXT),
    (3, NOT_TEXT),
    (b"a red balloon", NOT_TEXT),
    (["a red balloon"], NOT_TEXT),
]


def timed(build: Callable[[], GenerationRequest]) -> tuple[GenerationRequest | InvalidRequest, float]:
    """What comes of it, and the processor time that it took: other programs on the machine do not count."""
    begun = time.thread_time()
    try:
        result: GenerationRequest | InvalidRequest = build()
    except InvalidRequest as error:
        result = error
    return result, time.thread_time() - begun


def test_forty_hostile_prompts_are_cleaned_or_refused_in_no_time() -> None:
    assert len(ACCEPTED) + len(REFUSED) == 40
    for sent, expected in ACCEPTED:
        result, seconds = timed(lambda sent=sent: GenerationRequest(prompt=sent))
        assert isinstance(result, GenerationRequest), (sent[:60], result)
        assert result.prompt == expected and len(result.prompt) <= MAX_PROMPT_CHARS, sent[:60]
        assert seconds < 1, f"{seconds:.1f} s for {sent[:60]!r}"
        result.prompt.encode()  # a lone surrogate would fail here, and in the tokenizer
        assert clean_prompt(result.prompt) == result.prompt, "what is kept in a recipe stays as it is"
    for sent, said in REFUSED:
        with pytest.raises(InvalidRequest, match=said) as caught:
            GenerationRequest(prompt=sent)
        assert len(str(caught.value)) < 120
        _, seconds = timed(lambda sent=sent: GenerationRequest(prompt=sent))
        assert seconds < 2, f"{seconds:.1f} s for {str(sent)[:60]!r}"


def test_every_accepted_prompt_fits_the_text_encoder(tmp_path: Path) -> None:
    pipe = SelfForcingPipeline.from_pretrained(write_model_folder(tmp_path), device="cpu")
    for sent, cleaned in ACCEPTED:
        embeds = pipe.text(GenerationRequest(prompt=sent).prompt)
        assert embeds.shape == (1, pipe.spec.text_len, 8) and embeds.isfinite().all(), cleaned[:60]
        assert all(word in cleaned.lower() for word in pipe.unknown_words(cleaned)), cleaned[:60]


# ---- V2: hostile numbers

VALUES: dict[str, Any] = {
    "NaN": math.nan,
    "infinity": math.inf,
    "bool": True,
    "fraction": 2.5,
    "list": [7],
    "text": "7",
    "nothing": None,
    "out of range": -2,
    "2^63": 2**63,
}
RANGES = {
    "seed": "must be a whole number from 0 to 4294967295, or -1 for a random one",
    "seconds": "must be a number from 0.1 to 600",
    "fps": "must be a number from 1 to 60",
    "taehv": "must be true or false",
    "fp8": "must be true or false",
    "compile": "must be true or false",
}
RIGHT = {("taehv", "bool"), ("fp8", "bool"), ("compile", "bool"), ("seconds", "fraction"), ("fps", "fraction")}
RIGHT |= {("fps", "nothing")}
"""The model's own rate."""


@pytest.mark.parametrize("field", RANGES)
def test_nine_hostile_numbers_are_refused_with_field_value_and_range(field: str) -> None:
    assert len(VALUES) * len(RANGES) == 54
    for name, value in VALUES.items():
        if (field, name) in RIGHT:
            assert getattr(GenerationRequest(prompt="x", **{field: value}), field) == value
            continue
        with pytest.raises(InvalidRequest) as caught:
            GenerationRequest(prompt="x", **{field: value})
        assert str(caught.value) == f"{field} is {value!r}, but {RANGES[field]}.", name


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("seed", [-math.inf, -1.5, 2**32, 2.0**70, 1e300, {}, b"7", 1j]),
        ("seconds", [-math.inf, 0, 0.0999, 600.1, -1.0, 1e300, {}, b"7", 1j]),
        ("fps", [-math.inf, 0, 0.9, 60.5, -1.0, 1e300, {}, b"7", 1j]),
        ("taehv", [0, 1, 0.0, "true", [], {}]),
        ("fp8", [0, 1, 0.0, "true", [], {}]),
        ("compile", [0, 1, 0.0, "true", [], {}]),
    ],
)
def test_more_values_beyond_each_limit_are_refused(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InvalidRequest) as caught:
            GenerationRequest(prompt="x", **{field: value})
        assert str(caught.value).startswith(f"{field} is ") and RANGES[field] in str(caught.value), value


@pytest.mark.parametrize("value", [10**5000, [10**5000]], ids=["number", "list"])
@pytest.mark.parametrize("field", RANGES)
def test_a_number_too_long_to_print_is_refused_too(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"{field} is a very large {type(value).__name__}"):
        GenerationRequest(prompt="x", **{field: value})


@pytest.mark.parametrize("field", ["prompt", *RANGES])
def test_lists_nested_too_deeply_to_print_are_refused_too(field: str) -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(InvalidRequest, match=f"{field} is a very large list"):
        GenerationRequest(**({"prompt": "x"} | {field: nested}))


def test_limits_are_accepted() -> None:
    for seed in (-1, 0, 7.0, MAX_SEED):
        assert GenerationRequest(prompt="x", seed=seed).seed == int(seed)
    for seconds, fps in ((0.1, 1), (600, 60)):
        request = GenerationRequest(prompt="x", seconds=seconds, fps=fps)
        assert (request.seconds, request.fps) == (float(seconds), float(fps))
        assert type(request.seconds) is type(request.fps) is float


def test_a_request_cannot_be_changed_after_it_was_checked() -> None:
    request = GenerationRequest(prompt="x")
    for field in ("prompt", *RANGES):
        with pytest.raises(FrozenInstanceError):
            setattr(request, field, math.nan)


# ---- V3: fuzz

FIELDS = ("prompt", *RANGES)
EDGES: list[Any] = [None, True, False, -1, 0, 7, 7.0, 2.5, -0.0, math.nan, math.inf, -math.inf, 1e300, 5e-324, 2**70]
EDGES += [10**5000, 1j, b"x", (), [], {}, [[]], {"a": [1]}, object(), int, len, "", "7", "nan", "a dog", "\ud800"]


def random_text(rng: random.Random) -> str:
    pools = ("abc \n\t", "&#;xampltgq39", "\x00\x1b\u0301\u0327\u202e\ufeff\ud83d", "Ã©â€œ日本😀{}%<>/\\'\"")
    return "".join(rng.choices(rng.choice(pools), k=rng.choice((0, 1, 5, 40, 400, 3000))))


def random_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(6)
    if kind == 0:
        return random_text(rng)
    if kind == 1:
        return rng.uniform(-10, 10) * 10.0 ** rng.randrange(-5, 10)
    if kind == 2:
        return rng.randrange(-(2**40), 2**40)
    if kind == 3 and depth < 3:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return rng.choice(EDGES)


def mutated_request(rng: random.Random) -> dict[str, Any]:
    """Right in most fields: the last check is reached as often as the first."""
    values: dict[str, Any] = {"prompt": "a dog", "seed": 7, "seconds": 3.5, "fps": 12, "taehv": True}
    values |= {"fp8": False, "compile": False}
    for field in rng.sample(FIELDS, rng.choice((0, 0, 1, 1, 1, 2, 7))):
        values[field] = random_value(rng)
    return values


def assert_sound(request: GenerationRequest) -> None:
    assert type(request.prompt) is str and 1 <= len(request.prompt) <= MAX_PROMPT_CHARS and request.prompt.encode()
    assert type(request.seed) is int and -1 <= request.seed <= MAX_SEED
    assert type(request.seconds) is float and 0.1 <= request.seconds <= 600
    assert request.fps is None or (type(request.fps) is float and 1 <= request.fps <= 60)
    assert all(type(getattr(request, name)) is bool for name in ("taehv", "fp8", "compile"))


def test_two_thousand_random_requests_are_sound_or_refused() -> None:
    rng = random.Random(20)
    outcomes = {"sound": 0, "refused": 0}
    begun = time.thread_time()
    for number in range(2000):
        values = mutated_request(rng)
        try:
            request = GenerationRequest(**values)
        except InvalidRequest as error:
            outcomes["refused"] += 1
            assert len(str(error)) < 200 and str(error).encode(), f"request {number}"
        else:
            outcomes["sound"] += 1
            assert_sound(request)
    assert min(outcomes.values()) > 400, f"the fuzz reaches one side only: {outcomes}"
    assert time.thread_time() - begun < 5


def test_recipes_from_strangers_are_sound_or_refused_too() -> None:
    """A dropped MP4 file brings whatever its maker put into it, field names and nesting included."""
    rng = random.Random(21)
    sound = 0
    for _ in range(500):
        values = mutated_request(rng)
        recipe: dict[str, Any] = {"format": RECIPE_FORMAT, "version": RECIPE_VERSION}
        recipe |= {"prompt": values.pop("prompt"), "seed": values.pop("seed"), "settings": values}
        spoiled = rng.choice((recipe, recipe["settings"]))
        if rng.random() < 0.3:
            spoiled[rng.choice(list(spoiled))] = random_value(rng)
        if rng.random() < 0.2:
            del spoiled[rng.choice(list(spoiled))]
        try:
            request = request_from_recipe(recipe)
        except (InvalidRequest, VideoError) as error:
            assert len(str(error)) < 200
        else:
            sound += 1
            assert_sound(request)
    assert 50 < sound < 450
