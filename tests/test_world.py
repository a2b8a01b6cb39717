"""The procedural world, its captions, its latents and the tokenizer."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from training import text as text_training
from training.captions import COLOUR_WORDS, MAX_TOKENS, make_caption, vocabulary, words
from training.data import ClipDataset, DatasetInfo, build, training_clip
from training.pca import TEMPORAL_STRIDE, PatchPCA, from_patches, group_frames, mask_patches, psnr, to_patches
from training.scenery import TIMES, layout
from training.sprites import COLOURS, CYCLE, SUBJECTS, draw_sprite
from training.text import EOS, PAD, UNK, CaptionSampler, build_tokenizer, save_tokenizer
from training.tracking import read_motion
from training.weather import WEATHERS, add_weather
from training.world import (
    _PACE,
    _ROLL,
    ATTRIBUTES,
    GRID,
    HEIGHT,
    MOTIONS,
    NUM_FRAMES,
    WIDTH,
    ClipParams,
    all_params,
    held_out,
    render,
    sample_params,
)

HEADLINE = "a red balloon rises over the mountains at sunset"


def clip_of(subject: str = "balloon", colour: str = "red", motion: str = "up", weather: str = "clear") -> ClipParams:
    return ClipParams("mountains", "sunset", weather, subject, colour, motion)


def test_render_is_a_function_of_parameters_and_seed() -> None:
    first, again, other = (render(clip_of(), seed, num_frames=9) for seed in (3, 3, 4))
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])


def test_rendering_leaves_the_shared_layouts_alone() -> None:
    night = ClipParams("city", "night", "snow", "car", "red", "still")
    before = render(night, 0, num_frames=5)[0].copy()
    for seed in range(8):
        render(night, seed, num_frames=5)
    assert np.array_equal(before, render(night, 0, num_frames=5)[0])


@pytest.mark.parametrize("height, width", [(64, 112), (48, 80)])
def test_shapes_and_ranges(height: int, width: int) -> None:
    frames, mask, track = render(clip_of(), 0, 13, height, width)
    assert frames.shape == (13, height, width, 3) and frames.dtype == np.float32
    assert mask.shape == (13, height, width) and mask.dtype == np.float32
    assert track.x.shape == track.y.shape == (13,)
    assert frames.min() >= 0 and frames.max() <= 1 and mask.min() >= 0 and mask.max() <= 1


@pytest.mark.parametrize("subject", SUBJECTS)
def test_mask_lies_around_the_track(subject: str) -> None:
    params = ClipParams("desert", "day", "rain", subject, "blue", "still")
    _, mask, track = render(params, 1, num_frames=5)
    rows, columns = np.nonzero(mask[0] > 0.5)
    assert abs((columns.mean() + 0.5) / HEIGHT - track.x[0]) < 0.04
    assert abs((rows.mean() + 0.5) / HEIGHT - track.y[0]) < 0.08
    assert 0.03 < mask[0].mean() * WIDTH / HEIGHT < 0.25


def test_colours_look_different_at_night() -> None:
    looks = []
    for colour in COLOURS:
        frames, mask, _ = render(ClipParams("meadow", "night", "fog", "ball", colour, "still"), 2, num_frames=1)
        looks.append(frames[0][mask[0] > 0.99].mean(axis=0))
    distances = [np.abs(a - b).max() for i, a in enumerate(looks) for b in looks[:i]]
    assert min(distances) > 0.15


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("motion", MOTIONS)
def test_subjects_move_as_asked(motion: str, subject: str) -> None:
    """Whatever else they do on their way: hop, rock, turn."""
    for seed in range(6):
        _, _, track = render(clip_of(subject, motion=motion), seed, num_frames=33, height=16, width=28)
        assert read_motion(track.x, track.y).direction == motion


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("motion", ["right", "left", "up", "down"])
def test_a_subject_leaves_and_comes_back_for_ever(motion: str, subject: str) -> None:
    _, mask, track = render(clip_of(subject, motion=motion), 0, 200, 32, 56)
    along = track.x if motion in ("right", "left") else track.y
    returns = np.flatnonzero(np.abs(np.diff(along)) > 1)
    assert 1 <= len(returns) <= 2
    # Hardly a pixel's edge of it is seen when it jumps, and all the rest of the time it goes on.
    assert max(mask[jump + side].mean() for jump in returns for side in (0, 1)) < 0.003
    assert np.ptp(np.delete(np.diff(along), returns)) < 1e-4
    assert (mask.max(axis=(1, 2)) > 0.5).mean() > 0.75


def test_most_subjects_begin_well_inside() -> None:
    tracks = [render(clip_of(motion="right"), seed, 25, 16, 28)[2] for seed in range(80)]
    inside = [track.x[0] > 0.2 and track.x[24] < 28 / 16 - 0.2 for track in tracks]
    assert 0.6 < np.mean(inside) < 0.95


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("motion", MOTIONS)
def test_a_subject_has_few_appearances(motion: str, subject: str) -> None:
    """It stands on the grid, moves one step of it a latent, and its place tells how it is turned and how high it is."""
    sign = {"right": 1, "down": 1, "left": -1, "up": -1}.get(motion)
    sideways = motion in ("right", "left")
    appearances = set()
    for seed in range(12):
        track = render(clip_of(subject, motion=motion), seed, 97, 16, 28)[2]
        along = track.x if sideways else track.y
        places = along[:: 4 * CYCLE] / GRID - 0.5
        assert np.allclose(places, np.round(places), atol=1e-3)
        steps = np.diff(along[::CYCLE]) / GRID
        if sign is not None:
            assert np.allclose(steps[np.abs(steps) < 2], sign, atol=1e-3)
        for t in range(0, 97, CYCLE):
            place = round(float(along[t]) / GRID - 0.5) % 4 if sign else t // CYCLE % 4
            height = 0.0 if motion in ("up", "down") else track.y[t]
            stripe = np.cos(2 * track.roll[t] + 0.1) if subject == "ball" else 0.0
            appearances.add((place, *(round(float(value), 3) + 0.0 for value in (height, track.turn[t], stripe))))
    assert len(appearances) == (8 if subject == "ball" and sideways else 4)


def test_what_goes_up_down_or_nowhere_stands_in_one_of_a_few_columns() -> None:
    columns = {
        float(render(clip_of(motion=motion), seed, 5, 16, 28)[2].x[0]) / GRID - 0.5
        for motion in ("up", "down", "still")
        for seed in range(40)
    }
    assert len(columns) == 4 and all(column % 4 == 0 for column in columns)


def test_a_rolling_ball_looks_the_same_after_two_paces() -> None:
    u, v = np.meshgrid(np.linspace(-1.1, 1.1, 40), np.linspace(-1.1, 1.1, 40))
    looks = [
        draw_sprite(
            "ball",
            "red",
            "day",
            u,
            v,
            softness=0.05,
            turn=np.array(_ROLL * _PACE * paces),
            phase=np.zeros(1),
            moves=True,
        ).rgb
        for paces in (0, 1, 2)
    ]
    assert np.allclose(looks[0], looks[2], atol=1e-4) and not np.allclose(looks[0], looks[1], atol=0.1)


def test_the_sea_glitters_under_a_clear_sky_only() -> None:
    clear, rain = (layout("ocean", "sunset", weather, 0, 64, 112)[45] for weather in ("clear", "rain"))
    assert np.ptp(clear, axis=0).max() > 0.1 and np.ptp(rain, axis=0).max() < 1e-4


def test_own_ways_of_moving() -> None:
    ball, boat, rocket = (
        render(clip_of(subject, motion="right"), 5, 33, 16, 28)[2] for subject in ("ball", "boat", "rocket")
    )
    assert np.ptp(ball.y) > 0.1 and np.ptp(boat.y) == 0
    assert 0.05 < np.ptp(boat.turn) < 0.3 and np.allclose(rocket.turn, np.pi / 2)


@pytest.mark.parametrize("subject", ["car", "bird", "rocket"])
def test_what_moves_within_a_sprite_comes_back_every_latent(subject: str) -> None:
    u, v = np.meshgrid(np.linspace(-1.1, 1.1, 40), np.linspace(-1.1, 1.1, 40))
    how = {"softness": 0.05, "turn": np.zeros(1), "moves": True}
    looks = [draw_sprite(subject, "red", "day", u, v, phase=np.float32(t), **how).rgb for t in range(CYCLE + 1)]
    assert np.allclose(looks[0], looks[CYCLE], atol=1e-4)
    assert not np.allclose(looks[0], looks[1], atol=1e-2) and not np.allclose(looks[0], looks[2], atol=1e-2)
    assert CYCLE == TEMPORAL_STRIDE


@pytest.mark.parametrize("time", TIMES)
def test_weathers_look_different_and_only_clear_ones_stand_still(time: str) -> None:
    clips = {weather: np.zeros((9, 64, 112, 3), np.float32) for weather in WEATHERS}
    for weather, clip in clips.items():
        add_weather(clip, weather, time)
    assert not clips["clear"].any()
    for weather in ("rain", "snow", "fog"):
        assert np.abs(clips[weather] - clips[weather][0]).max() > 0.015
    assert np.array_equal(clips["rain"][0], clips["rain"][4]) and np.array_equal(clips["snow"][0], clips["snow"][8])
    stills = [layout("meadow", time, weather, 0, 64, 112).mean(axis=(0, 1)) for weather in WEATHERS]
    assert min(np.abs(a - b).max() for i, a in enumerate(stills) for b in stills[:i]) > 0.02


def test_it_rains_in_front_of_the_subject() -> None:
    rain, clear = (
        render(ClipParams("meadow", "day", weather, "car", "red", "still"), 1, 5) for weather in ("rain", "clear")
    )
    inside = clear[1][0] > 0.99
    assert np.abs(rain[0][0][inside] - clear[0][0][inside]).max() > 0.1


def test_about_a_tenth_is_held_out_with_whole_triples() -> None:
    everything = all_params()
    out = [params for params in everything if held_out(params)]
    assert 0.07 < len(out) / len(everything) < 0.13
    by_triple: dict[tuple[str, str, str], list[bool]] = {}
    for params in everything:
        by_triple.setdefault((params.subject, params.colour, params.scene), []).append(held_out(params))
    assert sum(all(flags) for flags in by_triple.values()) >= 3
    for name, values in ATTRIBUTES.items():
        assert {getattr(params, name) for params in everything if not held_out(params)} == set(values)


def test_training_never_renders_what_is_held_out() -> None:
    rng = np.random.default_rng(0)
    assert not any(held_out(sample_params(rng, "train")) for _ in range(500))
    assert all(held_out(sample_params(rng, "held_out")) for _ in range(50))


def test_the_text_encoder_never_reads_what_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[ClipParams] = []
    monkeypatch.setattr(
        text_training, "make_caption", lambda params, rng: read.append(params) or make_caption(params, rng)
    )
    CaptionSampler(build_tokenizer(), seed=0, unknown_share=0.1).batch(200)
    assert len(read) == 200 and not any(map(held_out, read))


@pytest.mark.parametrize(
    "values",
    [
        ("moon", "day", "clear"),
        ("ocean", "noon", "clear"),
        ("ocean", "day", "hail"),
        ("space", "day", "clear"),
        ("space", "night", "rain"),
    ],
)
def test_impossible_parameters_are_refused(values: tuple[str, str, str]) -> None:
    with pytest.raises(ValueError):
        ClipParams(*values, "ball", "red", "up")


def test_captions_state_what_they_say_they_state() -> None:
    rng, known = np.random.default_rng(0), set(vocabulary())
    colours = {word: colour for colour, options in COLOUR_WORDS.items() for word in options}
    colours["pale"] = "white"
    for _ in range(2000):
        params = sample_params(rng)
        caption, stated = make_caption(params, rng)
        assert stated.items() <= params.to_dict().items() and "subject" in stated
        assert all(params.shows(name) for name in stated)
        found = words(caption)
        assert set(found) <= known and len(found) < MAX_TOKENS and caption == caption.lower()
        named = {colours[word] for word in found if word in colours}
        assert named == ({params.colour} if "colour" in stated else set())


def test_fine_weather_is_seldom_stated_and_never_contradicted() -> None:
    rng = np.random.default_rng(2)
    said: dict[str, list[bool]] = {"clear": [], "other": []}
    for _ in range(2000):
        params = sample_params(rng)
        caption, stated = make_caption(params, rng)
        if params.shows("weather"):
            said["clear" if params.weather == "clear" else "other"].append("weather" in stated)
        if params.weather != "clear":
            assert not {"sunny", "bright", "moonlight", "clear", "fine"} & set(words(caption))
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption)
        assert not re.search(r"^(we see|there is|look at) .*(ball|car|boat|bird) (rolls|drives|goes|is) ", caption)
    assert 0.2 < np.mean(said["clear"]) < 0.4 and np.mean(said["other"]) > 0.9


def test_full_captions_state_everything() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        params = sample_params(rng)
        stated = make_caption(params, rng, full=True)[1]
        assert set(stated) == {name for name in ATTRIBUTES if params.shows(name)}


def test_vocabulary_is_small_and_knows_the_headline() -> None:
    assert set(words(HEADLINE)) <= set(vocabulary())
    assert 150 < len(vocabulary()) < 220
    rng = np.random.default_rng(4)
    said = {word for _ in range(8000) for word in words(make_caption(sample_params(rng), rng)[0])}
    assert said == set(vocabulary()), "a word that no caption has would be known and mean nothing"


def test_tokenizer_round_trip(tmp_path: Path) -> None:
    save_tokenizer(build_tokenizer(), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    options = {"padding": "max_length", "max_length": MAX_TOKENS, "truncation": True}
    encoded = tokenizer("A Red BALLOON, rises over the mountains at sunset!", **options)
    length = sum(encoded["attention_mask"])
    assert encoded["input_ids"][length - 1] == EOS and set(encoded["input_ids"][length:]) == {PAD}
    assert tokenizer.decode(encoded["input_ids"][: length - 1]).replace(" ,", "") == HEADLINE
    assert tokenizer("a zebra красный", **options)["input_ids"][1:4] == [UNK, UNK, EOS]
    long = tokenizer("red " * 50, **options)["input_ids"]
    assert len(long) == MAX_TOKENS and long[-1] == EOS
    assert tokenizer("", **options)["input_ids"][:2] == [EOS, PAD]


def test_first_latent_frame_is_the_first_video_frame() -> None:
    groups = group_frames(np.arange(9))
    assert groups.tolist() == [[0, 0, 0, 0], [1, 2, 3, 4], [5, 6, 7, 8]]
    with pytest.raises(ValueError, match="4k \\+ 1"):
        group_frames(np.arange(8))


def test_patches_round_trip() -> None:
    frames = np.random.default_rng(0).random((9, 32, 48, 3)).astype(np.float32)
    assert np.allclose(from_patches(to_patches(frames), 32, 48), frames, atol=1e-6)
    assert mask_patches(np.ones((9, 32, 48), np.float32)).shape == (3, 2, 3)


def test_pca_round_trip(tmp_path: Path) -> None:
    frames = training_clip(0)[1]
    patches = to_patches(frames)
    patches = patches.reshape(-1, patches.shape[-1])
    weights = np.ones(len(patches), np.float32)
    few, many = (PatchPCA.fit(patches, weights, channels) for channels in (4, 32))
    many.save(tmp_path / "pca.npz")
    loaded = PatchPCA.load(tmp_path / "pca.npz")
    reference = frames.astype(np.float32) / 255
    latents = loaded.encode(frames)
    assert latents.shape == (19, 32, 8, 14) and abs(latents.var(axis=(0, 2, 3)).mean() - 1) < 0.05
    assert np.allclose(latents, loaded.encode(reference), atol=1e-3)
    assert psnr(loaded.decode(latents), reference) > psnr(few.decode(few.encode(frames)), reference) + 2
    change = loaded.encode(loaded.decode(latents)) - latents  # not zero: decoding clips to what a pixel can show
    assert np.sqrt((change**2).mean()) < 0.1


def test_data_set_is_whole_or_does_not_open(tmp_path: Path) -> None:
    info = DatasetInfo(clips=6, validation=2, pixel_clips=2, channels=8)
    with pytest.raises(FileNotFoundError, match="training.data"):
        ClipDataset(tmp_path)
    data = build(tmp_path, info, processes=1, fit_clips=8)
    assert data.latents.shape == (6, 19, 8, 8, 14) and data.masks.shape == (6, 19, 8, 14)
    assert data.pixels.shape == (2, NUM_FRAMES, HEIGHT, WIDTH, 3) and len(data.params) == 6
    assert list(data.train_indices) == [0, 1, 2, 3] and list(data.validation_indices) == [4, 5]
    assert np.allclose(data.latents[1], data.pca.encode(data.pixels[1]), atol=2e-2)
    assert not any(held_out(params) for params in data.params)
    assert json.loads((tmp_path / "dataset.json").read_text())["clips"] == 6
    other = PatchPCA(data.pca.mean, data.pca.components[::-1].copy(), data.pca.scale)
    again = build(tmp_path / "other", DatasetInfo(clips=2, validation=1, pixel_clips=1, channels=8), 1, pca=other)
    assert np.array_equal(again.pca.components, other.components)
    assert np.allclose(again.latents[1], other.encode(training_clip(100_001)[1]), atol=2e-2)
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(FileNotFoundError):
        ClipDataset(tmp_path)
