"""Small random networks for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.cache import CacheWindow, KVCache
from pipeline.transformer import CausalWanTransformer3DModel, TextKV

CHANNELS, HEIGHT, WIDTH, TEXT_LEN, TEXT_DIM = 4, 4, 6, 5, 8


def small_transformer(seed: int = 0, **changes: Any) -> CausalWanTransformer3DModel:
    """A network of a few thousand parameters with every weight random and non-zero."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "text_dim": TEXT_DIM,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
    }
    model = CausalWanTransformer3DModel(**(config | changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        nn.init.normal_(parameter, std=1.5 * fan_in**-0.5, generator=generator)
    return model.requires_grad_(False)


def random_text(model: CausalWanTransformer3DModel, batch: int = 1, seed: int = 1) -> TextKV:
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(batch, TEXT_LEN, TEXT_DIM, generator=generator)
    embeds[:, TEXT_LEN - 2 :] = 0
    return model.encode_text(embeds)


def random_latents(frames: int, batch: int = 1, seed: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, frames, CHANNELS, HEIGHT, WIDTH, generator=generator)


def make_cache(model: CausalWanTransformer3DModel, window: CacheWindow, batch: int = 1) -> KVCache:
    return model.make_cache(window, HEIGHT, WIDTH, batch)


def write_blocks(
    model: CausalWanTransformer3DModel,
    cache: KVCache,
    latents: torch.Tensor,
    text: TextKV,
    block: int,
    timestep: float = 300.0,
    first_position: int = 0,
) -> torch.Tensor:
    """Call the model once per block and return its flows; the cache goes on to the next block each time."""
    cache.reset(first_position)
    flows = []
    for part in latents.split(block, dim=1):
        cache.begin_block(part.shape[1])
        flows.append(model(part, torch.full(part.shape[:2], timestep), text, cache=cache))
    return torch.cat(flows, dim=1)
