"""The least time that a block can take: its arithmetic at the rate of the fastest matrix products on this device.

What there is to compute is counted where it happens, by running the networks on tensors without content; only fused
attention, which does nothing there, is counted by formula. Everything else (norms, memory, launches) is taken
to be free, so this limit is hardly ever reached, and whoever measures more than it has most likely measured wrongly.
Convolutions are counted as they are written, not as a library may shorten them. One product and its sum are two
operations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import ModelSpec
from pipeline.decoder import StreamDecoder, TaehvStreamDecoder, WanStreamDecoder
from pipeline.memory import META, Builders
from pipeline.transformer import CausalWanTransformer3DModel
from pipeline.wan_layers import speed_up


@dataclass(frozen=True)
class BlockWork:
    """Operations of one block of latent frames.

    Attributes:
        linear: of one pass, everything but attention.
        cross_attention: of one pass.
        self_attention_frame: of one pass, for each latent frame that is attended to.
        first_decoding, decoding: decoder -> of a clip's first block, and of each later one.
        first_steps, steps: denoising steps of a clip's first block, and of each later one. Behind them comes a clean
            pass, but for a clip's last block.
        window_frames, block_frames: of the cache.
    """

    linear: float
    cross_attention: float
    self_attention_frame: float
    first_decoding: dict[str, float]
    decoding: dict[str, float]
    first_steps: int
    steps: int
    window_frames: int
    block_frames: int

    def context(self, block: int) -> int:
        """Latent frames that block number `block` attends to, itself included."""
        return min((block + 1) * self.block_frames, self.window_frames)

    def one_pass(self, context: int) -> float:
        return self.linear + self.cross_attention + self.self_attention_frame * context

    def block(self, block: int, decoder: str | None) -> float:
        """What is done until block number `block` is shown: the clean pass of the one before, all steps, decoding."""
        clean = self.one_pass(self.context(block - 1)) if block else 0.0
        decoders, steps = (self.decoding, self.steps) if block else (self.first_decoding, self.first_steps)
        return clean + steps * self.one_pass(self.context(block)) + (decoders[decoder] if decoder else 0.0)


@torch.inference_mode()
def count_work(builders: Builders, spec: ModelSpec, dtype: torch.dtype = torch.float32) -> BlockWork:
    """Count a model's operations.

    Args:
        builders: of its parts, as `memory.builders_of` gives them.
        dtype: what the decoders compute in: in float32, as on a CPU, they do less.
    """
    with META:
        model: CausalWanTransformer3DModel = builders["transformer"]()
    config, frames = model.config, spec.frames_per_block
    shape = (1, frames, *spec.latent_shape(config.in_channels))
    rows, columns = model.token_grid(*shape[-2:])
    width, tokens = config.num_attention_heads * config.attention_head_dim, rows * columns
    text = [(torch.empty(0, device=META),) * 2] * config.num_layers
    linear = _operations(lambda: model(torch.zeros(shape, device=META), torch.zeros(1, frames, device=META), text))
    per_key = 4 * frames * tokens * width * config.num_layers
    decoders: dict[str, type[StreamDecoder]] = {"vae": WanStreamDecoder, "taehv": TaehvStreamDecoder}
    decoding = {
        name: _decoding(kind, builders[name], shape, dtype) for name, kind in decoders.items() if name in builders
    }
    return BlockWork(
        linear=linear,
        cross_attention=per_key * spec.text_len,
        self_attention_frame=per_key * tokens,
        first_decoding={name: first for name, (first, _) in decoding.items()},
        decoding={name: later for name, (_, later) in decoding.items()},
        first_steps=len(spec.first_block_steps or spec.denoising_steps),
        steps=len(spec.denoising_steps),
        window_frames=spec.window_frames,
        block_frames=frames,
    )


def _decoding(
    kind: type[StreamDecoder], build: object, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[float, float]:
    """Of a clip's first block and of the next one."""
    with META:
        weights: nn.Module = build().to(dtype)
    if isinstance(weights, AutoencoderKLWan):
        speed_up(weights)
    decoder, latents = kind(weights), torch.zeros(shape, device=META)
    return _operations(lambda: decoder.decode(latents)), _operations(lambda: decoder.decode(latents))


def _operations(work: object) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())
