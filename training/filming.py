"""Make the videos that are judged: one after the other here, or side by side in several processes.

A small model on a CPU gains little from a second thread and nearly twofold from a second process.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from pipeline import GenerationRequest
from pipeline.config import ModelSpec, clean_prompt
from pipeline.decoder import WanStreamDecoder, to_uint8
from pipeline.errors import TrainingError, WeightsError
from pipeline.folder import ModelFolder
from pipeline.rotary import to_device
from pipeline.sampler import block_noise
from pipeline.text import TextEncoder
from pipeline.wan_layers import speed_up
from training.asked import Prompt
from training.rollout import Rollout, RolloutPlan
from training.settings import RolloutSettings
from training.world import FPS, render

Array = np.ndarray
Film = Callable[[Sequence[Prompt], float], Iterable[Array]]
"""Prompts and seconds -> a video for each prompt, uint8 [T, H, W, 3], in their order."""


class _HasFrames(Protocol):
    frames: Array


class Generator(Protocol):
    """What is judged: a pipeline, or anything that answers a request with uint8 frames [T, H, W, 3]."""

    spec: ModelSpec

    def generate(self, request: GenerationRequest) -> _HasFrames: ...

    def unknown_words(self, prompt: str) -> list[str]: ...


def make_video(generator: Generator, prompt: Prompt, seconds: float, taehv: bool = False) -> Array:
    """The video of a prompt, with as many frames as the world's clips have in that time."""
    request = GenerationRequest(prompt=prompt.caption, seed=prompt.seed, seconds=seconds, fps=FPS, taehv=taehv)
    return generator.generate(request).frames


def make_videos(generator: Generator, prompts: Sequence[Prompt], seconds: float, taehv: bool = False) -> list[Array]:
    return [make_video(generator, prompt, seconds, taehv) for prompt in prompts]


def film_with(generator: Generator, taehv: bool = False) -> Film:
    """Videos of a loaded model, each made when it is asked for."""

    def film(prompts: Sequence[Prompt], seconds: float) -> Iterator[Array]:
        return (make_video(generator, prompt, seconds, taehv) for prompt in prompts)

    return film


def real_video(prompt: Prompt, num_frames: int, height: int, width: int) -> Array:
    """A rendered clip of what a prompt asks for, uint8 [T, H, W, 3]."""
    frames, _, _ = render(prompt.params, prompt.seed, num_frames, height, width)
    return (frames * 255 + 0.5).astype(np.uint8)


def frames_per_second(generator: Generator, prompt: Prompt, seconds: float, taehv: bool = False) -> float:
    """Of one stream alone, text to pixels, everything loaded and warm."""
    make_video(generator, prompt, 1.0, taehv)
    started = time.perf_counter()
    return len(make_video(generator, prompt, seconds, taehv)) / (time.perf_counter() - started)


def film_together(folder: Path, device: torch.device | str) -> Film:
    """Videos of all prompts, rolled out as one batch: a small model leaves a GPU with nothing to do otherwise.

    Sampler, cache and noise are those of the pipeline, the arithmetic is float32; only the decoder takes turns. So on
    a CPU the frames are the pipeline's to rounding.

    Raises:
        WeightsError: the model takes other steps for its first block, which rollouts of training do not.
    """
    source = ModelFolder(folder)
    spec = source.spec
    if spec.first_block_steps is not None:
        raise WeightsError(f"{spec.name} takes other steps for its first block; make its videos one by one.")
    network, vae = (source.load(name, torch.float32).to(device) for name in ("transformer", "vae"))
    speed_up(vae)
    text = TextEncoder(source.load("text_encoder", torch.float32).to(device), source.load_tokenizer(), spec.text_len)
    shape = spec.latent_shape(network.config.in_channels)

    @torch.inference_mode()
    def film(prompts: Sequence[Prompt], seconds: float) -> Iterator[Array]:
        settings = RolloutSettings(
            height=shape[1],
            width=shape[2],
            block_frames=spec.frames_per_block,
            num_blocks=spec.blocks_for(seconds, FPS),
            window_frames=spec.window_frames,
            sink_frames=spec.sink_frames,
            positions=spec.positions,
            denoising_steps=spec.denoising_steps,
            shift=spec.shift,
            context_noise=spec.context_noise,
        )
        size = (spec.frames_per_block, *shape)

        def noise(block: int, step: int) -> torch.Tensor:
            drawn = [block_noise(prompt.seed, block, step, size) for prompt in prompts]
            return to_device(torch.stack(drawn), torch.device(device))

        embeds = text.encode([clean_prompt(prompt.caption) for prompt in prompts])
        rollout = Rollout(network, settings, shape, torch.device(device), torch.float32)
        for latents in rollout([embeds], RolloutPlan.full(settings), noise, gradients=False):
            yield to_uint8(WanStreamDecoder(vae).decode(latents.unsqueeze(0)), 0)

    return film


class Crew:
    """Processes that each load a model and make videos side by side, with one thread each.

    Usage:
        with Crew(folder, processes=2) as film:
            for video in film(prompts, seconds): ...
    """

    def __init__(self, folder: Path, processes: int, taehv: bool = False) -> None:
        self.processes = processes
        os.environ["OMP_NUM_THREADS"] = "1"  # read when a process starts; this one has counted its threads already
        self._pool = ProcessPoolExecutor(
            processes, multiprocessing.get_context("spawn"), initializer=_load, initargs=(folder, taehv)
        )

    def __enter__(self) -> Film:
        return self._film

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _film(self, prompts: Sequence[Prompt], seconds: float) -> Iterator[Array]:
        try:
            yield from self._pool.map(partial(_make, seconds=seconds), prompts)
        except BrokenProcessPool as error:
            raise TrainingError(
                f"One of the {self.processes} processes that make videos ended, perhaps for lack of memory: try "
                "--processes 1."
            ) from error


_make_here: Callable[[Prompt, float], Array]
"""In a process of the crew: its model at work."""


def _load(folder: Path, taehv: bool) -> None:
    global _make_here
    from pipeline import SelfForcingPipeline

    torch.set_num_threads(1)
    pipeline = SelfForcingPipeline.from_pretrained(folder)
    _make_here = partial(make_video, pipeline, taehv=taehv)


def _make(prompt: Prompt, seconds: float) -> Array:
    return _make_here(prompt, seconds)
