"""Does training on its own rollouts keep a model from drifting? `python -m training.ablation --minutes 30`.

The same small network, data and processor time, trained with teacher forcing, with diffusion forcing, by ODE regression
alone and by Self-Forcing (DMD, SiD, GAN), rolled out to 5, 20 and 60 seconds. The table and the curves go into
`docs/ablation.md`, which tells the protocol. What is finished is not done again, so a broken ablation goes on.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.cli import check_device
from pipeline.errors import TrainingError, WeightsError
from pipeline.folder import INDEX_FILE
from training import console
from training.ablation_budget import Budget, finished_steps
from training.ablation_methods import METHODS, Method, changes, described, settings_file
from training.ablation_report import REAL, START, write_report
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
from training.checkpoints import SETTINGS_FILE, what_is_learnt
from training.files import write_whole
from training.judge import SHIPPED, load_judge
from training.launching import children_minutes, launch
from training.network import transformer_folder
from training.report import rounded
from training.settings_file import first_difference
from training.videos import LATENTS_FILE
from training.world import FPS

logger = logging.getLogger(__name__)

EVALUATION_SEED = 21
FPS_SECONDS = 5.0


class Ablation:
    """Trains and judges what is not yet, in a folder that remembers what is."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out: Path = options.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.budget = Budget(options)
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
        needed = {options.ode / SETTINGS_FILE: "python -m training ode"}
        if not (self.out / "template" / INDEX_FILE).is_file():
            needed |= {
                options.data / "text": "python -m training.text",
                options.data / "vae": "python -m training.decoders --kind wan",
                options.data / "taehv": "python -m training.decoders --kind taehv",
            }
        finished = all((self.folder(name, seed) / SETTINGS_FILE).is_file() for name, seed in self.runs())
        if not finished:
            needed |= {
                options.data / LATENTS_FILE: "python -m training.data",
                options.pairs: "python -m training ode_pairs",
            }
        for path, command in needed.items():
            if not path.exists():
                raise WeightsError(f"{path} is missing: run {command} first, as docs/ablation.md says.")
        if not finished:
            for network in (options.start, options.teacher):
                transformer_folder(str(network))

    def runs(self) -> list[tuple[str, int]]:
        """Method and seed of each."""
        return [(name, seed) for name in self.options.methods for seed in self.options.seeds]

    def folder(self, name: str, seed: int) -> Path:
        return self.out / f"{name}-{seed}"

    @cached_property
    def plan(self) -> dict[str, Any]:
        """See `Budget.plan`."""
        return self.budget.plan()

    def run(self) -> dict[str, dict[int, dict[str, Any]]]:
        """Label of a method -> seed -> scores, in the order of `METHODS`; then the start itself, and real clips."""
        plan = self.plan
        results: dict[str, dict[int, dict[str, Any]]] = {}
        for name in self.options.methods:
            method = METHODS[name]
            for seed in self.options.seeds:
                run, minutes = self.train(name, seed, plan["steps"][name])
                spent = {"minutes": minutes + (plan["ode_minutes"] if method.from_ode else 0.0)}
                spent["steps"] = finished_steps(run)
                for steps in self.samplings(method):
                    label = method.label + (f", {steps} steps" if steps else "")
                    results.setdefault(label, {})[seed] = spent | self.judge(run, run, steps, method.clean_context)
                    if not self.options.part:
                        results[label][seed]["fps"] = self.fps(steps)
        real = self.real
        if not self.options.part or not self.options.methods:  # a part without methods does it for the others
            for steps in self.samplings(METHODS["diffusion"]):  # as which the start was trained
                label = START + (f", {steps} steps" if steps else "")
                results[label] = {0: self.judge(self.options.start, self.out / "start", steps)}
                if not self.options.part:
                    results[label][0]["fps"] = self.fps(steps)
        if not self.options.part:
            results[REAL] = {0: summary(self._real(other=True), real)}
        return results

    def samplings(self, method: Method) -> list[int | None]:
        """With how many steps a method is judged; None: those of the model's own sampler."""
        both = {"few": None, "many": method.many_steps}
        return [steps for name, steps in both.items() if steps != 0 and self.options.sampling in (name, "both")]

    def train(self, name: str, seed: int, steps: int) -> tuple[Path, float]:
        """The folder of a finished run, and the minutes it took over all its starts: of the processor or the clock.

        Raises:
            TrainingError: it failed, or the folder holds a run with other settings.
            WeightsError: a finished run has lost the file with its minutes.
        """
        run, method = self.folder(name, seed), METHODS[name]
        spent = run.with_name(f"{run.name}-minutes.json")
        clock = self.budget.clock(method)
        wanted = changes(self.options, name, seed, steps, run, clock)
        if (run / SETTINGS_FILE).is_file():
            saved = json.loads((run / SETTINGS_FILE).read_text(encoding="utf-8"))
            ours = described(self.options, name, wanted)
            if difference := first_difference(what_is_learnt(saved), what_is_learnt(ours)):
                raise TrainingError(f"{run} was trained with other settings: {difference}. Take another --out.")
            if not spent.is_file():
                raise WeightsError(f"{spent} is missing, which says what {run.name} took: bring it, or delete {run}.")
            return run, json.loads(spent.read_text(encoding="utf-8"))
        logger.info("%s, seed %d: %d steps", method.label, seed, steps)
        taken = json.loads(spent.read_text(encoding="utf-8")) if spent.is_file() else 0.0
        before = children_minutes()
        try:
            launch(method.stage, settings_file(self.options, name), wanted, self.options.processes)
        finally:  # a run that was broken off has used them, too
            taken += children_minutes() - before
            write_whole(spent, json.dumps(taken))
        if clock is not None:
            taken = clock
            write_whole(spent, json.dumps(taken))
        write_whole(run.with_name(f"{run.name}-steps.json"), json.dumps(finished_steps(run)))
        return run, taken

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
            with tempfile.TemporaryDirectory(dir=self.out) as place:
                folder = model_folder(self.options.ode, self.template, Path(place) / "model", steps)
                frames = speed(folder, self.prompts[0], min(FPS_SECONDS, self.options.seconds[-1]))
            write_whole(path, json.dumps(frames))
        return json.loads(path.read_text(encoding="utf-8"))

    def judge(self, network: Path, kept: Path, steps: int | None, clean_context: bool = False) -> dict[str, Any]:
        """Scores of a network, remembered in a file in the folder `kept`.

        A run keeps its own, so they go when it goes; those of the start go with the whole folder of runs.
        """
        options = self.options
        sampled = f"-{steps}steps" if steps else ""
        path = kept / f"scores{sampled}-{self.asked}.json"
        if not path.is_file():
            kept.mkdir(exist_ok=True)
            folder = self.out / "models" / f"{kept.name}{sampled}"
            model_folder(network, self.template, folder, steps, clean_context)
            scores = score_run(folder, self.probe, self.prompts, self.real, options.seconds, options.device)
            shutil.rmtree(folder)
            write_whole(path, json.dumps(rounded(scores)))
        return json.loads(path.read_text(encoding="utf-8"))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    cache = Path("training/cache")
    parser = argparse.ArgumentParser(prog="python -m training.ablation", description=__doc__.splitlines()[0])
    parser.add_argument("--start", type=Path, default=cache / "base", help="the causal network all begin with")
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
        study = Ablation(options)
        results = study.run()
        if not options.part:
            write_report(options.document, results, options, study.plan["machine"])

    return console.run(work)


if __name__ == "__main__":
    sys.exit(main())
