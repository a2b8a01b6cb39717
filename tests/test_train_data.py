"""Prompt files and folders of videos: what becomes of good ones, and the sentence for bad ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from pipeline.decoder import encode_wan
from pipeline.errors import TrainingDataError
from tests.training_world import make_world, stage_settings
from training import videos
from training.clips import ClipSampler, open_clips
from training.draws import Draws
from training.network import load_vae
from training.prompts import PromptFile
from training.settings import ClipSettings
from training.stages import run_stage
from training.text import build_tokenizer

LENGTH = 24


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("data") / "world")


def write_video(path: Path, frames: int = 24, size: tuple[int, int] = (32, 64), seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 255, (1, 4, 8, 3), dtype=np.uint8).repeat(frames, 0)
    pictures = pictures.repeat(size[0] // 4, 1).repeat(size[1] // 8, 2)
    iio.imwrite(path, pictures, plugin="FFMPEG", fps=16, macro_block_size=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    for index, name in enumerate(("a", "b")):
        write_video(folder / f"{name}.mp4", seed=index)
        (folder / f"{name}.txt").write_text(f"a red {'balloon' if index else 'car'}\n")
    return folder


def encode(world: Path, folder: Path, out: Path) -> int:
    options = ["--vae", str(world / "vae"), "--text", str(world / "text"), "--text-length", str(LENGTH)]
    return videos.main([str(folder), "--out", str(out), *options, "--frames", "6"])


def test_videos_become_clips_that_stages_train_on(world: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "encoded"
    assert encode(world, folder, out) == 0
    source = open_clips(ClipSettings(folder=str(out), frames=6))
    assert source.latents.shape == (2, 6, 4, 2, 4)
    frames = np.stack(list(iio.imiter(folder / "b.mp4", plugin="FFMPEG")))[:21]
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)[None].float() / 255
    expected = encode_wan(load_vae(str(world / "vae")), pixels)[0]
    torch.testing.assert_close(torch.from_numpy(np.array(source.latents[1])).float(), expected, atol=2e-3, rtol=2e-3)
    clips = ClipSampler(source, ClipSettings(folder=str(out), frames=6, caption_drop=0.5), 3)
    drawn = clips.draw(Draws(0, 0, range(20), 20), 6)
    assert set(drawn.captions) == {"", "a red car", "a red balloon"}
    changes = {"clips__folder": str(out), "run__steps": 1, "run__batch": 2}
    assert run_stage("teacher", stage_settings("teacher", world, tmp_path / "teacher", **changes)) == 1
    assert run_stage("gan", stage_settings("gan", world, tmp_path / "gan", **changes)) == 1


def test_captions_may_stand_in_one_file(world: Path, folder: Path, tmp_path: Path) -> None:
    for path in folder.glob("*.txt"):
        path.unlink()
    lines = [json.dumps({"file": f"{name}.mp4", "caption": f"a blue star {name}"}) for name in ("b", "a")]
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    assert encode(world, folder, tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "captions.json").read_text()) == ["a blue star b", "a blue star a"]


def cut(folder: Path) -> None:
    path = folder / "b.mp4"
    path.write_bytes(path.read_bytes()[:200])


def listed(*lines: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "captions.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "b.txt").write_text("  \n"), "The caption b.txt is empty"),
        (lambda folder: (folder / "b.txt").write_text("red " * 30), "The caption b.txt has 31 tokens, but"),
        (lambda folder: (folder / "b.txt").unlink(), "b.mp4 has no caption: b.txt is missing"),
        (cut, "b.mp4 cannot be decoded"),
        (lambda folder: (folder / "b.mp4").write_bytes(b""), "b.mp4 cannot be decoded"),
        (
            lambda folder: write_video(folder / "b.mp4", size=(64, 64)),
            "b.mp4 is 64x64, but the videos before it are 64x32",
        ),
        (lambda folder: write_video(folder / "b.mp4", frames=9), "b.mp4 has 9 frames, but 21 are needed"),
        (lambda folder: write_video(folder / "a.mp4", size=(48, 64)), "a.mp4 is 64x48: both must be multiples of 32"),
        (lambda folder: [path.unlink() for path in folder.glob("*.mp4")], "holds no .mp4 files"),
        (listed('{"file": "c.mp4", "caption": "x"}'), "names c.mp4, which is not in"),
        (listed('{"file": "a.mp4", "caption": ""}'), "The caption of a.mp4 in captions.jsonl is empty"),
        (listed('{"file": "a.mp4"}'), "Line 1 of captions.jsonl"),
        (listed("{"), "Line 1 of captions.jsonl"),
    ],
)
def test_bad_videos_are_refused_by_name(
    world: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], object],
    message: str,
) -> None:
    spoil(folder)
    assert encode(world, folder, tmp_path / "out") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in said
    assert not (tmp_path / "out" / "videos.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a red car\n\na blue car\n", r"Line 2 of .*prompts.txt is empty"),
        ("red " * 30, r"Line 1 of .*prompts.txt has 31 tokens, but the text encoder reads 24"),
        ("a car\n" + "x" * 3000, r"Line 2 of .*prompts.txt cannot be a prompt: The prompt has 3,000 characters"),
        ("", "is empty"),
    ],
)
def test_bad_prompt_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(text)
    with pytest.raises(TrainingDataError, match=message):
        PromptFile(path, build_tokenizer(), LENGTH)


def test_prompt_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(TrainingDataError, match="it is not UTF-8 text"):
        PromptFile(tmp_path / "binary", build_tokenizer(), LENGTH)


def test_dmd_learns_from_a_prompt_file(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a red car\na blue star\n")
    prompts = PromptFile(path, build_tokenizer(), LENGTH)
    assert set(prompts.draw(Draws(0, 0, range(30), 30), "x")) == {"a red car", "a blue star"}
    settings = stage_settings("dmd", world, tmp_path / "out", run__steps=1, prompts__source=str(path))
    assert run_stage("dmd", settings) == 1
