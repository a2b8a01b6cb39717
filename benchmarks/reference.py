"""The reference mode: this pipeline doing what the authors' code does.

`ReferencePipeline` is a `SelfForcingPipeline` with other parts: its stream, its loop over blocks and steps and its
weights are the same. Different is what `reference_network.py` and `reference_decoder.py` say, and:

* a finished block goes through the network in a pass of its own, before it is decoded and handed on; not the last one,
  as in the authors' demo;
* each sigma is searched for in the table of all levels. (Their x0 conversion copies that table to the device in
  float64 each time; this is left out here.)
* the prompt is encoded for every video, since nothing remembers it.

So that both make the same video, noise comes from (seed, block, step) here as there, and a model's own
settings hold: a sink with relative positions is turned, and finished blocks are noised if the model was trained so. How
frames become bytes is not compared: it is done here as there.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Self

import torch

from benchmarks.reference_decoder import ReferenceTaehvDecoder, original_layers
from benchmarks.reference_network import ReferenceText, ReferenceTransformer, SearchedSigmas
from pipeline.attention import Kernel
from pipeline.attention_backends import AttentionChoice
from pipeline.blocks import RunInfo
from pipeline.compiling import Compiler, Piece
from pipeline.control import checkpoint
from pipeline.decoder import WanStreamDecoder
from pipeline.errors import InvalidRequest
from pipeline.float8 import form_on
from pipeline.generator import SelfForcingPipeline
from pipeline.rollout import ContextNoise, roll_out
from pipeline.rotary import to_device
from pipeline.sampler import TRAIN_STEPS, DenoisingSteps, FlowSchedule, block_noise, flow_to_clean
from pipeline.text import TextEncoder


def encoder_beside(text: TextEncoder) -> TextEncoder:
    """The same model, working where it works there, with a memory of its own."""
    return TextEncoder(text.model, text.tokenizer, text.text_len, visits=text._visits)


class ReferenceOptions:
    """Stands for `TransformerOptions`; the reference has no switches, and nothing of it is compiled."""

    def __init__(self, transformer: ReferenceTransformer) -> None:
        self._transformer = transformer
        self.device, self.dtype, self.config = transformer.device, transformer.dtype, transformer.config
        self.fp8_form = form_on(self.device, self.dtype)
        self.compiler = Compiler()

    def use_attention(self, kernel: Kernel | None) -> None:
        self._transformer.kernel = kernel

    def pieces(self, fp8: bool) -> tuple[Piece, ...]:
        return ()

    def apply(self, *, fp8: bool, compile: bool) -> ReferenceTransformer:
        return self._transformer


class ReferencePipeline(SelfForcingPipeline):
    """Makes the same video as the pipeline it stands beside, in the authors' way."""

    takes_start = False

    @classmethod
    def beside(cls, pipeline: SelfForcingPipeline, *, attention: AttentionChoice | None = None) -> Self:
        """With the weights of a pipeline, which goes on working and must not store them in 8 bits.

        Args:
            attention: what attends; default: what does in the other pipeline.
        """
        transformer = ReferenceTransformer(pipeline._transformer.apply(fp8=False, compile=False))
        decoders = pipeline._decoders
        taehv = decoders[True].weights if True in decoders else None
        reference = cls(
            pipeline.spec,
            ReferenceOptions(transformer),
            encoder_beside(pipeline.text),
            original_layers(decoders[False].weights),
            taehv,
            attention=attention or pipeline.attention,
        )
        if taehv is not None:
            reference._decoders[True] = ReferenceTaehvDecoder(taehv)
        reference._decoders[False] = WanStreamDecoder(reference._decoders[False].weights)
        return reference

    def unavailable_options(self) -> dict[str, str]:
        reasons = {name: f"The reference mode has no {name}." for name in ("fp8", "compile")}
        return super().unavailable_options() | reasons

    def _roll_out(
        self, model: ReferenceTransformer, text: ReferenceText, run: RunInfo, given: Sequence[torch.Tensor] = ()
    ) -> Generator[torch.Tensor, None, None]:
        if given:
            raise InvalidRequest("The reference mode starts from nothing else.")
        spec, frames = self.spec, self.spec.frames_per_block
        shape = (1, frames, *spec.latent_shape(model.config.in_channels))
        cache = self._fresh_cache(model)
        schedule = FlowSchedule(spec.shift)

        def steps_of(unwarped: tuple[float, ...]) -> DenoisingSteps:
            timesteps = tuple(schedule.warp(unwarped).tolist())
            return DenoisingSteps(timesteps, SearchedSigmas(schedule, timesteps, frames, model.device))

        def call(latents: torch.Tensor, timesteps: tuple[float, ...], _block: int, step: int | None) -> torch.Tensor:
            if step is None:
                return latents  # it was written before the block was handed on
            checkpoint()
            timestep = torch.full((1, frames), timesteps[0], device=model.device)
            return model(latents, timestep, text, cache=cache)

        def noise(block: int, step: int) -> torch.Tensor:
            return to_device(block_noise(run.seed, block, step, shape), model.device).to(model.dtype)

        level = spec.context_noise
        context = ContextNoise(level, torch.tensor(level / TRAIN_STEPS) if level else None)
        steps = steps_of(spec.denoising_steps)
        first_steps = None if spec.first_block_steps is None else steps_of(spec.first_block_steps)
        rollout = roll_out(call, cache, noise, steps, run.num_blocks, ContextNoise(level), first_steps=first_steps)
        for block, latents in enumerate(rollout):
            if block + 1 < run.num_blocks:
                taken = steps if block or first_steps is None else first_steps
                drawn = len(taken.timesteps)
                clean = context.apply(latents, lambda block=block, drawn=drawn: noise(block, drawn))
                flow = model(clean, torch.full((1, frames), level, device=model.device), text, cache=cache)
                flow_to_clean(flow, clean, taken.sigmas.at(level))  # their wrapper converts whatever it is asked for
            yield latents
