"""Requests: what is accepted, what is refused and in which words."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from pipeline.config import GenerationRequest, ModelSpec, clean_prompt
from pipeline.errors import InvalidRequest, WeightsError

SETTINGS: dict[str, Any] = {
    "name": "test",
    "height": 64,
    "width": 112,
    "fps": 16,
    "native_fps": 16,
    "frames_per_block": 3,
    "text_len": 24,
    "denoising_steps": [1000, 750, 500, 250],
    "shift": 5.0,
    "window_frames": 9,
    "sink_frames": 3,
}


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  a  red\n\tballoon ", "a red balloon"),
        ("caf\u0065\u0301", "café"),
        ("&amp;lt;b&amp;gt; schÃ¶n", "<b> schön"),
        ("a\x00b\x07c", "abc"),
        ("x" * 2000, "x" * 2000),
        ("🎈 أحمر {} %s", "🎈 أحمر {} %s"),
    ],
)
def test_prompts_are_cleaned(text: str, cleaned: str) -> None:
    assert GenerationRequest(prompt=text).prompt == cleaned == clean_prompt(cleaned)


@pytest.mark.parametrize("text", ["", "   ", "\n\t", "\x00", "x" * 2001, "x" * 5_000_000, None, 3, b"x", ["x"]])
def test_prompts_are_refused(text: Any) -> None:
    with pytest.raises(InvalidRequest, match="[Pp]rompt"):
        GenerationRequest(prompt=text)


def test_a_lone_surrogate_becomes_something_that_can_be_written() -> None:
    GenerationRequest(prompt="a\ud800b").prompt.encode()


BAD_NUMBERS = [math.nan, math.inf, -math.inf, True, "7", [7], 2**63, -2, None]


@pytest.mark.parametrize("value", [*BAD_NUMBERS, 2.5, 2**32])
def test_seed_is_refused(value: Any) -> None:
    with pytest.raises(InvalidRequest, match="seed is .* but must be a whole number from 0 to 4294967295, or -1"):
        GenerationRequest(prompt="x", seed=value)


def test_a_number_too_long_to_print_is_refused_too() -> None:
    with pytest.raises(InvalidRequest, match="seed is a very large int"):
        GenerationRequest(prompt="x", seed=10**5000)


@pytest.mark.parametrize("value", [*BAD_NUMBERS, 0.0999, 600.1, 0])
def test_seconds_are_refused(value: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"seconds is .* but must be a number from 0\.1 to 600"):
        GenerationRequest(prompt="x", seconds=value)


@pytest.mark.parametrize("value", [v for v in [*BAD_NUMBERS, 0.9, 60.5] if v is not None])
def test_fps_is_refused(value: Any) -> None:
    with pytest.raises(InvalidRequest, match="fps is .* but must be a number from 1 to 60"):
        GenerationRequest(prompt="x", fps=value)


@pytest.mark.parametrize("field", ["taehv", "fp8", "compile"])
@pytest.mark.parametrize("value", [1, "true", None, 0.0, []])
def test_switches_are_refused(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"{field} is .* but must be true or false"):
        GenerationRequest(prompt="x", **{field: value})


def test_limits_are_accepted() -> None:
    for seed in (-1, 0, 7.0, 2**32 - 1):
        assert GenerationRequest(prompt="x", seed=seed).seed == int(seed)
    assert GenerationRequest(prompt="x", seconds=0.1, fps=1).fps == 1.0
    assert GenerationRequest(prompt="x", seconds=600, fps=60).seconds == 600.0


def test_nothing_but_invalid_request_comes_out() -> None:
    rng = random.Random(0)
    pool = [
        None,
        True,
        -1,
        0,
        7,
        2.5,
        math.nan,
        math.inf,
        1e300,
        2**70,
        "",
        "a dog",
        "x" * 3000,
        b"x",
        [],
        {},
        (),
        object(),
    ]
    for _ in range(2000):
        values = {name: rng.choice(pool) for name in ("prompt", "seed", "seconds", "fps", "taehv", "fp8", "compile")}
        try:
            request = GenerationRequest(**values)
        except InvalidRequest as error:
            assert len(str(error)) < 300
        else:
            assert request.prompt and -1 <= request.seed < 2**32 and 0.1 <= request.seconds <= 600


@pytest.mark.parametrize(
    ("seconds", "fps", "blocks", "frames"),
    [
        (5, 16, 7, 81),
        (5, 6, 3, 33),
        (0.1, 16, 1, 9),
        (3, 16, 4, 45),
        (60, 16, 80, 957),
        (0.5625, 16, 1, 9),
        (1.3125, 16, 2, 21),
    ],
)
def test_length_is_rounded_to_whole_blocks(seconds: float, fps: float, blocks: int, frames: int) -> None:
    spec = ModelSpec.from_config(SETTINGS)
    assert spec.blocks_for(seconds, fps) == blocks
    assert spec.frames_in(blocks) == frames == 9 + 12 * (blocks - 1)


def test_frame_wise_model_counts_differently() -> None:
    spec = ModelSpec.from_config(SETTINGS | {"frames_per_block": 1, "window_frames": 21, "sink_frames": 1})
    assert [spec.frames_in(blocks) for blocks in (1, 2, 21)] == [1, 5, 81]
    assert spec.blocks_for(5, 16) == 21


def test_spec_names_unknown_and_missing_settings() -> None:
    with pytest.raises(WeightsError, match="unknown settings colour, sink_frame"):
        ModelSpec.from_config(SETTINGS | {"sink_frame": 3, "colour": 1})
    with pytest.raises(WeightsError, match="incomplete.*shift"):
        ModelSpec.from_config({key: value for key, value in SETTINGS.items() if key != "shift"})
