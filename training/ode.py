"""ODE initialisation: trajectories of the teacher's probability-flow ODE, and regression of the student on them.

The few-step student starts Self-Forcing from a network that already maps each of its noise levels to a clean clip. It
learns this from pairs of a state on the teacher's trajectory and where that trajectory ends (Yin et al. 2025).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from pipeline.errors import TrainingDataError, TrainingError
from pipeline.sampler import FlowSchedule
from training.checkpoints import check_continues
from training.draws import Draws
from training.faults import explained
from training.files import settle, write_whole
from training.losses import clean_loss
from training.network import clip_shape
from training.parallel import Processes
from training.prompts import open_prompts
from training.rollout import Rollout, RolloutPlan
from training.score import ScoreNetwork, solve_ode
from training.settings_file import as_plain
from training.stage import Metrics, Stage, check_prompts
from training.stage_settings import OdePairsSettings, OdeSettings

MARKER = "pairs.json"


class OdePairsStage(Stage[OdePairsSettings]):
    """Writes trajectories instead of weights: one file for each part of a batch, prompts in its metadata.

    A file holds `states` float16 [B, K + 1, F, C, h, w]: the states at the student's K timesteps and the end.
    """

    settings_kind = OdePairsSettings

    def __init__(self, settings: OdePairsSettings, processes: Processes) -> None:
        super().__init__(settings, processes)
        rollout = settings.rollout
        self.score = ScoreNetwork(
            self.frozen(settings.network),
            FlowSchedule(rollout.shift),
            rollout.block_frames if settings.attention == "causal" else 0,
            compute_dtype=processes.compute_dtype,
        )
        self.prompts = open_prompts(settings.prompts, self.text.tokenizer, settings.text.length)
        self.shape = clip_shape(rollout, settings.network)
        self.out = Path(settings.run.out)

    @classmethod
    def check(cls, settings: OdePairsSettings) -> None:
        super().check(settings)
        check_prompts(settings, settings.prompts)
        clip_shape(settings.rollout, settings.network)
        marker = Path(settings.run.out) / MARKER
        if marker.is_file():
            check_continues(marker, _described(settings), f"What {marker.parent} holds of ODE pairs")

    @classmethod
    def saved(cls, settings: OdePairsSettings) -> str:
        return "The files written so far are whole: the same command goes on from there."

    def run(self) -> int:
        """Solve for every batch that has no file yet. Returns the number of batches there are."""
        settings, processes = self.settings, self.processes
        doing = "before the first batch"
        with explained(self.out, processes, lambda: self.saved(settings), lambda: doing):
            if processes.leads:
                write_whole(self.out / MARKER, json.dumps(_described(settings), indent=1))
            processes.barrier()
            for step in tqdm(
                range(settings.run.steps), desc="ode_pairs", unit="batch", disable=not processes.leads or None
            ):
                doing = f"in batch {step + 1}"
                self.step(step)
        return settings.run.steps

    def step(self, step: int) -> Metrics:
        for part in self.parts(step):
            # The network is spread over the processes: they leave a part out together or not at all.
            if self.processes.mean(torch.tensor(float(self._is_there(step, part)))) == 1:
                continue
            captions, states = self.solve(part)
            path = self.out / f"pairs-{step:06d}-{part.samples[0]:05d}-{part.samples[-1]:05d}.safetensors"
            partial = path.with_suffix(".partial")
            try:
                save_file({"states": states}, partial, metadata={"captions": json.dumps(captions)})
                settle(partial)
                partial.replace(path)
            except (OSError, SafetensorError) as error:
                partial.unlink(missing_ok=True)
                raise TrainingError(
                    f"{path.name} could not be written ({error}); the files before it are whole."
                ) from error
        return {}

    def _is_there(self, step: int, part: Draws) -> bool:
        """Whether files hold all samples of a part, also where other numbers of processes have cut the batch."""
        found = {sample for path in self.out.glob(f"pairs-{step:06d}-*.safetensors") for sample in _samples(path)}
        return found.issuperset(part.samples)

    def solve(self, draws: Draws) -> tuple[list[str], Tensor]:
        """Prompts and their trajectories at the student's timesteps, float16 [B, K + 1, F, C, h, w]."""
        settings, rollout = self.settings, self.settings.rollout
        captions = self.prompts.draw(draws, "prompt")
        noise = draws.normal("noise", self.shape, self.processes.device, self.processes.master_dtype)
        states = solve_ode(
            self.score, noise, self.embed(captions), self.without, settings.solver_steps, settings.guidance
        )
        kept = [round(settings.solver_steps * (1 - step / 1000)) for step in rollout.denoising_steps]
        return captions, torch.stack([states[index] for index in (*kept, -1)], dim=1).half().cpu()

    def sample(self, draws: Draws) -> tuple[list[str], Tensor]:
        captions, states = self.solve(draws)
        return captions, states[:, -1]


def _described(settings: OdePairsSettings) -> dict[str, Any]:
    return {"stage": "ode_pairs", "settings": as_plain(settings)}


def _samples(path: Path) -> range:
    """The samples of its batch that a file of pairs holds: from its name, or of older ones its first and its length."""
    first, *last = map(int, path.stem.split("-")[2:])
    return range(first, last[0] + 1 if last else first + _read_header(path)[0][0])


def _read_header(path: Path) -> tuple[tuple[int, ...], list[str]]:
    """Shape of a file's states, and their prompts.

    Raises:
        TrainingDataError: the file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            shape = tuple(file.get_slice("states").get_shape())
            captions = json.loads(file.metadata()["captions"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise TrainingDataError(
            f"{path.name} in {path.parent} is damaged: delete it and make it again with the stage ode_pairs."
        ) from error
    return shape, captions


class PairFiles:
    """The trajectories a run of `ode_pairs` wrote.

    Their order is that of batches and samples: how many processes made them, and whether a part was made again by
    another number of them, changes nothing.

    Raises:
        TrainingDataError: there are none, or a file is damaged or of another shape.
    """

    def __init__(self, folder: Path, states: int, shape: tuple[int, ...]) -> None:
        rows: dict[tuple[int, int], tuple[Path, int, str]] = {}
        for path in sorted(folder.glob("pairs-*.safetensors")):
            found, captions = _read_header(path)
            if found[1:] != (states, *shape):
                raise TrainingDataError(
                    f"{path.name} in {folder} has trajectories of shape {found[1:]}, but {(states, *shape)} is needed."
                )
            step = int(path.stem.split("-")[1])
            for row, (sample, caption) in enumerate(zip(_samples(path), captions, strict=True)):
                rows.setdefault((step, sample), (path, row, caption))
        if not rows:
            raise TrainingDataError(f"{folder} holds no ODE pairs: make them with the stage ode_pairs.")
        self._rows = [rows[key] for key in sorted(rows)]

    def draw(self, draws: Draws) -> tuple[list[str], Tensor]:
        """Prompts and trajectories [B, K + 1, F, C, h, w], float32."""
        drawn = [self[int(rng.integers(len(self)))] for rng in draws.own("pair")]
        return [caption for caption, _ in drawn], torch.stack([states for _, states in drawn])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[str, Tensor]:
        """A prompt and its trajectory [K + 1, F, C, h, w], float32."""
        path, row, caption = self._rows[index]
        with safe_open(path, "pt") as file:
            return caption, file.get_slice("states")[row].float()


class OdeStage(Stage[OdeSettings]):
    """Every block of a clip gets a random state of its trajectory; the network predicts where that ends."""

    settings_kind = OdeSettings

    def __init__(self, settings: OdeSettings, processes: Processes) -> None:
        super().__init__(settings, processes)
        rollout = settings.rollout
        network = self.trainee("generator", settings.network, settings.optimizer)
        self.score = ScoreNetwork(
            network,
            FlowSchedule(rollout.shift),
            rollout.block_frames,
            window=rollout.window_frames,
            compute_dtype=processes.compute_dtype,
        )
        self.shape = clip_shape(rollout, settings.network)
        self.pairs = PairFiles(Path(settings.pairs), len(rollout.denoising_steps) + 1, self.shape)
        self.timesteps = torch.cat([self.score.schedule.warp(rollout.denoising_steps), torch.zeros(1)])

    @classmethod
    def check(cls, settings: OdeSettings) -> None:
        super().check(settings)
        states = len(settings.rollout.denoising_steps) + 1
        PairFiles(Path(settings.pairs), states, clip_shape(settings.rollout, settings.network))

    def step(self, step: int) -> Metrics:
        parts = self.parts(step)
        loss = self.learn((self.loss(part) for part in parts), len(parts))
        return {"loss": loss, "norm": self.trainees["generator"].step(step)}

    def loss(self, draws: Draws) -> Tensor:
        captions, states = self.pairs.draw(draws)
        blocks = self.settings.rollout.num_blocks
        chosen = draws.integers("state", states.shape[1], blocks)
        chosen = chosen.repeat_interleave(self.settings.rollout.block_frames, 1)  # [B, F]
        index = chosen[:, None, :, None, None, None].expand(-1, 1, *self.shape)
        device, dtype = self.processes.device, self.processes.master_dtype
        noisy = states.gather(1, index)[:, 0].to(device, dtype)
        times = self.timesteps[chosen].to(device)
        predicted = self.score.clean(noisy, times, self.score.encode(self.embed(captions)))
        return clean_loss(predicted, states[:, -1].to(device, dtype), (times > 0).to(dtype))

    def sample(self, draws: Draws) -> tuple[list[str], Tensor]:
        captions, _ = self.pairs.draw(draws)
        rollout = self.settings.rollout
        processes = self.processes
        sampler = Rollout(self.score.network, rollout, self.shape[1:], processes.device, processes.compute_dtype)
        plan = RolloutPlan.full(rollout)
        return captions, sampler.with_noise([self.embed(captions)], plan, draws, "sample", gradients=False)
