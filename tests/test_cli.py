"""`python -m pipeline`: what it prints, what it writes, and how it ends, as a process of its own."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.cli import check_device, main
from pipeline.errors import OptionUnavailable
from pipeline.recipe import read_recipe
from tests.media import read_media
from tests.scripted import ScriptedPipeline, read_code

ROOT = Path(__file__).resolve().parent.parent

# The command line with a scripted model. A file `fault.txt` in the model folder makes it fail in the second block.
SCRIPTED = """
import sys
from pathlib import Path
from pipeline import cli, errors
from tests.scripted import ScriptedPipeline

def load(folder, device):
    pipeline = ScriptedPipeline(step_seconds={step_seconds}, unavailable={{"compile": "There is no compiler here."}})
    fault = (folder / "fault.txt")
    if fault.exists():
        pipeline.faults[1, 1] = eval(fault.read_text())
    if (folder / "broken").exists():
        raise errors.WeightsError("The transformer is damaged.")
    return pipeline

sys.exit(cli.main(load=load))
"""


@pytest.fixture
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "model_index.json").write_text("{}")
    return folder


@pytest.fixture
def run(tmp_path: Path, model: Path):
    def run(*arguments: str, step_seconds: float = 0.0) -> subprocess.CompletedProcess[str]:
        return finished(command(*arguments, "--model", str(model), step_seconds=step_seconds), tmp_path)

    return run


def command(*arguments: str, step_seconds: float = 0.0) -> list[str]:
    return [sys.executable, "-c", SCRIPTED.format(step_seconds=step_seconds), *arguments]


def finished(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def assert_refused(result: subprocess.CompletedProcess[str], folder: Path, *words: str) -> None:
    """Exit code 2, one or two sentences on stderr, nothing on stdout, no trace, no file."""
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    message = result.stderr.strip()
    assert message and "\n" not in message and "Traceback" not in message
    assert message.endswith(".") and 1 <= message.count(". ") + 1 <= 2
    for word in words:
        assert word in message
    assert os.listdir(folder) == []


def test_json_is_one_object_last_on_stdout(run, tmp_path: Path) -> None:
    result = run(
        "a red ball", "--seed", "7", "--seconds", "2", "--fps", "12", "--output", "out.mp4", "--taehv", "--json"
    )
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["frames"] == 21 and said["fps"] == 12 and said["seconds"] == pytest.approx(21 / 12, abs=1e-3)
    assert said["seed"] == 7 and said["applied"]["decoder"] == "taehv"
    assert 0 < said["time_to_first_frame"] <= said["elapsed"]
    assert os.listdir(tmp_path) == ["out.mp4"]
    media = read_media(tmp_path / "out.mp4")
    assert [read_code(picture) for picture in media.frames] == list(range(21))
    recipe = read_recipe(tmp_path / "out.mp4")
    assert recipe["prompt"] == "a red ball" and recipe["seed"] == 7 and recipe["settings"]["taehv"]
    assert "frame" in result.stderr, "the progress bar"


def test_without_json_it_says_what_it_made(run, tmp_path: Path) -> None:
    result = run("a RED ball/../é!", "--seconds", "1", "--seed", "5")
    assert result.returncode == 0, result.stderr
    (name,) = os.listdir(tmp_path)
    assert name == "a-red-ball-seed5.mp4"
    assert name in result.stdout and "21 frames" in result.stdout and result.stdout.count("\n") == 1
    assert "does not know" in result.stderr


def test_what_the_device_needs_on_is_on(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline = ScriptedPipeline()
    pipeline.preset = {"fp8": True, "taehv": True}
    given = ["a ball", "--seconds", "1", "--taehv"]
    assert cli.main(given, load=lambda folder, device: pipeline) == 0
    (request,) = pipeline.requests
    assert (request.taehv, request.fp8, request.compile) == (True, True, False)
    assert "There is little memory here, so these are on: --fp8." in capsys.readouterr().err


def test_a_name_of_its_own_choice_never_replaces_a_file(run, tmp_path: Path) -> None:
    for _ in range(2):
        assert run("a ball", "--seconds", "1", "--seed", "5").returncode == 0
    assert sorted(os.listdir(tmp_path)) == ["a-ball-seed5-2.mp4", "a-ball-seed5.mp4"]


def test_a_random_seed_is_told(run) -> None:
    seeds = {
        json.loads(run("a ball", "--seconds", "1", "--json", "--output", "o.mp4").stdout)["seed"] for _ in range(2)
    }
    assert len(seeds) == 2 and all(0 <= seed < 2**32 for seed in seeds)


def test_an_existing_file_is_replaced(run, tmp_path: Path) -> None:
    (tmp_path / "out.mp4").write_text("old")
    assert run("a ball", "--seconds", "1", "--output", "out.mp4").returncode == 0
    assert len(read_media(tmp_path / "out.mp4").frames) == 21


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["prompt"]),
        ([""], ["prompt is empty"]),
        (["   \n "], ["prompt is empty"]),
        (["a" * 2001], ["2,001", "2,000"]),
        (["a ball", "--seed", "-2"], ["seed", "-2"]),
        (["a ball", "--seed", "4294967296"], ["seed", "4294967296"]),
        (["a ball", "--seed", "1.5"], ["seed", "1.5"]),
        (["a ball", "--seed", "x"], ["seed", "x"]),
        (["a ball", "--seed", "nan"], ["seed", "nan"]),
        (["a ball", "--seconds", "nan"], ["seconds", "nan"]),
        (["a ball", "--seconds", "inf"], ["seconds", "inf"]),
        (["a ball", "--seconds", "0"], ["seconds", "0.1", "600"]),
        (["a ball", "--seconds", "601"], ["seconds", "600"]),
        (["a ball", "--fps", "0"], ["fps", "60"]),
        (["a ball", "--fps", "61"], ["fps", "60"]),
        (["a ball", "--fps", "fast"], ["fps", "fast"]),
        (["a ball", "--seconds"], ["seconds"]),
        (["a ball", "another"], ["another"]),
        (["a ball", "--colour", "red"], ["--colour"]),
        (["a ball", "--device", "gpu"], ["device", "gpu"]),
        (["a ball", "--device", "mps"], ["Apple", "cpu"]),
        (["a ball", "--output", "o" * 300 + ".mp4"], ["ooo...", "cannot be written"]),
        (["a ball", "--output", "o" * 300 + "/out.mp4"], ["does not exist"]),
        (["a ball", "--model", "m" * 300], ["model folder"]),
        (["a ball", "--output", "out.avi"], [".mp4"]),
        (["a ball", "--output", "missing/out.mp4"], ["missing", "does not exist"]),
        (["a ball", "--output", "/proc/out.mp4"], ["/proc", "cannot be written"]),
        (["a ball", "--compile"], ["no compiler"]),
        (["a ball", "--model", "missing"], ["missing", "model folder"]),
        (["a ball", "--model", "."], ["model_index.json"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_bad_input_is_refused_in_a_sentence(tmp_path: Path, model: Path, capsys, monkeypatch, arguments, words) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "terminate_like_interrupt", lambda: None)  # signals are pytest's in this process
    if "--model" not in arguments:
        arguments = [*arguments, "--model", str(model)]
    pipeline = ScriptedPipeline(unavailable={"compile": "There is no compiler here."})
    code = main(arguments, load=lambda folder, device: pipeline)
    said = capsys.readouterr()
    assert_refused(subprocess.CompletedProcess([], code, said.out, said.err), tmp_path, *words)
    assert pipeline.requests == []


def test_folders_out_of_bounds_are_refused_in_a_sentence(tmp_path: Path, capsys, monkeypatch) -> None:
    def refuse(path: Path, **_) -> None:  # as a folder without permissions does, even to root
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(cli, "terminate_like_interrupt", lambda: None)
    monkeypatch.setattr(Path, "stat", refuse)
    monkeypatch.setattr(Path, "exists", lambda path: False)
    for arguments in (["--output", "closed/out.mp4"], ["--output", "out.mp4", "--model", "closed/model"]):
        assert main(["a ball", *arguments], load=lambda folder, device: pytest.fail("too late")) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1


def test_bad_input_is_refused_at_once_and_without_torch(tmp_path: Path) -> None:
    code = "import sys; from pipeline.cli import main; code = main(); assert 'torch' not in sys.modules; sys.exit(code)"
    arguments = ["a ball", "--seconds", "nan"]
    result = finished([sys.executable, "-c", code, *arguments], tmp_path)
    assert_refused(result, tmp_path, "seconds", "nan")
    module = finished([sys.executable, "-m", "pipeline", "a ball", "--model", str(tmp_path / "none")], tmp_path)
    assert_refused(module, tmp_path, "none")


def test_a_device_that_is_not_there() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(OptionUnavailable, match="no device cuda .* Use cpu"):
        check_device("cuda")
    check_device("cpu")
    check_device(None)


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        ("MemoryError()", 1, "out of memory"),
        ("errors.NonFiniteOutput('Block 2 has NaN.')", 1, "Block 2"),
        ("RuntimeError('secret')", 1, "--verbose to see why"),
        ("SystemExit(0)", 1, "failed unexpectedly"),
    ],
)
def test_a_failing_model_leaves_the_old_file(
    run, tmp_path: Path, model: Path, fault: str, code: int, words: str
) -> None:
    (model / "fault.txt").write_text(fault)
    (tmp_path / "out.mp4").write_text("old")
    result = run("a ball", "--output", "out.mp4", "--json")
    assert result.returncode == code and result.stdout == ""
    assert words in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
    assert os.listdir(tmp_path) == ["out.mp4"] and (tmp_path / "out.mp4").read_text() == "old"


def test_damaged_weights_are_bad_input(run, tmp_path: Path, model: Path) -> None:
    (model / "broken").touch()
    assert_refused(run("a ball"), tmp_path, "damaged")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_cleanly(tmp_path: Path, model: Path, number: int) -> None:
    (tmp_path / "out.mp4").write_text("old")
    process = subprocess.Popen(
        command("a ball", "--seconds", "60", "--output", "out.mp4", "--model", str(model), step_seconds=0.1),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As at a terminal, even if the tests themselves run in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr.read(1)  # the progress bar: it is at work
    time.sleep(0.6)
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert out == "" and "Traceback" not in err and err.strip().endswith("Nothing was written.")
    assert os.listdir(tmp_path) == ["out.mp4"] and (tmp_path / "out.mp4").read_text() == "old"


def test_with_a_real_model(tmp_path: Path, tmp_path_factory) -> None:
    pytest.importorskip("torch")
    from tests.small import write_model_folder

    folder = write_model_folder(tmp_path_factory.mktemp("real"))
    arguments = ["a red balloon over the volcano", "--seconds", "1", "--model", str(folder), "--device", "cpu"]
    result = finished([sys.executable, "-m", "pipeline", *arguments, "--output", "out.mp4", "--json"], tmp_path)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["frames"] == len(read_media(tmp_path / "out.mp4").frames) == 9
    assert read_recipe(tmp_path / "out.mp4")["seed"] == said["seed"]
    told = [line for line in result.stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert "volcano" in told[0] and all("Making video" in line for line in told[1:]), result.stderr
