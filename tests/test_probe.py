"""The probe, tracking, and scores with pipelines that play back rendered clips."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import GenerationRequest
from training import evaluate as evaluation
from training.data import ClipDataset, DatasetInfo, build
from training.evaluate import Prompt, as_table, evaluate, plan_prompts, rounded
from training.pca import PatchPCA, to_patches
from training.probe import (
    READ,
    WINDOW,
    AttributeProbe,
    WindowReading,
    agreement,
    augment,
    held_out_clips,
    train,
)
from training.sheets import contact_sheet
from training.tracking import follow, read_motion
from training.world import ATTRIBUTES, FPS, ClipParams, all_params, held_out, render


class Oracle(AttributeProbe):
    """Reads rendered clips without a mistake: finds the parameters whose clip has exactly these frames."""

    def __init__(self, known: dict[bytes, WindowReading]) -> None:
        super().__init__()
        self.known = known

    def read(self, frames: np.ndarray) -> WindowReading:
        return self.known[frames[0].tobytes()]


class Playback:
    """A pipeline that answers with a rendered clip of some parameters for each caption."""

    def __init__(self, shown: dict[str, Prompt], freeze: bool = False) -> None:
        self.shown, self.freeze, self.requests = shown, freeze, []

    def generate(self, request: GenerationRequest) -> SimpleNamespace:
        self.requests.append(request)
        prompt = self.shown[request.prompt]
        count = round(request.seconds * FPS)
        frames = (render(prompt.params, prompt.seed, count)[0] * 255 + 0.5).astype(np.uint8)
        return SimpleNamespace(frames=np.repeat(frames[:1], count, axis=0) if self.freeze else frames)


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return plan_prompts(8, seed=5)


def oracle_for(prompts: list[Prompt]) -> Oracle:
    known = {}
    for prompt in prompts:
        frames, _, track = render(prompt.params, prompt.seed, WINDOW)
        motion = read_motion(track.x, track.y)
        reading = WindowReading(
            prompt.params.to_dict() | {"motion": motion.direction}, 1.0, track.x, track.y, motion.speed
        )
        known[(frames * 255 + 0.5).astype(np.uint8)[0].tobytes()] = reading
    return Oracle(known)


def different(prompts: list[Prompt]) -> dict[str, Prompt]:
    """For each caption, the clip of a prompt that differs from it in every attribute but the time."""
    mapping = {}
    for prompt in prompts:
        asked = prompt.params.to_dict()
        wrong = next(
            params
            for params in all_params()
            if all(value != asked[name] for name, value in params.to_dict().items() if name != "time")
        )
        mapping[prompt.caption] = Prompt(prompt.caption, wrong, prompt.seed)
    return mapping


def test_prompts_are_full_held_out_and_repeatable(prompts: list[Prompt]) -> None:
    assert prompts == plan_prompts(8, seed=5) != plan_prompts(8, seed=6)
    assert all(held_out(prompt.params) for prompt in prompts)


def test_real_clips_score_as_the_ceiling(prompts: list[Prompt], tmp_path: Path) -> None:
    generator = Playback({prompt.caption: prompt for prompt in prompts})
    sheet = tmp_path / "sheets" / "scores.png"
    report = evaluate(generator, oracle_for(prompts), prompts, sheet=sheet)
    assert report["prompt_following"] == report["ceiling"]
    assert all(report["relative"][name] == pytest.approx(1) for name in ATTRIBUTES)
    assert generator.requests[0].seconds == WINDOW / FPS and generator.requests[0].fps == FPS
    assert [request.seed for request in generator.requests] == [prompt.seed for prompt in prompts]
    assert Image.open(sheet).height > 8 * 64
    assert report["video_fps"] > 0 and "windows" not in report


def test_clips_of_other_prompts_score_low(prompts: list[Prompt]) -> None:
    shown = different(prompts)
    oracle = oracle_for([*prompts, *shown.values()])
    following = evaluate(Playback(shown), oracle, prompts)["prompt_following"]
    assert all(following[name] == 0 for name in ("scene", "subject", "colour")) and following["motion"] <= 0.25


@pytest.mark.parametrize("freeze", [False, True])
def test_a_frozen_video_is_noticed(freeze: bool) -> None:
    prompts = [Prompt("a ball", ClipParams("city", "day", "ball", "red", "right"), 3)]
    report = evaluate(
        Playback({"a ball": prompts[0]}, freeze), AttributeProbe().eval(), prompts, prompts, 2 * WINDOW / FPS
    )
    assert [window["frozen"] for window in report["windows"]] == [float(freeze)] * 2
    table, last = as_table(report), json.dumps(rounded(report))
    assert "frozen" in table and "1 prompts" in table and json.loads(last)["long_prompts"] == 1


def test_numbers_that_are_none_stay_valid_json() -> None:
    assert json.loads(json.dumps(rounded({"a": [float("nan"), 0.123456], "b": "c"}))) == {
        "a": [None, 0.1235],
        "b": "c",
    }


def test_decoder_psnr_prefers_the_true_decoder() -> None:
    frames = next(held_out_clips(1))[1]
    patches = to_patches(frames).reshape(-1, 768)
    pca = PatchPCA.fit(patches, np.ones(len(patches), np.float32), 16)
    scores = evaluation.decoder_psnr(
        {"linear": pca.decode, "grey": lambda latents: np.full(frames.shape, 0.5, np.float32)}, pca, clips=2
    )
    assert scores["linear"] > scores["grey"] + 5


def test_command_line_prints_json_last(
    prompts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import pipeline

    generator = Playback({prompt.caption: prompt for prompt in prompts})
    stub = SimpleNamespace(from_pretrained=lambda folder: generator)
    monkeypatch.setitem(vars(pipeline), "SelfForcingPipeline", stub)
    AttributeProbe().save(tmp_path / "probe")
    arguments = [
        "--prompts",
        "2",
        "--long-prompts",
        "0",
        "--seed",
        "5",
        "--sheet",
        str(tmp_path / "sheet.png"),
        "--json",
    ]
    evaluation.main([str(tmp_path / "model"), "--probe", str(tmp_path / "probe"), *arguments])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["prompts"] == 2 and set(last["relative"]) == set(ATTRIBUTES)


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
    x = (1.4 + 0.014 * steps) % 1.75
    assert read_motion(x, np.full(WINDOW, 0.5)).direction == "right"
    assert read_motion(np.full(WINDOW, 0.5), (0.2 - 0.009 * steps) % 1.0).direction == "up"
    assert read_motion(np.full(WINDOW, 0.5), 0.5 + 0.008 * np.sin(0.2 * steps)).direction == "still"
    assert read_motion(np.full(WINDOW, np.nan), np.full(WINDOW, np.nan)).direction == "still"


def test_space_is_not_asked_for_a_time() -> None:
    shown = [ClipParams("space", "night", "car", "red", "up"), ClipParams("city", "day", "car", "red", "up")]
    reading = WindowReading(shown[1].to_dict() | {"motion": "down"}, 1.0, np.zeros(1), np.zeros(1), 0.0)
    scores = agreement([reading, reading], shown)
    assert scores == {"scene": 0.5, "time": 1.0, "subject": 1.0, "colour": 1.0, "motion": 0.0}


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
    assert len(loaded.read_windows(frames)) == 1
    with pytest.raises(FileNotFoundError, match="training.probe"):
        AttributeProbe.load(tmp_path / "nowhere")


def test_network_reads_all_attributes_but_motion() -> None:
    logits, cover = AttributeProbe()(torch.rand(2, 3, 64, 112))
    assert {name: value.shape[1] for name, value in logits.items()} == {name: len(ATTRIBUTES[name]) for name in READ}
    assert cover.shape == (2, 8, 14)
