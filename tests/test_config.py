"""A model's settings, and how a length becomes blocks. What a request may hold: `test_hostile_requests.py`."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config import ModelSpec
from pipeline.errors import WeightsError

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


def test_a_first_block_may_have_steps_of_its_own() -> None:
    spec = ModelSpec.from_config(SETTINGS | {"denoising_steps": [1000], "first_block_steps": [1000, 500]})
    assert spec.first_block_steps == (1000, 500)
    assert ModelSpec.from_config(SETTINGS).first_block_steps is None
    for wrong in ([], [500, 1000], [0], "1000", 4):
        with pytest.raises(WeightsError, match="first_block_steps"):
            ModelSpec.from_config(SETTINGS | {"first_block_steps": wrong})
