"""The transformer and its cache called as the authors' code calls them, on the same weights.

What costs them time is here on purpose, and nothing that would cost them more: the text MLP and the time MLPs run in
every pass, rotary positions are complex numbers in float64 that are put together for every call, the places in the
cache are tensors that are read back from the device in every layer (as often as theirs: twice a pass; with a full
window three times, or six), and a full window is moved by copying it. Where the weights are is not repeated: a
`ReferenceTransformer` uses those of the pipeline's own transformer.

The authors attend with FlashAttention, whose lengths they send to the device in every call. Here it is torch's fused
attention in the model's dtype, without those copies. Their 21 frames and 1560 tokens a frame come from the config.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.attention import Kernel, attention
from pipeline.cache import CacheWindow
from pipeline.errors import InvalidRequest
from pipeline.rotary import to_device
from pipeline.transformer import CausalWanBlock, CausalWanTransformer3DModel, time_sinusoid

ROTARY_FRAMES = 1024
"""Rows of the authors' table of rotary positions: no video is longer there."""


@dataclass
class ReferenceText:
    """A prompt: its embedding [1, text_len, text_dim], and the cross-attention's keys and values once there are any."""

    embeds: Tensor
    layers: list[tuple[Tensor, Tensor] | None]


@dataclass
class ReferenceLayer:
    """One layer's cache: keys and values [1, tokens, heads, head_dim] and where they end, int64 [1] on the device."""

    key: Tensor
    value: Tensor
    global_end: Tensor
    local_end: Tensor
    sink_keys: Tensor | None = None
    """The sink's keys as they were before they were turned, for models with relative positions."""


@dataclass
class ReferenceCache:
    """What `roll_out` and the pipeline want of a cache."""

    window: CacheWindow
    frame_tokens: int
    layers: list[ReferenceLayer]
    start_frame: int = 0
    current_frames: int = field(default=0)

    def reset(self) -> None:
        self.start_frame = self.current_frames = 0
        for layer in self.layers:
            layer.global_end.zero_()
            layer.local_end.zero_()
            layer.sink_keys = None

    def fits(self, device: torch.device, dtype: torch.dtype) -> bool:
        key = self.layers[0].key
        return key.device == device and key.dtype == dtype

    def begin_block(self, num_frames: int, *, merged: bool = False) -> None:
        if merged:
            raise ValueError("the reference writes a finished block in a pass of its own")
        self.start_frame += self.current_frames
        self.current_frames = num_frames
        if self.start_frame + num_frames > ROTARY_FRAMES:
            raise InvalidRequest(
                f"The reference mode ends at latent frame {ROTARY_FRAMES}, as the authors' code does. "
                "Ask for a shorter video."
            )


class ReferenceTransformer:
    """Predicts the flow as `CausalWanTransformer3DModel` does, in the authors' way.

    Args:
        model: whose weights are used; nothing in it is changed.
    """

    def __init__(self, model: CausalWanTransformer3DModel) -> None:
        self._model = model
        self.config = model.config
        self.device, self.dtype = model.device, model.dtype
        self.kernel: Kernel | None = None
        """What attends; None: torch's own choice."""
        spatial = 2 * (self.config.attention_head_dim // 6)
        temporal = self.config.attention_head_dim - 2 * spatial
        tables = [_rotary_table(temporal), _rotary_table(spatial), _rotary_table(spatial)]
        self._rotary = torch.cat(tables, dim=1).to(self.device)
        self._axes = [temporal // 2, spatial // 2, spatial // 2]

    def encode_text(self, prompt_embeds: Tensor) -> ReferenceText:
        return ReferenceText(prompt_embeds, [None] * len(self._model.blocks))

    def make_cache(self, window: CacheWindow, height: int, width: int) -> ReferenceCache:
        rows, columns = self._model.token_grid(height, width)
        shape = (1, window.window_frames * rows * columns, self.config.num_attention_heads, -1)

        def buffer() -> Tensor:
            size = (*shape[:3], self.config.attention_head_dim)
            return torch.zeros(size, device=self.device, dtype=self.dtype)

        def end() -> Tensor:
            return torch.zeros(1, dtype=torch.int64, device=self.device)

        layers = [ReferenceLayer(buffer(), buffer(), end(), end()) for _ in self._model.blocks]
        return ReferenceCache(window, rows * columns, layers)

    def __call__(self, latents: Tensor, timestep: Tensor, text: ReferenceText, *, cache: ReferenceCache) -> Tensor:
        """latents [1, F, C, h, w], timestep [1, F] in 0..1000 -> flow [1, F, C, h, w]."""
        model, config = self._model, self.config
        frames, height, width = latents.shape[1], *latents.shape[3:]
        grid = (frames, *model.token_grid(height, width))
        hidden = model.patch_embedding(latents.transpose(1, 2)).flatten(2).transpose(1, 2)

        embedder = model.condition_embedder
        sinusoid = time_sinusoid(timestep.flatten(), config.freq_dim).to(hidden.dtype)
        time = embedder.time_embedder(sinusoid)
        modulation = embedder.time_proj(embedder.act_fn(time)).unflatten(1, (6, -1)).unflatten(0, timestep.shape)
        context = embedder.text_embedder(text.embeds)

        for index, block in enumerate(model.blocks):
            parts = (block.scale_shift_table.unsqueeze(1) + modulation).chunk(6, dim=2)  # each [1, F, 1, C]
            x = _scaled(_layer_norm(hidden, config.eps), parts[0], parts[1])
            hidden = hidden + _gated(self._attend(block, x, grid, cache, cache.layers[index]), parts[2])
            hidden = hidden + self._attend_text(block, block.norm2(hidden), context, text, index)
            x = _scaled(_layer_norm(hidden, config.eps), parts[3], parts[4])
            hidden = hidden + _gated(block.ffn(x), parts[5])

        head = (model.scale_shift_table.unsqueeze(1) + time.unflatten(0, timestep.shape).unsqueeze(2)).chunk(2, dim=2)
        tokens = model.proj_out(_scaled(_layer_norm(hidden, config.eps), head[0], head[1]))
        _, patch_height, patch_width = config.patch_size
        cells = tokens.view(1, *grid, patch_height, patch_width, -1)
        return torch.einsum("bfhwpqc->bfchpwq", cells).reshape(latents.shape)

    def _attend(
        self, block: CausalWanBlock, x: Tensor, grid: tuple[int, int, int], cache: ReferenceCache, layer: ReferenceLayer
    ) -> Tensor:
        attn, eps = block.attn1, self.config.eps
        shape = (1, x.shape[1], attn.heads, -1)
        query = _rms_norm(attn.to_q(x), attn.norm_q.weight, eps).view(shape)
        key = _rms_norm(attn.to_k(x), attn.norm_k.weight, eps).view(shape)
        value = attn.to_v(x).view(shape)
        query = self._rotated(query, grid, cache.start_frame).type_as(value)
        key = self._rotated(key, grid, cache.start_frame).type_as(value)

        tokens, window = cache.frame_tokens, cache.window
        sink, size, added = window.sink_frames * tokens, window.window_frames * tokens, key.shape[1]
        end = cache.start_frame * tokens + added
        # What is known without asking the device: theirs does not ask either while the window has room, for their
        # attention is global then. Past it they need local attention, which asks in every pass.
        full = end > size
        if full and end > layer.global_end.item() and added + layer.local_end.item() > size:
            evicted = added + layer.local_end.item() - size
            kept = layer.local_end.item() - evicted - sink
            for buffer in (layer.key, layer.value):
                buffer[:, sink : sink + kept] = buffer[:, sink + evicted : sink + evicted + kept].clone()
            local_end = layer.local_end.item() + end - layer.global_end.item() - evicted
            self._turn_sink(layer, window, cache.start_frame, sink)
        else:
            local_end = layer.local_end.item() + end - layer.global_end.item()
        layer.key[:, local_end - added : local_end] = key
        layer.value[:, local_end - added : local_end] = value
        seen = slice(max(0, local_end - size), local_end)
        out = attention(query, layer.key[:, seen], layer.value[:, seen], None, self.kernel)
        layer.global_end.fill_(end)
        layer.local_end.fill_(local_end)
        return attn.to_out[0](out.flatten(2))

    def _attend_text(
        self, block: CausalWanBlock, x: Tensor, context: Tensor, text: ReferenceText, index: int
    ) -> Tensor:
        attn, eps = block.attn2, self.config.eps
        query = _rms_norm(attn.to_q(x), attn.norm_q.weight, eps).unflatten(2, (attn.heads, -1))
        found = text.layers[index]
        if found is None:
            key = _rms_norm(attn.to_k(context), attn.norm_k.weight, eps).unflatten(2, (attn.heads, -1))
            found = text.layers[index] = key, attn.to_v(context).unflatten(2, (attn.heads, -1))
        return attn.to_out[0](attention(query, *found, None, self.kernel).flatten(2))

    def _rotated(self, x: Tensor, grid: tuple[int, int, int], start_frame: int) -> Tensor:
        """x [1, tokens, heads, head_dim] times its rotary positions, float64."""
        frames, rows, columns = grid
        time, down, across = self._rotary.split(self._axes, dim=1)
        angles = torch.cat(
            [
                time[start_frame : start_frame + frames].view(frames, 1, 1, -1).expand(*grid, -1),
                down[:rows].view(1, rows, 1, -1).expand(*grid, -1),
                across[:columns].view(1, 1, columns, -1).expand(*grid, -1),
            ],
            dim=-1,
        ).reshape(1, -1, 1, sum(self._axes))
        return torch.view_as_real(_as_complex(x) * angles).flatten(3)

    def _turn_sink(self, layer: ReferenceLayer, window: CacheWindow, start_frame: int, sink: int) -> None:
        """The authors leave the sink at its old positions; a model made for relative ones must have it moved."""
        shift = window.sink_shift(start_frame)
        if not sink or not shift:
            return
        if layer.sink_keys is None:
            layer.sink_keys = layer.key[:, :sink].clone()
        turn = torch.ones(sum(self._axes), dtype=self._rotary.dtype, device=self.device)
        turn[: self._axes[0]] = self._rotary[shift, : self._axes[0]]
        layer.key[:, :sink] = torch.view_as_real(_as_complex(layer.sink_keys) * turn).flatten(3).type_as(layer.key)


def searched_sigma(table: dict[str, Tensor], timesteps: Tensor) -> Tensor:
    """Sigma [F, 1, 1, 1] of timesteps [F], found by going through the table of all levels, as the authors do each time.

    Args:
        table: `timesteps` and `sigmas`, float32 [levels] on the device.
    """
    nearest = torch.argmin((table["timesteps"].unsqueeze(0) - timesteps.unsqueeze(1)).abs(), dim=1)
    return table["sigmas"][nearest].reshape(-1, 1, 1, 1)


class SearchedSigmas:
    """Stands for a sampler's list of sigmas; each one is searched for whenever it is asked for."""

    def __init__(self, schedule: Any, timesteps: tuple[float, ...], frames: int, device: torch.device) -> None:
        self._table = {
            "timesteps": to_device(schedule.timesteps, device),
            "sigmas": to_device(schedule.sigmas, device),
        }
        self._timesteps = timesteps
        self._frames, self._device = frames, device

    def at(self, timestep: float) -> Tensor:
        return searched_sigma(self._table, torch.full((self._frames,), timestep, device=self._device))

    def __getitem__(self, index: int) -> Tensor:
        return self.at(self._timesteps[index])


def _rotary_table(channels: int) -> Tensor:
    powers = torch.arange(0, channels, 2, dtype=torch.float64) / channels
    angles = torch.outer(torch.arange(ROTARY_FRAMES, dtype=torch.float64), 10000.0**-powers)
    return torch.polar(torch.ones_like(angles), angles)


def _as_complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.double().unflatten(3, (-1, 2)))


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).type_as(x) * weight


def _layer_norm(x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def _scaled(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (x.unflatten(1, (shift.shape[1], -1)) * (1 + scale) + shift).flatten(1, 2)


def _gated(x: Tensor, gate: Tensor) -> Tensor:
    return (x.unflatten(1, (gate.shape[1], -1)) * gate).flatten(1, 2)
