"""The stages by name, and running one of them from its settings."""

from __future__ import annotations

from pathlib import Path

from training.dmd import DMDStage, SiDStage
from training.faults import explained
from training.files import claim_folder
from training.flow import CausalStage, TeacherStage
from training.gan import GANStage
from training.loop import train
from training.ode import OdePairsStage, OdeStage
from training.parallel import processes
from training.settings import StageSettings
from training.stage import Stage

STAGES: dict[str, type[Stage]] = {
    "teacher": TeacherStage,
    "causal": CausalStage,
    "ode_pairs": OdePairsStage,
    "ode": OdeStage,
    "dmd": DMDStage,
    "sid": SiDStage,
    "gan": GANStage,
}


def run_stage(name: str, settings: StageSettings) -> int:
    """Check the settings against the files they name, and run the stage. Returns its last step.

    Raises:
        SelfForcingError: in one sentence; what was saved before is whole.
    """
    kind = STAGES[name]
    kind.check(settings)
    out = Path(settings.run.out)
    with processes(settings.run) as group:
        claim_folder("run.out", out)
        with explained(out, group, lambda: kind.saved(settings), "when the networks were loaded"):
            stage = kind(settings, group)
        if isinstance(stage, OdePairsStage):
            return stage.run()
        return train(stage, name, group)
