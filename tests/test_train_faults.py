"""What a killed or confused run leaves: the last whole checkpoint, one sentence, and the same weights later."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import NonFiniteOutput, TrainingError, WeightsError
from tests.training_world import make_world, stage_settings
from training.network import WEIGHTS_FILE
from training.settings_file import as_plain
from training.stages import run_stage

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("faults") / "world")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the programs that are killed have it: sums of another order would be other numbers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "transformer" / WEIGHTS_FILE)


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def checkpoints(out: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (out / "checkpoints").glob("step-*"))


def wait_for(condition: Callable[[], bool], program: subprocess.Popen[str], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert program.poll() is None, program.stdout.read() if program.stdout else ""
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start(stage: str, settings: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "training", stage, str(settings)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_killed_run_goes_on_to_the_same_weights(world: Path, tmp_path: Path) -> None:
    changes = {"run__steps": 40, "run__checkpoint_every": 3, "run__batch": 2, "optimizer__rate": 1e-3}
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps(as_plain(stage_settings("dmd", world, tmp_path / "killed", **changes))))
    program = start("dmd", settings)
    wait_for(lambda: bool(checkpoints(tmp_path / "killed")), program)
    time.sleep(0.3)  # somewhere in a step or in the middle of a checkpoint
    program.send_signal(signal.SIGKILL)
    program.wait()
    reached = checkpoints(tmp_path / "killed")[-1]
    assert 3 <= reached < 40
    steps = {"run__steps": reached + 4}
    for name in ("killed", "straight"):
        assert run_stage("dmd", stage_settings("dmd", world, tmp_path / name, **changes | steps)) == reached + 4
    assert_same_weights(tmp_path / "killed", tmp_path / "straight")
    assert checkpoints(tmp_path / "killed") == [reached + 4]


def test_a_full_disk_leaves_the_checkpoint_before(world: Path, tmp_path: Path) -> None:
    changes = {"run__checkpoint_every": 1, "run__batch": 2}
    run_stage("teacher", stage_settings("teacher", world, tmp_path / "full", run__steps=2, **changes))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # no file may grow further: writing fails half-way
    try:
        with pytest.raises(TrainingError, match=r"step 3 could not be written to .*; the one of step 2 is intact"):
            run_stage("teacher", stage_settings("teacher", world, tmp_path / "full", run__steps=3, **changes))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoints(tmp_path / "full") == [2]
    for name in ("full", "straight"):
        assert run_stage("teacher", stage_settings("teacher", world, tmp_path / name, run__steps=3, **changes)) == 3
    assert_same_weights(tmp_path / "full", tmp_path / "straight")


def test_a_process_that_ends_takes_nothing_with_it(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = tmp_path / "settings.json"
    changes = {"run__steps": 500, "run__checkpoint_every": 2, "run__batch": 2}
    settings.write_text(json.dumps(as_plain(stage_settings("teacher", world, out, **changes))))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    programs = [start("teacher", settings, RANK=str(rank), **group) for rank in range(2)]
    wait_for(lambda: bool(checkpoints(out)), programs[0])
    programs[1].send_signal(signal.SIGKILL)
    said, _ = programs[0].communicate(timeout=120)
    programs[1].communicate()
    assert programs[0].returncode == 1, said[-2000:]
    assert "the same command goes on from there" in said or "is intact" in said, said[-2000:]
    reached = checkpoints(out)[-1]
    steps = {"run__steps": reached + 1}
    assert run_stage("teacher", stage_settings("teacher", world, out, **changes | steps)) == reached + 1


def test_a_checkpoint_of_other_settings_is_refused(world: Path, tmp_path: Path) -> None:
    run_stage("teacher", stage_settings("teacher", world, tmp_path, run__steps=1, run__batch=2))
    for changes, message in (
        ({"run__batch": 4}, "run.batch was 2 and is now 4"),
        ({"run__batch": 2, "optimizer__rate": 0.5}, "optimizer.rate was 0.01 and is now 0.5"),
    ):
        with pytest.raises(WeightsError, match=f"made with other settings: {message}"):
            run_stage("teacher", stage_settings("teacher", world, tmp_path, **changes))
    with pytest.raises(WeightsError, match="stage was 'teacher' and is now 'causal'"):
        run_stage("causal", stage_settings("causal", world, tmp_path, run__batch=2))
    assert checkpoints(tmp_path) == [1]


def test_a_damaged_checkpoint_is_refused(world: Path, tmp_path: Path) -> None:
    settings = stage_settings("teacher", world, tmp_path, run__steps=2, run__batch=2)
    run_stage("teacher", stage_settings("teacher", world, tmp_path, run__steps=1, run__batch=2))
    (folder,) = (tmp_path / "checkpoints").glob("step-*")
    for path in folder.glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="step-00000001 in .* cannot be read"):
        run_stage("teacher", settings)
    (folder / "settings.json").write_text("{")
    with pytest.raises(WeightsError, match="step-00000001 in .* is damaged"):
        run_stage("teacher", settings)


def test_a_gradient_that_is_no_number_is_named_and_not_saved(world: Path, tmp_path: Path) -> None:
    broken = tmp_path / "world"
    shutil.copytree(world, broken)
    latents = torch.full((12, 13, 4, 2, 4), float("nan"), dtype=torch.float16)
    np.save(broken / "latents.npy", latents.numpy())
    with pytest.raises(NonFiniteOutput, match="The gradient became nan in step 1"):
        run_stage("teacher", stage_settings("teacher", broken, tmp_path / "out", run__checkpoint_every=1))
    assert checkpoints(tmp_path / "out") == []
