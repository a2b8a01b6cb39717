"""Segments and files: every frame in its place, right colours and tags, a recipe inside, no debris after a fault."""

from __future__ import annotations

import os
import resource
import signal
import struct
import subprocess
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline import video
from pipeline.config import GenerationRequest
from pipeline.errors import VideoError
from pipeline.mp4 import count_frames
from pipeline.recipe import build_recipe, read_recipe, request_from_recipe
from pipeline.video import SegmentEncoder, encoded_size
from tests.media import read_media
from tests.scripted import SPEC, ScriptedPipeline, paint, read_code

REQUEST = GenerationRequest(prompt="a red ball over <the> mountains, 日没 “at” sunset\n= ; # \\ '", seed=7, seconds=3)


def encoded(fps: float = 16, num_blocks: int = 3, height: int = 64, width: int = 112) -> SegmentEncoder:
    encoder = SegmentEncoder(fps)
    for index in range(num_blocks):
        first, last = (SPEC.frames_in(index) if index else 0), SPEC.frames_in(index + 1)
        encoder.encode(np.stack([paint(n, height, width) for n in range(first, last)]))
    return encoder


@pytest.mark.parametrize("fps", [1, 6, 7, 16, 23.976, 24, 29.97, 60])
def test_the_file_holds_every_frame_at_its_time(tmp_path: Path, fps: float) -> None:
    encoder = encoded(fps)
    assert encoder.num_frames == 33
    assert encoder.duration == pytest.approx(33 / fps, rel=1e-4)
    encoder.write_mp4(tmp_path / "out.mp4")
    media = read_media(tmp_path / "out.mp4")
    assert [read_code(picture) for picture in media.frames] == list(range(33))
    assert media.timestamps[0] == 0
    steps = np.diff(media.timestamps)
    assert np.ptp(steps) < 1e-9 and steps[0] == pytest.approx(1 / fps, rel=1e-4)
    assert media.description.startswith("h264") and "yuv420p(tv, bt709, progressive)" in media.description
    assert os.listdir(tmp_path) == ["out.mp4"]


def test_segments_are_playable_in_a_row_and_alone(tmp_path: Path) -> None:
    encoder = SegmentEncoder(16)
    blocks = list(ScriptedPipeline().stream(REQUEST))
    segments = [encoder.encode(block.frames) for block in blocks]
    assert [segment.num_frames for segment in segments] == [9, 12, 12, 12]
    assert [segment.duration for segment in segments] == [9 / 16, 12 / 16, 12 / 16, 12 / 16]
    (tmp_path / "all.ts").write_bytes(b"".join(segment.data for segment in segments))
    media = read_media(tmp_path / "all.ts")
    assert [read_code(picture) for picture in media.frames] == list(range(45))
    assert np.allclose(np.diff(media.timestamps), 1 / 16)
    (tmp_path / "one.ts").write_bytes(segments[2].data)
    assert [read_code(picture) for picture in read_media(tmp_path / "one.ts").frames] == list(range(21, 33))


def test_continuity_counters_never_jump() -> None:
    encoder = SegmentEncoder(16)
    last: dict[int, int] = {}
    for block in ScriptedPipeline().stream(REQUEST):
        data = encoder.encode(block.frames).data
        for at in range(0, len(data), 188):
            packet = data[at : at + 188]
            pid = (packet[1] & 0x1F) << 8 | packet[2]
            expected = last.get(pid, -1) + bool(packet[3] & 0x10)
            assert packet[3] & 0x0F == expected % 16
            last[pid] = packet[3] & 0x0F
    assert len(last) >= 3, "tables and video"


def test_colours_survive(tmp_path: Path) -> None:
    encoder = SegmentEncoder(16)
    pure = np.zeros((9, 64, 112, 3), np.uint8)
    pure[:, :, :37, 0] = pure[:, :, 37:74, 1] = pure[:, :, 74:, 2] = 255
    encoder.encode(pure)
    encoder.write_mp4(tmp_path / "out.mp4")
    picture = read_media(tmp_path / "out.mp4").frames[4].astype(int)
    height, width = picture.shape[:2]
    for part, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255)]):
        assert np.abs(picture[height // 2, (2 * part + 1) * width // 6] - colour).max() <= 6


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (64, 112, (384, 672)),
        (480, 832, (480, 832)),
        (384, 384, (384, 384)),
        (128, 64, (768, 384)),
        (255, 400, (510, 800)),
    ],
)
def test_small_frames_are_enlarged_by_a_whole_number(height, width, expected) -> None:
    assert encoded_size(height, width) == expected


@pytest.mark.parametrize(("height", "width"), [(87, 113), (301, 465), (300, 465), (480, 832)])
def test_any_size_can_be_encoded(tmp_path: Path, height: int, width: int) -> None:
    encoder = encoded(num_blocks=1, height=height, width=width)
    encoder.write_mp4(tmp_path / "out.mp4")
    assert [read_code(picture) for picture in read_media(tmp_path / "out.mp4").frames] == list(range(9))


@pytest.mark.parametrize("name", ["12:30.mp4", "./a-b:c.mp4", "-y.mp4"])
def test_names_that_look_like_something_else_are_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    encoded().write_mp4(name)
    assert [path.name for path in tmp_path.iterdir()] == [Path(name).name]


def test_the_file_starts_with_its_index_so_that_it_plays_while_downloading(tmp_path: Path) -> None:
    encoded().write_mp4(tmp_path / "out.mp4")
    data = (tmp_path / "out.mp4").read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")
    assert count_frames(tmp_path / "out.mp4") == 33


def test_the_recipe_comes_back_and_makes_the_same_request(tmp_path: Path) -> None:
    request = replace(REQUEST, taehv=True, fps=12.5)
    encoder = SegmentEncoder(12.5)
    for block in ScriptedPipeline().stream(request):
        encoder.encode(block.frames)
    recipe = build_recipe(block.run, encoder.num_frames)
    encoder.write_mp4(tmp_path / "out.mp4", recipe)
    assert read_recipe(tmp_path / "out.mp4") == recipe
    assert recipe["complete"] and recipe["frames"] == encoder.num_frames
    assert {"python", "torch"} <= recipe["versions"].keys()
    assert request_from_recipe(recipe) == request


def test_a_part_of_a_video_says_so() -> None:
    block = next(ScriptedPipeline().stream(REQUEST))
    assert build_recipe(block.run, 9)["complete"] is False


def test_the_longest_prompt_fits_into_the_recipe(tmp_path: Path) -> None:
    request = replace(REQUEST, prompt="😀" * 2000)
    block = next(ScriptedPipeline().stream(request))
    encoder = SegmentEncoder(16)
    encoder.encode(block.frames)
    encoder.write_mp4(tmp_path / "out.mp4", build_recipe(block.run, 9))
    assert read_recipe(tmp_path / "out.mp4")["prompt"] == request.prompt


def test_of_a_cameras_file_the_beginning_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "camera.mp4"
    pictures = struct.pack(">I4s", 5_000_000, b"mdat") + bytes(1000)  # and the rest, and all about it, come after that
    start = struct.pack(">I4s8s", 16, b"ftyp", b"isom")
    path.write_bytes(start + pictures)
    with pytest.raises(VideoError, match="no recipe.* drop it into"):
        read_recipe(path)


def test_of_a_video_made_here_the_beginning_holds_the_recipe(tmp_path: Path) -> None:
    block = next(ScriptedPipeline().stream(REQUEST))
    encoder = SegmentEncoder(16)
    encoder.encode(block.frames)
    path = tmp_path / "out.mp4"
    encoder.write_mp4(path, build_recipe(block.run, 9))
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"mdat") + 100])
    assert read_recipe(path)["seed"] == block.run.seed
    path.write_bytes(whole[: whole.index(b"ilst")])
    with pytest.raises(VideoError, match="cut off"):
        read_recipe(path)


def test_files_without_a_recipe_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "x.mp4"
    encoder = encoded(num_blocks=1)
    encoder.write_mp4(path)
    with pytest.raises(VideoError, match="no recipe"):
        read_recipe(path)
    encoder.write_mp4(path, {"format": "something else"})
    with pytest.raises(VideoError, match="no recipe"):
        read_recipe(path)
    for content in (b"", b"RIFF", b"\x00" * 64, b"\xff" * 64, b"<html>"):
        path.write_bytes(content)
        with pytest.raises(VideoError):
            read_recipe(path)
    with pytest.raises(VideoError, match="cannot be read"):
        read_recipe(tmp_path / "missing.mp4")
    with pytest.raises(VideoError, match="newer version"):
        request_from_recipe({"format": "self-forcing-recipe", "version": 99})
    with pytest.raises(VideoError, match="incomplete"):
        request_from_recipe({"format": "self-forcing-recipe", "version": 1, "prompt": "a"})


def test_damaged_files_are_refused_or_read_but_never_crash(tmp_path: Path) -> None:
    path = tmp_path / "x.mp4"
    encoder = encoded(num_blocks=1)
    encoder.write_mp4(path, {"format": "self-forcing-recipe"})
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(100):
        data = bytearray(whole[: rng.integers(1, len(whole))])
        for at in rng.integers(0, min(len(data), 2000), size=3):
            data[at] = rng.integers(256)
        path.write_bytes(data)
        for read in (read_recipe, count_frames):
            with suppress(VideoError):
                read(path)


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((9, 64, 112, 3), np.float32),
        np.zeros((9, 64, 112), np.uint8),
        np.zeros((9, 64, 112, 4), np.uint8),
        np.zeros((0, 64, 112, 3), np.uint8),
        [1, 2, 3],
        None,
    ],
    ids=["float", "grey", "alpha", "none", "list", "nothing"],
)
def test_frames_of_another_kind_are_refused(frames) -> None:
    with pytest.raises(VideoError, match=r"\[T, H, W, 3\]"):
        SegmentEncoder(16).encode(frames)


def test_a_change_of_size_is_refused() -> None:
    encoder = SegmentEncoder(16)
    encoder.encode(np.zeros((2, 64, 112, 3), np.uint8))
    with pytest.raises(VideoError, match="size changed"):
        encoder.encode(np.zeros((2, 64, 120, 3), np.uint8))


def test_there_must_be_something_to_write(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="no video to write"):
        SegmentEncoder(16).write_mp4(tmp_path / "out.mp4")
    assert os.listdir(tmp_path) == []


def test_ffmpeg_on_path_is_not_needed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    encoded().write_mp4(tmp_path / "out.mp4")
    assert count_frames(tmp_path / "out.mp4") == 33


# ---- faults: in every case the file that was there before stays, and nothing else remains


@pytest.fixture
def old_file(tmp_path: Path):
    path = tmp_path / "out.mp4"
    path.write_bytes(b"the old one")
    yield path
    assert path.read_bytes() == b"the old one"
    assert os.listdir(tmp_path) == ["out.mp4"]


@pytest.mark.parametrize("limit", [0, 1, 4096, 8192, 12000])
def test_a_write_that_is_cut_short_leaves_nothing(old_file: Path, monkeypatch, limit: int) -> None:
    encoder = encoded()
    run = subprocess.run

    def limited(*args, **kwargs):  # the kernel stops ffmpeg at so many bytes, as a quota does
        def limits():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        return run(*args, **kwargs, preexec_fn=limits)

    monkeypatch.setattr(video.subprocess, "run", limited)
    with pytest.raises(VideoError):
        encoder.write_mp4(old_file)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_while_writing_leaves_nothing(old_file: Path, monkeypatch, error) -> None:
    def interrupted(*args):
        raise error

    encoder = encoded()
    monkeypatch.setattr(video.os, "replace", interrupted)
    with pytest.raises(error):
        encoder.write_mp4(old_file)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 1", "code 1"),
        ("echo 'No space left on device' >&2; exit 228", "disk is full"),
        ("exit 0", "MP4 file|written"),
    ],
)
def test_an_encoder_that_fails(old_file: Path, tmp_path_factory, monkeypatch, script: str, message: str) -> None:
    fake = tmp_path_factory.mktemp("bin") / "ffmpeg"
    fake.write_text(f"#!/bin/sh\ncat >/dev/null\n{script}\n")
    fake.chmod(0o755)
    encoder = encoded()
    monkeypatch.setattr(video, "ffmpeg_binary", lambda: str(fake))
    with pytest.raises(VideoError, match=message) as caught:
        encoder.write_mp4(old_file)
    assert str(old_file.parent) not in str(caught.value)


def test_an_encoder_that_is_not_there(old_file: Path, monkeypatch) -> None:
    encoder = encoded()
    monkeypatch.setattr(video, "ffmpeg_binary", lambda: str(old_file.parent / "missing"))
    with pytest.raises(VideoError, match="could not be started"):
        encoder.write_mp4(old_file)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(VideoError):
        encoded(num_blocks=1).write_mp4(tmp_path / "no" / "out.mp4")
