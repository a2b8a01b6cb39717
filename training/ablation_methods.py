"""What the ablation compares: ways to train one network, as stages with their settings."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.launching import value
from training.settings_file import as_plain, load_settings
from training.stages import STAGES

MANY_STEPS = 10**7
"""What a run that ends by the clock has for `run.steps`."""

# Whole windows only, for the network has been through the shorter ones when it comes here; and only from a clip's
# beginning, as the rollouts of the others are.
_WHOLE = ("lengths=[]", "shifts=[]", "curriculum=[]", "clips.later_windows=0", "optimizer.average_decay=0.98")

# The network has been trained when it comes here: rates of embedded_causal_context.toml, which goes on from one, too.
_GOING_ON = (
    "optimizer.rate=4e-4",
    "optimizer.matrix_rate=2e-3",
    "optimizer.warmup_steps=10",
    "optimizer.flat_until=0.5",
)

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
        (*_WHOLE, *_GOING_ON, "forcing=teacher", "clean_blocks=0.0"),
        many_steps=16,
        clean_context=True,
    ),
    "diffusion": Method("Diffusion forcing", "causal", (*_WHOLE, *_GOING_ON, "forcing=diffusion"), many_steps=16),
    "ode": Method("ODE regression", "ode"),
    "dmd": Method("Self-Forcing, DMD", "dmd", _SHORT_ROLLOUTS, from_ode=True),
    "sid": Method("Self-Forcing, SiD", "sid", _SHORT_ROLLOUTS, from_ode=True),
    # The critic's start as short as the others': the file's own would take much of a short budget.
    "gan": Method("Self-Forcing, GAN", "gan", ("critic_warmup=8",), from_ode=True),
}


def settings_file(options: argparse.Namespace, name: str) -> Path:
    return options.configs / f"embedded_{METHODS[name].stage}.toml"


def changes(
    options: argparse.Namespace, name: str, seed: int, steps: int, out: Path, clock: float | None = None
) -> list[str]:
    """What differs from the settings file.

    Args:
        clock: minutes after which the run ends, whatever steps it has made; None: it makes them all.
    """
    method = METHODS[name]
    found = [value("run.out", out), f"run.seed={seed}", f"run.steps={steps}", "run.sheet_every=0"]
    found.append("run.compile=false")  # its one-off cost would spoil what a step is measured to cost
    # The whole section: a file that describes a fresh network has sizes there.
    found.append(f"network={{init={json.dumps(str(options.ode if method.from_ode else options.start))}}}")
    found += method.changes
    if clock is not None:
        found += [f"run.minutes={clock}", 'run.schedule="minutes"', f"run.checkpoint_every={MANY_STEPS}"]
    if method.stage in ("dmd", "sid"):
        found.append(value("score.teacher.init", options.teacher))
    if method.stage == "ode":
        found.append(value("pairs", options.pairs))
    return [*found, *options.set]


def described(options: argparse.Namespace, name: str, found: list[str]) -> dict[str, Any]:
    """As a run's settings file describes it: the method's file with these changes."""
    kind = STAGES[METHODS[name].stage].settings_kind
    return {"settings": as_plain(load_settings(kind, settings_file(options, name), found))}
