"""Runs every stage in one process or several and writes down gradients and weights; started by `torchrun`.

Arguments: the data set's folder and the folder for the results, one `.pt` a job, of whole tensors.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from tests.training_world import stage_settings
from training.checkpoints import Checkpoints
from training.loop import resume, save
from training.optim import Trainee
from training.parallel import processes, whole
from training.stages import STAGES

JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "teacher": ("teacher", {"optimizer__kind": "muon"}),
    "teacher_forcing": ("causal", {"forcing": "teacher"}),
    "diffusion_forcing": ("causal", {"clips__later_windows": 0.5, "subject_weight": 3.0}),
    "ode": ("ode", {}),
    "dmd": ("dmd", {}),
    "sid": ("sid", {}),
    "gan": ("gan", {}),
    "gan_relativistic": ("gan", {"relativistic": True, "time_embedding": True}),
    "long_switched_dmd": (
        "dmd",
        {
            "rollout__long_share": 1.0,
            "rollout__long_blocks": [3, 4],
            "rollout__switch_share": 0.5,
            "rollout__exit_per_block": True,
            "run__micro_batch": 1,
            "run__gradient_checkpointing": True,
            "vae": "vae",
        },
    ),
}
"""Job -> stage and what it changes. All that could depend on how a batch is cut is in one of them."""
STEPS = 3
CONTINUED = ("teacher", "dmd", "gan")
"""Jobs that are continued as well: Muon, two trainees, three."""


def run_job(name: str, world: Path, out: Path, precision: str) -> None:
    """Three steps; for some, a checkpoint after the second, from which the third is done again in a fresh stage."""
    stage_name, changes = JOBS[name]
    if "vae" in changes:
        changes = changes | {"vae": str(world / changes["vae"])}
    settings = stage_settings(stage_name, world, out / name, run__precision=precision, run__steps=STEPS, **changes)
    gradients: dict[str, torch.Tensor] = {}
    record = Trainee.step

    def recording(trainee: Trainee, step: int) -> float:
        for key, parameter in trainee.network.named_parameters():
            # A trainee that moves at another step than the first is recorded then.
            if parameter.grad is not None:
                gradients.setdefault(f"{names[id(trainee)]}.{key}", whole(parameter.grad).clone())
        return record(trainee, step)

    with processes(settings.run) as group:
        stage = STAGES[stage_name](settings, group)
        checkpoints = Checkpoints(out / name, stage_name, settings, group)
        names = {id(trainee): key for key, trainee in stage.trainees.items()}
        Trainee.step = recording  # type: ignore[method-assign]
        try:
            for step in range(STEPS):
                stage.step(step)
                if step == 1 and name in CONTINUED:
                    save(stage, checkpoints, 2)
        finally:
            Trainee.step = record  # type: ignore[method-assign]
        result = {"gradients": gradients, "weights": weights(stage)}
        if name in CONTINUED:
            continued = STAGES[stage_name](settings, group)
            assert resume(continued, checkpoints) == 2
            continued.step(2)
            result["continued"] = weights(continued)
        if group.leads:
            torch.save(result, out / f"{name}.pt")


def weights(stage: Any) -> dict[str, torch.Tensor]:
    """All weights and averages of a stage, whole."""
    found = {}
    for name, trainee in stage.trainees.items():
        for key, parameter in trainee.network.named_parameters():
            found[f"{name}.{key}"] = whole(parameter.detach()).clone()
        for key, value in trainee.averaged_weights().items():
            found[f"{name}.average.{key}"] = value
    return found


def main(world: Path, out: Path) -> None:
    torch.set_num_threads(1)
    with processes(stage_settings("dmd", world, out).run):
        for name in JOBS:
            run_job(name, world, out, "float64")
        run_job("dmd", world, out / "single", "float32")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
