"""The procedural world, its captions, its latents and the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from training.captions import MAX_TOKENS, make_caption, vocabulary, words
from training.data import ClipDataset, DatasetInfo, build, training_clip
from training.pca import PatchPCA, from_patches, group_frames, mask_patches, psnr, to_patches
from training.sprites import COLOURS, SUBJECTS
from training.text import EOS, PAD, UNK, build_tokenizer, save_tokenizer
from training.tracking import read_motion
from training.world import (
    ATTRIBUTES,
    MOTIONS,
    ClipParams,
    all_params,
    held_out,
    render,
    sample_params,
)

HEADLINE = "a red balloon rises over the mountains at sunset"


def clip_of(subject: str = "balloon", colour: str = "red", motion: str = "up") -> ClipParams:
    return ClipParams("mountains", "sunset", subject, colour, motion)


def test_render_is_a_function_of_parameters_and_seed() -> None:
    first, again, other = (render(clip_of(), seed, num_frames=9) for seed in (3, 3, 4))
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])


def test_rendering_leaves_the_shared_layouts_alone() -> None:
    night = ClipParams("city", "night", "car", "red", "still")
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
    params = ClipParams("desert", "day", subject, "blue", "still")
    _, mask, track = render(params, 1, num_frames=5)
    rows, columns = np.nonzero(mask[0] > 0.5)
    assert abs((columns.mean() + 0.5) / 64 - track.x[0]) < 0.04
    assert abs((rows.mean() + 0.5) / 64 - track.y[0]) < 0.08
    assert 0.03 < mask[0].mean() * 112 / 64 < 0.25


def test_colours_look_different_at_night() -> None:
    looks = []
    for colour in COLOURS:
        frames, mask, _ = render(ClipParams("meadow", "night", "ball", colour, "still"), 2, num_frames=1)
        looks.append(frames[0][mask[0] > 0.99].mean(axis=0))
    distances = [np.abs(a - b).max() for i, a in enumerate(looks) for b in looks[:i]]
    assert min(distances) > 0.15


@pytest.mark.parametrize("motion", MOTIONS)
def test_subjects_move_as_asked(motion: str) -> None:
    right = 0
    for seed in range(30):
        _, _, track = render(clip_of(motion=motion), seed, num_frames=33)
        right += read_motion(track.x, track.y).direction == motion
    assert right == 30


def test_some_clips_wrap_around_the_border_and_some_stay_inside() -> None:
    tracks = [render(clip_of(motion="right"), seed)[2] for seed in range(60)]
    inside = [track.x.min() > 0 and track.x.max() < 112 / 64 for track in tracks]
    wrapped = [np.diff(track.x).min() < -1 for track in tracks]
    assert 0.45 < np.mean(inside) < 0.85 and np.mean(wrapped) > 0.02


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


@pytest.mark.parametrize("values", [("moon", "day"), ("ocean", "noon"), ("space", "day")])
def test_impossible_parameters_are_refused(values: tuple[str, str]) -> None:
    with pytest.raises(ValueError):
        ClipParams(*values, "ball", "red", "up")


def test_captions_state_what_they_say_they_state() -> None:
    rng, known = np.random.default_rng(0), set(vocabulary())
    colours = {"crimson": "red", "golden": "yellow", "emerald": "green"} | {colour: colour for colour in COLOURS}
    for _ in range(2000):
        params = sample_params(rng)
        caption, stated = make_caption(params, rng)
        assert stated.items() <= params.to_dict().items() and "subject" in stated
        assert not ("time" in stated and params.scene == "space")
        found = words(caption)
        assert set(found) <= known and len(found) < MAX_TOKENS and caption == caption.lower()
        named = {colours[word] for word in found if word in colours}
        assert named == ({params.colour} if "colour" in stated else set())


def test_full_captions_state_everything() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        params = sample_params(rng)
        stated = make_caption(params, rng, full=True)[1]
        assert set(stated) == set(ATTRIBUTES) - ({"time"} if params.scene == "space" else set())


def test_vocabulary_is_small_and_knows_the_headline() -> None:
    assert set(words(HEADLINE)) <= set(vocabulary())
    assert 100 < len(vocabulary()) < 170


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
    frames = np.random.default_rng(0).random((9, 16, 24, 3)).astype(np.float32)
    assert np.allclose(from_patches(to_patches(frames), 16, 24), frames, atol=1e-6)
    assert mask_patches(np.ones((9, 16, 24), np.float32)).shape == (3, 2, 3)


def test_pca_round_trip(tmp_path: Path) -> None:
    frames = training_clip(0)[1]
    patches = to_patches(frames).reshape(-1, 768)
    weights = np.ones(len(patches), np.float32)
    few, many = (PatchPCA.fit(patches, weights, channels) for channels in (4, 32))
    many.save(tmp_path / "pca.npz")
    loaded = PatchPCA.load(tmp_path / "pca.npz")
    reference = frames.astype(np.float32) / 255
    latents = loaded.encode(frames)
    assert latents.shape == (13, 32, 8, 14) and abs(latents.var(axis=(0, 2, 3)).mean() - 1) < 0.05
    assert np.allclose(latents, loaded.encode(reference), atol=1e-3)
    assert psnr(loaded.decode(latents), reference) > psnr(few.decode(few.encode(frames)), reference) + 2
    change = loaded.encode(loaded.decode(latents)) - latents  # not zero: decoding clips to what a pixel can show
    assert np.sqrt((change**2).mean()) < 0.1


def test_data_set_is_whole_or_does_not_open(tmp_path: Path) -> None:
    info = DatasetInfo(clips=6, validation=2, pixel_clips=2, channels=8)
    with pytest.raises(FileNotFoundError, match="training.data"):
        ClipDataset(tmp_path)
    data = build(tmp_path, info, processes=1, fit_clips=8)
    assert data.latents.shape == (6, 13, 8, 8, 14) and data.masks.shape == (6, 13, 8, 14)
    assert data.pixels.shape == (2, 49, 64, 112, 3) and len(data.params) == 6
    assert list(data.train_indices) == [0, 1, 2, 3] and list(data.validation_indices) == [4, 5]
    assert np.allclose(data.latents[1], data.pca.encode(data.pixels[1]), atol=2e-2)
    assert not any(held_out(params) for params in data.params)
    assert json.loads((tmp_path / "dataset.json").read_text())["clips"] == 6
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(FileNotFoundError):
        ClipDataset(tmp_path)
