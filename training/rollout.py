"""Self-Forcing's rollout: a clip made block by block on the model's own outputs, with gradients through one step.

The sampler, the cache and the network are those of inference. What differs: many clips at once, a random exit step
instead of the last one, and gradients in that step for the blocks that will be scored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.cache import CacheWindow, KVCache
from pipeline.sampler import TRAIN_STEPS, DenoisingSteps, FlowSchedule, add_noise, denoise_block
from pipeline.transformer import CausalWanTransformer3DModel, TextKV


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How the student samples; the same values go into the model's `model_index.json`."""

    block_frames: int = 3
    window_frames: int = 9
    sink_frames: int = 3
    denoising_steps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    shift: float = 3.0
    context_noise: float = 100.0
    """Level, 0..1000, at which finished blocks are written into the cache; noise of that level is added to them."""

    @property
    def window(self) -> CacheWindow:
        return CacheWindow(self.block_frames, self.window_frames, self.sink_frames, "relative")

    @property
    def steps(self) -> DenoisingSteps:
        return DenoisingSteps.from_schedule(FlowSchedule(self.shift), self.denoising_steps)


class Rollout:
    """Rolls out clips of one latent size in batches.

    Args:
        network: generator; its dtype and device are used throughout.
        config: how it samples.
        shape: (C, h, w) of a latent frame.
    """

    def __init__(
        self, network: CausalWanTransformer3DModel, config: RolloutConfig, shape: tuple[int, int, int]
    ) -> None:
        self.network = network
        self.config = config
        self.shape = shape
        self.steps = config.steps
        self._cache: KVCache | None = None

    def __call__(
        self,
        text_kv: TextKV,
        num_blocks: int,
        *,
        exit_step: int | None = None,
        gradient_blocks: int = 0,
        guidance: float = 1.0,
        empty_kv: TextKV | None = None,
    ) -> torch.Tensor:
        """Make clips [B, num_blocks * block_frames, C, h, w].

        Args:
            text_kv: of the prompts.
            exit_step: the step whose clean estimate is the result, for every block; None for the last.
            gradient_blocks: so many blocks at the end get gradients through their exit step.
            guidance: > 1 sharpens towards the prompt by `empty_kv`; for sampling from an undistilled network.
        """
        config, network = self.config, self.network
        batch = text_kv[0][0].shape[0]
        last_step = len(self.steps) - 1 if exit_step is None else exit_step
        guided = guidance != 1.0 and empty_kv is not None
        if guided:
            text_kv = [
                (torch.cat([key, k.expand_as(key)]), torch.cat([value, v.expand_as(value)]))
                for (key, value), (k, v) in zip(text_kv, empty_kv, strict=True)
            ]
        cache = self._fresh_cache(2 * batch if guided else batch)
        frames = (batch, config.block_frames, *self.shape)
        blocks: list[torch.Tensor] = []

        def call(latents: torch.Tensor, timestep: float) -> torch.Tensor:
            times = latents.new_full(latents.shape[:2], timestep, dtype=torch.float32)
            if not guided:
                return network(latents, times, text_kv, cache=cache)
            flow = network(torch.cat([latents, latents]), torch.cat([times, times]), text_kv, cache=cache)
            with_text, without = flow.chunk(2)
            return without + guidance * (with_text - without)

        for index in range(num_blocks):
            cache.begin_block(config.block_frames)
            scored = index >= num_blocks - gradient_blocks

            def predict(latents: torch.Tensor, timestep: float, step: int, scored: bool = scored) -> torch.Tensor:
                with torch.set_grad_enabled(scored and step == last_step):
                    return call(latents, timestep)

            def noise(_step: int) -> torch.Tensor:
                return torch.randn(frames, device=network.device, dtype=network.dtype)

            *_, clean = denoise_block(predict, noise, self.steps, last_step)
            blocks.append(clean)
            if index < num_blocks - 1:
                with torch.no_grad():
                    context = clean.detach()
                    if config.context_noise:
                        sigma = torch.tensor(config.context_noise / TRAIN_STEPS)
                        context = add_noise(context, torch.randn_like(context), sigma)
                    call(context, config.context_noise)
        return torch.cat(blocks, dim=1)

    def _fresh_cache(self, batch: int) -> KVCache:
        if self._cache is None or self._cache.batch != batch:
            _, height, width = self.shape
            self._cache = self.network.make_cache(self.config.window, height, width, batch)
        self._cache.reset()
        return self._cache


def last_window(latents: torch.Tensor, config: RolloutConfig) -> torch.Tensor:
    """The frames that the last block of a rollout could see, in the order of their positions: sink, recent, current."""
    if latents.shape[1] <= config.window_frames:
        return latents
    recent = config.window_frames - config.sink_frames
    return torch.cat([latents[:, : config.sink_frames], latents[:, -recent:]], dim=1)
