"""Start a training stage as a program of its own, and count the processor time it takes."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import TrainingError


def launch(stage: str, settings: Path, overrides: Sequence[str], processes: int = 1) -> float:
    """Run a stage to its end; returns the processor minutes it took, over all its processes.

    Other programs on the machine make a training slower, but change its processor time little.

    Raises:
        TrainingError: it failed; it has said why.
    """
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(several if processes > 1 else []), "-m", "training", stage, str(settings), *overrides]
    before = children_minutes()
    failed = subprocess.run(command, check=False).returncode
    if failed:
        raise TrainingError(
            f"The stage {stage} failed; what it said stands above. What it saved is continued next time."
        )
    return children_minutes() - before


def children_minutes() -> float:
    """Processor minutes of all programs that this one started and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (usage.ru_utime + usage.ru_stime) / 60


def value(setting: str, text: str | Path) -> str:
    """A text setting for the command line, quoted as the settings file wants it."""
    return f"{setting}={json.dumps(str(text))}"
