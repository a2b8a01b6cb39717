"""Run a training stage: `python -m training dmd SETTINGS.toml run.out=runs/dmd`.

The same command with `torchrun --nproc-per-node 8 -m training` in place of `python -m training` uses eight GPUs, or
as many processes of the CPU where there is no GPU. Stopped or killed, it goes on where its newest checkpoint is.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from pathlib import Path

from pipeline.errors import SelfForcingError, TrainingError
from training.faults import LastWords
from training.settings_file import load_settings
from training.stages import STAGES, run_stage

LEADERS_WORD = 5.0
"""Seconds."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("settings", type=Path, help="a .toml or .json file")
    parser.add_argument(
        "override", nargs="*", metavar="section.name=value", help="settings that differ from the file's"
    )
    options = parser.parse_args(argv)
    leads = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if leads else logging.WARNING, format="%(message)s")
    words = LastWords()
    try:
        stage = STAGES[options.stage]
        settings = load_settings(stage.settings_kind, options.settings, options.override)
        if leads:
            words.watch(lambda: f"{_why_ended()} {stage.saved(settings)}")
        run_stage(options.stage, settings)
    except SelfForcingError as error:
        if not leads and not isinstance(error, TrainingError):
            # Most likely the first process says the same. It must get the time to: torchrun ends them all with one.
            time.sleep(LEADERS_WORD)
        words.say(str(error))
        return 1 if isinstance(error, TrainingError) else 2
    finally:
        words.forget()
    return 0


def _why_ended() -> str:
    """What SIGTERM most likely means."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return "This run was told to end, most likely because another of its processes has ended."
    return "This run was told to end."


if __name__ == "__main__":
    if code := main():
        # Not by sys.exit: after an error the group of processes still stands, and taking it down waits for peers.
        sys.stdout.flush()
        os._exit(code)
