"""A network as it looks at whole clips: flow and clean estimate at any noise level, with the attention it was made for.

One `FlowSchedule` serves everything: the noise that is added, the conversion of flows, teacher and critic alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.sampler import FlowSchedule, add_noise, euler_step, flow_to_clean
from pipeline.transformer import CausalWanTransformer3DModel, TextKV
from training.losses import guided
from training.masks import block_causal, frame_mask


class ScoreNetwork:
    """Flow and clean estimate of whole noisy clips by one network, each frame at its own noise level.

    Args:
        network: bidirectional or causal; sharded or not.
        schedule: the sigma table.
        block_frames: of block-causal attention; 0 for bidirectional.
        window: frames a block may see; 0: all before it.
        first_frame: whether the first frame is a block of its own.
        compute_dtype: what the network computes in; results are in the dtype of the clips.
    """

    def __init__(
        self,
        network: CausalWanTransformer3DModel,
        schedule: FlowSchedule,
        block_frames: int = 0,
        *,
        window: int = 0,
        first_frame: bool = False,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.network = network
        self.schedule = schedule
        self.block_frames = block_frames
        self.window = window
        self.first_frame = first_frame
        self.compute_dtype = compute_dtype
        self._masks: dict[tuple[int, ...], Tensor] = {}

    def encode(self, embeds: Tensor) -> TextKV:
        """Keys and values of prompt embeddings [B, text_len, text_dim], for any number of calls."""
        return self.network.encode_text(embeds.to(self.compute_dtype))

    def noised(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """The clip [B, F, C, h, w] at the table's level nearest to each frame's timestep [B, F]."""
        return add_noise(clean, noise, self._sigma(timestep))

    def flow(self, noisy: Tensor, timestep: Tensor, text: TextKV, taps: dict[int, Tensor] | None = None) -> Tensor:
        """Predicted noise - clean of clips [B, F, C, h, w] at timesteps [B, F]; `taps` as in the network's forward."""
        mask = self._mask(noisy)
        flow = self.network(noisy.to(self.compute_dtype), timestep, text, mask=mask, taps=taps)
        return flow.to(noisy.dtype)

    def clean(self, noisy: Tensor, timestep: Tensor, text: TextKV) -> Tensor:
        """Predicted clean clip."""
        return flow_to_clean(self.flow(noisy, timestep, text), noisy, self._sigma(timestep))

    def guided_clean(self, noisy: Tensor, timestep: Tensor, text: TextKV, without: TextKV, guidance: float) -> Tensor:
        """Predicted clean clip, led away from the text `without` by c + guidance * (c - u)."""
        clean = self.clean(noisy, timestep, text)
        if guidance == 0:
            return clean
        return guided(clean, self.clean(noisy, timestep, without), guidance)

    def _sigma(self, timestep: Tensor) -> Tensor:
        return self.schedule.sigma(timestep)[..., None, None, None]

    def _mask(self, clips: Tensor) -> Tensor | None:
        frames, (height, width) = clips.shape[1], clips.shape[-2:]
        if not self.block_frames or frames <= 1:
            return None
        key = (frames, height, width)
        if key not in self._masks:
            rows, columns = self.network.token_grid(height, width)
            visible = block_causal(frames, self.block_frames, first_frame=self.first_frame, window=self.window or None)
            self._masks[key] = frame_mask(visible, rows * columns).to(clips.device)
        return self._masks[key]


@torch.no_grad()
def solve_ode(
    score: ScoreNetwork, noise: Tensor, embeds: Tensor, without: Tensor, steps: int, guidance: float
) -> list[Tensor]:
    """The probability-flow ODE from noise [B, F, C, h, w] to a clip by Euler's method: all `steps` + 1 states."""
    schedule = FlowSchedule(score.schedule.shift, steps)
    text = score.encode(embeds)
    empty = score.encode(without.expand_as(embeds)) if guidance else text
    sigmas = [*schedule.sigmas.tolist(), 0.0]
    states = [noise]
    for timestep, sigma, following in zip(schedule.timesteps.tolist(), sigmas, sigmas[1:], strict=False):
        noisy = states[-1]
        times = torch.full(noisy.shape[:2], timestep, device=noisy.device)
        flow = score.flow(noisy, times, text)
        if guidance:
            flow = guided(flow, score.flow(noisy, times, empty), guidance)
        states.append(euler_step(flow, noisy, torch.tensor(sigma), torch.tensor(following)))
    return states
