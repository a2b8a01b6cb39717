"""The ablation's budget: what a step of each method costs, and how many steps the same minutes pay for."""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch

from pipeline.device import processor_name
from pipeline.errors import TrainingError
from training.ablation_methods import MANY_STEPS, METHODS, Method, changes, described, settings_file
from training.checkpoints import SETTINGS_FILE, newest_checkpoint, what_is_learnt
from training.files import write_whole
from training.launching import launch
from training.settings_file import first_difference

logger = logging.getLogger(__name__)

CALIBRATION_STEPS = (2, 6)
"""A stage is run for so many steps twice; what the second takes longer is what its further steps cost."""


class Budget:
    """Made once for a folder of runs, and kept there in `plan.json`."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.path: Path = options.out / "plan.json"

    def plan(self) -> dict[str, Any]:
        """`steps` of each method, so that all take the same minutes; `ode_minutes`; `machine`, in words.

        Raises:
            TrainingError: the folder was begun with another budget or on other networks, or the ODE start is not one
                for these runs or takes all of it.
        """
        options = self.options
        self._check_ode_start()
        budget: dict[str, Any] = {
            "set": options.set,
            **{name: str(getattr(options, name)) for name in ("start", "teacher", "pairs", "ode", "configs")},
        }
        if options.clock is not None:
            budget["clock"] = options.clock
        else:
            budget |= {"minutes": options.minutes, "steps": options.steps, "processes": options.processes}
        kept: dict[str, Any] = {"budget": budget, "costs": {}, "machine": machine(options.device)}
        begun = self.path.is_file()
        if begun:
            kept = json.loads(self.path.read_text(encoding="utf-8"))
        if difference := first_difference(kept["budget"], budget):
            raise TrainingError(f"{options.out} was begun with another budget: {difference}. Take another --out.")
        if options.clock is not None:
            kept["ode_minutes"] = self._ode_clock()
            kept["steps"] = dict.fromkeys(options.methods, MANY_STEPS)
            if not begun:
                self._keep(kept)
            return kept
        costs = kept["costs"]
        if options.steps is None:
            for name in dict.fromkeys(("ode", *options.methods)):
                if name not in costs:
                    costs[name] = self._cost(name)
                    self._keep(kept)
        kept["ode_minutes"] = finished_steps(options.ode) * costs["ode"] if costs else 0.0
        kept["steps"] = {name: self._steps(name, costs, kept["ode_minutes"]) for name in options.methods}
        self._keep(kept)
        return kept

    def clock(self, method: Method) -> float | None:
        """Minutes by the clock that a run of a method gets; None: the budget is another one."""
        if self.options.clock is None:
            return None
        return self.options.clock - (self._ode_clock() if method.from_ode else 0.0)

    def _keep(self, plan: dict[str, Any]) -> None:
        write_whole(self.path, json.dumps(plan, indent=1))

    def _check_ode_start(self) -> None:
        """Before anything is measured.

        Raises:
            TrainingError: it began elsewhere, learnt other trajectories or had steps of another size: what it cost
                could not be counted in steps of the runs' own, or the runs would not begin alike.
        """
        folder: Path = self.options.ode
        saved = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        clock = None if self.options.clock is None else self._ode_clock()
        ours = described(self.options, "ode", changes(self.options, "ode", 0, 1, folder, clock))
        if difference := first_difference(what_is_learnt(saved), what_is_learnt(ours)):
            raise TrainingError(
                f"The ODE start in {folder} is not one for these runs: {difference}. Train it again as they are, into "
                "another folder for --ode."
            )

    def _ode_clock(self) -> float:
        """Minutes by the clock that the ODE start had.

        Raises:
            TrainingError: it was not trained by the clock, or had all of the budget.
        """
        options = self.options
        run = json.loads((options.ode / SETTINGS_FILE).read_text(encoding="utf-8"))["settings"]["run"]
        if run.get("schedule") != "minutes":
            raise TrainingError(
                f"{options.ode} was not trained by the clock, so --clock cannot take its time off: train it with "
                'run.schedule="minutes" and run.minutes.'
            )
        if run["minutes"] >= options.clock:
            raise TrainingError(
                f"The ODE start took {run['minutes']:g} minutes, which leaves nothing of the {options.clock:g} of "
                "--clock: raise it."
            )
        return run["minutes"]

    def _steps(self, name: str, costs: dict[str, float], ode_minutes: float) -> int:
        """Steps that a method's budget pays for, after the ODE start if it begins there."""
        if self.options.steps is not None:
            return self.options.steps
        method = METHODS[name]
        left = self.options.minutes - (ode_minutes if method.from_ode else 0.0)
        if left < costs[name]:
            raise TrainingError(
                f"The ODE start took {ode_minutes:.1f} processor minutes, which leaves nothing of the "
                f"{self.options.minutes:g} for {method.label}: raise --minutes."
            )
        return int(left / costs[name])

    def _cost(self, name: str) -> float:
        """Processor minutes of one step of a method's stage."""
        logger.info("measuring what a step of %s costs", name)
        few, many = CALIBRATION_STEPS
        with tempfile.TemporaryDirectory(dir=self.options.out) as place:
            took = []
            for count in (few, many):
                found = changes(self.options, name, 0, count, Path(place) / str(count))
                if METHODS[name].from_ode:
                    found.append("critic_warmup=0")  # with the generator's turns from the first step on
                stage = METHODS[name].stage
                took.append(launch(stage, settings_file(self.options, name), found, self.options.processes))
        return max(took[1] - took[0], 1e-6) / (many - few)


def machine(device: str) -> str:
    """Where runs are made, in words."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else processor_name()
    return f"{name}, torch {torch.__version__}"


def finished_steps(run: Path) -> int:
    """Steps of a finished run, which time may have ended before its settings did."""
    newest = newest_checkpoint(run)
    counted = run.with_name(f"{run.name}-steps.json")
    if newest is None and counted.is_file():  # a run that was brought from elsewhere, without its weights
        return json.loads(counted.read_text(encoding="utf-8"))
    settings = json.loads((run / SETTINGS_FILE).read_text(encoding="utf-8"))["settings"]
    return settings["run"]["steps"] if newest is None else int(newest.name.removeprefix("step-"))
