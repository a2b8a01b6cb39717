"""ODE initialisation: trajectories of the teacher's probability-flow ODE, and regression of the student on them.

The few-step student starts Self-Forcing from a network that already maps each of its noise levels to a clean clip. It
learns this from pairs of a state on the teacher's trajectory and where that trajectory ends (Yin et al. 2025).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from pipeline.errors import TrainingDataError, TrainingError
from pipeline.sampler import FlowSchedule
from training.draws import Draws
from training.losses import clean_loss
from training.network import clip_shape
from training.parallel import Processes
from training.prompts import open_prompts
from training.rollout import Rollout, RolloutPlan
from training.score import ScoreNetwork, solve_ode
from training.settings import require
from training.settings_file import as_plain, first_difference
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
            saved = json.loads(marker.read_text(encoding="utf-8"))["settings"]
            for described in (saved, current := as_plain(settings)):
                for name in ("steps", "minutes", "device"):
                    described["run"].pop(name)
            difference = first_difference(saved, current)
            require(difference is None, f"{marker.parent} holds pairs made with other settings: {difference}.")

    def run(self) -> int:
        """Solve for every batch that has no file yet. Returns the number of batches there are."""
        settings, processes = self.settings, self.processes
        if processes.leads:
            self.out.mkdir(parents=True, exist_ok=True)
            marker = self.out / f"{MARKER}.partial"
            marker.write_text(json.dumps({"settings": as_plain(settings)}, indent=1), encoding="utf-8")
            marker.replace(self.out / MARKER)
        processes.barrier()
        for step in tqdm(
            range(settings.run.steps), desc="ode_pairs", unit="batch", disable=not processes.leads or None
        ):
            self.step(step)
        return settings.run.steps

    def step(self, step: int) -> Metrics:
        for part in self.parts(step):
            path = self.out / f"pairs-{step:06d}-{part.samples[0]:05d}.safetensors"
            # The network is spread over the processes: they leave a part out together or not at all.
            if self.processes.mean(torch.tensor(float(path.is_file()))) == 1:
                continue
            captions, states = self.solve(part)
            partial = path.with_suffix(".partial")
            try:
                save_file({"states": states}, partial, metadata={"captions": json.dumps(captions)})
                partial.replace(path)
            except (OSError, SafetensorError) as error:
                partial.unlink(missing_ok=True)
                raise TrainingError(
                    f"{path.name} could not be written ({error}); the files before it are whole."
                ) from error
        return {}

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


class PairFiles:
    """The trajectories a run of `ode_pairs` wrote.

    Raises:
        TrainingDataError: there are none, or a file is damaged or of another shape.
    """

    def __init__(self, folder: Path, states: int, shape: tuple[int, ...]) -> None:
        self._rows: list[tuple[Path, int]] = []
        self._captions: list[str] = []
        for path in sorted(folder.glob("pairs-*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    found = tuple(file.get_slice("states").get_shape())
                    captions = json.loads(file.metadata()["captions"])
            except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
                raise TrainingDataError(f"{path.name} in {folder} is damaged: delete it and make it again.") from error
            if found[1:] != (states, *shape):
                raise TrainingDataError(
                    f"{path.name} in {folder} has trajectories of shape {found[1:]}, but {(states, *shape)} is needed."
                )
            self._rows += [(path, row) for row in range(found[0])]
            self._captions += captions
        if not self._rows:
            raise TrainingDataError(f"{folder} holds no ODE pairs: make them with the stage ode_pairs.")

    def draw(self, draws: Draws) -> tuple[list[str], Tensor]:
        """Prompts and trajectories [B, K + 1, F, C, h, w], float32."""
        chosen = [int(rng.integers(len(self._rows))) for rng in draws.own("pair")]
        states = []
        for index in chosen:
            path, row = self._rows[index]
            with safe_open(path, "pt") as file:
                states.append(file.get_slice("states")[row : row + 1].float())
        return [self._captions[index] for index in chosen], torch.cat(states)


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
        return captions, sampler.draw([self.embed(captions)], plan, draws, "sample", gradients=False)
