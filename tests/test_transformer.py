"""The causal transformer against diffusers' own."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from pipeline.cache import CacheWindow
from pipeline.rotary import apply_rotary, rotary_positions
from pipeline.transformer import CausalWanTransformer3DModel, gelu
from tests.small import (
    HEIGHT,
    TEXT_DIM,
    TEXT_LEN,
    WIDTH,
    make_cache,
    random_latents,
    random_text,
    small_transformer,
    write_blocks,
)
from training.masks import block_causal, frame_mask


class MaskedProcessor(WanAttnProcessor):
    """Stock attention with a mask the stock model has no argument for."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.mask = mask

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.mask, rotary_emb)


def stock_copy(model: CausalWanTransformer3DModel) -> WanTransformer3DModel:
    stock = WanTransformer3DModel.from_config(dict(model.config)).eval()
    stock.load_state_dict(model.state_dict())
    return stock


def test_cached_blocks_equal_the_stock_model_under_a_block_causal_mask() -> None:
    model = small_transformer(num_layers=3)
    stock = stock_copy(model)
    frames, block, timestep = 12, 3, 640.0
    latents = random_latents(frames, batch=2)
    tokens = (HEIGHT // 2) * (WIDTH // 2)
    mask = frame_mask(block_causal(frames, block), tokens)
    for layer in stock.blocks:
        layer.attn1.set_processor(MaskedProcessor(mask))
    generator = torch.Generator().manual_seed(3)
    embeds = torch.randn(2, TEXT_LEN, TEXT_DIM, generator=generator)
    with torch.no_grad():
        expected = stock(latents.transpose(1, 2), torch.full((2,), timestep), embeds).sample.transpose(1, 2)
        text = model.encode_text(embeds)
        cached = write_blocks(model, make_cache(model, CacheWindow(block, frames), 2), latents, text, block, timestep)
        masked = model(latents, torch.full((2, frames), timestep), text, mask=mask)
    torch.testing.assert_close(cached, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(masked, cached, rtol=0, atol=1e-5)


def test_weights_are_those_of_the_stock_class(tmp_path) -> None:
    model = small_transformer()
    model.save_pretrained(tmp_path / "ours")
    stock = WanTransformer3DModel.from_pretrained(tmp_path / "ours")
    assert stock.state_dict().keys() == model.state_dict().keys()
    stock.save_pretrained(tmp_path / "stock")
    again = CausalWanTransformer3DModel.from_pretrained(tmp_path / "stock")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert again.config.num_layers == 2


def test_frames_have_timesteps_of_their_own() -> None:
    model = small_transformer()
    text, latents = random_text(model), random_latents(4)
    causal = frame_mask(block_causal(4, 1), (HEIGHT // 2) * (WIDTH // 2))
    low = model(latents, torch.tensor([[0.0, 0.0, 0.0, 200.0]]), text, mask=causal)
    high = model(latents, torch.tensor([[0.0, 0.0, 0.0, 900.0]]), text, mask=causal)
    assert torch.equal(low[:, :3], high[:, :3])
    assert not torch.allclose(low[:, 3], high[:, 3], atol=1e-2)


def test_impossible_sizes_are_refused() -> None:
    model = small_transformer()
    with pytest.raises(ValueError, match="5x6 is not a multiple of the patch 2x2"):
        model.token_grid(5, 6)
    with pytest.raises(ValueError, match="patch_size"):
        small_transformer(patch_size=(2, 2, 2))


def test_attention_with_gradients_equals_attention_without() -> None:
    from pipeline.attention import attention

    query, key, value = torch.randn(3, 2, 7, 2, 8, generator=torch.Generator().manual_seed(0)).unbind()
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    plain = attention(query, key, value, mask)
    differentiable = attention(query.clone().requires_grad_(), key, value, mask)
    torch.testing.assert_close(differentiable, plain, rtol=0, atol=1e-6)


def test_calls_with_gradients_leave_the_cache_alone_and_see_the_same() -> None:
    model = small_transformer()
    text, latents = random_text(model), random_latents(6)
    cache = make_cache(model, CacheWindow(3, 9, 3))
    first, second = latents.split(3, 1)
    cache.begin_block(3)
    model(first, torch.zeros(1, 3), text, cache=cache)
    cache.begin_block(3)
    time = torch.full((1, 3), 500.0)
    expected = model(second, time, text, cache=cache)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    flow = model(second, time, text, cache=cache)
    torch.testing.assert_close(flow, expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        model(second * 2, torch.zeros(1, 3), text, cache=cache)  # overwrites the buffers, as the clean pass does
    flow.sum().backward()
    of_text = ("attn2.to_k", "attn2.to_v", "attn2.norm_k")  # computed before gradients were on
    for name, parameter in model.blocks.named_parameters():
        assert (parameter.grad is None) == any(part in name for part in of_text), name


def test_the_quick_forms_of_a_cpu_are_those_of_other_devices() -> None:
    x = torch.cat([torch.linspace(-40, 40, 4001), torch.tensor([0.0, 1e20, -1e20, torch.inf, torch.nan])])
    with torch.no_grad():
        quick = gelu(x)
    usual = gelu(x.clone().requires_grad_()).detach()
    assert torch.allclose(quick, usual, atol=1e-6, rtol=1e-6, equal_nan=True)

    heads = torch.randn(2, 12, 3, 12)
    rotation = rotary_positions(12, 2, 2)(range(5, 8))
    wide = tuple(part.double() for part in rotation)
    assert (apply_rotary(heads, rotation) - apply_rotary(heads.double(), wide)).abs().max() < 1e-6
