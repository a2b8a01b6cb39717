"""`python -m pipeline --image` and `--video`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pipeline import cli, compare_cli
from pipeline.recipe import read_recipe
from pipeline.start_file import read_start
from tests.media import read_media
from tests.pictures import encoded, picture, write_video
from tests.scripted import SPEC, ScriptedPipeline, read_code


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"settings": asdict(SPEC)}))
    return folder


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(cli, "terminate_like_interrupt", lambda: None)  # signals are pytest's in this process
    (tmp_path / "a.png").write_bytes(encoded(picture(), "PNG"))
    return folder


def run(model: Path, *arguments: str) -> tuple[int, ScriptedPipeline]:
    pipeline = ScriptedPipeline()
    code = cli.main(["a red ball", "--model", str(model), *arguments], load=lambda folder, device: pipeline)
    return code, pipeline


def test_a_video_from_a_picture(model: Path, out: Path, capsys) -> None:
    arguments = ["--image", "../a.png", "--seconds", "1.5", "--seed", "7", "--output", "b.mp4", "--json"]
    code, pipeline = run(model, *arguments)
    assert code == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["frames"], said["start_frames"]) == (25, 1), "seconds counts what is made: two blocks"
    start = read_start(out.parent / "a.png", SPEC)
    assert np.array_equal(pipeline.requests[0].start.frames, start.frames)
    assert start.matches(read_recipe("b.mp4")["start"])
    assert [read_code(frame) for frame in read_media("b.mp4").frames][1:] == list(range(1, 25))


def test_a_picture_is_not_what_every_model_was_made_for(model: Path, out: Path, capsys) -> None:
    given = ["--image", "../a.png", "--seconds", "1.5"]
    told = []
    for trained in (False, True):
        pipeline = ScriptedPipeline()
        pipeline.spec = replace(SPEC, trained_on_pictures=trained)
        load = partial(lambda made, folder, device: made, pipeline)
        assert cli.main(["a red ball", "--model", str(model), *given], load=load) == 0
        told.append("not trained to start from a picture" in capsys.readouterr().err)
    assert told == [True, False]
    start = read_start(out.parent / "a.png", SPEC)
    assert "not trained" in SPEC.start_note(start) and SPEC.start_note(None) == ""
    assert replace(SPEC, frames_per_block=1).start_note(start) == ""


def test_a_video_goes_on(model: Path, out: Path, capsys) -> None:
    write_video(out.parent / "a.mp4", 40)
    code, pipeline = run(model, "--video", "../a.mp4", "--seconds", "0.75", "--seed", "7")
    assert code == 0
    said = capsys.readouterr().out
    assert "45 frames (33 of them what it starts from)" in said
    assert pipeline.requests[0].start.kind == "video"
    assert os.listdir(out) == ["a-red-ball-seed7.mp4"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", "../missing.png"], "cannot be read"),
        (["--image", ".."], "cannot be read"),
        (["--video", "../a.png"], "A video is needed here"),
        (["--image", "../a.png", "--video", "../a.png"], "cannot be used together"),
        (["--video", "../short.mp4"], "too short: it has 8 frames (0.50 s)"),
        (["--image", "../text.png"], "neither a picture"),
        (["--image", "../a.png", "--model", "../out"], "model folder"),
    ],
)
def test_bad_files_are_refused_in_a_sentence_and_without_a_model(
    model: Path, out: Path, capsys, arguments: list[str], words: str
) -> None:
    write_video(out.parent / "short.mp4", 8)
    (out.parent / "text.png").write_text("a red ball")
    code = cli.main(
        ["a red ball", "--model", str(model), *arguments], load=lambda folder, device: pytest.fail("too late")
    )
    said = capsys.readouterr()
    assert code == 2 and said.out == "" and words in said.err
    assert said.err.count("\n") == 1 and os.listdir(out) == []


def test_a_bad_file_does_not_wait_for_torch(model: Path, out: Path) -> None:
    code = "import sys; from pipeline.cli import main; code = main(); assert 'torch' not in sys.modules; sys.exit(code)"
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run(
        [sys.executable, "-c", code, "a ball", "--image", "../model/model_index.json", "--model", str(model)],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2 and "neither a picture" in result.stderr


def test_a_comparison_starts_from_the_same_picture(model: Path, out: Path, capsys) -> None:
    pipeline = ScriptedPipeline()
    arguments = ["a red ball", "--a", "taehv=on", "--b", "taehv=off", "--image", "../a.png", "--seconds", "1"]
    arguments += ["--output", "c.mp4", "--model", str(model)]
    assert compare_cli.main(arguments, load=lambda folder, device: pipeline) == 0
    assert len({id(request.start) for request in pipeline.requests}) == 1
    assert pipeline.requests[0].start.kind == "image"
