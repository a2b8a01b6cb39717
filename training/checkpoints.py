"""Checkpoints of a run: sharded, written beside their place and moved there whole.

A checkpoint is a folder `step-00000100` of torch's distributed format, which any number of processes can read again,
with the run's settings in it. A folder that is being written has another name, so whatever happens to a process, the
newest folder of that name is complete. Read only checkpoints you wrote: torch keeps their index as a pickle.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from pipeline.errors import TrainingError, WeightsError
from training.files import settle
from training.parallel import Processes
from training.settings_file import as_plain, first_difference

logger = logging.getLogger(__name__)

FOLDER, SETTINGS_FILE = "checkpoints", "settings.json"
MAY_CHANGE = {
    "run": ("out", "steps", "minutes", "device", "micro_batch", "checkpoint_every", "sheet_every", "sheet_clips")
    + ("decoder", "gradient_checkpointing", "compile", "cpu_offload", "workers", "keep_gathered")
}
"""Settings that a continued run may have otherwise: they do not change what is learnt from what."""


def newest_checkpoint(out: Path) -> Path | None:
    """The newest whole checkpoint in a run's folder, the same on every process."""
    return max((out / FOLDER).glob("step-*[0-9]"), default=None)


def saved_so_far(out: Path) -> str:
    """A sentence about what a run that ends now leaves to the next start."""
    newest = newest_checkpoint(out)
    if newest is None:
        return "Nothing was saved yet: start it again."
    return f"The checkpoint of step {_step(newest)} is whole: the same command goes on from there."


def check_continues(path: Path, described: Mapping[str, Any], what: str) -> None:
    """Refuse to continue what was begun with other settings.

    Args:
        path: where those it was begun with were written.
        described: stage and settings of now.
        what: beginning of a sentence: what was begun.

    Raises:
        WeightsError: naming the first setting that differs, or the file if it is damaged.
    """
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        was = {"stage": saved.get("stage", described["stage"])}
        difference = first_difference(was, {"stage": described["stage"]})
        difference = difference or first_difference(what_is_learnt(saved), what_is_learnt(described))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{what} is damaged ({path.name} cannot be read): delete it.") from error
    if difference:
        raise WeightsError(
            f"{what} was made with other settings: {difference}. Take another run.out, or the old setting."
        )


class Checkpoints:
    """The checkpoints in a run's folder; only the newest is kept.

    Args:
        folder: the run's.
        stage: the stage's name, and
        settings: its settings: a checkpoint of others is refused.
    """

    def __init__(self, folder: Path, stage: str, settings: Any, processes: Processes) -> None:
        self.out = folder
        self.folder = folder / FOLDER
        self.processes = processes
        self.described = {"stage": stage, "settings": as_plain(settings)}

    def newest(self) -> Path | None:
        """The newest whole checkpoint, the same on every process."""
        return newest_checkpoint(self.out)

    def check(self) -> None:
        """Refuse to continue what was begun with other settings.

        Raises:
            WeightsError: naming the first setting that differs.
        """
        if (path := self.newest()) is not None:
            check_continues(path / SETTINGS_FILE, self.described, f"The checkpoint {path.name} in {self.folder}")

    def load(self, state: dict[str, Any]) -> int:
        """Fill `state` from the newest checkpoint; returns its step, 0 if there is none."""
        path = self.newest()
        if path is None:
            return 0
        try:
            dcp.load(state, checkpoint_id=str(path))
        except torch.OutOfMemoryError:
            raise
        except (CheckpointException, OSError, RuntimeError, KeyError) as error:
            raise WeightsError(
                f"The checkpoint {path.name} in {self.folder} cannot be read: {_cause(error)}."
            ) from error
        return _step(path)

    def save(self, state: dict[str, Any], step: int) -> None:
        """Write a checkpoint; the one before it goes when it is whole.

        Raises:
            TrainingError: it could not be written (the disk is full, ...); the one before it is as it was.
        """
        path = self.folder / f"step-{step:08d}"
        before = self.newest()
        if before == path:
            return
        partial = self.folder / "partial"
        try:
            if self.processes.leads:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                (partial / SETTINGS_FILE).write_text(json.dumps(self.described, indent=1), encoding="utf-8")
            self.processes.barrier()
            dcp.save(state, checkpoint_id=str(partial))
        except (CheckpointException, OSError, RuntimeError) as error:
            if self.processes.leads:
                shutil.rmtree(partial, ignore_errors=True)
            raise self._failed(step, before, error) from error
        if self.processes.leads:
            try:
                for written in (*partial.iterdir(), partial):  # a name must never outlive its contents
                    settle(written)
                partial.rename(path)
                settle(self.folder)
            except OSError as error:
                raise self._failed(step, before, error) from error
            for older in self.folder.glob("step-*"):
                if older != path:
                    shutil.rmtree(older, ignore_errors=True)
        self.processes.barrier()

    def _failed(self, step: int, before: Path | None, error: Exception) -> TrainingError:
        kept = f"the one of step {_step(before)} is intact" if before else "there is none before it"
        return TrainingError(
            f"The checkpoint of step {step} could not be written to {self.folder} ({_cause(error)}); {kept}."
        )


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def what_is_learnt(described: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a settings file's content that make one run another than the next."""
    return {
        section: {name: entry for name, entry in value.items() if name not in MAY_CHANGE.get(section, ())}
        if isinstance(value, dict)
        else value
        for section, value in described["settings"].items()
    }


def _cause(error: BaseException) -> str:
    """The first plain reason among an error and those that led to it, in one line."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
