"""`SelfForcingPipeline`: a prompt in, blocks of frames out, each as soon as it exists."""

from __future__ import annotations

import functools
import secrets
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from pipeline.assembly import load_parts
from pipeline.attention_backends import AttentionChoice
from pipeline.blocks import FrameBlock, GeneratedVideo, RunInfo
from pipeline.cache import CacheWindow, KVCache
from pipeline.compiled_runs import CompiledRuns, telling_compile_failures
from pipeline.compiling import CompileState
from pipeline.config import GenerationRequest, ModelSpec, check_available
from pipeline.control import checkpoint
from pipeline.decoder import StreamDecoder, TaehvStreamDecoder, WanStreamDecoder, to_uint8
from pipeline.device import dtype_name
from pipeline.errors import NonFiniteOutput, SelfForcingError
from pipeline.failures import free_memory
from pipeline.options import TransformerOptions, unavailable_options
from pipeline.plan import AS_THE_MODEL_HAS_IT, Placement
from pipeline.rollout import ContextNoise, roll_out
from pipeline.rotary import to_device
from pipeline.sampler import TRAIN_STEPS, DenoisingSteps, FlowSchedule, block_noise
from pipeline.start_latents import decode_start, encode_start
from pipeline.taehv import TAEHV
from pipeline.text import TextEncoder
from pipeline.transformer import CausalWanTransformer3DModel, TextKV, TimeEmbedding
from prompting.enhancer import Enhancer

WARM_UP_SECONDS = 10.0


class SelfForcingPipeline:
    """Streams video from a causal Wan transformer.

    One stream at a time: all of them share one KV cache. A pipeline that several people use belongs to a `ModelWorker`.

    Usage:
        pipeline = SelfForcingPipeline.from_pretrained("weights/embedded")
        for block in pipeline.stream(GenerationRequest(prompt="a red balloon rises over the mountains")):
            show(block.frames)

    Args:
        spec: what the model is.
        transformer: options and weights of the transformer.
        text: the text encoder.
        vae, taehv: the two decoders' weights; without `taehv` the request option of that name is unavailable.
        enhancer: fills prompts in, for models with templates for that. The pipeline itself never asks it.
        weights_sha256: of the transformer's file, for the recipe in each video.
        placement: where the parts are; for what is said of a run.
        attention: the kernel that attends.
        merge_clean_pass: write a finished block into the cache in the same forward as the next block's first step.
            Exact; off, the two are separate forwards, as the authors have it.
    """

    takes_start = True

    def __init__(
        self,
        spec: ModelSpec,
        transformer: TransformerOptions,
        text: TextEncoder,
        vae: AutoencoderKLWan,
        taehv: TAEHV | None = None,
        *,
        enhancer: Enhancer | None = None,
        weights_sha256: str = "",
        merge_clean_pass: bool = True,
        placement: Placement = AS_THE_MODEL_HAS_IT,
        attention: AttentionChoice | None = None,
    ) -> None:
        self.spec = spec
        self.text = text
        self.enhancer = enhancer
        self.merge_clean_pass = merge_clean_pass
        self.placement = placement
        self.weights_sha256 = weights_sha256
        self._transformer = transformer
        self._vae = vae
        self.attention = attention or AttentionChoice()
        transformer.use_attention(self.attention.kernel)
        self._decoders: dict[bool, StreamDecoder] = {False: WanStreamDecoder(vae)}
        if taehv is not None:
            self._decoders[True] = TaehvStreamDecoder(taehv)
        schedule = FlowSchedule(spec.shift)
        self._steps = DenoisingSteps.from_schedule(schedule, spec.denoising_steps)
        first = spec.first_block_steps
        self._first_steps = None if first is None else DenoisingSteps.from_schedule(schedule, first)
        self._cache: KVCache | None = None
        self._stream_number = 0
        self._rollout: Generator[torch.Tensor, None, None] | None = None
        self.compiled = CompiledRuns(spec, transformer, self._decoders)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        placement: Placement = AS_THE_MODEL_HAS_IT,
        attention: str = "auto",
    ) -> SelfForcingPipeline:
        """Load a model folder.

        Args:
            folder: diffusers-style: `model_index.json` and a folder for each component.
            device: default: a GPU if there is one, else the CPU.
            dtype: of all parts; default: bfloat16 on a GPU, float32 on the CPU, but for TAEHV, see `taehv_dtype`.
            placement: where the parts are, and the size of the KV cache; see `plan.plan_for`. Its `fp8` and `taehv` are
                up to each request, and only offered as `preset`.
            attention: one of `ATTENTION_NAMES`; see `attention_backends.choose_attention`.

        Raises:
            OptionUnavailable: that attention cannot be used here.
            WeightsError: something is missing, damaged or of another kind.
        """
        return cls(**load_parts(folder, device, dtype, placement, attention))

    @property
    def preset(self) -> dict[str, bool]:
        """Options of a request that should be on here: without them there may be too little memory."""
        return self.placement.preset

    @property
    def device(self) -> torch.device:
        return self._transformer.device

    def plan(self, request: GenerationRequest) -> RunInfo:
        """What a request comes to: the seed is drawn, the length rounded to whole blocks. Touches nothing."""
        self._check(request)
        return self._plan(request, self.compile_state(request))

    def _check(self, request: GenerationRequest) -> None:
        check_available(request, self.unavailable_options())
        self.spec.check_start(request.start)

    def _plan(self, request: GenerationRequest, compiled: CompileState) -> RunInfo:
        fps = float(self.spec.fps if request.fps is None else request.fps)
        num_blocks, num_frames = self.spec.length(request.seconds, fps, request.start)
        dtype, fp8 = dtype_name(self._transformer.dtype), self._transformer.fp8_form
        return RunInfo(
            request=request,
            seed=secrets.randbelow(2**32) if request.seed == -1 else request.seed,
            fps=fps,
            num_blocks=num_blocks,
            num_frames=num_frames,
            applied={
                "device": self.device.type,
                "precision": fp8.precision(self._transformer.dtype) if request.fp8 else dtype,
                "attention": self.attention.title,
                "decoder": self._decoder_title(request.taehv),
                "compile": self.compiled.applied(request, compiled),
                **self.placement.applied(request.start is not None),
            },
            model=self.spec.name,
            weights_sha256=self.weights_sha256,
        )

    def _decoder_title(self, taehv: bool) -> str:
        title, dtype = "TAEHV" if taehv else "Wan VAE", self._decoders[taehv].weights.dtype
        return title if dtype == self._transformer.dtype else f"{title} in {dtype_name(dtype)}"

    @torch.inference_mode()
    def stream(self, request: GenerationRequest) -> Iterator[FrameBlock]:
        """Yield the clip block by block. What it starts from comes with the first one, as the model's decoder shows it.

        A block is handed on before it is written into the cache, so nobody waits for that. Starting another stream
        ends this one.

        Raises:
            OptionUnavailable, InvalidRequest: before anything is made.
            NonFiniteOutput: naming the block.
            Cancelled, DeadlineExceeded: from `control.checkpoint`, at any denoising step.
        """
        began = time.perf_counter()
        self._check(request)
        compiled = self.compiled.prepare(request, self.stream)
        run = self._plan(request, compiled)
        self._stream_number += 1
        number = self._stream_number
        if self._rollout is not None:  # one that nobody drained holds its cache
            self._rollout.close()
        for decoder in self._decoders.values():  # the other one, too: what it holds may be what this run lacks room for
            decoder.reset()
        model = self._transformer.apply(fp8=request.fp8, compile=request.compile)
        prompt_embeds = self._encoded(request.prompt).to(model.device, model.dtype)
        text_kv = model.encode_text(prompt_embeds)
        decoder = self._decoders[request.taehv]
        given: Sequence[torch.Tensor] = ()
        if request.start is not None:
            checkpoint()
            latents = encode_start(request.start, self._vae, self.spec, self.placement.start_tiled)
            given = latents.to(model.device, model.dtype).split(self.spec.frames_per_block, dim=1)
        self.compiled.install(request, compiled, decoder)
        rollout = self._rollout = self._roll_out(model, text_kv, run, given)
        shown = 0
        try:
            for index in range(run.num_blocks):
                start = time.perf_counter()
                with telling_compile_failures():
                    latents = next(rollout)
                if not torch.isfinite(latents).all():
                    raise NonFiniteOutput(f"The model produced invalid numbers in block {index + 1}. Try another seed.")
                denoised = time.perf_counter()
                before = decode_start(request.start, given, decoder) if request.start is not None and index == 0 else []
                frames = to_uint8(decoder.decode(latents), index)
                frames = np.concatenate([*before, frames]) if before else frames
                decoded = time.perf_counter()
                yield FrameBlock(
                    index=index,
                    frames=frames,
                    start_frame=shown,
                    run=run,
                    elapsed=decoded - began,
                    denoise_seconds=denoised - start,
                    decode_seconds=decoded - denoised,
                )
                if number != self._stream_number:
                    raise SelfForcingError("Another run was started on this model, which ended this one.")
                shown += len(frames)
        finally:  # suspended before the last clean pass; left open it would keep cache and weights alive
            rollout.close()
            if self._rollout is rollout:
                self._rollout = None

    def warm_up(self, compile: bool = False) -> None:
        """Make some blocks for nobody, so that one-off costs are paid before the first visitor comes.

        On a GPU as many as fill the cache: some kernels are made ready for each length of it, in tenths of a second.

        With `compile`, also begin to compile what later runs with that option need, which goes on in the background.
        """
        blocks = 2 if self.device.type == "cpu" else self.spec.window_frames // self.spec.frames_per_block + 1
        seconds = self.spec.seconds_for(blocks, self.spec.fps)
        request = GenerationRequest(prompt="a first look around", seed=0, seconds=seconds, **self.preset)
        if compile:
            self.compiled.waits = False
            request = self.learning_request(request)
        for block in self.stream(request):
            if block.elapsed > WARM_UP_SECONDS:  # a large model on a small machine: the visitor is better off now
                break

    def generate(self, request: GenerationRequest) -> GeneratedVideo:
        """The whole clip at once: the drained stream."""
        blocks = list(self.stream(request))
        return GeneratedVideo(
            frames=np.concatenate([block.frames for block in blocks]),
            run=blocks[0].run,
            time_to_first_frame=blocks[0].elapsed,
            elapsed=blocks[-1].elapsed,
        )

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of the prompt that the model ignores; none for a model that reads any text."""
        return self.text.unknown_words(prompt)

    def known_words(self) -> list[str]:
        """All words the model was trained on, in alphabetical order; empty for a model that reads any text."""
        return sorted(self.text.vocabulary)

    def option_notes(self) -> dict[str, str]:
        """Option -> one sentence on what it is here, where that depends on the machine."""
        return {"fp8": self._transformer.fp8_form.sentence()}

    def unavailable_options(self) -> dict[str, str]:
        """Option -> one sentence why it cannot work here."""
        reasons = unavailable_options(self.device, has_taehv=True in self._decoders)
        if (failure := self.compiled.failure) is not None:
            reasons.setdefault("compile", failure)
        return reasons

    def compile_state(self, request: GenerationRequest) -> CompileState:
        """How far the compiled code is that a request with these options would run, even if it does not ask for it."""
        return self.compiled.state(request)

    def learning_request(self, request: GenerationRequest) -> GenerationRequest:
        """A short clip with the options of another; running it is enough to have everything compiled for both."""
        return self.compiled.learning_request(request)

    def close(self, timeout: float | None = 0.0) -> bool:
        """Compile nothing more. Returns whether no compilation goes on after `timeout` seconds; None waits for that."""
        return self.compiled.compiler.close(timeout)

    def _encoded(self, prompt: str) -> torch.Tensor:
        """The prompt's embedding. A text encoder that comes for it gets the room of the KV cache: it is empty."""
        if self.placement.text_encoder != "offload" or self.text.remembers(prompt):
            return self.text(prompt)
        self._cache = None
        free_memory()  # blocks held for the KV cache's sizes would leave gaps too small for the encoder
        embeds = self.text(prompt)
        free_memory()
        return embeds

    def _roll_out(
        self, model: CausalWanTransformer3DModel, text_kv: TextKV, run: RunInfo, given: Sequence[torch.Tensor]
    ) -> Generator[torch.Tensor, None, None]:
        """The run's blocks of latents [1, F, C, h, w], after those that are given."""
        shape = (1, self.spec.frames_per_block, *self.spec.latent_shape(model.config.in_channels))
        # State is cleared at the start of a run and not at its end: a run that failed has left some behind.
        cache = self._fresh_cache(model)

        @functools.cache
        def embedded(timesteps: tuple[float, ...]) -> TimeEmbedding:
            return model.embed_time(to_device(torch.tensor([timesteps], dtype=torch.float32), model.device))

        def call(latents: torch.Tensor, timesteps: tuple[float, ...], block: int, step: int | None) -> torch.Tensor:
            if step is not None or block < len(given):
                checkpoint()
            return model(latents, embedded(timesteps), text_kv, cache=cache)

        def noise(block: int, step: int) -> torch.Tensor:
            return to_device(block_noise(run.seed, block, step, shape), model.device).to(model.dtype)

        level = self.spec.context_noise
        context = ContextNoise(level, torch.tensor(level / TRAIN_STEPS, dtype=torch.float32) if level else None)
        return roll_out(
            call,
            cache,
            noise,
            self._steps,
            run.num_blocks,
            context,
            first_steps=self._first_steps,
            merge_clean_pass=self.merge_clean_pass,
            given=given,
        )

    def _fresh_cache(self, model: CausalWanTransformer3DModel) -> KVCache:
        """The cache, emptied; a new one only if it was given up for the text encoder, or if the transformer was loaded
        anew elsewhere or in another dtype."""
        spec = self.spec
        if self._cache is None or not self._cache.fits(model.device, model.dtype):
            window = CacheWindow(spec.frames_per_block, spec.window_frames, spec.sink_frames, spec.positions)
            _, height, width = spec.latent_shape(model.config.in_channels)
            self._cache = model.make_cache(window, height, width)
        self._cache.reset()
        return self._cache
