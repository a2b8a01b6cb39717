"""The KV cache of a rollout: fixed buffers, a window with a sink, and positions that never run out.

Every layer owns one buffer for keys and one for values, laid out in latent frames as

    [ current block | sink | ring ]

The block being denoised is always written to the front, so its slots never change between steps, and whatever is
filled follows without a gap: attention reads one contiguous slice. When the next block begins, the current frames
are copied to where they stay: the first `sink_frames` of a run to the sink for good, later ones into the ring, each
over the oldest there. The order of keys means nothing to softmax, which is what makes this layout legal.

Keys are stored rotated at their frame's position. `positions="relative"` turns the sink's keys once per block so
that they sit directly in front of the oldest frame in the ring; no distance between a query and a key ever exceeds
the window. With `"absolute"` they stay where they were, as the authors' code has it.

All bookkeeping is in Python integers: no index tensor is read back from the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from pipeline.attention import Kernel, attention
from pipeline.rotary import RotaryPositions, Rotation, apply_rotary


@dataclass(frozen=True)
class CacheWindow:
    """How much a cache remembers, in latent frames. Any sizes that leave room for a block are possible here."""

    block_frames: int
    """The largest block that will be written."""
    window_frames: int
    """Frames visible to attention, the current block and the sink included."""
    sink_frames: int = 0
    positions: Literal["relative", "absolute"] = "relative"

    def __post_init__(self) -> None:
        if self.sink_frames < 0 or self.block_frames < 1 or self.ring_frames < 0:
            raise ValueError(
                f"a window of {self.window_frames} frames cannot hold a sink of {self.sink_frames} and a block of "
                f"{self.block_frames}"
            )

    @property
    def ring_frames(self) -> int:
        return self.window_frames - self.sink_frames - self.block_frames

    def filled(self, finished: int) -> int:
        """Frames in sink and ring after `finished` frames of a run."""
        return min(finished, self.sink_frames + self.ring_frames)

    def slot(self, frame: int) -> int | None:
        """Where the run's frame number `frame` stays once its block is finished; None if it is not kept."""
        if frame < self.sink_frames:
            return self.block_frames + frame
        if self.ring_frames == 0:
            return None
        return self.block_frames + self.sink_frames + (frame - self.sink_frames) % self.ring_frames

    def sink_shift(self, start_frame: int) -> int:
        """How far the sink is moved forward while the block that begins at `start_frame` is made."""
        if self.positions == "absolute":
            return 0
        return max(0, start_frame - self.ring_frames - self.sink_frames)


@dataclass(frozen=True)
class Advance:
    """What one layer must do when a block is finished and the next one begins."""

    copies: tuple[tuple[int, int, int], ...]
    """(source, destination, count) in tokens; sources lie in the current block."""
    sink_tokens: tuple[int, int] | None
    """Tokens [begin, end) of the sink that are filled and must be turned, or None if they may stay as they are."""
    sink_rotation: tuple[torch.Tensor, torch.Tensor] | None
    sink_base: tuple[tuple[int, int, int], ...]
    """Like `copies`, for the unmoved keys of frames that have just become part of the sink."""
    current_begin: int
    """First token of the new current block; it ends where the sink begins."""
    visible_end: int
    """End of the filled tokens for the new block."""


class LayerCache:
    """Keys and values of one layer, [B, tokens, heads, head_dim].

    With `leaky`, gradients of later blocks reach the keys and values of the last call with gradients on each earlier
    one, although the values seen are those of its clean pass: what the authors' code does by overwriting a buffer
    that autograd remembers.
    """

    def __init__(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        sink_base: torch.Tensor,
        block_tokens: int,
        leaky: bool = False,
    ) -> None:
        self.leaky = leaky
        self._history: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.key = key
        self.value = value
        self.sink_base = sink_base
        self.block_tokens = block_tokens
        self.current_begin = block_tokens
        self.visible_end = block_tokens
        self.pending: Advance | None = None

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kernel: Kernel | None = None
    ) -> torch.Tensor:
        """Write the call's keys and values, and attend to all that is visible. Shapes [B, tokens, heads, head_dim]."""
        if self.pending is None:
            return self._attend_current(query, key, value, kernel)
        # Merged call: the finished block's clean pass and the next block's first step in one forward. The halves see
        # different windows, so they take turns; everything outside attention is done for both at once.
        split = self.block_tokens - self.current_begin
        finished = self._attend_current(query[:, :split], key[:, :split], value[:, :split], kernel)
        self.advance(self.pending)
        begun = self._attend_current(query[:, split:], key[:, split:], value[:, split:], kernel)
        return torch.cat([finished, begun], dim=1)

    def _attend_current(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kernel: Kernel | None
    ) -> torch.Tensor:
        if key.requires_grad:
            return self.snapshot().attend(query, key, value)
        self.key[:, self.current_begin : self.block_tokens] = key
        self.value[:, self.current_begin : self.block_tokens] = value
        visible = slice(self.current_begin, self.visible_end)
        return attention(query, self.key[:, visible], self.value[:, visible], None, kernel)

    def snapshot(self) -> LayerSnapshot:
        """What a call with gradients attends to besides its own frames: a copy that later calls do not change."""
        past = slice(self.block_tokens, self.visible_end)
        key, value = self.key[:, past].clone(), self.value[:, past].clone()
        for slot, (key_history, value_history) in self._history.items():
            if slot >= self.block_tokens:
                span = slice(slot - self.block_tokens, slot - self.block_tokens + key_history.shape[1])
                key[:, span] = key[:, span] + key_history
                value[:, span] = value[:, span] + value_history
        return LayerSnapshot(key, value, self._remember if self.leaky else None)

    def _remember(self, key: torch.Tensor, value: torch.Tensor) -> None:
        # Zeros with a past: added to the clean pass's values they leave these alone and lead gradients back.
        self._history[self.current_begin] = key - key.detach(), value - value.detach()

    def forget(self) -> None:
        """Let go of a run's gradients."""
        self._history.clear()

    def advance(self, step: Advance) -> None:
        """Move the current block to its lasting place and make room for the next one."""
        self._advance_history(step)
        for source, destination, count in step.copies:
            self.key[:, destination : destination + count] = self.key[:, source : source + count]
            self.value[:, destination : destination + count] = self.value[:, source : source + count]
        for source, destination, count in step.sink_base:
            self.sink_base[:, destination : destination + count] = self.key[:, source : source + count]
        if step.sink_tokens is not None and step.sink_rotation is not None:
            begin, end = step.sink_tokens
            moved = apply_rotary(self.sink_base[:, : end - begin], step.sink_rotation)
            self.key[:, begin:end] = moved
        self.current_begin, self.visible_end = step.current_begin, step.visible_end
        self.pending = None

    def _advance_history(self, step: Advance) -> None:
        current = self._history.pop(self.current_begin, None)
        for source, destination, count in step.copies:
            self._history.pop(destination, None)
            if current is not None:
                begin = source - self.current_begin
                self._history[destination] = tuple(part[:, begin : begin + count] for part in current)


@dataclass(frozen=True)
class LayerSnapshot:
    """The finished blocks of one layer as a call with gradients sees them: without history, as the paper has it.

    The call leaves the buffers alone: they are read by the backward pass, long after the clean pass wrote them anew.
    """

    key: torch.Tensor
    value: torch.Tensor
    remember: Callable[[torch.Tensor, torch.Tensor], None] | None = None
    """Told the call's keys and values, if later gradients shall reach them."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kernel: Kernel | None = None
    ) -> torch.Tensor:
        """Attend to the call's own frames and all before them. Shapes [B, tokens, heads, head_dim]."""
        if self.remember is not None:
            self.remember(key, value)
        return attention(query, torch.cat([key, self.key], 1), torch.cat([value, self.value], 1), None, kernel)


class KVCache:
    """The caches of all layers and the place of the rollout in its video.

    Usage: `reset()`, then per block `begin_block(n)` and any number of model calls on its n frames, the last of
    them on the clean frames. With `begin_block(n, merged=True)` the finished block's clean call and the first
    call on the new block are one call on both.

    Args:
        num_layers, batch, heads, head_dim: the model's.
        frame_tokens: tokens per latent frame.
        window: what is remembered.
        rotary: positions of the model's token grid.
        leaky: see `LayerCache`; for training, with blocks that divide the window.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        batch: int,
        frame_tokens: int,
        heads: int,
        head_dim: int,
        window: CacheWindow,
        rotary: RotaryPositions,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        leaky: bool = False,
    ) -> None:
        if leaky and window.positions == "relative" and window.sink_frames:
            raise ValueError("a leaky cache cannot turn its sink's keys: positions must be 'absolute'")
        self.window = window
        self.batch = batch
        self.frame_tokens = frame_tokens
        self._rotary = rotary
        self._device = torch.device(device)

        def buffer(frames: int) -> torch.Tensor:
            return torch.zeros(batch, frames * frame_tokens, heads, head_dim, device=device, dtype=dtype)

        block_tokens = window.block_frames * frame_tokens
        self.layers = [
            LayerCache(
                buffer(window.window_frames),
                buffer(window.window_frames),
                buffer(window.sink_frames),
                block_tokens,
                leaky,
            )
            for _ in range(num_layers)
        ]
        self.reset()

    def reset(self, first_position: int = 0) -> None:
        """Forget everything. `first_position` is the rotary position of the run's first frame."""
        self._first_position = first_position
        self._rotation: tuple[range, Rotation] | None = None
        self.start_frame = 0
        """Frame number, within the run, of the current block's first frame."""
        self.current_frames = 0
        self._merging = 0
        for layer in self.layers:
            layer.current_begin = layer.visible_end = layer.block_tokens
            layer.pending = None
            layer.forget()

    def fits(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether a model on this device and in this dtype can use the buffers."""
        key = self.layers[0].key
        return key.device == device and key.dtype == dtype

    def begin_block(self, num_frames: int, *, merged: bool = False) -> None:
        """Keep the current block as it was last written, and begin one of `num_frames` behind it.

        With `merged`, the current block is kept only in the middle of the next model call, which gets its clean frames
        followed by those of the new block.
        """
        if not 1 <= num_frames <= self.window.block_frames:
            raise ValueError(f"a block of {num_frames} frames does not fit the cache's {self.window.block_frames}")
        if merged and not self.current_frames:
            raise ValueError("there is no finished block to merge with: this is the first one")
        step = self._plan(num_frames)
        if merged:
            self._merging = self.current_frames
        for layer in self.layers:
            if merged:
                layer.pending = step
            else:
                layer.advance(step)
        self.start_frame += self.current_frames
        self.current_frames = num_frames

    def positions(self, num_frames: int) -> range:
        """Rotary positions for the frames of the next call; names both numbers if the call does not fit."""
        expected = self._merging + self.current_frames
        if num_frames != expected:
            raise ValueError(f"the model was called on {num_frames} frames, but the cache expects {expected}")
        start = self._first_position + self.start_frame - self._merging
        return range(start, start + num_frames)

    def rotation(self, num_frames: int) -> Rotation:
        """Rotation of the next call's tokens. All calls on a block share it: it crosses to the device once."""
        positions = self.positions(num_frames)
        if self._rotation is None or self._rotation[0] != positions:
            self._rotation = positions, self._rotary(positions, self._device)
        return self._rotation[1]

    def end_call(self) -> None:
        """Told by the model when all layers are done."""
        self._merging = 0

    def in_order(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer in the order of their frames, the current block last. For tests and tools."""
        finished = self.start_frame
        kept = [f for f in range(finished) if f < self.window.sink_frames or f >= finished - self.window.ring_frames]
        slots = [self.window.slot(frame) for frame in kept]
        slots += range(self.window.block_frames - self.current_frames, self.window.block_frames)
        tokens = torch.cat(
            [torch.arange(self.frame_tokens) + slot * self.frame_tokens for slot in slots if slot is not None]
        ).to(self._device)
        return self.layers[layer].key[:, tokens], self.layers[layer].value[:, tokens]

    def _plan(self, num_frames: int) -> Advance:
        window, tokens = self.window, self.frame_tokens
        finished = self.start_frame + self.current_frames
        front = window.block_frames - self.current_frames
        copies: list[tuple[int, int, int]] = []
        base: list[tuple[int, int, int]] = []
        for offset in range(self.current_frames):
            frame = self.start_frame + offset
            slot = window.slot(frame)
            # A block longer than the ring would write some slots twice; only the newest frame of each counts.
            if slot is None or (frame >= window.sink_frames and frame < finished - window.ring_frames):
                continue
            copies.append(((front + offset) * tokens, slot * tokens, tokens))
            if frame < window.sink_frames:
                base.append(((front + offset) * tokens, frame * tokens, tokens))
        shift = window.sink_shift(finished)
        moves = window.sink_frames > 0 and shift > 0
        block_tokens = window.block_frames * tokens
        return Advance(
            copies=_coalesce(copies),
            sink_base=_coalesce(base) if window.positions == "relative" else (),
            sink_tokens=(block_tokens, block_tokens + window.sink_frames * tokens) if moves else None,
            sink_rotation=self._rotary.temporal_shift(shift, self._device) if moves else None,
            current_begin=(window.block_frames - num_frames) * tokens,
            visible_end=block_tokens + window.filled(finished) * tokens,
        )


def _coalesce(copies: list[tuple[int, int, int]]) -> tuple[tuple[int, int, int], ...]:
    """Join copies whose sources and destinations both follow on."""
    joined: list[tuple[int, int, int]] = []
    for source, destination, count in copies:
        if joined:
            last_source, last_destination, last_count = joined[-1]
            if (last_source + last_count, last_destination + last_count) == (source, destination):
                joined[-1] = (last_source, last_destination, last_count + count)
                continue
        joined.append((source, destination, count))
    return tuple(joined)
