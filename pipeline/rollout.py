"""The autoregressive loop: block after block through the few-step sampler, each finished one into the KV cache.

Inference and training share it. What differs between them is handed in: how the network is called, where noise comes
from, and at which step a block ends.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from pipeline.cache import KVCache
from pipeline.sampler import DenoisingSteps, add_noise, denoise_block


class NetworkCall(Protocol):
    """One forward pass on frames the cache expects."""

    def __call__(
        self, latents: torch.Tensor, timesteps: tuple[float, ...], block: int, step: int | None
    ) -> torch.Tensor:
        """Args:
        latents: [B, F, C, h, w].
        timesteps: of each of the F frames, 0..1000. A rollout has few different ones.
        block, step: which block of the rollout, which denoising step; None for a finished block's clean pass.
        """


@dataclass(frozen=True)
class ContextNoise:
    """How a finished block is shown to later ones."""

    timestep: float = 0.0
    """The level the network is told, 0..1000."""
    sigma: torch.Tensor | None = None
    """How much noise is added; None for none."""

    def apply(self, clean: torch.Tensor, noise: Callable[[], torch.Tensor]) -> torch.Tensor:
        return clean if self.sigma is None else add_noise(clean, noise(), self.sigma)


def roll_out(
    call: NetworkCall,
    cache: KVCache,
    noise: Callable[[int, int], torch.Tensor],
    steps: DenoisingSteps,
    num_blocks: int,
    context: ContextNoise,
    *,
    first_steps: DenoisingSteps | None = None,
    merge_clean_pass: bool = False,
    exit_step: Callable[[int], int] | None = None,
    given: Sequence[torch.Tensor] = (),
) -> Generator[torch.Tensor, None, None]:
    """Yield each block [B, F, C, h, w] as soon as it is denoised; it enters the cache when the next one is asked for.

    Args:
        call: the network.
        cache: freshly reset.
        noise: (block, step) -> noise [B, F, C, h, w]; the step after a block's last one is that of its clean pass.
        steps: timesteps and sigmas of the sampler.
        num_blocks: how many are made.
        context: the noise level of finished blocks.
        first_steps: of the first block that is made, if it has others.
        merge_clean_pass: the clean pass and the next block's first step are one call, on both blocks' frames.
        exit_step: block -> index of its last step; default: all steps are taken.
        given: finished blocks [B, F, C, h, w] that the video begins with. They enter the cache as if they had been made
            here and are not yielded; the blocks after them are numbered on.
    """
    finished: torch.Tensor | None = None

    def steps_of(block: int) -> DenoisingSteps:
        return steps if block != len(given) or first_steps is None else first_steps

    for block in range(len(given) + num_blocks):
        merged = finished is not None and merge_clean_pass and block >= len(given)
        if finished is not None:
            finished = context.apply(finished, lambda block=block: noise(block - 1, len(steps_of(block - 1))))
            if not merged:
                call(finished, (context.timestep,) * finished.shape[1], block - 1, None)
        if block < len(given):
            finished = given[block]
            cache.begin_block(finished.shape[1])
            continue
        start = noise(block, 0)
        cache.begin_block(start.shape[1], merged=merged)

        def predict_flow(
            latents: torch.Tensor,
            timestep: float,
            step: int,
            block: int = block,
            previous: torch.Tensor | None = finished if merged else None,
        ) -> torch.Tensor:
            times = (timestep,) * latents.shape[1]
            if previous is None or step > 0:
                return call(latents, times, block, step)
            times = (context.timestep,) * previous.shape[1] + times
            return call(torch.cat([previous, latents], dim=1), times, block, step)[:, previous.shape[1] :]

        def draw(step: int, block: int = block, start: torch.Tensor = start) -> torch.Tensor:
            return start if step == 0 else noise(block, step)

        last_step = None if exit_step is None else exit_step(block)
        *_, finished = denoise_block(predict_flow, draw, steps_of(block), last_step)
        yield finished
