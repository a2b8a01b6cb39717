"""The probe and tracking."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from training.data import ClipDataset, DatasetInfo, build
from training.probe import (
    READ,
    WINDOW,
    AttributeProbe,
    WindowReading,
    agreement,
    augment,
    train,
)
from training.sheets import contact_sheet
from training.sprites import CYCLE
from training.tracking import follow, read_motion
from training.world import ATTRIBUTES, GRID, ClipParams


def test_sheet_needs_a_caption_for_each_video() -> None:
    video = np.zeros((5, 16, 24, 3), np.uint8)
    assert contact_sheet([video, video], ["a", "b"], columns=3, zoom=2).size == (3 * 50, 2 * 48)
    with pytest.raises(ValueError, match="one caption for each"):
        contact_sheet([video], [])


def test_track_follows_coverage_and_skips_frames_without_a_subject() -> None:
    coverage = np.zeros((3, 8, 14), np.float32)
    coverage[0, 4, 3] = coverage[1, 4, 5] = 1
    x, y = follow(coverage, np.array([True, True, False]))
    assert np.allclose(x[:2], [3.5 / 8, 5.5 / 8]) and np.allclose(y[:2], 4.5 / 8) and np.isnan(x[2])


def test_motion_of_a_track_that_wraps_around() -> None:
    steps = np.arange(WINDOW)
    x = (1.4 + GRID / CYCLE * steps) % 1.75
    assert read_motion(x, np.full(WINDOW, 0.5)).direction == "right"
    assert read_motion(np.full(WINDOW, 0.5), (0.2 - GRID / CYCLE * steps) % 1.0).direction == "up"
    assert read_motion(np.full(WINDOW, 0.5), 0.5 + 0.008 * np.sin(0.2 * steps)).direction == "still"
    assert read_motion(np.full(WINDOW, np.nan), np.full(WINDOW, np.nan)).direction == "still"


def test_space_is_not_asked_for_time_and_weather() -> None:
    shown = [
        ClipParams("space", "night", "clear", "car", "red", "up"),
        ClipParams("city", "day", "rain", "car", "red", "up"),
    ]
    reading = WindowReading(shown[1].to_dict() | {"motion": "down"}, 1.0, np.zeros(1), np.zeros(1), 0.0)
    scores = agreement([reading, reading], shown)
    assert scores == {"scene": 0.5, "time": 1.0, "weather": 1.0, "subject": 1.0, "colour": 1.0, "motion": 0.0}


def test_augmentation_keeps_shape_and_range() -> None:
    frames = torch.rand(4, 3, 64, 112)
    changed = augment(frames, torch.Generator().manual_seed(0))
    assert changed.shape == frames.shape and changed.min() >= 0 and changed.max() <= 1
    assert not torch.equal(changed, frames)


def test_a_short_training_learns_and_survives_saving(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    build(
        tmp_path / "data",
        DatasetInfo(clips=12, validation=1, pixel_clips=12, channels=8),
        processes=1,
        fit_clips=8,
    )
    probe = train(ClipDataset(tmp_path / "data"), seconds=60, batch_size=24, max_steps=40)
    params, frames = ClipDataset(tmp_path / "data").params[0], ClipDataset(tmp_path / "data").pixels[0]
    reading = probe.read(frames[:WINDOW])
    assert set(reading.attributes) == set(ATTRIBUTES) and reading.x.shape == (WINDOW,)
    assert reading.attributes["time"] == params.time
    probe.save(tmp_path / "probe")
    loaded = AttributeProbe.load(tmp_path / "probe")
    assert loaded.read(frames[:WINDOW]).attributes == reading.attributes
    assert (tmp_path / "probe" / "probe.safetensors").stat().st_size < 2**20
    doubled = frames[:5].repeat(2, axis=1).repeat(2, axis=2)
    assert loaded.read(doubled).attributes == loaded.read(frames[:5]).attributes
    with pytest.raises(FileNotFoundError, match="training.probe"):
        AttributeProbe.load(tmp_path / "nowhere")


def test_network_reads_all_attributes_but_motion() -> None:
    logits, cover = AttributeProbe()(torch.rand(2, 3, 64, 112))
    assert {name: value.shape[1] for name, value in logits.items()} == {name: len(ATTRIBUTES[name]) for name in READ}
    assert cover.shape == (2, 8, 14)
