"""Flow matching on real clips: the bidirectional teacher, and causal students by teacher or diffusion forcing.

Teacher forcing shows every noisy block the clean ones before it; diffusion forcing gives every block a noise level of
its own, some of them nearly clean. A curriculum of shorter windows makes the latter affordable: single frames first,
which cost a fraction of a clip and teach scenes, shapes and colours.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.sampler import TRAIN_STEPS, FlowSchedule, add_noise, shifted_time
from training.ahead import Ahead
from training.clips import ClipBatch, ClipSampler, open_clips
from training.draws import Draws
from training.losses import flow_loss
from training.masks import frame_mask, teacher_forcing
from training.network import network_config
from training.parallel import Processes
from training.score import ScoreNetwork, solve_ode
from training.settings import require
from training.stage import Metrics, Stage
from training.stage_settings import CausalSettings, FlowSettings, TeacherSettings

SHEET_STEPS = 20


def emphasised(level: Tensor, progress: float) -> Tensor:
    """Share 0..1 of a subject's extra weight at noise levels 0..1, at this share of the steps.

    The subject counts most at the beginning. Later only where it can be seen: weighted where noise hides its place, it
    would be expected everywhere.
    """
    return torch.clamp(1 - level, min=max(0.0, 1 - progress / 0.9))


class FlowStage(Stage[FlowSettings]):
    """Teacher and causal students alike: they differ in mask and noise levels."""

    takes_workers = True

    def __init__(self, settings: FlowSettings, processes: Processes) -> None:
        super().__init__(settings, processes)
        network = self.trainee("generator", settings.network, settings.optimizer)
        causal = settings.attention == "causal"
        self.score = ScoreNetwork(
            network,
            FlowSchedule(settings.shift),
            settings.block_frames if causal else 0,
            window=settings.window_frames,
            first_frame=settings.first_frame,
            compute_dtype=processes.compute_dtype,
        )
        self.clips = ClipSampler(open_clips(settings.clips), settings.clips, settings.block_frames)
        self.ahead = Ahead(self._draw, settings.run.steps, settings.run.workers)

    @classmethod
    def check(cls, settings: FlowSettings) -> None:
        super().check(settings)
        source = open_clips(settings.clips)
        channels, config = source.latents.shape[2], network_config(settings.network)
        require(
            channels == config["in_channels"],
            f"Clips in {settings.clips.folder} have {channels} channels, but the network has {config['in_channels']}.",
        )

    def step(self, step: int) -> Metrics:
        progress = step / self.steps
        frames, shift = self._arrangement(step)
        parts = self._parts(step, frames)
        drawn = zip(self.ahead(step), parts, strict=True)
        loss = self.learn((self.loss(clips, part, shift, progress) for clips, part in drawn), len(parts))
        norm = self.trainees["generator"].step(step)
        return {f"loss/{frames}": loss, "norm": norm}

    def _parts(self, step: int, frames: int) -> list[Draws]:
        """Shorter windows come in larger numbers: a step costs about the same whatever its arrangement."""
        return self.parts(step, self.settings.run.batch * (self.settings.clips.frames // frames))

    def _draw(self, step: int) -> Iterator[ClipBatch]:
        """A step's clips, part by part."""
        frames, _ = self._arrangement(step)
        return (self.clips.draw(part, frames) for part in self._parts(step, frames))

    def _arrangement(self, step: int) -> tuple[int, float]:
        """Window length of a step, and how strongly its noise levels lean to noise."""
        settings = self.settings
        progress = step / settings.run.steps
        if not settings.curriculum:
            return settings.clips.frames, settings.shift
        shares = [phase[1:] for phase in settings.curriculum if progress >= phase[0]][-1]
        chosen = int(Draws(settings.run.seed, step, (), 0).shared("arrangement").choice(len(shares), p=shares))
        lengths, shifts = (*settings.lengths, settings.clips.frames), (*settings.shifts, settings.shift)
        return lengths[chosen], shifts[chosen]

    def loss(self, clips: ClipBatch, draws: Draws, shift: float, progress: float) -> Tensor:
        """Mean squared error of the flow over what is to be learnt."""
        device, settings = self.processes.device, self.settings
        clean = clips.latents.to(device, self.processes.master_dtype)
        level, learnt = self.levels(clips, draws, shift)
        noise = self.noise_like(draws, "noise", clean)
        noisy = add_noise(clean, noise, level.to(device)[..., None, None, None])
        text = self.score.encode(self.embed(clips.captions))
        times = level.to(device) * TRAIN_STEPS
        if settings.forcing == "teacher" and clean.shape[1] > 1:
            flow = self._teacher_forced(clean, noisy, times, text, draws)
        else:
            flow = self.score.flow(noisy, times, text)
        emphasis = settings.subject_weight * emphasised(level.to(clean), progress)[..., None, None]
        near_subject = F.max_pool2d((clips.subject.to(device) > 0.04).to(clean), 3, stride=1, padding=1)
        weight = learnt.to(clean)[..., None, None] * (1 + emphasis * near_subject)  # [B, F, h, w]
        return flow_loss(flow, clean, noise, weight.unsqueeze(2).expand_as(clean))

    def levels(self, clips: ClipBatch, draws: Draws, shift: float) -> tuple[Tensor, Tensor]:
        """Noise levels 0..1 and which frames are learnt (1 or 0), float32 [B, F]."""
        settings = self.settings
        batch, frames = clips.latents.shape[:2]
        alone = 1 if settings.first_frame and frames > 1 else 0
        sizes = [1] * alone + [min(frames, settings.block_frames)] * (
            (frames - alone) // min(frames, settings.block_frames)
        )
        if settings.forcing == "none":
            level = shifted_time(draws.spread("level", 1), shift).expand(batch, frames)
            return level, torch.ones(batch, frames)
        level = shifted_time(draws.spread("level", len(sizes)), shift)
        context = torch.zeros(batch, len(sizes), dtype=torch.bool)
        if settings.forcing == "diffusion":
            context = draws.uniform("context", len(sizes)) < settings.clean_blocks
            context |= torch.stack([part.all(1) for part in clips.given.split(sizes, dim=1)], dim=1)
            context[:, -1] = False  # the last block is context to nobody
            level = torch.where(context, draws.uniform("clean", len(sizes)) * settings.clean_level, level)
        repeats = torch.tensor(sizes)
        return level.repeat_interleave(repeats, 1), (~context).float().repeat_interleave(repeats, 1)

    def _teacher_forced(self, clean: Tensor, noisy: Tensor, times: Tensor, text: list, draws: Draws) -> Tensor:
        """Flow of the noisy frames, which see the clean ones of earlier blocks, slightly noised if so set."""
        settings, frames = self.settings, clean.shape[1]
        rows, columns = self.score.network.token_grid(*clean.shape[-2:])
        visible = teacher_forcing(frames, settings.block_frames, first_frame=settings.first_frame)
        mask = frame_mask(visible, rows * columns).to(clean.device)
        context = (draws.uniform("context", 1) * settings.context_level).to(clean.device).expand(-1, frames)
        if settings.context_level:
            noise = self.noise_like(draws, "context noise", clean)
            clean = add_noise(clean, noise, context[..., None, None, None])
        both = torch.cat([clean, noisy], dim=1).to(self.processes.compute_dtype)
        levels = torch.cat([context * TRAIN_STEPS, times], dim=1)
        positions = [*range(frames), *range(frames)]
        return self.score.network(both, levels, text, mask=mask, positions=positions)[:, frames:].to(noisy.dtype)

    def sample(self, draws: Draws) -> tuple[list[str], Tensor]:
        clips = self.clips.draw(draws, self.settings.clips.frames)
        noise = self.noise_like(draws, "noise", clips.latents.to(self.processes.device))
        embeds = self.embed(clips.captions)
        return clips.captions, solve_ode(self.score, noise, embeds, self.without, SHEET_STEPS, guidance=1.0)[-1]


class TeacherStage(FlowStage):
    settings_kind = TeacherSettings


class CausalStage(FlowStage):
    settings_kind = CausalSettings
