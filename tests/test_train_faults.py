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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import NonFiniteOutput, OutOfMemory, TrainingError, WeightsError
from tests.training_world import SIZES, make_world, stage_settings
from training import checkpoints as checkpoints_module
from training import console, loop, videos
from training.faults import explained
from training.network import WEIGHTS_FILE
from training.ode import OdePairsStage
from training.optim import Trainee
from training.settings_file import as_plain
from training.stages import run_stage

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("faults") / "world")


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
    with (
        disk_of(100_000),
        pytest.raises(TrainingError, match=r"step 3 could not be written to .*; the one of step 2 is intact"),
    ):
        run_stage("teacher", stage_settings("teacher", world, tmp_path / "full", run__steps=3, **changes))
    assert checkpoints(tmp_path / "full") == [2]
    for name in ("full", "straight"):
        assert run_stage("teacher", stage_settings("teacher", world, tmp_path / name, run__steps=3, **changes)) == 3
    assert_same_weights(tmp_path / "full", tmp_path / "straight")


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: writing fails half-way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_in_the_end_leaves_no_finished_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = stage_settings("teacher", world, tmp_path, run__steps=1, run__batch=2)
    saved = loop.save_network

    def fill_the_disk(*arguments: Any) -> None:
        saved(*arguments)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    monkeypatch.setattr(loop, "save_network", fill_the_disk)
    with (
        disk_of(10**9),
        pytest.raises(TrainingError, match="cannot be read or written when the weights .* step 1 is whole"),
    ):
        run_stage("teacher", settings)
    assert not (tmp_path / "settings.json").exists()  # what says that a run is finished
    monkeypatch.undo()
    assert run_stage("teacher", settings) == 1
    assert json.loads((tmp_path / "settings.json").read_text())["stage"] == "teacher"


def test_a_full_disk_ends_ode_pairs_in_a_sentence(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solve = OdePairsStage.run

    def run(stage: OdePairsStage) -> int:
        with disk_of(100):
            return solve(stage)

    monkeypatch.setattr(OdePairsStage, "run", run)
    with pytest.raises(TrainingError, match="cannot be read or written before the first batch"):
        run_stage("ode_pairs", stage_settings("ode_pairs", world, tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_ends_the_encoding_of_videos_in_a_sentence(tmp_path: Path) -> None:
    clip = np.zeros((6, 4, 2, 4), np.float16)
    path = tmp_path / "latents.npy"
    with disk_of(2 * clip.nbytes), pytest.raises(OSError):  # and not a signal, which a file mapped to memory would be
        videos._write_clips(path, (5, *clip.shape), iter([clip] * 5))
    videos._write_clips(path, (2, *clip.shape), iter([clip, clip + 1]))
    found = np.load(path, mmap_mode="r")
    assert found.dtype == np.float16 and np.array_equal(found, [clip, clip + 1])


def test_programs_end_with_a_sentence_on_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with disk_of(10):
        code = console.run(lambda: (tmp_path / "x").write_text("x" * 20))
    assert code == 2 and capsys.readouterr().err == "A file cannot be read or written (File too large).\n"
    assert console.run(lambda: (tmp_path / "none").read_text()) == 2
    assert f"(No such file or directory: {tmp_path / 'none'})" in capsys.readouterr().err


def test_a_checkpoint_is_on_the_disk_before_the_older_one_goes(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    settle, rmtree = checkpoints_module.settle, shutil.rmtree
    monkeypatch.setattr(checkpoints_module, "settle", lambda path: (events.append(path.name), settle(path)))
    monkeypatch.setattr(shutil, "rmtree", lambda path, **how: (events.append(f"-{path.name}"), rmtree(path, **how)))
    run_stage(
        "teacher", stage_settings("teacher", world, tmp_path, run__steps=2, run__batch=2, run__checkpoint_every=1)
    )
    second = events[events.index("-partial", 1) + 1 : events.index("-step-00000001") + 1]
    assert second[-3:] == ["partial", "checkpoints", "-step-00000001"] and "settings.json" in second
    assert any(name.endswith(".distcp") for name in second)


def test_a_network_that_does_not_fit_is_explained(world: Path, tmp_path: Path) -> None:
    sizes = SIZES | {"ffn_dim": 10**6, "num_attention_heads": 10**5}
    with pytest.raises(OutOfMemory, match="The machine ran out of memory when the networks were loaded. Lower run"):
        run_stage("teacher", stage_settings("teacher", world, tmp_path, network={"sizes": sizes}))


def test_a_gpu_that_is_full_when_a_run_is_continued_is_explained(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stage("teacher", stage_settings("teacher", world, tmp_path, run__steps=1, run__batch=2))

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Trainee, "load_state_dict", full)
    with pytest.raises(OutOfMemory, match="The GPU ran out of memory when the run was continued.*step 1 is whole"):
        run_stage("teacher", stage_settings("teacher", world, tmp_path, run__steps=2, run__batch=2))


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (torch.distributed.DistBackendError("NCCL error: remote process exited"), True),
        (torch.distributed.DistNetworkError("recv failed"), True),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"), True),
        (RuntimeError("size mismatch for nccl_weights"), False),
    ],
)
def test_a_lost_peer_is_told_from_other_errors(tmp_path: Path, error: RuntimeError, lost: bool) -> None:
    class Two:
        count = 2

    with pytest.raises(TrainingError if lost else RuntimeError) as raised, explained(tmp_path, Two(), str, "in step 1"):
        raise error
    assert lost == ("Another process of this run ended in step 1." in str(raised.value))


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
