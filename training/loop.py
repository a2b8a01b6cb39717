"""The loop all stages share: continue from the newest checkpoint, step, show, save, and hand on the weights."""

from __future__ import annotations

import json
import logging
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pipeline.decoder import WanStreamDecoder
from pipeline.errors import NonFiniteOutput, OutOfMemory, SelfForcingError, TrainingError
from training.checkpoints import SETTINGS_FILE, Checkpoints
from training.draws import Draws
from training.network import load_vae, save_network
from training.parallel import Processes
from training.sheets import contact_sheet
from training.stage import Stage

logger = logging.getLogger(__name__)


def train(stage: Stage, name: str, processes: Processes) -> int:
    """Run a stage to its end, or to the end of its time. Returns the number of the last step.

    Raises:
        WeightsError: the newest checkpoint is of other settings, or damaged.
        TrainingError: a checkpoint could not be written, or another process ended; says what is saved.
        NonFiniteOutput: the loss became no number.
        OutOfMemory: of the GPU; says which settings need less.
    """
    run = stage.settings.run
    out = Path(run.out)
    checkpoints = Checkpoints(out, name, stage.settings, processes)
    checkpoints.check()
    step = resume(stage, checkpoints)
    started = time.monotonic()
    writer = SummaryWriter(str(out / "tensorboard"), purge_step=step) if processes.leads else None
    bar = tqdm(total=run.steps, initial=step, desc=name, unit="step", disable=None if processes.leads else True)
    try:
        while step < run.steps:
            metrics = stage.step(step)
            step += 1
            bar.update()
            bar.set_postfix({key: f"{value:.4g}" for key, value in metrics.items()}, refresh=False)
            if writer is not None:
                for key, value in metrics.items():
                    writer.add_scalar(key, value, step)
            for key, value in metrics.items():
                if not np.isfinite(value):
                    raise NonFiniteOutput(f"{key} became {value} in step {step}. Lower the rate, or look at the data.")
            if run.sheet_every and step % run.sheet_every == 0:
                show(stage, writer, step)
            over = bool(run.minutes) and processes.agreed(time.monotonic() - started > 60 * run.minutes)
            if over or step == run.steps or step % run.checkpoint_every == 0:
                save(stage, checkpoints, step)
                shown = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())
                logger.info("%s: step %d of %d saved  %s", name, step, run.steps, shown)
            if over:
                break
    except SelfForcingError:
        raise
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"The GPU ran out of memory in step {step + 1}. Lower run.micro_batch, set run.gradient_checkpointing or "
            f"run.cpu_offload. {_saved(checkpoints)}"
        ) from error
    except RuntimeError as error:
        if processes.count > 1 and _lost_peer(error):
            raise TrainingError(
                f"Another process of this run ended in step {step + 1}. {_saved(checkpoints)}"
            ) from error
        raise
    except OSError as error:
        raise TrainingError(f"{out} cannot be written to ({error.strerror or error}). {_saved(checkpoints)}") from error
    finally:
        bar.close()
        if writer is not None:
            # On a full disk the curves lose their end. That the disk is full was said; weights are in checkpoints.
            with suppress(OSError):
                writer.close()
    hand_on(stage, checkpoints, out)
    return step


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
        (out / SETTINGS_FILE).write_text(json.dumps(checkpoints.described, indent=1) + "\n", encoding="utf-8")
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


def _lost_peer(error: RuntimeError) -> bool:
    """Whether an error is what a process sees when one it talks to has gone."""
    text = str(error).lower()
    return any(sign in text for sign in ("connection closed", "connection reset", "broken pipe", "gloo", "nccl"))


def _saved(checkpoints: Checkpoints) -> str:
    newest = checkpoints.newest()
    if newest is None:
        return "Nothing was saved yet: start it again."
    return f"The checkpoint of step {int(newest.name[5:])} is whole: the same command goes on from there."
