"""Wan's video transformer made causal: the same layers and weight names, called block by block with a KV cache.

`CausalWanTransformer3DModel` subclasses diffusers' `WanTransformer3DModel` and replaces its forward pass. It loads any
stock Wan folder and any converted Self-Forcing checkpoint. Three ways to call it:

* with a `KVCache`: one block of a rollout (`cache.py`);
* with a `mask`: a whole clip at once, as training does (block-causal, teacher forcing, ...);
* with neither: Wan's bidirectional attention, which is what a teacher uses.

Unlike the stock model it has one timestep per frame, computes time sinusoids and rotary angles in double precision, and
stays in the model's dtype throughout, as the authors' code does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import nn

from pipeline.attention import Kernel, attention
from pipeline.cache import CacheWindow, KVCache, LayerCache, LayerSnapshot
from pipeline.rotary import RotaryPositions, Rotation, apply_rotary, rotary_positions

TextKV = list[tuple[torch.Tensor, torch.Tensor]]
"""Cross-attention keys (normalised) and values of every layer, each [B, text_len, heads, head_dim]."""

TimeEmbedding = tuple[torch.Tensor, torch.Tensor]
"""Embedding of timesteps [B, F], for the head [B, F, C] and for the blocks [B, F, 6, C]. See `embed_time`."""

TIME_EMBEDDING = -1
"""Key under which a forward's `taps` ask for the time embedding."""


class CausalWanBlock(WanTransformerBlock):
    """One transformer block. Its parts are self-contained: compiled once, they serve all layers."""

    kernel: Kernel | None = None
    """What attends; None: torch's own choice."""

    def forward(
        self,
        hidden: torch.Tensor,
        time_modulation: torch.Tensor,
        rotation: Rotation,
        text_key: torch.Tensor,
        text_value: torch.Tensor,
        memory: LayerCache | LayerSnapshot | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Args:
        hidden: [B, F * tokens, C].
        time_modulation: [B, F, 6, C], shared by all layers.
        rotation: of the F frames.
        text_key, text_value: [B, text_len, heads, head_dim].
        memory: this layer's cache; without it the call's own tokens are all there is.
        mask: boolean [F * tokens, F * tokens] for calls without memory.
        """
        query, key, value, gates = self.open_self_attention(hidden, time_modulation, rotation)
        if memory is None:
            out = attention(query, key, value, mask, self.kernel)
        else:
            out = memory.attend(query, key, value, self.kernel)
        hidden, query = self.open_cross_attention(hidden, out, gates)
        out = attention(query, text_key, text_value, None, self.kernel)
        return self.close_attention(hidden, out, gates)

    # What a block does outside of attention, in three functions of their own: these are what torch.compile compiles.
    # Attention has kernels of its own already, and the cache behind it another length in every block of a video; out
    # of the compiled code, neither can make anybody compile anew.

    def open_self_attention(
        self, hidden: torch.Tensor, time_modulation: torch.Tensor, rotation: Rotation
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value of self-attention, and the modulation of all that follows: the last four of the six."""
        modulation = (time_modulation + self.scale_shift_table.unsqueeze(1)).unsqueeze(3)  # [B, F, 6, 1, C]
        shift, scale = modulation[:, :, :2].unbind(2)
        x = modulate(hidden, shift, scale, self.norm1.eps)
        return *self._heads(x, rotation), modulation[:, :, 2:]

    def open_cross_attention(
        self, hidden: torch.Tensor, out: torch.Tensor, modulation: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add what self-attention gave. Returns the sum and the query of cross-attention."""
        hidden = gated_add(hidden, self.attn1.to_out[0](out.flatten(2)), modulation[:, :, 0])
        query = self.attn2.norm_q(self.attn2.to_q(self.norm2(hidden))).unflatten(2, (self.attn2.heads, -1))
        return hidden, query

    def close_attention(self, hidden: torch.Tensor, out: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        """Add what cross-attention gave, and the feed-forward network's share."""
        hidden = hidden + self.attn2.to_out[0](out.flatten(2))
        shift, scale, gate = modulation[:, :, 1:].unbind(2)
        expand, _, shrink = self.ffn.net
        return gated_add(hidden, shrink(gelu(expand.proj(modulate(hidden, shift, scale, self.norm3.eps)))), gate)

    COMPILED = ("open_self_attention", "open_cross_attention", "close_attention")
    """Names of these three."""

    def _heads(self, x: torch.Tensor, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        attn = self.attn1
        query = attn.norm_q(attn.to_q(x)).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(x)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(x).unflatten(2, (attn.heads, -1))
        return apply_rotary(query, rotation), apply_rotary(key, rotation), value

    def text_kv(self, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of embedded text [B, text_len, C]: the same for every frame and step of a prompt."""
        key = self.attn2.norm_k(self.attn2.to_k(text)).unflatten(2, (self.attn2.heads, -1))
        return key, self.attn2.to_v(text).unflatten(2, (self.attn2.heads, -1))


class CausalWanTransformer3DModel(WanTransformer3DModel):
    """Wan2.1's text-to-video transformer with causal, cached attention. Weight names are those of the stock class."""

    _no_split_modules = ["CausalWanBlock"]
    _repeated_blocks = ["CausalWanBlock"]
    # The authors' model has no fp32 islands: in bf16, norms and modulation are bf16 too.
    _keep_in_fp32_modules = None

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        num_attention_heads: int = 12,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 8960,
        num_layers: int = 30,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
    ) -> None:
        super().__init__(
            patch_size=patch_size,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            text_dim=text_dim,
            freq_dim=freq_dim,
            ffn_dim=ffn_dim,
            num_layers=0,
            cross_attn_norm=cross_attn_norm,
            qk_norm=qk_norm,
            eps=eps,
            rope_max_seq_len=1,  # the table is not used: see rotary.py
        )
        if image_dim is not None or added_kv_proj_dim is not None:
            raise ValueError("only text-to-video weights are supported: image_dim and added_kv_proj_dim must be None")
        if patch_size[0] != 1:
            raise ValueError(f"patch_size {tuple(patch_size)} joins frames; a causal model needs 1 in time")
        width = num_attention_heads * attention_head_dim
        self.blocks = nn.ModuleList(
            CausalWanBlock(width, ffn_dim, num_attention_heads, qk_norm, cross_attn_norm, eps)
            for _ in range(num_layers)
        )
        # super().__init__ was told of no layers; the saved config must have the real number.
        self.register_to_config(num_layers=num_layers, rope_max_seq_len=rope_max_seq_len)

    def use_attention(self, kernel: Kernel | None) -> None:
        """Attend with this kernel from now on, in all layers."""
        for block in self.blocks:
            block.kernel = kernel

    def encode_text(self, prompt_embeds: torch.Tensor) -> TextKV:
        """Text MLP and cross-attention projections of prompt_embeds [B, text_len, text_dim], once per prompt.

        There is no mask over the padding: the zero rows take part with the constant the MLP gives for zero, as in
        training.
        """
        text = self.condition_embedder.text_embedder(prompt_embeds)
        return [block.text_kv(text) for block in self.blocks]

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor | TimeEmbedding,
        text_kv: TextKV,
        *,
        cache: KVCache | None = None,
        positions: Sequence[int] | None = None,
        mask: torch.Tensor | None = None,
        taps: dict[int, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Predict the flow (noise minus clean) of every frame.

        Args:
            latents: [B, F, C, h, w].
            timestep: [B, F], 0..1000, or what `embed_time` makes of it: a sampler has few different ones.
            text_kv: from `encode_text`.
            cache: the rollout's memory; the call must be on the frames its `begin_block` announced.
            positions: frame positions for calls without cache; default 0..F-1.
            mask: boolean [F * tokens, F * tokens] for calls without cache, see `masks.py`.
            taps: its keys are layer numbers; each gets what leaves that layer, [B, F * tokens, C], as its value. The
                key `TIME_EMBEDDING` gets the time embedding, [B, F, C].

        Returns:
            [B, F, C, h, w].
        """
        batch, frames, _, height, width = latents.shape
        rows, columns = self.token_grid(height, width)
        if cache is not None:
            rotation = cache.rotation(frames)
        else:
            rotation = self.rotary(height, width)(positions or range(frames), latents.device)

        if isinstance(timestep, torch.Tensor):
            timestep = self.embed_time(timestep)
        time_embedding, time_modulation = timestep
        hidden = self._patchify(latents, rows, columns)
        for index, block in enumerate(self.blocks):
            memory = cache.layers[index] if cache is not None else None
            arguments = (hidden, time_modulation, rotation, *text_kv[index])
            if self.gradient_checkpointing and torch.is_grad_enabled():
                # The block runs again in the backward pass, when the cache has long gone on: it gets a copy.
                past = memory.snapshot() if memory is not None else None
                hidden = self._gradient_checkpointing_func(block, *arguments, past, mask)
            else:
                hidden = block(*arguments, memory, mask)
            if taps is not None and index in taps:
                taps[index] = hidden
        if taps is not None and TIME_EMBEDDING in taps:
            taps[TIME_EMBEDDING] = time_embedding
        if cache is not None:
            cache.end_call()

        shift, scale = (self.scale_shift_table.unsqueeze(1) + time_embedding.unsqueeze(2)).unsqueeze(3).unbind(2)
        hidden = self.proj_out(modulate(hidden, shift, scale, self.norm_out.eps))
        return self._unpatchify(hidden, frames, rows, columns)

    def embed_time(self, timestep: torch.Tensor) -> TimeEmbedding:
        """timestep [B, F] -> embedding [B, F, C] (for the head) and modulation [B, F, 6, C] (for the blocks)."""
        embedder = self.condition_embedder
        sinusoid = time_sinusoid(timestep, self.config.freq_dim).to(self.dtype)
        embedding = embedder.time_embedder(sinusoid)
        return embedding, embedder.time_proj(embedder.act_fn(embedding)).unflatten(-1, (6, -1))

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens in a latent frame of this size."""
        _, patch_h, patch_w = self.config.patch_size
        if height % patch_h or width % patch_w:
            raise ValueError(f"latent size {height}x{width} is not a multiple of the patch {patch_h}x{patch_w}")
        return height // patch_h, width // patch_w

    def rotary(self, height: int, width: int) -> RotaryPositions:
        """Rotary positions for latents of this size."""
        return rotary_positions(self.config.attention_head_dim, *self.token_grid(height, width))

    def make_cache(
        self,
        window: CacheWindow,
        height: int,
        width: int,
        batch: int = 1,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        leaky: bool = False,
    ) -> KVCache:
        """A cache for rollouts of this latent size; unless told otherwise, on the model's device and in its dtype.

        A sharded model has to be told: its weights are at rest elsewhere, and in another dtype, than where it computes.
        """
        rows, columns = self.token_grid(height, width)
        return KVCache(
            num_layers=len(self.blocks),
            batch=batch,
            frame_tokens=rows * columns,
            heads=self.config.num_attention_heads,
            head_dim=self.config.attention_head_dim,
            window=window,
            rotary=self.rotary(height, width),
            device=device or self.device,
            dtype=dtype or self.dtype,
            leaky=leaky,
        )

    def _patchify(self, latents: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        # A convolution whose stride is its kernel is a Linear on patches, and a faster one on a CPU.
        patches = latents.unflatten(3, (rows, -1)).unflatten(5, (columns, -1))  # [B, F, C, rows, ph, columns, pw]
        patches = patches.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)
        return F.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)

    def _unpatchify(self, tokens: torch.Tensor, frames: int, rows: int, columns: int) -> torch.Tensor:
        _, patch_h, patch_w = self.config.patch_size
        x = tokens.unflatten(1, (frames, rows, columns)).unflatten(-1, (patch_h, patch_w, -1))
        return x.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


def modulate(hidden: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    """LayerNorm without parameters, then scale and shift per frame: hidden [B, F * tokens, C], others [B, F, 1, C]."""
    normed = F.layer_norm(hidden, hidden.shape[-1:], eps=eps).unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift, normed, 1 + scale).flatten(1, 2)


def gated_add(hidden: torch.Tensor, update: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """hidden + update * gate, with one gate per frame: [B, F * tokens, C] and [B, F, 1, C]."""
    frames = (gate.shape[1], -1)
    return torch.addcmul(hidden.unflatten(1, frames), update.unflatten(1, frames), gate).flatten(1, 2)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh approximation."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.requires_grad or torch.compiler.is_dynamo_compiling():
        return F.gelu(x, approximate="tanh")
    # (1 + tanh z) / 2 = sigmoid 2z, which torch computes on a CPU in less than half the time.
    twice = 2 * math.sqrt(2 / math.pi)
    return (x * x).mul_(0.044715 * twice).add_(twice).mul_(x).sigmoid_().mul_(x)


def time_sinusoid(timestep: torch.Tensor, channels: int) -> torch.Tensor:
    """Sinusoidal embedding [..., channels] of timesteps 0..1000, in float64: in float32 the angles are off by 1e-4."""
    half = channels // 2
    exponent = torch.arange(half, dtype=torch.float64, device=timestep.device) / half
    angles = timestep.double().unsqueeze(-1) * 10000.0**-exponent
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
