"""The loop all stages share: continue from the newest checkpoint, step, show, save, and hand on the weights."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pipeline.decoder import WanStreamDecoder
from pipeline.errors import NonFiniteOutput
from training.checkpoints import SETTINGS_FILE, Checkpoints
from training.draws import Draws
from training.faults import explained
from training.files import write_whole
from training.network import load_vae, save_network
from training.parallel import Processes
from training.sheets import contact_sheet
from training.stage import Stage

logger = logging.getLogger(__name__)


def train(stage: Stage, name: str, processes: Processes) -> int:
    """Run a stage to its end, or to the end of its time. Returns the number of the last step.

    Raises:
        WeightsError: the newest checkpoint is of other settings, or damaged.
        TrainingError: something could not be written, or another process ended; says what is saved.
        NonFiniteOutput: the loss became no number.
        OutOfMemory: says which settings need less.
    """
    run = stage.settings.run
    out = Path(run.out)
    checkpoints = Checkpoints(out, name, stage.settings, processes)
    checkpoints.check()
    doing = "when the run was continued"
    with explained(out, processes, lambda: stage.saved(stage.settings), lambda: doing):
        step = first = resume(stage, checkpoints)
        started = time.monotonic()
        quiet = None if processes.leads else True
        with (
            _curves(out, step, processes.leads) as writer,
            tqdm(total=run.steps, initial=step, desc=name, unit="step", disable=quiet) as bar,
        ):
            while step < run.steps:
                doing = f"in step {step + 1}"
                if run.schedule == "minutes" and step > first:
                    seconds = processes.leaders(time.monotonic() - started)
                    stage.expect(steps_in_all(step, first, seconds, run.minutes, run.steps))
                metrics = stage.step(step)
                step += 1
                bar.update()
                bar.set_postfix({key: f"{value:.4g}" for key, value in metrics.items()}, refresh=False)
                if writer is not None:
                    for key, value in metrics.items():
                        writer.add_scalar(key, value, step)
                for key, value in metrics.items():
                    if not np.isfinite(value):
                        raise NonFiniteOutput(
                            f"{key} became {value} in step {step}. Lower the rate, or look at the data."
                        )
                if run.sheet_every and step % run.sheet_every == 0:
                    show(stage, writer, step)
                over = bool(run.minutes) and processes.agreed(time.monotonic() - started > 60 * run.minutes)
                if over or step == run.steps or step % run.checkpoint_every == 0:
                    save(stage, checkpoints, step)
                    shown = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())
                    logger.info("%s: step %d of %d saved  %s", name, step, run.steps, shown)
                if over:
                    break
        doing = "when the weights were handed on"
        hand_on(stage, checkpoints, out)
    return step


def steps_in_all(step: int, first: int, seconds: float, minutes: float, most: int) -> int:
    """Steps a run will have had at the end of its minutes, if those to come take as long as those from `first` on."""
    return max(step + 1, min(most, first + round((step - first) * 60 * minutes / seconds)))


@contextmanager
def _curves(out: Path, step: int, leads: bool) -> Iterator[SummaryWriter | None]:
    """TensorBoard's file for what comes after a step; None for all processes but one."""
    if not leads:
        yield None
        return
    writer = SummaryWriter(str(out / "tensorboard"), purge_step=step)
    try:
        yield writer
    finally:
        # On a full disk the curves lose their end. That the disk is full was said; weights are in checkpoints.
        with suppress(OSError):
            writer.close()


def resume(stage: Stage, checkpoints: Checkpoints) -> int:
    """Load the newest checkpoint into the stage's trainees; returns its step."""
    if checkpoints.newest() is None:
        return 0
    state = {name: trainee.state_dict() for name, trainee in stage.trainees.items()}
    step = checkpoints.load(state)
    for name, trainee in stage.trainees.items():
        trainee.load_state_dict(state[name])
    return step


def save(stage: Stage, checkpoints: Checkpoints, step: int) -> None:
    checkpoints.save({name: trainee.state_dict() for name, trainee in stage.trainees.items()}, step)


def hand_on(stage: Stage, checkpoints: Checkpoints, out: Path) -> None:
    """Write the generator's averaged weights to `transformer/`, and the settings beside them."""
    generator = stage.trainees["generator"]
    weights = {name: value.float() for name, value in generator.averaged_weights().items()}
    if stage.processes.leads:
        save_network(generator.network, weights, out / "transformer")
        write_whole(out / SETTINGS_FILE, json.dumps(checkpoints.described, indent=1) + "\n")
    stage.processes.barrier()


@torch.no_grad()
def show(stage: Stage, writer: SummaryWriter | None, step: int) -> None:
    """A sheet of clips, the same prompts and noise every time. All processes take part: the network is spread."""
    run = stage.settings.run
    draws = Draws(run.seed, -1, range(run.sheet_clips), run.sheet_clips)
    with stage.trainees["generator"].averaged():
        captions, latents = stage.sample(draws)
    if writer is None:
        return
    decoder = WanStreamDecoder(load_vae(run.decoder, latents.device))
    frames = decoder.decode(latents.float()).permute(0, 1, 3, 4, 2).mul(255).round().byte().cpu().numpy()
    sheet = np.asarray(contact_sheet(list(frames), captions))
    writer.add_image("samples", sheet, step, dataformats="HWC")
