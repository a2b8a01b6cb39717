"""Two runs of the same noise: what is compared, what it comes to, the command and the page that show it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline import cli
from pipeline.compare import Comparison, Pair, Side, _preparation, compare, psnr, read_switches, squared_errors
from pipeline.compare_cli import main
from pipeline.config import GenerationRequest
from pipeline.errors import Cancelled, InvalidRequest, OptionUnavailable, SelfForcingError, VideoError
from pipeline.frame_file import FrameFile
from pipeline.mp4 import read_comment
from pipeline.recipe import build_comparison_recipe, read_recipe
from pipeline.side_by_side import GAP, joined, strip
from pipeline.start import Start
from pipeline.worker import ModelWorker
from tests.media import read_media
from tests.scripted import OFF_BY, SPEC, ScriptedPipeline, SwitchedPipeline, read_code
from tests.server import Refused, Server
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parent.parent
REQUEST = GenerationRequest(prompt="a red ball", seed=7, seconds=1)
ON, OFF = {"taehv": True}, {"taehv": False}
PSNR = pytest.approx(34.1514, abs=1e-3)
"""Of pictures in which every value is off by 5: 10 log10(255² / 25)."""


# ---- what is compared


def test_psnr_is_the_textbooks() -> None:
    a = np.zeros((3, 2, 4, 3), np.uint8)
    b = a.copy()
    b[1] = OFF_BY
    b[2, 0, 0, 0] = 255
    assert [psnr(error) for error in squared_errors(a, b)] == [None, PSNR, pytest.approx(13.802, abs=1e-3)]
    assert squared_errors(a, b) == squared_errors(b, a), "no value wraps around"


def test_a_switch_that_shows_is_measured() -> None:
    report = compare(SwitchedPipeline(first_block=1), REQUEST, ON, OFF)
    assert report["psnr_frames"] == [None] * 9 + [PSNR] * 12
    assert (report["psnr_lowest"], report["psnr_lowest_frame"] >= 9) == (PSNR, True)
    assert report["psnr"] == pytest.approx(10 * np.log10(255**2 / (25 * 12 / 21)), abs=1e-3), "of all frames together"
    assert report["identical"] is False
    assert (report["seed"], report["frames"], report["fps"], report["model"]) == (7, 21, 16, "scripted")
    assert report["a"]["applied"]["decoder"] == "taehv" and report["b"]["applied"]["decoder"] == "wan"
    for side in ("a", "b"):
        assert report[side]["time_to_first_frame"] > 0 and report[side]["generation_fps"] > 0


def test_a_report_says_what_both_started_from() -> None:
    start = Start(kind="image", frames=np.zeros((1, SPEC.height, SPEC.width, 3), np.uint8))
    report = compare(SwitchedPipeline(), replace(REQUEST, start=start), ON, OFF)
    assert start.matches(report["start"]) and start.matches(build_comparison_recipe(report)["start"])
    assert compare(SwitchedPipeline(), REQUEST, ON, OFF)["start"] is None


def test_a_switch_that_changes_nothing_is_told_as_identical_in_valid_json() -> None:
    report = compare(SwitchedPipeline(), REQUEST, {"fp8": True}, {"fp8": False})
    assert report["identical"] is True and report["psnr"] is None and report["psnr_lowest"] is None
    assert report["psnr_lowest_frame"] is None
    assert json.loads(json.dumps(report, allow_nan=False))["psnr_frames"] == [None] * 21


def test_both_runs_have_everything_else_in_common_and_are_prepared() -> None:
    pipeline = SwitchedPipeline()
    request = GenerationRequest(prompt="a red ball", seconds=3, fps=12, fp8=True)
    report = compare(pipeline, request, ON, OFF)
    prepared_a, a, prepared_b, b = pipeline.requests
    assert (a.taehv, b.taehv) == (True, False) == (prepared_a.taehv, prepared_b.taehv)
    assert a.seed == b.seed == report["seed"] >= 0, "drawn once"
    assert (a.prompt, a.seconds, a.fps, a.fp8) == (b.prompt, b.seconds, b.fps, b.fp8) == ("a red ball", 3, 12, True)
    assert [run for run, _ in pipeline.made] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert len(pipeline.threads) == 1


def test_preparation_may_be_shorter_than_any_video_that_can_be_asked_for() -> None:
    """Two blocks of a frame-wise model, at a high rate."""
    request = GenerationRequest(prompt="a ball", seconds=5, fps=60)
    assert _preparation(request, replace(SPEC, frames_per_block=1)).seconds == 0.1


def test_preparation_is_no_part_of_what_is_measured() -> None:
    pipeline = SwitchedPipeline()
    pipeline.on_step = lambda block, step: time.sleep(0.2) if (len(pipeline.requests), block, step) == (1, 0, 0) else 0
    report = compare(pipeline, REQUEST, ON, OFF)
    assert report["a"]["prepare_seconds"] > 0.2 > report["a"]["time_to_first_frame"]


@pytest.mark.parametrize(
    ("a", "b", "where", "words"),
    [
        ({"taehv": True}, {}, "decoder", "Only the decoder"),
        ({"fp8": True}, {"compile": True}, "transformer", "Only the transformer"),
        ({"fp8": True, "taehv": True}, {"taehv": True}, "transformer", "Only the transformer"),
        ({"fp8": True}, {"taehv": True}, "transformer and decoder", "both differ"),
    ],
)
def test_it_says_which_part_of_the_model_differs(a: dict, b: dict, where: str, words: str) -> None:
    pair = Pair.of(REQUEST, a, b)
    assert pair.differs_in == where and words in pair.meaning


def test_sides_that_are_equal_or_no_sides_are_refused() -> None:
    for a, b in (({}, {}), (ON, ON), ({"fp8": False}, {}), ({"fp8": True}, {"fp8": True})):
        with pytest.raises(InvalidRequest, match="the same"):
            Pair.of(REQUEST, a, b)
    with pytest.raises(InvalidRequest, match="seed"):
        Pair.of(REQUEST, {"seed": 8}, {})


def test_switches_are_read() -> None:
    assert read_switches("a", " FP8=on , taehv=OFF") == {"fp8": True, "taehv": False}
    assert read_switches("a", ["fp8=on", "taehv=off,compile=on"]) == {"fp8": True, "taehv": False, "compile": True}
    for wrong in ("", "fp8", "fp8=yes", "fp9=on", "fp8=on,", "=on", "fp8=on=on", ["fp8=on", ""]):
        with pytest.raises(InvalidRequest, match="a has .*name=on or name=off"):
            read_switches("a", wrong)
    with pytest.raises(InvalidRequest, match="twice"):
        read_switches("a", ["fp8=on", "fp8=off"])


def test_what_cannot_work_here_is_refused_before_anything_is_made() -> None:
    pipeline = ScriptedPipeline(unavailable={"taehv": "There is no TAEHV here."})
    with pytest.raises(OptionUnavailable, match="no TAEHV here"):
        compare(pipeline, REQUEST, {}, ON)
    with pytest.raises(InvalidRequest, match=r"35997 frames take 86.3 GB .*at most 2 GB.*fewer seconds"):
        huge = ScriptedPipeline(spec=replace(SPEC, height=480, width=832))
        compare(huge, GenerationRequest(prompt="a ball", seconds=600, fps=60), ON, OFF)
    assert pipeline.requests == huge.requests == []


def test_a_full_disk_is_told_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = ScriptedPipeline()
    monkeypatch.setattr("pipeline.frame_file.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(InvalidRequest, match=r"only 0\.0 GB of the disk are free"):
        compare(pipeline, REQUEST, ON, OFF)
    assert pipeline.requests == []


def test_a_pipeline_that_tells_no_length_has_the_same_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    frame_bytes = SPEC.height * SPEC.width * 3
    monkeypatch.setattr("pipeline.compare.MAX_FRAME_BYTES", 2 * 20 * frame_bytes)
    pipeline = ScriptedPipeline()
    with ModelWorker(pipeline) as worker, Comparison(worker, Pair.of(REQUEST, ON, OFF)) as comparison:
        with pytest.raises(VideoError, match="fewer seconds"):
            list(comparison.make())
        assert len(comparison.a.frames) == 9, "21 frames are one too many"


def test_speed_is_that_of_the_model_not_of_whoever_takes_the_frames() -> None:
    (first, *_), request = ScriptedPipeline().stream(REQUEST), REQUEST
    side = Side("A", request, "taehv on")
    side.take(first)
    for number in (1, 2):
        side.take(replace(first, elapsed=first.elapsed + 10 * number, denoise_seconds=0.6, decode_seconds=0.3))
    assert side.facts["generation_fps"] == 10
    side.frames.close()
    silent = Side("A", request, "taehv on")
    for number in (1, 2):
        silent.take(replace(first, elapsed=9.0 * number, denoise_seconds=0))
    assert silent.facts["generation_fps"] == 1, "blocks that do not say it are timed from outside"
    silent.frames.close()


def test_stop_ends_the_report_too() -> None:
    wanted = [False, False, True]
    with (
        ModelWorker(ScriptedPipeline()) as worker,
        Comparison(worker, Pair.of(REQUEST, ON, OFF), stopped=lambda: wanted.pop(0)) as comparison,
    ):
        list(comparison.make())
        comparison.report()
        with pytest.raises(Cancelled, match="nothing of it is kept"):
            comparison.report()


def test_a_comparison_can_be_stopped_at_any_of_its_runs() -> None:
    pipeline = ScriptedPipeline()
    with ModelWorker(pipeline) as worker:
        for number in range(1, 5):
            runs = []

            def stop_at(run, runs=runs, number=number) -> None:
                runs.append(run)
                if len(runs) == number:
                    run.stop()

            with (
                Comparison(worker, Pair.of(REQUEST, ON, OFF), on_run=stop_at) as comparison,
                pytest.raises(Cancelled, match="nothing of it is kept"),
            ):
                list(comparison.make())
            assert len(runs) == number
        assert not compare(worker, REQUEST, ON, OFF)["psnr"], "the worker goes on"


def test_no_file_stays_open_however_a_comparison_ends() -> None:
    def stop(run) -> None:
        run.stop()

    pair = Pair.of(REQUEST, ON, OFF)
    pipeline = ScriptedPipeline()
    with ModelWorker(pipeline) as worker:
        compare(worker, REQUEST, ON, OFF)
        before = len(os.listdir("/dev/fd"))
        with Comparison(worker, pair):
            assert len(os.listdir("/dev/fd")) == before + 2, "the frames of each side"
        assert len(os.listdir("/dev/fd")) == before
        with pytest.raises(Cancelled), Comparison(worker, pair, on_run=stop) as comparison:
            list(comparison.make())
        pipeline.faults = {(0, 0): SelfForcingError("It failed.")}
        with pytest.raises(SelfForcingError, match="It failed"):
            compare(worker, REQUEST, ON, OFF)
        assert len(os.listdir("/dev/fd")) == before


def test_a_failure_of_one_side_is_told() -> None:
    pipeline = SwitchedPipeline()

    def fail(block: int, step: int) -> None:
        if len(pipeline.requests) == 4:
            raise SelfForcingError("B failed.")

    pipeline.on_step = fail
    with pytest.raises(SelfForcingError, match="B failed"):
        compare(pipeline, REQUEST, ON, OFF)


def test_two_models_are_not_compared() -> None:
    pipeline = SwitchedPipeline()

    def exchange(block: int, step: int) -> None:
        if len(pipeline.requests) == 3:
            pipeline.spec = replace(SPEC, name="another")

    pipeline.on_step = exchange
    with pytest.raises(SelfForcingError, match="exchanged between"):
        compare(pipeline, REQUEST, ON, OFF)


def test_frames_come_back_from_the_disk_as_they_were() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (21, 6, 10, 3), np.uint8)
    with FrameFile() as file:
        file.append(frames[:9])
        file.append(frames[9:])
        for length in (1, 16, 21, 50):
            pieces = list(file.pieces(length))
            assert np.array_equal(np.concatenate(pieces), frames) and len(pieces[0]) == min(length, 21)
        with pytest.raises(VideoError, match="size changed"):
            file.append(frames[:, :4])


def test_frames_that_cannot_be_read_again_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with FrameFile() as file:
        file.append(np.zeros((2, 4, 4, 3), np.uint8))

        class Broken:
            def seek(self, *_) -> None:
                raise OSError(5, "Input/output error")

            def close(self) -> None:
                pass

        file._file.close()
        monkeypatch.setattr(file, "_file", Broken())
        with pytest.raises(VideoError, match="read again .Input/output error"):
            list(file.pieces(1))


# ---- side by side


@pytest.mark.parametrize(("height", "width"), [(128, 224), (480, 832), (65, 113)])
def test_nothing_of_the_pictures_is_covered_and_both_are_named(height: int, width: int) -> None:
    a, b = (np.full((2, height, width, 3), value, np.uint8) for value in (200, 100))
    both = joined(a, b, "fp8 on", "fp8 off")
    top = len(strip("A: fp8 on", height, width))
    assert both.shape[1] % 2 == both.shape[2] % 2 == 0
    assert (both[:, top : top + height, :width] == 200).all()
    assert (both[:, top : top + height, width + GAP : 2 * width + GAP] == 100).all()
    name_a, name_b = both[0, :top, :width], both[0, :top, width + GAP : 2 * width + GAP]
    assert np.ptp(name_a) > 150 and np.ptp(name_b) > 150 and not np.array_equal(name_a, name_b)


def test_a_long_name_fits() -> None:
    text = "B: taehv off, fp8 off, compile off"
    assert (strip(text, 128, 224)[:, -2:] == strip("", 128, 224)[:, -2:]).all(), "it is not cut off"


# ---- with a real model


def test_the_embedded_models_decoders_differ_by_so_much(one_thread) -> None:
    pytest.importorskip("torch")
    pipeline = cli.load_pipeline(cli.EMBEDDED_MODEL, "cpu")
    request = GenerationRequest(prompt="a red balloon rises over the mountains", seed=7, seconds=0.5)
    report = compare(pipeline, request, ON, OFF)
    assert 25 < report["psnr_lowest"] <= report["psnr"] < 40 and report["identical"] is False
    assert report["a"]["applied"]["decoder"].startswith("TAEHV") and report["b"]["applied"]["decoder"] == "Wan VAE"


@pytest.mark.parametrize(("switch", "same_latents"), [("taehv", True), ("fp8", False)])
def test_both_sides_get_the_same_noise(
    switch: str, same_latents: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    from pipeline import generator
    from tests.small import write_model_folder

    pipeline = cli.load_pipeline(write_model_folder(tmp_path), "cpu")
    noise, latents = [], []
    draw = generator.block_noise
    monkeypatch.setattr(generator, "block_noise", lambda *asked: (noise.append(draw(*asked)), noise[-1])[1])
    for decoder in pipeline._decoders.values():
        decode = decoder.decode
        monkeypatch.setattr(decoder, "decode", lambda block, decode=decode: (latents.append(block), decode(block))[1])
    report = compare(pipeline, REQUEST, {switch: True}, {switch: False})
    assert report["psnr"] is not None and report["psnr"] < 60
    half = len(noise) // 2
    assert half and all(torch.equal(a, b) for a, b in zip(noise[:half], noise[half:], strict=True))
    half = len(latents) // 2
    same = [torch.equal(a, b) for a, b in zip(latents[:half], latents[half:], strict=True)]
    assert half and all(same) is same_latents and any(same) is same_latents


# ---- the command

PROGRAM = """
import sys
from pipeline import compare_cli
from tests.scripted import SwitchedPipeline
sys.exit(compare_cli.main(load=lambda folder, device: SwitchedPipeline(step_seconds={step_seconds})))
"""


@pytest.fixture
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "model_index.json").write_text("{}")
    return folder


@pytest.fixture
def run(tmp_path: Path, model: Path, capsys, monkeypatch):
    """The command in this process. Returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "terminate_like_interrupt", lambda: None)  # signals are pytest's in this process

    def run(*arguments: str, pipeline: ScriptedPipeline | None = None) -> tuple[int, str, str]:
        pipeline = pipeline or SwitchedPipeline()
        code = main([*arguments, "--model", str(model)], load=lambda folder, device: pipeline)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_the_command_writes_both_side_by_side_and_one_json_object(run, tmp_path: Path) -> None:
    (tmp_path / "out.mp4").write_text("old")
    code, out, err = run(
        "a red volcano", "--a", "taehv=on", "--b", "fp8=off", "--seed", "7", "--seconds", "1", "--fps", "12",
        "--output", "out.mp4", "--json",
    )  # fmt: skip
    assert code == 0, err
    said = json.loads(out)
    assert said["output"] == "out.mp4" and said["psnr"] == said["psnr_lowest"] == PSNR and not said["identical"]
    assert (said["seed"], said["frames"], said["fps"], said["differs"]) == (7, 9, 12, ["taehv"])
    assert (said["a"]["taehv"], said["b"]["taehv"]) == (True, False)
    assert "volcano" in err and os.listdir(tmp_path) == ["out.mp4"]
    media = read_media(tmp_path / "out.mp4")
    height, width = media.frames.shape[1:3]
    assert height % 2 == width % 2 == 0
    half = width // 2
    for number, picture in enumerate(media.frames):
        assert read_code(picture[:, : half - 14]) == read_code(picture[:, half + 14 :]) == number
    kept = json.loads(read_comment(tmp_path / "out.mp4"))
    assert kept["prompt"] == "a red volcano" and kept["psnr"] == said["psnr"] and kept["b"] == said["b"]
    with pytest.raises(VideoError, match="two side by side"):
        read_recipe(tmp_path / "out.mp4")


def test_for_people_it_is_a_line(run, tmp_path: Path) -> None:
    code, out, _ = run("a red ball", "--a", "taehv=on", "--a", "fp8=on", "--b", "taehv=off", "--seconds", "1")
    assert code == 0 and out.count("\n") == 1
    (name,) = os.listdir(tmp_path)
    for words in (name, "PSNR 34.15 dB", "A: taehv on, fp8 on", "B: taehv off, fp8 off", "FPS", "both differ"):
        assert words in out
    same = run("a red ball", "--a", "fp8=on", "--b", "fp8=off", "--seconds", "1", "--output", "same.mp4")[1]
    assert "every frame is the same" in same and "PSNR" not in same


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a ball"], ["--a", "--b"]),
        (["a ball", "--a", "fp8=on"], ["--b"]),
        (["a ball", "--a", "fp8=off", "--b", "fp8=off"], ["the same"]),
        (["a ball", "--a", "fp8=on", "--b", "fp8=1"], ["b has 'fp8=1'", "name=on"]),
        (["a ball", "--a", "fp16=on", "--b", "fp8=on"], ["a has 'fp16=on'", "taehv, fp8, compile"]),
        (["a ball", "--a", "fp8=on", "--b", "compile=on"], ["no compiler"]),
        (["", "--a", "fp8=on", "--b", "fp8=off"], ["prompt is empty"]),
        (["a ball", "--a", "fp8=on", "--b", "fp8=off", "--seconds", "nan"], ["seconds", "nan"]),
        (["a ball", "--a", "fp8=on", "--b", "fp8=off", "--fp8"], ["--fp8"]),
        (["a ball", "--a", "fp8=on", "--b", "fp8=off", "--output", "out.avi"], [".mp4"]),
        (["a ball", "--a", "fp8=on", "--b", "fp8=off", "--device", "gpu"], ["device", "gpu"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_bad_input_is_refused_in_a_sentence(run, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    pipeline = SwitchedPipeline(unavailable={"compile": "There is no compiler here."})
    code, out, err = run(*arguments, pipeline=pipeline)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert all(word in err for word in words), err
    assert pipeline.requests == [] and os.listdir(tmp_path) == []


def test_what_the_device_needs_on_is_on_unless_named(run) -> None:
    pipeline = SwitchedPipeline()
    pipeline.preset = {"fp8": True}
    code, _, err = run("a ball", "--a", "taehv=on", "--b", "taehv=off", "--seconds", "1", pipeline=pipeline)
    assert code == 0 and "too little memory" not in err
    assert all(request.fp8 for request in pipeline.requests) and len(pipeline.requests) == 4
    code, _, err = run("a ball", "--a", "fp8=on", "--b", "fp8=off", "--seconds", "1", pipeline=pipeline)
    assert code == 0 and "There may be too little memory for this without fp8=on." in err


def test_a_failing_model_leaves_the_old_file(run, tmp_path: Path) -> None:
    (tmp_path / "out.mp4").write_text("old")
    pipeline = SwitchedPipeline(faults={(1, 1): MemoryError()})
    code, out, err = run("a ball", "--a", "taehv=on", "--b", "taehv=off", "--output", "out.mp4", pipeline=pipeline)
    assert (code, out) == (1, "") and "out of memory" in err.splitlines()[-1]
    assert os.listdir(tmp_path) == ["out.mp4"] and (tmp_path / "out.mp4").read_text() == "old"


def test_the_first_word_leads_to_it_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pipeline.__main__ import main; code = main(sys.argv[1:]);"
        "assert not {'torch', 'PIL'} & set(sys.modules); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "compare", "a ball", "--a", "fp8=on", "--b", "fp8=on"]
    result = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "A and B are the same" in result.stderr, result.stderr


def test_ctrl_c_leaves_nothing_however_often_it_comes(tmp_path: Path, model: Path) -> None:
    arguments = ["a ball", "--a", "taehv=on", "--b", "taehv=off", "--seconds", "60", "--model", str(model)]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(step_seconds=1), *arguments],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    said = ""
    for awaited, number in (("Preparing A", signal.SIGINT), ("Stopped", signal.SIGTERM)):
        while awaited not in said:
            assert (letter := process.stderr.read(1)), said
            said += letter
        process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert out == "" and "Traceback" not in said + err
    assert os.listdir(tmp_path) == []


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


# ---- the page


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Server]:
    server = Server(SwitchedPipeline(unavailable={"compile": "There is no compiler here."}), max_seconds=20)
    yield server
    server.close()


@pytest.fixture
def folders(server: Server, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """All folders that the page makes for videos. (The folder around them may be that of other programs, too.)"""
    made = []
    store = server.page.generator.store
    new_folder = store.new_folder
    monkeypatch.setattr(store, "new_folder", lambda *what, **how: (made.append(new_folder(*what, **how)), made[-1])[1])
    return made


SKIPPED = {"__type__": "update", "props": {"__type__": "update"}}
ASKED = ("a red ball", 7, 16, 1, False, False, False)


def test_the_page_gives_three_files_and_what_they_come_to(server: Server) -> None:
    values = server.run(*ASKED, "taehv", None, name="make_both")
    cards = [value[0] for value in values]
    for words in ("Preparing A", "Making A", "Preparing B", "Making B", "Writing"):
        assert any(words in card for card in cards), words
    for words in ("PSNR 34.15 dB", "A: taehv on", "B: taehv off", "21 frames", "seed 7", "Only the decoder"):
        assert words in cards[-1]
    both, a, b = (Path(file["path"]) for file in values[-1][2:])
    assert len({file.parent for file in (both, a, b)}) == 1 and both.parent.parent == server.page.generator.store.root
    shown = [read_media(file).frames for file in (a, b)]
    assert [read_code(picture) for picture in shown[0]] == [read_code(picture) for picture in shown[1]] == [*range(21)]
    assert [read_recipe(file)["settings"]["taehv"] for file in (a, b)] == [True, False]
    assert len(read_media(both).frames) == 21
    assert server.http.get(values[-1][2]["url"].split("/gradio_api")[1]).content == both.read_bytes()


def test_the_other_settings_hold_for_both_sides(server: Server) -> None:
    server.run("a red ball", 7, 12, 1, True, False, False, "fp8", None, name="make_both")
    assert [(request.fp8, request.taehv, request.fps) for request in server.pipeline.requests] == [
        (True, True, 12), (True, True, 12), (False, True, 12), (False, True, 12)
    ]  # fmt: skip


def test_what_is_wrong_is_refused_before_it_stands_in_the_queue(server: Server) -> None:
    for asked, words in (
        ((*ASKED, "compile"), "not in the list"),
        ((*ASKED, "seed"), "not in the list"),
        ((*ASKED, None), "Choose"),
        (("", *ASKED[1:], "taehv"), "prompt is empty"),
    ):
        with pytest.raises(Refused, match=words):
            server.run(*asked, name="begin_both")
    assert server.pipeline.requests == []


def test_stop_ends_both_and_keeps_nothing(server: Server, folders: list[Path]) -> None:
    session = uuid.uuid4().hex
    server.pipeline.step_seconds = 0.03

    def stop() -> None:
        wait_until(lambda: (1, 1) in server.pipeline.made)
        server.call("_stop", session=session)

    thread = threading.Thread(target=stop)
    thread.start()
    values = server.run("a red ball", 7, 16, 20, *ASKED[4:], "taehv", None, name="make_both", session=session)
    thread.join()
    assert "Stopped" in values[-1][0] and values[-1][2:] == [None, None, None]
    assert len(server.pipeline.requests) == 2 and folders == []
    wait_until(lambda: server.idle)


def test_stop_is_heard_while_the_files_are_written(server: Server, folders: list[Path], monkeypatch) -> None:
    session = uuid.uuid4().hex

    def write(*_) -> Iterator[None]:
        server.call("_stop", session=session)
        yield

    monkeypatch.setattr("web.comparing.write_side_by_side", write)
    values = server.run(*ASKED, "taehv", None, name="make_both", session=session)
    assert "Stopped" in values[-1][0] and values[-1][2:] == [None, None, None]
    (folder,) = folders
    assert not folder.exists()


def test_a_visitor_who_waits_is_told_and_can_stop(server: Server) -> None:
    session = uuid.uuid4().hex
    ticket, card, *_ = server.run(*ASKED, "taehv", name="begin_both", session=session)[-1]
    assert "Starting" in card
    with pytest.raises(Refused, match="being made"):
        server.run(*ASKED, name="_begin", session=session)
    status, both, *_ = server.call("_stop", session=session)
    assert "Stopped" in both and status == SKIPPED
    values = server.run(*ASKED, "taehv", ticket, name="make_both", session=session)
    assert "Stopped" in values[-1][0] and server.pipeline.requests == []
    server.call("end_both", ticket, session=session)
    assert not server.page.generator.sessions.busy(session)


def test_a_comparison_that_is_refused_when_its_turn_comes_is_over(server: Server, monkeypatch) -> None:
    session = uuid.uuid4().hex
    ticket, *_ = server.run(*ASKED, "taehv", name="begin_both", session=session)[-1]
    with monkeypatch.context() as patch:
        patch.setitem(server.pipeline.unavailable, "taehv", "The other model has no TAEHV.")
        with pytest.raises(Refused, match="no TAEHV"):
            server.run(*ASKED, "taehv", ticket, name="make_both", session=session)
    status, both, timer, *_ = server.call("end_both", ticket, session=session)
    assert status == SKIPPED and both == "" and not timer["active"], "nothing says any more that it is to come"


def test_a_click_after_stop_is_told_its_place_at_the_end_of_the_one_before(server: Server) -> None:
    session = uuid.uuid4().hex
    first, *_ = server.run(*ASKED, "taehv", name="begin_both", session=session)[-1]
    server.call("_stop", session=session)
    server.run(*ASKED, name="_begin", session=session)
    server.run(*ASKED, "taehv", first, name="make_both", session=session)
    status, both, timer, *buttons = server.call("end_both", first, session=session)
    assert "Starting" in status and both == SKIPPED and timer["active"]
    assert [button["visible"] for button in buttons] == [False, True] * 2, "the video is still to come"
    status, both, timer = server.call("_place", session=session)
    assert "Starting" in status and both == SKIPPED
    server.call("_stop", session=session)


def test_without_a_model_there_is_nothing_to_press(server: Server) -> None:
    ui = server.page.ui
    assert ui.without_model()[ui.compare.make] == {"interactive": False}
    assert ui.fitted_to(server.page.model_or_none())[ui.compare.make] == {"interactive": True}
    assert set(ui.without_model()) <= set(ui.fitted)


def test_a_full_disk_is_told_and_leaves_nothing(
    server: Server, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_) -> None:
        raise VideoError("The disk is full.")
        yield

    monkeypatch.setattr("web.comparing.write_side", full)
    with pytest.raises(Refused, match="disk is full") as refused:
        server.run(*ASKED, "taehv", None, name="make_both")
    assert "Failed" in refused.value.values[-1][0]
    (folder,) = folders
    assert not folder.exists()


def test_the_panel_offers_what_can_differ_and_hides_if_nothing_can(server: Server) -> None:
    panel = server.page.ui.compare
    assert panel.panel.visible and [name for _, name in panel.switch.choices] == ["taehv", "fp8"]
    fitted = panel.fitted_to(dict.fromkeys(("taehv", "fp8", "compile"), "No."))
    assert fitted[panel.panel] == {"visible": False}


def test_the_panel_leaves_out_what_the_device_needs_on(server: Server) -> None:
    panel = server.page.ui.compare
    switch = panel.fitted_to({}, {"fp8": True})[panel.switch]
    assert [name for _, name in switch["choices"]] == ["taehv", "compile"]
    assert "FP8 quantization" in switch["info"] and "memory" in switch["info"]
    assert panel.fitted_to({})[panel.switch]["info"] is None


def test_a_program_gets_what_the_device_needs_on_and_no_file_more(
    server: Server, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.pipeline, "preset", {"fp8": True}, raising=False)
    server.run("a red ball", 7, 16, 1, "taehv=on", "taehv=off", name="compare")
    assert all(request.fp8 for request in server.pipeline.requests)
    (folder,) = folders
    assert len(os.listdir(folder)) == 1


def test_a_mishap_that_nobody_foresaw_is_told(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Comparison, "report", lambda self: 1 // 0)
    with pytest.raises(Refused, match="went wrong") as refused:
        server.run(*ASKED, "taehv", None, name="make_both")
    assert "Failed" in refused.value.values[-1][0]
