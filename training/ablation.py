"""Does training on its own rollouts keep a model from drifting? `python -m training.ablation --minutes 30`.

The same small network, data and processor time, trained with teacher forcing, with diffusion forcing, by ODE regression
alone and by Self-Forcing (DMD, SiD, GAN), rolled out to 5, 20 and 60 seconds. The table and the curves go into
`docs/ablation.md`, which tells the protocol. What is finished is not done again, so a broken ablation goes on.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.cli import check_device
from pipeline.errors import TrainingError, WeightsError
from training import console
from training.ablation_report import write_report
from training.ablation_scores import (
    Seen,
    load_seen,
    make_template,
    model_folder,
    save_seen,
    score_run,
    see_real,
    speed,
    summary,
)
from training.asked import plan_prompts
from training.checkpoints import SETTINGS_FILE, newest_checkpoint, what_is_learnt
from training.files import write_whole
from training.judge import SHIPPED, load_judge
from training.launching import children_minutes, launch, value
from training.report import rounded
from training.settings_file import as_plain, first_difference, load_settings
from training.stages import STAGES
from training.videos import LATENTS_FILE
from training.world import FPS

logger = logging.getLogger(__name__)

EVALUATION_SEED = 21
CALIBRATION_STEPS = (2, 6)
"""A stage is run for so many steps twice; what the second takes longer is what its further steps cost."""
FPS_SECONDS = 5.0
MANY_STEPS = 10**7
"""What a run that ends by the clock has for `run.steps`."""

# Whole windows only, for the network has been through the shorter ones when it comes here; and only from a clip's
# beginning, as the rollouts of the others are.
_WHOLE = ("lengths=[]", "shifts=[]", "curriculum=[]", "clips.later_windows=0", "optimizer.average_decay=0.98")

# The paper's own: rollouts as long as the clips. It also makes them those of the GAN, whose real clips are no longer.
_SHORT_ROLLOUTS = ("rollout.long_share=0",)


@dataclass(frozen=True)
class Method:
    """One way to train: a stage, its settings file, what differs from the file, and how it is sampled.

    Attributes:
        from_ode: begins where ODE regression ended; what that cost is part of its budget.
        many_steps: it learnt no few-step sampling, so it is also judged with that many steps; 0: it is not.
        clean_context: it learnt from finished blocks without noise, so that is what it gets when it is judged.
    """

    label: str
    stage: str
    changes: tuple[str, ...] = ()
    from_ode: bool = False
    many_steps: int = 0
    clean_context: bool = False


METHODS = {
    "teacher": Method(
        "Teacher forcing",
        "causal",
        (*_WHOLE, "forcing=teacher", "clean_blocks=0.0"),
        many_steps=16,
        clean_context=True,
    ),
    "diffusion": Method("Diffusion forcing", "causal", (*_WHOLE, "forcing=diffusion"), many_steps=16),
    "ode": Method("ODE regression", "ode"),
    "dmd": Method("Self-Forcing, DMD", "dmd", _SHORT_ROLLOUTS, from_ode=True),
    "sid": Method("Self-Forcing, SiD", "sid", _SHORT_ROLLOUTS, from_ode=True),
    # The critic's start as short as the others': the file's own would take much of a short budget.
    "gan": Method("Self-Forcing, GAN", "gan", ("critic_warmup=8",), from_ode=True),
}


class Ablation:
    """Trains and judges what is not yet, in a folder that remembers what is."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out: Path = options.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.check_folders()
        check_device(options.device)
        self.probe = load_judge(options.probe).probe
        self.prompts = plan_prompts(options.prompts, EVALUATION_SEED)
        self.template = make_template(options.ode, options.data, self.out / "template")

    def check_folders(self) -> None:
        """Hours may pass before the last of them is needed.

        Raises:
            WeightsError: naming the first that is missing, and what makes it.
        """
        options = self.options
        needed = {
            options.data / LATENTS_FILE: "python -m training.data",
            options.data / "vae": "python -m training.decoders --kind wan",
            options.data / "taehv": "python -m training.decoders --kind taehv",
            options.start: "python -m training causal",
            options.teacher: "python -m training causal",
            options.pairs: "python -m training ode_pairs",
            options.ode / SETTINGS_FILE: "python -m training ode",
        }
        for path, command in needed.items():
            if not path.exists():
                raise WeightsError(f"{path} is missing: run {command} first, as docs/ablation.md says.")

    def run(self) -> dict[str, dict[int, dict[str, Any]]]:
        """Label of a method -> seed -> scores, in the order of `METHODS`."""
        plan = self.plan()
        results: dict[str, dict[int, dict[str, Any]]] = {}
        for name in self.options.methods:
            method = METHODS[name]
            for seed in self.options.seeds:
                run, minutes = self.train(name, seed, plan["steps"][name])
                spent = {"minutes": minutes + (plan["ode_minutes"] if method.from_ode else 0.0)}
                spent["steps"] = self.finished_steps(run)
                for steps in self.samplings(method):
                    label = method.label + (f", {steps} steps" if steps else "")
                    results.setdefault(label, {})[seed] = spent | self.judge(run, steps, method.clean_context)
                    if not self.options.part:
                        results[label][seed]["fps"] = self.fps(steps)
        real = self.real  # a part without methods makes it for the others
        if not self.options.part:
            results["Real clips"] = {0: summary(self._real(other=True), real)}
        return results

    def samplings(self, method: Method) -> list[int | None]:
        """With how many steps a method is judged; None: those of the model's own sampler."""
        both = {"few": None, "many": method.many_steps}
        return [steps for name, steps in both.items() if steps != 0 and self.options.sampling in (name, "both")]

    def plan(self) -> dict[str, Any]:
        """Steps for each method, so that all take the same processor time; made once and kept.

        Raises:
            TrainingError: the folder was begun with another budget, or the ODE start alone takes all of it.
        """
        options, path = self.options, self.out / "plan.json"
        budget = {"minutes": options.minutes, "steps": options.steps, "processes": options.processes}
        if options.clock is not None:
            budget = {"clock": options.clock}
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"budget": budget, "costs": {}}
        if difference := first_difference(kept["budget"], budget):
            raise TrainingError(f"{self.out} was begun with another budget: {difference}. Take another --out.")
        if options.clock is not None:
            kept["ode_minutes"] = self.ode_minutes()
            kept["steps"] = dict.fromkeys(options.methods, MANY_STEPS)
            if not path.is_file():
                partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # several parts may come here at once
                partial.write_text(json.dumps(kept, indent=1), encoding="utf-8")
                partial.replace(path)
            return kept
        costs = kept["costs"]
        if options.steps is None:
            for name in dict.fromkeys(("ode", *options.methods)):
                if name not in costs:
                    costs[name] = self.cost(name)
                    path.write_text(json.dumps(kept, indent=1), encoding="utf-8")
        kept["ode_minutes"] = 0.0
        if costs:
            self.check_ode_batch()
            kept["ode_minutes"] = self.finished_steps(options.ode) * costs["ode"]
        kept["steps"] = {name: self.steps(name, costs, kept["ode_minutes"]) for name in options.methods}
        path.write_text(json.dumps(kept, indent=1), encoding="utf-8")
        return kept

    def check_ode_batch(self) -> None:
        """What the ODE start cost is counted in steps of the runs' own size.

        Raises:
            TrainingError: its steps were of another size.
        """
        saved = json.loads((self.options.ode / SETTINGS_FILE).read_text(encoding="utf-8"))["settings"]["run"]["batch"]
        changes = self.changes("ode", 0, 1, self.options.ode)
        ours = load_settings(STAGES["ode"].settings_kind, self.settings("ode"), changes).run.batch
        if saved != ours:
            raise TrainingError(
                f"{self.options.ode} was trained with run.batch={saved}, but the runs have {ours}, so what it cost is "
                f"not known: train it again with run.batch={ours}."
            )

    def clock_minutes(self, method: Method) -> float:
        """Minutes by the clock that a run of a method gets."""
        return self.options.clock - (self.ode_minutes() if method.from_ode else 0.0)

    def ode_minutes(self) -> float:
        """Minutes by the clock that the ODE start had.

        Raises:
            TrainingError: it was not trained by the clock, or had all of the budget.
        """
        run = json.loads((self.options.ode / SETTINGS_FILE).read_text(encoding="utf-8"))["settings"]["run"]
        if run.get("schedule") != "minutes":
            raise TrainingError(
                f"{self.options.ode} was not trained by the clock, so --clock cannot take its time off: train it with "
                'run.schedule="minutes" and run.minutes.'
            )
        if run["minutes"] >= self.options.clock:
            raise TrainingError(
                f"The ODE start took {run['minutes']:g} minutes, which leaves nothing of the {self.options.clock:g} of "
                "--clock: raise it."
            )
        return run["minutes"]

    def steps(self, name: str, costs: dict[str, float], ode_minutes: float) -> int:
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

    def cost(self, name: str) -> float:
        """Processor minutes of one step of a method's stage."""
        logger.info("measuring what a step of %s costs", name)
        few, many = CALIBRATION_STEPS
        with tempfile.TemporaryDirectory(dir=self.out) as place:
            took = []
            for count in (few, many):
                changes = self.changes(name, 0, count, Path(place) / str(count))
                if METHODS[name].from_ode:
                    changes.append("critic_warmup=0")  # with the generator's turns from the first step on
                took.append(launch(METHODS[name].stage, self.settings(name), changes, self.options.processes))
        return max(took[1] - took[0], 1e-6) / (many - few)

    def settings(self, name: str) -> Path:
        return self.options.configs / f"embedded_{METHODS[name].stage}.toml"

    def changes(self, name: str, seed: int, steps: int, out: Path) -> list[str]:
        """What differs from the settings file."""
        options, method = self.options, METHODS[name]
        changes = [value("run.out", out), f"run.seed={seed}", f"run.steps={steps}", "run.sheet_every=0"]
        changes.append("run.compile=false")  # its one-off cost would spoil what a step is measured to cost
        # The whole section: a file that describes a fresh network has sizes there.
        changes.append(f"network={{init={json.dumps(str(options.ode if method.from_ode else options.start))}}}")
        changes += method.changes
        if options.clock is not None:
            changes += [
                f"run.minutes={self.clock_minutes(method)}",
                'run.schedule="minutes"',
                f"run.checkpoint_every={MANY_STEPS}",
            ]
        if method.stage in ("dmd", "sid"):
            changes.append(value("score.teacher.init", options.teacher))
        if method.stage == "ode":
            changes.append(value("pairs", options.pairs))
        return [*changes, *options.set]

    def train(self, name: str, seed: int, steps: int) -> tuple[Path, float]:
        """The folder of a finished run, and the minutes it took over all its starts: of the processor or the clock.

        Raises:
            TrainingError: it failed, or the folder holds a run with other settings.
        """
        run, spent = self.out / f"{name}-{seed}", self.out / f"{name}-{seed}-minutes.json"
        taken = json.loads(spent.read_text(encoding="utf-8")) if spent.is_file() else 0.0
        changes = self.changes(name, seed, steps, run)
        if (run / SETTINGS_FILE).is_file():
            kind = STAGES[METHODS[name].stage].settings_kind
            ours = {"settings": as_plain(load_settings(kind, self.settings(name), changes))}
            saved = json.loads((run / SETTINGS_FILE).read_text(encoding="utf-8"))
            if difference := first_difference(what_is_learnt(saved), what_is_learnt(ours)):
                raise TrainingError(f"{run} was trained with other settings: {difference}. Take another --out.")
            return run, taken
        logger.info("%s, seed %d: %d steps", METHODS[name].label, seed, steps)
        before = children_minutes()
        try:
            launch(METHODS[name].stage, self.settings(name), changes, self.options.processes)
        finally:  # a run that was broken off has used them, too
            taken += children_minutes() - before
            write_whole(spent, json.dumps(taken))
        if self.options.clock is not None:
            taken = self.clock_minutes(METHODS[name])
            write_whole(spent, json.dumps(taken))
        write_whole(run.with_name(f"{run.name}-steps.json"), json.dumps(self.finished_steps(run)))
        return run, taken

    def finished_steps(self, run: Path) -> int:
        """Steps of a finished run, which time may have ended before its settings did."""
        newest = newest_checkpoint(run)
        counted = run.with_name(f"{run.name}-steps.json")
        if newest is None and counted.is_file():  # a run that was brought from elsewhere, without its weights
            return json.loads(counted.read_text(encoding="utf-8"))
        settings = json.loads((run / SETTINGS_FILE).read_text(encoding="utf-8"))["settings"]
        return settings["run"]["steps"] if newest is None else int(newest.name.removeprefix("step-"))

    @cached_property
    def real(self) -> Seen:
        path = self.out / f"real-{self.asked}.npz"
        if not path.is_file():
            save_seen(self._real(other=False), path)
        return load_seen(path)

    @property
    def asked(self) -> str:
        return f"{self.options.prompts}x{'-'.join(f'{mark:g}' for mark in self.options.seconds)}"

    def _real(self, other: bool) -> Seen:
        info = json.loads((self.template / "model_index.json").read_text(encoding="utf-8"))["settings"]
        shape = (round(self.options.seconds[-1] * FPS), info["height"], info["width"])
        return see_real(self.probe, self.prompts, self.options.seconds, shape, other)

    def fps(self, steps: int | None) -> float:
        """Frames a second with so many denoising steps. The same for all methods: their networks are alike."""
        path = self.out / f"fps{f'-{steps}steps' if steps else ''}.json"
        if not path.is_file():
            folder = model_folder(self.options.ode, self.template, self.out / "models" / "fps", steps)
            path.write_text(json.dumps(speed(folder, self.prompts[0], min(FPS_SECONDS, self.options.seconds[-1]))))
        return json.loads(path.read_text(encoding="utf-8"))

    def judge(self, run: Path, steps: int | None, clean_context: bool) -> dict[str, Any]:
        """Scores of a run, remembered in a file in its folder: they go when it goes."""
        options = self.options
        sampled = f"-{steps}steps" if steps else ""
        path = run / f"scores{sampled}-{self.asked}.json"
        if not path.is_file():
            folder = self.out / "models" / f"{run.name}{sampled}"
            model_folder(run, self.template, folder, steps, clean_context)
            scores = score_run(folder, self.probe, self.prompts, self.real, options.seconds, options.device)
            shutil.rmtree(folder)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(rounded(scores)), encoding="utf-8")
            partial.replace(path)
        return json.loads(path.read_text(encoding="utf-8"))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    cache = Path("training/cache")
    parser = argparse.ArgumentParser(prog="python -m training.ablation", description=__doc__.splitlines()[0])
    parser.add_argument("--start", type=Path, default=cache / "short", help="the short causal network all begin with")
    parser.add_argument("--ode", type=Path, default=cache / "ode", help="finished stage ode: Self-Forcing's start")
    parser.add_argument("--pairs", type=Path, default=cache / "ode_pairs", help="trajectories, for ODE regression")
    parser.add_argument("--teacher", type=Path, default=cache / "base", help="fully trained, of DMD and SiD")
    parser.add_argument("--data", type=Path, default=cache, help="the data set, with text/, vae/ and taehv/")
    parser.add_argument("--probe", type=Path, default=SHIPPED, help="what judges")
    parser.add_argument("--configs", type=Path, default=Path("training/configs"), help="the settings files")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="runs and scores")
    parser.add_argument("--document", type=Path, default=Path("docs/ablation.md"), help="where table and curves go")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the trainings")
    parser.add_argument("--minutes", type=float, default=30.0, help="processor minutes a run; 15 minutes of two cores")
    parser.add_argument(
        "--clock",
        type=float,
        metavar="MINUTES",
        help="minutes by the clock a run instead: for runs that stand side by side on one GPU",
    )
    parser.add_argument(
        "--part",
        action="store_true",
        help="train and judge --methods and --seeds, and write no report: several parts may be made at once, and the "
        "same command without this option puts them together",
    )
    parser.add_argument("--sampling", choices=("few", "many", "both"), default="both", help="what is judged")
    parser.add_argument("--device", default="cpu", help="where videos are made")
    parser.add_argument("--steps", type=console.whole_number(1), help="so many steps a run instead, whatever they cost")
    parser.add_argument("--processes", type=console.whole_number(1), default=2, help="of a training")
    parser.add_argument("--prompts", type=console.whole_number(1), default=16, help="long videos for each network")
    parser.add_argument(
        "--seconds", type=float, nargs="+", default=[5.0, 20.0, 60.0], help="where videos are looked at"
    )
    parser.add_argument(
        "--quick", action="store_true", help="4 steps, one seed, 2 prompts of 5 s, into a folder of its own"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="section.name=value", help="settings of all trainings")
    options = parser.parse_args(argv)
    if sorted(set(options.seconds)) != options.seconds or not 2 <= options.seconds[0] <= options.seconds[-1] <= 600:
        parser.error("--seconds must rise, from at least 2 to at most 600")
    if options.clock is not None and (options.steps is not None or options.quick):
        parser.error("--clock does not go with --steps or --quick")
    if options.part and options.clock is None and options.steps is None:
        parser.error("--part needs --clock or --steps: parts that are made at once cannot measure what a step costs")
    if not options.methods and not options.part:
        parser.error("--methods names none")
    if options.quick:
        options.steps, options.seeds, options.prompts, options.seconds = 4, [0], 2, [2.5, 5.0]
        options.out = options.out.with_name(f"{options.out.name}-quick")
        options.document = options.out / "ablation.md"
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, or 2 for what cannot be used or did not work."""
    options = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def work() -> None:
        results = Ablation(options).run()
        if not options.part:
            write_report(options.document, results, options)

    return console.run(work)


if __name__ == "__main__":
    sys.exit(main())
