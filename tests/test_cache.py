"""The cache against slower but obvious ways to say the same thing."""

from __future__ import annotations

import pytest
import torch

from pipeline.attention import attention
from pipeline.cache import CacheWindow, KVCache, LayerCache
from pipeline.config import ModelSpec
from pipeline.errors import WeightsError
from pipeline.rotary import RotaryPositions, apply_rotary
from tests.small import make_cache, random_latents, random_text, small_transformer, write_blocks

BLOCK = 3


class PackedOracle(LayerCache):
    """Keeps every key unrotated in a list and rotates all visible ones to positions 0, 1, 2, ... at every read."""

    def __init__(self, window: CacheWindow, rotary: RotaryPositions, tokens: int) -> None:
        self.window, self.rotary, self.tokens = window, rotary, tokens
        self.frames: list[tuple[torch.Tensor, torch.Tensor]] = []

    def attend_raw(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        count = key.shape[1] // self.tokens
        self.frames += list(zip(key.split(self.tokens, 1), value.split(self.tokens, 1), strict=True))
        sink = self.frames[: self.window.sink_frames]
        recent = self.frames[len(sink) :][-(self.window.ring_frames + count) :]
        visible = sink + recent
        keys = apply_rotary(torch.cat([k for k, _ in visible], 1), self.rotary(range(len(visible))))
        query = apply_rotary(query, self.rotary(range(len(visible) - count, len(visible))))
        return attention(query, keys, torch.cat([v for _, v in visible], 1))


def attend_both(window: CacheWindow, blocks: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Outputs of the cache and of the oracle on the same random queries, keys and values, block by block."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns, heads, head_dim = 1, 2, 2, 24
    rotary = RotaryPositions(head_dim, rows, columns)
    tokens = rows * columns
    cache = KVCache(
        num_layers=1, batch=1, frame_tokens=tokens, heads=heads, head_dim=head_dim, window=window, rotary=rotary
    )
    oracle = PackedOracle(window, rotary, tokens)
    results = []
    for _ in range(blocks):
        query, key, value = torch.randn(3, 1, BLOCK * tokens, heads, head_dim, generator=generator).unbind()
        cache.begin_block(BLOCK)
        rotation = rotary(cache.positions(BLOCK))
        mine = cache.layers[0].attend(apply_rotary(query, rotation), apply_rotary(key, rotation), value)
        cache.end_call()
        results.append((mine, oracle.attend_raw(query, key, value)))
    return results


@pytest.mark.parametrize(("window", "sink"), [(12, 0), (12, 3), (12, 6), (9, 3), (6, 0), (10, 2), (7, 1), (8, 4)])
def test_moved_sink_equals_packed_positions(window: int, sink: int) -> None:
    for mine, packed in attend_both(CacheWindow(BLOCK, window, sink), blocks=30):
        torch.testing.assert_close(mine, packed, rtol=0, atol=1e-5)


def test_window_is_full_attention_until_it_is_full() -> None:
    model = small_transformer()
    text, latents = random_text(model), random_latents(15)
    full = write_blocks(model, make_cache(model, CacheWindow(BLOCK, 15)), latents, text, BLOCK)
    windowed = write_blocks(model, make_cache(model, CacheWindow(BLOCK, 12)), latents, text, BLOCK)
    assert torch.equal(full[:, :12], windowed[:, :12])
    assert not torch.allclose(full[:, 12:], windowed[:, 12:], atol=1e-3)


def test_absolute_and_relative_positions_differ_only_with_a_sink_and_after_an_eviction() -> None:
    model = small_transformer()
    text, latents = random_text(model), random_latents(90)

    def run(sink: int, positions: str) -> torch.Tensor:
        window = CacheWindow(BLOCK, 9, sink, positions)  # type: ignore[arg-type]
        return write_blocks(model, make_cache(model, window), latents, text, BLOCK)

    torch.testing.assert_close(run(0, "relative"), run(0, "absolute"), rtol=0, atol=1e-5)
    relative, absolute = run(3, "relative"), run(3, "absolute")
    assert torch.equal(relative[:, :9], absolute[:, :9])
    assert (relative - absolute)[:, 9:].abs().max() > 1e-2


@pytest.mark.parametrize("start", [5000, 1_000_000])
def test_positions_do_not_run_out(start: int) -> None:
    model = small_transformer()
    text, latents = random_text(model), random_latents(24)
    cache = make_cache(model, CacheWindow(BLOCK, 9, 3))
    here = write_blocks(model, cache, latents, text, BLOCK)
    there = write_blocks(model, cache, latents, text, BLOCK, first_position=start)
    torch.testing.assert_close(here, there, rtol=0, atol=1e-5)


def test_past_a_thousand_frames() -> None:
    model = small_transformer(num_layers=1)
    text = random_text(model)
    cache = make_cache(model, CacheWindow(BLOCK, 9, 3))
    latents = random_latents(BLOCK).repeat(1, 345, 1, 1, 1)
    flows = write_blocks(model, cache, latents, text, BLOCK)
    assert cache.start_frame == 1032
    # The same block over and over settles; nothing happens at frame 1024.
    torch.testing.assert_close(flows[:, 1020:1023], flows[:, 1026:1029], rtol=0, atol=1e-4)


def test_sink_keeps_its_first_content() -> None:
    model = small_transformer()
    text, latents = random_text(model), random_latents(300)
    cache = make_cache(model, CacheWindow(BLOCK, 12, 6))
    write_blocks(model, cache, latents[:, :9], text, BLOCK)
    base, values = cache.layers[0].sink_base.clone(), cache.in_order(0)[1][:, : 6 * cache.frame_tokens].clone()
    write_blocks(model, cache, latents, text, BLOCK)
    assert torch.equal(cache.layers[0].sink_base, base)
    assert torch.equal(cache.in_order(0)[1][:, : 6 * cache.frame_tokens], values)


def test_blocks_are_evicted_whole() -> None:
    """What a block sees depends on the frames in the window and on nothing before them."""
    model = small_transformer(num_layers=1)  # deeper layers carry older frames along inside the keys they keep
    text, latents = random_text(model), random_latents(24)
    other = latents.clone()
    other[:, 3:15] = random_latents(12, seed=9)
    cache = make_cache(model, CacheWindow(BLOCK, 9, 3))
    first = write_blocks(model, cache, latents, text, BLOCK)
    second = write_blocks(model, cache, other, text, BLOCK)
    assert not torch.allclose(first[:, 15:18], second[:, 15:18], atol=1e-3)
    assert torch.equal(first[:, 18:], second[:, 18:])


def test_only_the_clean_pass_leaves_a_trace() -> None:
    model = small_transformer()
    text, latents = random_text(model), random_latents(6)
    noisy = random_latents(6, seed=5)
    one, two = (make_cache(model, CacheWindow(BLOCK, 9)) for _ in range(2))
    zero = torch.zeros(1, BLOCK)
    for part, noise in zip(latents.split(BLOCK, 1), noisy.split(BLOCK, 1), strict=True):
        one.begin_block(BLOCK)
        for timestep in (1000.0, 700.0, 300.0):
            model(noise, torch.full((1, BLOCK), timestep), text, cache=one)
        for cache in (one, two):
            if cache is two:
                two.begin_block(BLOCK)
            model(part, zero, text, cache=cache)
    for layer in range(2):
        for mine, lone in zip(one.in_order(layer), two.in_order(layer), strict=True):
            assert torch.equal(mine, lone)


def test_unused_slots_are_never_read() -> None:
    model = small_transformer()
    text, latents = random_text(model), random_latents(12)
    cache = make_cache(model, CacheWindow(BLOCK, 12, 3))
    for layer in cache.layers:
        for buffer in (layer.key, layer.value, layer.sink_base):
            buffer.fill_(float("nan"))
    assert torch.isfinite(write_blocks(model, cache, latents, text, BLOCK)).all()


@pytest.mark.parametrize(
    "window", [CacheWindow(BLOCK, 9, 3), CacheWindow(BLOCK, 6), CacheWindow(BLOCK, 7, 1, "absolute")]
)
def test_merged_clean_pass_is_exact(window: CacheWindow) -> None:
    model = small_transformer()
    text, clean, noisy = random_text(model), random_latents(18), random_latents(18, seed=4)
    apart, merged = make_cache(model, window), make_cache(model, window)
    previous = None
    for block, noise in zip(clean.split(BLOCK, 1), noisy.split(BLOCK, 1), strict=True):
        high, zero = torch.full((1, BLOCK), 900.0), torch.zeros(1, BLOCK)
        apart.begin_block(BLOCK)
        expected = model(noise, high, text, cache=apart)
        model(block, zero, text, cache=apart)
        merged.begin_block(BLOCK, merged=previous is not None)
        if previous is None:
            flow = model(noise, high, text, cache=merged)
        else:
            both = torch.cat([previous, noise], 1)
            flow = model(both, torch.cat([zero, high], 1), text, cache=merged)[:, BLOCK:]
        torch.testing.assert_close(flow, expected, rtol=0, atol=1e-5)
        previous = block


def test_buffers_stay_where_they_are() -> None:
    model = small_transformer()
    text = random_text(model)
    cache = make_cache(model, CacheWindow(BLOCK, 9, 3))
    before = [(layer.key.data_ptr(), layer.value.data_ptr()) for layer in cache.layers]
    write_blocks(model, cache, random_latents(60), text, BLOCK)
    assert [(layer.key.data_ptr(), layer.value.data_ptr()) for layer in cache.layers] == before


def test_wrong_calls_name_both_numbers() -> None:
    model = small_transformer()
    text = random_text(model)
    cache = make_cache(model, CacheWindow(BLOCK, 9))
    with pytest.raises(ValueError, match="4 frames does not fit the cache's 3"):
        cache.begin_block(4)
    cache.begin_block(BLOCK)
    with pytest.raises(ValueError, match="called on 2 frames, but the cache expects 3"):
        model(random_latents(2), torch.zeros(1, 2), text, cache=cache)


@pytest.mark.parametrize(("window", "sink"), [(3, 1), (4, 3), (2, 0), (6, 6), (6, -3)])
def test_a_window_without_room_for_a_block_is_refused(window: int, sink: int) -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        CacheWindow(BLOCK, window, sink)


@pytest.mark.parametrize(("window", "sink"), [(3, 0), (6, 3), (8, 0), (9, 2), (9, 9), (7, 1)])
def test_what_a_user_may_choose_is_stricter(window: int, sink: int) -> None:
    values = {"name": "x", "height": 64, "width": 64, "fps": 16, "native_fps": 16, "text_len": 8}
    settings = {"frames_per_block": BLOCK, "denoising_steps": (1000.0,), "shift": 5.0}
    with pytest.raises(WeightsError):
        ModelSpec(**values, **settings, window_frames=window, sink_frames=sink)
    ModelSpec(**values, **settings, window_frames=9, sink_frames=3)


def test_ring_equals_a_shifting_buffer() -> None:
    """30 blocks with absolute positions against a list from which the oldest frames are dropped."""
    generator = torch.Generator().manual_seed(0)
    rotary, tokens, window = RotaryPositions(24, 1, 2), 2, CacheWindow(BLOCK, 12, 3, "absolute")
    cache = KVCache(num_layers=1, batch=1, frame_tokens=tokens, heads=2, head_dim=24, window=window, rotary=rotary)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    for _ in range(30):
        query, key, value = torch.randn(3, 1, BLOCK * tokens, 2, 24, generator=generator).unbind()
        cache.begin_block(BLOCK)
        rotation = rotary(cache.positions(BLOCK))
        query, key = apply_rotary(query, rotation), apply_rotary(key, rotation)
        ring = cache.layers[0].attend(query, key, value)
        kept += zip(key.split(tokens, 1), value.split(tokens, 1), strict=True)
        if len(kept) > 12:
            del kept[3 : 3 + len(kept) - 12]
        keys, values = (torch.cat(part, 1) for part in zip(*kept, strict=True))
        torch.testing.assert_close(ring, attention(query, keys, values), rtol=0, atol=1e-5)
        assert all(torch.equal(mine, shifted) for mine, shifted in zip(cache.in_order(0), (keys, values), strict=True))


@pytest.mark.parametrize("sink", [3, 6])
def test_moved_sink_in_half_precision(sink: int) -> None:
    model = small_transformer()
    window = CacheWindow(BLOCK, 12, sink)
    full_text, latents = random_text(model), random_latents(60)
    exact = write_blocks(model, make_cache(model, window), latents, full_text, BLOCK)
    model = model.bfloat16()
    text = [(key.bfloat16(), value.bfloat16()) for key, value in full_text]
    half = write_blocks(model, make_cache(model, window), latents.bfloat16(), text, BLOCK).float()
    early = (half - exact)[:, :12].norm() / exact[:, :12].norm()
    late = (half - exact)[:, 48:].norm() / exact[:, 48:].norm()
    assert late < max(5e-2, 3 * early)  # rounding does not pile up as the sink is moved again and again
