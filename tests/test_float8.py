"""FP8: which form a device gets, which layers it takes, what it costs. No GPU has run these.

The row-wise form itself is tested where torchao is installed, with its refusal of CPUs taken away: torch multiplies
there by the same rules.
"""

from __future__ import annotations

import logging
import sys
import types
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import app
from pipeline import GenerationRequest, SelfForcingPipeline, float8, options
from pipeline.cli import EMBEDDED_MODEL
from pipeline.device import DeviceFacts
from pipeline.float8 import Float8Form, float8_form, goes_row_wise, multiply_in_8_bits, row_wise_bytes
from pipeline.folder import ModelFolder
from pipeline.memory import META, LiveBytes, builders_of, rehearse
from pipeline.options import TransformerOptions
from pipeline.transformer import CausalWanTransformer3DModel
from tests.scripted import ScriptedPipeline
from tests.small import small_transformer, write_model_folder
from weights import blueprints
from weights.manifest import load_manifest

ADA, HOPPER, AMPERE = (DeviceFacts("cuda", capability) for capability in ((8, 9), (9, 0), (8, 6)))
BF16, CPU = torch.bfloat16, torch.device("cpu")
SIZES = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64}


# ---- the choice


@pytest.mark.parametrize("facts", [ADA, HOPPER, DeviceFacts("cuda", (12, 0))])
def test_gpus_that_multiply_in_8_bits_do(facts: DeviceFacts) -> None:
    assert float8_form(facts, BF16, None) == Float8Form(True)
    assert "row-wise" in Float8Form(True).precision(BF16)


@pytest.mark.parametrize(
    ("facts", "dtype", "problem", "said"),
    [
        (AMPERE, BF16, None, "a GPU of capability 8.6 cannot multiply in 8 bits"),
        (DeviceFacts("cpu"), BF16, None, "a CPU cannot"),
        (DeviceFacts("cuda", rocm=True), BF16, None, "an AMD GPU cannot"),
        (DeviceFacts("xpu"), BF16, None, "xpu cannot"),
        (HOPPER, torch.float16, None, "the model is in float16"),
        (HOPPER, BF16, "torchao is not installed", "torchao is not installed"),
    ],
)
def test_elsewhere_weights_only_and_it_says_why(facts, dtype, problem, said) -> None:
    form = float8_form(facts, dtype, problem)
    assert not form.row_wise and said in form.why
    assert form.sentence().startswith("Weights only, because ") and said in form.sentence()
    assert form.precision(dtype) == f"float8 weights, {str(dtype)[6:]} arithmetic"


def test_torchao_that_is_missing_or_broken_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8.importlib.util, "find_spec", lambda name: None)
    assert "not installed (pip install" in str(float8.torchao_problem())
    monkeypatch.setattr(float8.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "torchao.quantization", types.ModuleType("torchao.quantization"))
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    assert f"does not work with torch {torch.__version__} (ImportError" in str(float8.torchao_problem())


def test_torchao_is_not_imported_where_it_cannot_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8, "torchao_problem", lambda: pytest.fail("that takes seconds"))
    assert not float8.form_on(torch.device("cpu"), BF16).row_wise


def test_capability_is_asked_of_the_driver_and_not_of_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: pytest.fail("names say nothing"))
    monkeypatch.setattr(float8, "torchao_problem", lambda: None)
    assert float8.form_on(torch.device("cuda"), BF16, lambda device: None).row_wise


def test_arithmetic_is_tried_before_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[torch.device] = []

    def fails(device: torch.device) -> str:
        tried.append(device)
        return "torchao fails here (RuntimeError: no kernel image)"

    cuda = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(float8, "torchao_problem", lambda: None)
    form = float8.form_on(cuda, BF16, fails)
    assert form == Float8Form(False, "torchao fails here (RuntimeError: no kernel image)") and tried == [cuda]
    monkeypatch.setattr(float8, "row_wise_problem", fails)
    assert float8.form_on(cuda, BF16) == form, "without a word about it, the real trial is made"
    monkeypatch.setattr(float8, "torchao_problem", lambda: "torchao is not installed")
    assert float8.form_on(cuda, BF16, fails).why == "torchao is not installed"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert not float8.form_on(cuda, BF16, fails).row_wise and len(tried) == 2, "there is nothing to try"


# ---- the layers


def test_every_matrix_of_the_blocks_and_nothing_else_in_the_published_model() -> None:
    """Ten matrices in each of 30 blocks; six small layers around them stay, as in LongLive 2."""
    with META:
        model = blueprints.builders_of(load_manifest().model("self-forcing-dmd"))["transformer"]().to(BF16)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    inside = {f"blocks.{name}" for name, module in model.blocks.named_modules() if goes_row_wise(module)}
    assert len(inside) == 300
    assert sorted(name.partition(".")[0] for name in linear - inside) == ["condition_embedder"] * 5 + ["proj_out"]
    whole = sum(parameter.numel() * 2 for parameter in model.parameters())
    assert 0.5 * whole < row_wise_bytes(model) < 0.52 * whole


def test_sizes_that_8_bits_cannot_have_stay() -> None:
    assert goes_row_wise(nn.Linear(32, 48)) and not goes_row_wise(nn.LayerNorm(32))
    assert not goes_row_wise(nn.Linear(24, 32)) and not goes_row_wise(nn.Linear(32, 24))
    model = small_transformer()  # of widths that do not fit
    assert not any(goes_row_wise(module) for module in model.blocks[0].attn1.modules())


@dataclass
class FakeConfig:
    granularity: Any
    activation_value_lb: float
    set_inductor_config: bool


@pytest.fixture
def fake_torchao(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Notes what it is asked to convert."""
    converted: list[tuple[str, Any]] = []
    module = types.ModuleType("torchao.quantization")

    def quantize_(model: nn.Module, config: FakeConfig, filter_fn: Any = lambda part, name: False) -> None:
        converted.extend((name, config) for name, part in model.named_modules() if filter_fn(part, name))

    module.quantize_, module.PerRow, module.Float8DynamicActivationFloat8WeightConfig = quantize_, object, FakeConfig
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", module)
    return converted


def test_the_blocks_are_handed_to_torchao_and_an_empty_row_is_not(fake_torchao) -> None:
    model = small_transformer(**SIZES).to(BF16)
    multiply_in_8_bits(model)
    assert len(fake_torchao) == 20 and {name.partition(".")[0] for name, _ in fake_torchao} == {"0", "1"}
    config = fake_torchao[0][1]
    assert config.activation_value_lb > 0 and config.set_inductor_config is False
    fake_torchao.clear()
    model.blocks[0].attn1.to_q.weight[3] = 0
    multiply_in_8_bits(model)
    assert len(fake_torchao) == 19 and "0.attn1.to_q" not in dict(fake_torchao)


def test_the_trial_multiplies(fake_torchao, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["torchao.quantization"]
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    assert float8.row_wise_problem(CPU) is None
    assert torch.equal(torch.rand(1), expected), "torch's own random numbers are left alone"

    def wrong(model: nn.Module, config: FakeConfig, filter_fn: Any = None) -> None:
        model[0].weight.mul_(1.5)

    def broken(model: nn.Module, config: FakeConfig, filter_fn: Any = None) -> None:
        raise RuntimeError("no kernel image is available\nand a long story")

    monkeypatch.setattr(module, "quantize_", wrong)
    assert float8.row_wise_problem(CPU) == "torchao's product in 8 bits is off by 50% here"
    monkeypatch.setattr(module, "quantize_", lambda model, config: model[0].weight.fill_(float("nan")))
    assert "off by nan%" in str(float8.row_wise_problem(CPU))
    monkeypatch.setattr(module, "quantize_", broken)
    assert float8.row_wise_problem(CPU) == "torchao fails here (RuntimeError: no kernel image is available)"


def test_the_trial_is_made_as_a_run_is(fake_torchao, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, ...]] = []

    class Noted(nn.Module):
        def __init__(self, weight: torch.Tensor) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            seen.append((torch.is_inference_mode_enabled(), tokens.is_inference(), self.weight.is_inference()))
            return tokens @ self.weight.T

    def quantize_(model: nn.Module, config: FakeConfig) -> None:
        model[0] = Noted(model[0].weight)

    monkeypatch.setattr(sys.modules["torchao.quantization"], "quantize_", quantize_)
    assert float8.row_wise_problem(CPU) is None
    assert seen == [(True, True, False)]
    assert not torch.is_inference_mode_enabled()


def test_switched_on_off_and_on_again(fake_torchao, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "form_on", lambda device, dtype: Float8Form(True))
    monkeypatch.setattr(options, "store_in_8_bits", lambda *_: pytest.fail("that is the other form"))
    loads = []
    switches = TransformerOptions(lambda: loads.append(1) or small_transformer(**SIZES).to(BF16))
    first = switches.apply(fp8=True, compile=False)
    assert len(fake_torchao) == 20 and switches.apply(fp8=True, compile=False) is first
    assert switches.apply(fp8=False, compile=False) is not first and len(loads) == 2
    switches.apply(fp8=True, compile=False)
    assert len(fake_torchao) == 40 and len(loads) == 2


def test_a_run_says_which_form_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = SelfForcingPipeline.from_pretrained(write_model_folder(tmp_path), device="cpu")
    both = GenerationRequest(prompt="a ball", fp8=True, compile=True)
    monkeypatch.setattr(pipe, "unavailable_options", dict)
    assert pipe.plan(both).applied["precision"] == "float8 weights, float32 arithmetic"
    assert pipe.plan(both).applied["compile"] == "the decoder only, because of FP8"
    assert "a CPU cannot multiply in 8 bits" in pipe.option_notes()["fp8"]
    pipe._transformer.fp8_form = Float8Form(True)
    assert pipe.plan(both).applied["precision"] == "float8 row-wise arithmetic (torchao)"
    assert pipe.plan(both).applied["compile"] == "on"


def test_the_page_says_which_form_it_will_be() -> None:
    pipeline = ScriptedPipeline()
    pipeline.option_notes = lambda: {"fp8": "Weights only, because of the moon."}
    infos = {
        component["props"]["elem_id"]: component["props"]["info"]
        for component in app.build_app(pipeline).get_config_file()["components"]
        if str(component["props"].get("elem_id")).startswith("option-")
    }
    assert infos["option-fp8"].endswith("slightly different pictures. Weights only, because of the moon.")
    assert "moon" not in infos["option-taehv"] + infos["option-compile"]


# ---- with torchao


@pytest.fixture
def torchao(monkeypatch: pytest.MonkeyPatch) -> Any:
    logging.getLogger("torchao").setLevel(logging.CRITICAL)
    api = pytest.importorskip("torchao.quantization.quant_api", reason=f"needs torchao: {float8.INSTALL_TORCHAO}")
    monkeypatch.setattr(api, "_check_hardware_support", lambda granularity: None)
    monkeypatch.setattr(options, "form_on", lambda device, dtype: Float8Form(True))
    return api


def embedded() -> CausalWanTransformer3DModel:
    return ModelFolder(EMBEDDED_MODEL).load("transformer", BF16)


def stored(tensor: torch.Tensor) -> int:
    parts = [tensor.qdata, tensor.scale] if hasattr(tensor, "qdata") else [tensor]
    return sum(part.numel() * part.element_size() for part in parts)


def test_weights_take_what_the_plan_says(torchao: Any) -> None:
    model = embedded()
    expected = row_wise_bytes(model)
    multiply_in_8_bits(model)
    assert sum(map(stored, (*model.parameters(), *model.buffers()))) == expected
    assert model.dtype == BF16 and model.device.type == "cpu"


def test_a_small_product_works(torchao: Any) -> None:
    assert float8.row_wise_problem(CPU) is None


def test_zeros_do_not_become_nan(torchao: Any) -> None:
    model = small_transformer(**SIZES).to(BF16)
    layer = model.blocks[0].ffn.net[2]
    tokens = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0)).to(BF16)
    tokens[:, 2] = 0
    exact = layer(tokens)
    multiply_in_8_bits(model)
    found = layer(tokens)
    assert torch.equal(found[:, 2], exact[:, 2])
    assert 0 < (found - exact).norm() / exact.norm() < 0.1


def test_the_rehearsal_leaves_room_for_rounding(torchao: Any) -> None:
    layer = nn.Sequential(nn.Linear(256, 512, bias=False)).to(BF16)
    tokens = torch.randn(1, 1000, 256).to(BF16)
    model = types.SimpleNamespace(blocks=layer, device=tokens.device)
    multiply_in_8_bits(model)
    with torch.inference_mode(), LiveBytes(tokens.device) as counted:
        layer(tokens)
    rounding = 13 * tokens.numel()  # three copies in float32 and one in 8 bits, as `memory` has it
    assert 0.9 * rounding < counted.peak < 1.3 * rounding


def test_a_video_is_nearly_the_same_and_comes_back_exactly(torchao: Any, tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path)
    small_transformer(in_channels=4, out_channels=4, text_dim=8, **SIZES).save_pretrained(folder / "transformer")
    pipe = SelfForcingPipeline.from_pretrained(folder, device="cpu", dtype=BF16)
    request = GenerationRequest(prompt="a red balloon", seed=7, seconds=1, fps=12)
    plain = pipe.generate(request).frames
    video = pipe.generate(replace(request, fp8=True))
    assert video.run.applied["precision"] == "float8 row-wise arithmetic (torchao)"
    error = ((video.frames.astype(float) - plain) ** 2).mean()
    assert error > 0 and 10 * np.log10(255**2 / error) > 20
    assert np.array_equal(pipe.generate(request).frames, plain)


def test_a_compiled_block_is_one_graph(torchao: Any) -> None:
    model = small_transformer(**SIZES).to(BF16)
    multiply_in_8_bits(model)
    latents, time = torch.randn(1, 3, 4, 4, 6).to(BF16), torch.zeros(1, 3)
    with torch.inference_mode():
        text = model.encode_text(torch.randn(1, 5, 8).to(BF16))
        plain = model(latents, time, text)
        for block in model.blocks:
            block.compile(fullgraph=True, backend="aot_eager")  # raises at the first break; needs no compiler
        assert (model(latents, time, text) - plain).norm() < 0.05 * plain.norm()


# ---- the plan


def test_the_plan_leaves_room_for_rounding_the_inputs_of_layers() -> None:
    spec = ModelFolder(EMBEDDED_MODEL).spec
    needs = rehearse(builders_of(EMBEDDED_MODEL), spec, BF16).transformer
    with META:
        model = builders_of(EMBEDDED_MODEL)["transformer"]().to(BF16)
    widest = max(layer.in_features for layer in model.blocks.modules() if goes_row_wise(layer))
    assert needs.fp8_working > needs.working
    tokens = 2 * spec.frames_per_block * (spec.height // 32) * (spec.width // 32)
    assert needs.fp8_working - needs.working <= 13 * tokens * widest
    assert row_wise_bytes(model) <= needs.fp8_weights < 0.6 * needs.weights
