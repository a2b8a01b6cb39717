"""What every training stage is: networks that learn, a step, and a sample to look at. The loop is in `loop.py`."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor
from transformers import AutoTokenizer

from pipeline.errors import InvalidSettings
from pipeline.text import TextEncoder
from pipeline.transformer import CausalWanTransformer3DModel
from training.checkpoints import saved_so_far
from training.draws import Draws
from training.network import check_vae, load_network, load_text_encoder, network_config
from training.optim import Trainee
from training.parallel import Processes
from training.prompts import open_prompts
from training.settings import NetworkSettings, OptimizerSettings, PromptSettings, StageSettings

Kind = TypeVar("Kind", bound=StageSettings)
Metrics = dict[str, float]


class Stage(ABC, Generic[Kind]):
    """One stage of training.

    Subclasses build their networks in their constructor, put all that learn into `trainees`, and hand on the one
    called `generator`. Everything random comes from `Draws`, so a step is a function of the weights and its number.
    """

    settings_kind: ClassVar[type[StageSettings]]
    takes_workers: ClassVar[bool] = False
    """Whether `run.workers` can help: the stage learns from clips that others may put together."""

    def __init__(self, settings: Kind, processes: Processes) -> None:
        self.settings = settings
        self.processes = processes
        self.text = self.load_text()
        self.without = self.embed([settings.text.negative])
        self.trainees: dict[str, Trainee] = {}
        self.steps = settings.run.steps
        """Of the whole run, as far as is known: a run that lasts some minutes finds out on the way."""

    def expect(self, steps: int) -> None:
        """Lay the course of the rates out for so many steps."""
        self.steps = steps
        for trainee in self.trainees.values():
            trainee.steps = steps

    def load_text(self) -> TextEncoder:
        text = load_text_encoder(self.settings.text, self.processes.device)
        text.model.to(self.processes.master_dtype)  # float64 is for comparisons, which float32 prompts would blur
        return text

    @classmethod
    def check(cls, settings: Kind) -> None:
        """Refuse, before anything starts, what the settings' files do not allow.

        Raises:
            SelfForcingError: naming the setting or the file.
        """
        if settings.run.workers and not cls.takes_workers:
            raise InvalidSettings(
                f"run.workers is {settings.run.workers}, but this stage has no work for them: set it to 0."
            )
        config = network_config(settings.network)
        check_text(settings, config)
        if settings.run.sheet_every:
            check_vae("run.decoder", settings.run.decoder, config["in_channels"])

    @classmethod
    def saved(cls, settings: Kind) -> str:
        """A sentence about what a run that ends now leaves to the next start."""
        return saved_so_far(Path(settings.run.out))

    @abstractmethod
    def step(self, step: int) -> Metrics:
        """Learn from one global batch; returns what is worth a curve."""

    @abstractmethod
    def sample(self, draws: Draws) -> tuple[list[str], Tensor]:
        """Captions and latents [B, F, C, h, w] for a sample sheet, by the averaged network."""

    def trainee(self, name: str, source: NetworkSettings, optimizer: OptimizerSettings) -> CausalWanTransformer3DModel:
        """Load and shard a network that learns, and register it."""
        run = self.settings.run
        network = load_network(source, self.processes.master_dtype, run.seed).requires_grad_(True).train()
        if run.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        if run.compile:
            # The forward itself, not the call: sharding hooks itself onto the call.
            for block in network.blocks:
                block.forward = torch.compile(block.forward, dynamic=False)
        self.trainees[name] = Trainee(self.processes.shard(network), optimizer, run.steps)
        return network

    def frozen(self, settings: NetworkSettings) -> CausalWanTransformer3DModel:
        """Load and shard a network that only judges; it is kept in what it computes in."""
        network = load_network(settings, self.processes.compute_dtype, self.settings.run.seed)
        network.requires_grad_(False).eval()
        if self.settings.run.gradient_checkpointing:  # gradients may flow through it, to the clips
            network.enable_gradient_checkpointing()
        return self.processes.shard(network)

    def parts(self, step: int, batch: int | None = None) -> list[Draws]:
        """This process's share of a global batch, cut into what goes through the network at once."""
        run, processes = self.settings.run, self.processes
        batch = batch or run.batch
        share = batch // processes.count
        size = run.micro_batch * (batch // run.batch) or share
        begin = processes.rank * share
        starts = range(begin, begin + share, size)
        return [Draws(run.seed, step, range(start, start + size), batch, run.noise) for start in starts]

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [B, text_len, text_dim] on the run's device, in what networks compute in."""
        return self.text.encode(prompts).to(self.processes.device, self.processes.compute_dtype)

    def noise_like(self, draws: Draws, purpose: str, clips: Tensor) -> Tensor:
        return draws.normal(purpose, clips.shape[1:], clips.device, clips.dtype)

    def learn(self, losses: Iterator[Tensor], parts: int) -> float:
        """Backward through the loss of each part in turn; returns their mean over all parts and processes."""
        total = torch.zeros((), dtype=torch.float64)
        for loss in losses:
            (loss / parts).backward()
            total += loss.detach().double().cpu() / parts
        return self.processes.mean(total)


def check_text(settings: StageSettings, config: dict[str, Any]) -> None:
    """The network must take what the text encoder gives."""
    path = Path(settings.text.folder) / "text_encoder" / "config.json"
    if not path.is_file():
        raise InvalidSettings(f"text.folder {settings.text.folder} holds no text encoder.")
    try:
        width = dict(json.loads(path.read_text(encoding="utf-8"))).get("d_model")
    except (OSError, ValueError, TypeError) as error:
        raise InvalidSettings(f"text.folder {settings.text.folder}: text_encoder/config.json is damaged.") from error
    if width != config.get("text_dim"):
        raise InvalidSettings(
            f"The text encoder in {settings.text.folder} is {width} wide, but the network takes "
            f"{config.get('text_dim')}."
        )


def check_prompts(settings: StageSettings, prompts: PromptSettings) -> None:
    """Every prompt must be one that the text encoder reads to its end."""
    if prompts.source != "world":
        try:
            tokenizer = AutoTokenizer.from_pretrained(Path(settings.text.folder) / "tokenizer", local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise InvalidSettings(f"text.folder {settings.text.folder}: tokenizer is missing or damaged.") from error
        open_prompts(prompts, tokenizer, settings.text.length)


def check_same_shape(name: str, config: dict[str, Any], other: dict[str, Any], names: Sequence[str]) -> None:
    """Refuse networks that cannot work on the same clips and text."""
    for key in names:
        if config.get(key) != other.get(key):
            raise InvalidSettings(f"{name} has {key} {other.get(key)}, but the generator has {config.get(key)}.")
