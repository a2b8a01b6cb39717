"""Several processes as users start them: their launchers, one of them killed, and another number of them later."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import OptionUnavailable
from tests.training_world import make_world, stage_settings
from training import parallel
from training.network import WEIGHTS_FILE
from training.ode import PairFiles
from training.settings_file import as_plain
from training.stages import run_stage

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
"""It counts processes of the CPU as those of GPUs where there is none; with `--cpu` it would start one only."""
CHANGES = {"run__batch": 2, "run__precision": "float64", "optimizer__kind": "muon"}
"""Of a run in which sums of another order differ by less than the tests look at."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("processes") / "world")


def start(launcher: Sequence[str], stage: str, settings: Any, file: Path) -> subprocess.Popen[str]:
    """Two processes of a stage."""
    file.write_text(json.dumps(as_plain(settings)))
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "-m", "training", stage, str(file)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(program: subprocess.Popen[str]) -> None:
    said, _ = program.communicate(timeout=240)
    assert program.returncode == 0, said[-3000:]


def checkpoints(out: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (out / "checkpoints").glob("step-*"))


def assert_close(one: Path, other: Path) -> None:
    first, second = (load_file(out / "transformer" / WEIGHTS_FILE) for out in (one, other))
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-5, atol=1e-6)


def test_a_checkpoint_is_continued_by_another_number_of_processes(world: Path, tmp_path: Path) -> None:
    def settings(name: str, steps: int) -> Any:
        return stage_settings("teacher", world, tmp_path / name, run__steps=steps, **CHANGES)

    started = start(TORCHRUN, "teacher", settings("two_one", 2), tmp_path / "two_one.json")
    run_stage("teacher", settings("one_two", 2))
    run_stage("teacher", settings("one", 4))
    finish(started)
    # `accelerate launch` is the other launcher people have.
    continued = start(ACCELERATE, "teacher", settings("one_two", 4), tmp_path / "one_two.json")
    assert checkpoints(tmp_path / "two_one") == [2]
    assert run_stage("teacher", settings("two_one", 4)) == 4
    finish(continued)
    shards = {name: len([*(tmp_path / name).rglob("*.distcp")]) for name in ("one", "two_one", "one_two")}
    assert shards == {"one": 1, "two_one": 1, "one_two": 2}
    for name in ("two_one", "one_two"):
        assert_close(tmp_path / "one", tmp_path / name)


def test_a_killed_process_is_explained_through_torchrun(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    changes = {"run__steps": 5000, "run__checkpoint_every": 2, "run__batch": 2}
    program = start(TORCHRUN, "teacher", stage_settings("teacher", world, out, **changes), tmp_path / "settings.json")
    deadline = time.monotonic() + 240
    while not checkpoints(out):
        assert program.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    first, second = (_process_of(program.pid, rank) for rank in (0, 1))
    # The first process is stopped until the launcher has told it to end: it must not matter whether it noticed before.
    os.kill(first, signal.SIGSTOP)
    os.kill(second, signal.SIGKILL)
    while not _is_told_to_end(first):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(first, signal.SIGCONT)
    said, _ = program.communicate(timeout=120)
    assert program.returncode == 1
    ended = "most likely because another of its processes has ended" in said or "Another process of this run" in said
    assert ended, said[-3000:]
    kept = f"The checkpoint of step {checkpoints(out)[-1]} is whole: the same command goes on from there." in said
    assert kept or f"the one of step {checkpoints(out)[-1]} is intact" in said, said[-3000:]


def _process_of(launcher: int, rank: int) -> int:
    """Number of the process that a launcher started for a rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    (found,) = (
        int(child) for child in children if f"\0RANK={rank}\0".encode() in Path(f"/proc/{child}/environ").read_bytes()
    )
    return found


def _is_told_to_end(process: int) -> bool:
    """Whether SIGTERM waits for a stopped process."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return bool(int(status["ShdPnd"], 16) >> (signal.SIGTERM - 1) & 1)


def test_one_process_that_is_told_to_end_says_what_is_saved(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = stage_settings("teacher", world, out, run__steps=5000, run__checkpoint_every=2, run__batch=2)
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(as_plain(settings)))
    command = [sys.executable, "-m", "training", "teacher", str(file)]
    program = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
    while not checkpoints(out):
        assert program.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    program.terminate()
    said = program.communicate(timeout=60)[1]
    assert program.returncode == 1
    assert said.splitlines()[-1].startswith("This run was told to end. The checkpoint of step "), said[-2000:]


def test_pairs_are_complete_whoever_makes_them(world: Path, tmp_path: Path) -> None:
    """Files of half a batch, some missing, and then of whole ones: no sample is missing, and none is there twice."""

    def settings(size: int) -> Any:
        return stage_settings("ode_pairs", world, tmp_path / "pairs", run__steps=2, run__micro_batch=size)

    run_stage("ode_pairs", settings(2))
    files = sorted((tmp_path / "pairs").glob("pairs-*.safetensors"))
    found = PairFiles(tmp_path / "pairs", 3, (6, 4, 2, 4))
    straight = [found[index] for index in range(len(found))]
    assert len(straight) == 8
    files[0].rename(files[0].with_name("pairs-000000-00000.safetensors"))  # as older runs named them
    files[1].unlink()
    run_stage("ode_pairs", settings(4))
    made = sorted(path.stem for path in (tmp_path / "pairs").glob("pairs-*.safetensors"))
    assert made == [
        "pairs-000000-00000",
        "pairs-000000-00000-00003",
        "pairs-000001-00000-00001",
        "pairs-000001-00002-00003",
    ]
    again = PairFiles(tmp_path / "pairs", 3, (6, 4, 2, 4))
    assert len(again) == 8
    for index in range(8):
        assert again[index][0] == straight[index][0]
        torch.testing.assert_close(again[index][1], straight[index][1], atol=2e-3, rtol=0)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        with pytest.raises(OptionUnavailable, match="3 processes were started on this machine, but torch finds 2 GPUs"):
            parallel.own_gpu()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert parallel.own_gpu() == 1
