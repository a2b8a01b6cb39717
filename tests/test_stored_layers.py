"""Weights in 8 bits with a scale for each row: what they lose, what they take, and which layers have them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import UMT5Config, UMT5EncoderModel

from pipeline.cli import EMBEDDED_MODEL
from pipeline.float8 import store_in_8_bits
from pipeline.folder import ModelFolder
from pipeline.memory import LiveBytes
from pipeline.stored_layers import FP8_STORAGE, StoredEmbedding, StoredLinear, store, stored_rows
from tests.small import small_transformer

BF16 = torch.bfloat16


def everything(_name: str) -> bool:
    return True


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.float() - exact.float()).norm() / exact.float().norm()).item()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("std", [1e-4, 0.002, 0.05, 3.0])
def test_a_layer_loses_a_few_percent_however_small_its_weights_are(std: float) -> None:
    model = nn.Sequential(nn.Linear(256, 128).to(BF16)).requires_grad_(False)
    model[0].weight.normal_(std=std)
    model[0].bias.normal_(std=std)
    tokens = torch.randn(50, 256).to(BF16)
    exact = model(tokens)
    store(model, BF16, everything)
    assert model[0].weight.dtype == FP8_STORAGE and model(tokens).dtype == BF16
    assert 0.005 < relative_error(model(tokens), exact) < 0.04


def test_rows_of_different_size_lose_alike() -> None:
    weight = torch.randn(64, 256) * torch.logspace(-6, 2, 64)[:, None]
    values, scale = stored_rows(weight, torch.float32)
    errors = ((values.float() * scale - weight).norm(dim=1) / weight.norm(dim=1)).tolist()
    assert min(errors) > 0.01 and max(errors) < 0.04
    assert values.float().abs().amax(1).gt(100).all(), "the range of 8 bits is used"


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_scales_change_nothing_but_the_exponent(dtype: torch.dtype) -> None:
    values, scale = stored_rows(0.01 * torch.randn(64, 256).to(dtype), dtype)
    product = values.to(dtype) * scale
    assert torch.equal(product.double(), values.double() * scale.double())
    again, scale = stored_rows(product, dtype)
    assert torch.equal(again.to(dtype) * scale, product), "what was rounded once is not rounded again"


def test_an_empty_row_stays_empty_and_a_broken_one_broken() -> None:
    weight = torch.randn(3, 16)
    weight[0], weight[1, 3] = 0, torch.nan
    values, scale = stored_rows(weight, torch.float32)
    whole = values.float() * scale
    assert torch.equal(whole[0], weight[0]) and whole[1].isnan().any() and whole[2].isfinite().all()


def test_an_embedding_loses_as_little_and_is_never_whole() -> None:
    model = nn.Sequential(nn.Embedding(5000, 64)).requires_grad_(False)
    tokens = torch.tensor([[3, 7, 3, 4999]])
    exact = model(tokens)
    store(model, torch.float32, everything)
    with torch.inference_mode(), LiveBytes(torch.device("cpu")) as counted:
        found = model(tokens)
    assert type(model[0]) is StoredEmbedding and found.shape == exact.shape
    assert relative_error(found, exact) < 0.04
    stored = model[0].weight.nbytes  # which a view of it counts as
    assert counted.peak - stored < 20 * exact.numel() < stored


class RefusesToIndex8Bits(TorchDispatchMode):
    """As a CPU does with torch 2.8 and 2.9."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.index and args[0].dtype == FP8_STORAGE:
            raise NotImplementedError("\"index_cpu\" not implemented for 'Float8_e4m3fn'")
        return func(*args, **(kwargs or {}))


def test_an_embedding_picks_rows_where_torch_cannot_index_8_bits() -> None:
    model = nn.Sequential(nn.Embedding(50, 8).to(BF16)).requires_grad_(False)
    store(model, BF16, everything)
    tokens = torch.tensor([[3, 7, 3], [0, 49, 1]])
    expected = (model[0].weight.to(BF16) * model[0].scale)[tokens]
    with torch.inference_mode(), RefusesToIndex8Bits():
        assert torch.equal(model(tokens), expected)


def test_a_shared_weight_is_stored_once_and_a_kept_one_not_at_all() -> None:
    model = nn.ModuleDict({name: nn.Linear(32, 16) for name in ("one", "two", "kept", "tied")})
    model["two"].weight = model["one"].weight
    model["kept"].weight = model["tied"].weight
    store(model, torch.float32, lambda name: name != "kept")
    assert model["two"].weight is model["one"].weight and model["two"].scale is model["one"].scale
    assert type(model["kept"]) is nn.Linear and model["kept"].weight.dtype == torch.float32
    assert type(model["tied"]) is StoredLinear and model["tied"].weight.dtype == FP8_STORAGE


def test_t5_keeps_what_it_cannot_have_in_8_bits_and_its_embedding_once() -> None:
    model = UMT5EncoderModel(UMT5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)).eval()
    with torch.no_grad():
        tokens = torch.arange(1, 9)[None]
        exact = model(input_ids=tokens).last_hidden_state
        store_in_8_bits(model, torch.float32)
        found = model(input_ids=tokens).last_hidden_state
    stored = {name for name, layer in model.named_modules() if isinstance(layer, StoredLinear | StoredEmbedding)}
    assert {name.rpartition(".")[2] for name in stored} == {"shared", "embed_tokens", *"qkvo", "wi_0", "wi_1"}
    assert model.shared.weight is model.encoder.embed_tokens.weight
    assert 0 < relative_error(found, exact) < 0.1


def test_only_the_matrices_of_blocks_are_stored_in_the_transformer() -> None:
    model = small_transformer()
    store_in_8_bits(model, torch.float32)
    stored = {name for name, layer in model.named_modules() if isinstance(layer, StoredLinear)}
    inside = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and "blocks." in name}
    assert stored == inside and len(stored) == 20


def test_eight_bits_hardly_change_the_embedded_models_text() -> None:
    model = ModelFolder(EMBEDDED_MODEL).load("text_encoder", torch.float32)
    tokens = torch.arange(2, 12)[None]
    with torch.inference_mode():
        exact = model(input_ids=tokens).last_hidden_state
        store_in_8_bits(model, torch.float32)
        found = model(input_ids=tokens).last_hidden_state
    assert 0 < relative_error(found, exact) < 0.1
