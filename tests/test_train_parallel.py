"""Two processes learn what one learns from the same global batch, for every loss; and a continued run likewise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import parallel_worker
from tests.training_world import make_world, stage_settings
from training.stages import run_stage

ROOT = Path(__file__).resolve().parent.parent
RELATIVE = 1e-6


def torchrun(processes: int, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [*command, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Number of processes -> folder of what they learnt."""
    folder = tmp_path_factory.mktemp("parallel")
    world = make_world(folder / "world")
    run_stage("ode_pairs", stage_settings("ode_pairs", world, world / "pairs"))
    places = {1: folder / "one", 2: folder / "two"}
    for place in places.values():
        (place / "single").mkdir(parents=True)
    two = torchrun(2, str(ROOT / "tests" / "parallel_worker.py"), str(world), str(places[2]))
    parallel_worker.main(world, places[1])
    output, _ = two.communicate(timeout=600)
    assert two.returncode == 0, output[-3000:]
    return places


def load(results: dict[int, Path], processes: int, job: str, kind: str) -> dict[str, torch.Tensor]:
    return torch.load(results[processes] / f"{job}.pt", weights_only=True)[kind]


def difference(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """The largest difference of two tensors, relative to the first; or to a hundredth of all, where it is less.

    Some true gradients are zero, such as that of a relativistic judge's last bias: there is nothing to be relative to.
    """
    assert one.keys() == two.keys()
    floor = 1e-2 * torch.stack([value.double().norm() for value in one.values()]).norm()
    assert floor > 0
    return max(
        ((value - two[name]).double().norm() / value.double().norm().clamp(min=floor)).item()
        for name, value in one.items()
    )


@pytest.mark.parametrize("job", [*parallel_worker.JOBS, "single/dmd"])
def test_gradients_of_two_processes_equal_those_of_one(results: dict[int, Path], job: str) -> None:
    one, two = (load(results, count, job, "gradients") for count in (1, 2))
    for name in {key.split(".")[0] for key in one}:
        part = [{key: value for key, value in found.items() if key.startswith(f"{name}.")} for found in (one, two)]
        assert difference(*part) < RELATIVE, name


@pytest.mark.parametrize("job", parallel_worker.JOBS)
def test_weights_after_steps_are_equal(results: dict[int, Path], job: str) -> None:
    one, two = (load(results, count, job, "weights") for count in (1, 2))
    # All of them together: Adam makes a whole step of a gradient that is nothing but rounding.
    assert (
        difference(*({"all": torch.cat([values[name].flatten() for name in one])} for values in (one, two))) < RELATIVE
    )


@pytest.mark.parametrize("job", parallel_worker.CONTINUED)
@pytest.mark.parametrize("count", [1, 2])
def test_a_continued_run_ends_with_the_same_weights(results: dict[int, Path], job: str, count: int) -> None:
    straight, continued = (load(results, count, job, kind) for kind in ("weights", "continued"))
    assert straight.keys() == continued.keys()
    for name, value in straight.items():
        assert torch.equal(value, continued[name]), name
