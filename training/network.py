"""The embedded model's network and what every stage of its training shares: building, processes, checkpoints."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from transformers import AutoTokenizer, UMT5EncoderModel

from pipeline.text import TextEncoder
from pipeline.transformer import CausalWanTransformer3DModel
from training.captions import MAX_TOKENS

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Sizes of the small transformer, in the names of its class."""

    num_attention_heads: int = 3
    attention_head_dim: int = 64
    ffn_dim: int = 768
    num_layers: int = 8
    freq_dim: int = 256
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 128


def build_network(config: NetworkConfig, seed: int = 0) -> CausalWanTransformer3DModel:
    """A fresh network. Residual branches start small and the output at zero, so that it begins as the identity."""
    torch.manual_seed(seed)
    network = CausalWanTransformer3DModel(**asdict(config))
    width, depth = config.num_attention_heads * config.attention_head_dim, config.num_layers
    branch_std = 0.3 / width**0.5 / depth**0.5
    for block in network.blocks:
        nn.init.normal_(block.attn1.to_out[0].weight, std=branch_std)
        nn.init.normal_(block.attn2.to_out[0].weight, std=branch_std)
        nn.init.normal_(block.ffn.net[2].weight, std=branch_std / 2)
    nn.init.normal_(network.condition_embedder.time_proj.weight, std=0.02)
    nn.init.zeros_(network.condition_embedder.time_proj.bias)
    nn.init.zeros_(network.proj_out.weight)
    nn.init.zeros_(network.proj_out.bias)
    return network


def load_text_encoder(folder: Path) -> TextEncoder:
    """The frozen text encoder written by `python -m training.text`."""
    model = UMT5EncoderModel.from_pretrained(folder / "text_encoder")
    return TextEncoder(model, AutoTokenizer.from_pretrained(folder / "tokenizer"), MAX_TOKENS)


def matrices_and_rest(network: CausalWanTransformer3DModel) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The blocks' weight matrices, which Muon steps, and everything else."""
    matrices = [p for name, p in network.blocks.named_parameters() if p.ndim == 2 and "scale_shift" not in name]
    chosen = {id(p) for p in matrices}
    return matrices, [p for p in network.parameters() if id(p) not in chosen]


def run_processes(stage: Callable[..., None], processes: int, config: Any) -> None:
    """Run `stage(rank, config)` in this process, or in several joined by gloo.

    Two processes of one thread beat one of two at these sizes, and suffer less when something else wants a core.
    """
    if processes == 1:
        stage(0, config)
        return
    if config.device != "cpu":
        raise SystemExit(f"{processes} processes share the CPU; a stage on {config.device} takes --processes 1.")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_joined, args=(processes, port, stage, config), nprocs=processes)


def _joined(rank: int, processes: int, port: int, stage: Callable[..., None], config: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=processes)
    try:
        stage(rank, config)
    finally:
        dist.destroy_process_group()


def agree(value: float) -> float:
    """Rank 0's value on every process."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(shared, 0)
    return shared.item()


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """A killed run leaves the last whole checkpoint, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


class StageClock:
    """How far a stage has come in its budget of minutes, over all the runs it took."""

    def __init__(self, minutes: float, spent: float = 0.0) -> None:
        self.minutes = minutes
        self._spent = spent
        self._started = time.monotonic()

    @property
    def spent(self) -> float:
        """Minutes used so far."""
        return self._spent + (time.monotonic() - self._started) / 60

    def progress(self) -> float:
        """0 at the beginning, 1 when the budget is used up; the same on every process."""
        return agree(min(1.0, self.spent / self.minutes))
