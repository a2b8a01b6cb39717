"""Which kernel attends: what each needs, that wrong ones are found out, and that the choice reaches the model.

No GPU has run these: devices are told, not present, and times are made up.
"""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import app
from pipeline import GenerationRequest, SelfForcingPipeline, attention_backends, cli, doctor
from pipeline.attention import attention
from pipeline.attention_backends import (
    BACKENDS,
    AttentionChoice,
    AttentionShapes,
    Backend,
    choose_attention,
    exact_attention,
    fastest,
)
from pipeline.config import ATTENTION_NAMES
from pipeline.device import DeviceFacts
from pipeline.errors import OptionUnavailable
from pipeline.folder import ModelFolder
from pipeline.memory import META, builders_of
from pipeline.options import TransformerOptions
from tests.small import random_latents, random_text, small_transformer, write_model_folder
from weights import blueprints
from weights.manifest import load_manifest

CPU, BF16 = torch.device("cpu"), torch.bfloat16
SHAPES = AttentionShapes(2, 16, 70, (70, 210, 9))
HOPPER, ADA, AMPERE, TURING = (DeviceFacts("cuda", c) for c in ((9, 0), (8, 9), (8, 0), (7, 5)))
AMD = DeviceFacts("cuda", rocm=True)


def tensors(keys: int = 20, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, tokens, 3, 16, generator=generator) for tokens in (10, keys, keys))


# ---- what each needs


def test_the_names_are_those_that_the_command_line_offers() -> None:
    assert ("auto", *BACKENDS) == ATTENTION_NAMES
    assert [name for name, backend in BACKENDS.items() if backend.approximate] == ["sage"]


@pytest.mark.parametrize(
    ("facts", "usable"),
    [
        (HOPPER, {"sdpa", "cudnn", "flash", "efficient", "math", "fa3", "fa2", "sage"}),
        (ADA, {"sdpa", "cudnn", "flash", "efficient", "math", "fa2", "sage"}),
        (AMPERE, {"sdpa", "cudnn", "flash", "efficient", "math", "fa2", "sage"}),
        (DeviceFacts("cuda", (10, 0)), {"sdpa", "cudnn", "flash", "efficient", "math", "fa2", "sage"}),
        (TURING, {"sdpa", "efficient", "math"}),
        (AMD, {"sdpa", "flash", "efficient", "math"}),
        (DeviceFacts("cpu"), {"sdpa", "flash", "math"}),
        (DeviceFacts("xpu"), {"sdpa", "math"}),
    ],
)
def test_what_each_device_can_have(facts: DeviceFacts, usable: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_backends.importlib.util, "find_spec", lambda name: object())
    assert {name for name, backend in BACKENDS.items() if backend.problem(facts, BF16) is None} == usable


def test_missing_packages_and_wide_numbers_are_told() -> None:
    assert BACKENDS["fa3"].problem(HOPPER, BF16) == "the package flash_attn_interface is not installed"
    assert "not float32" in str(BACKENDS["cudnn"].problem(HOPPER, torch.float32))
    assert BACKENDS["flash"].problem(DeviceFacts("cpu"), torch.float32) is None


def test_shapes_are_those_of_the_model() -> None:
    spec = ModelFolder(cli.EMBEDDED_MODEL).spec
    with META:
        config = builders_of(cli.EMBEDDED_MODEL)["transformer"]().config
        published = blueprints.builders_of(load_manifest().model("self-forcing-dmd"))["transformer"]().config
    frame = (spec.height // spec.spatial_stride // 2) * (spec.width // spec.spatial_stride // 2)
    assert AttentionShapes.of(config, spec) == AttentionShapes(
        3, 64, 3 * frame, (3 * frame, spec.window_frames * frame, spec.text_len)
    )
    real = AttentionShapes.of(published, load_manifest().model("self-forcing-dmd").spec)
    assert real == AttentionShapes(12, 128, 4680, (4680, 32760, 512))


# ---- the kernels


@pytest.mark.parametrize("name", ["flash", "math"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_kernels_of_the_cpu_give_exact_results(name: str, dtype: torch.dtype) -> None:
    kernel = BACKENDS[name].make(DeviceFacts("cpu"))
    given = [tensor.to(dtype) for tensor in tensors()]
    found = attention(*given, None, kernel)
    assert found.shape == (2, 10, 3, 16) and found.dtype == dtype
    torch.testing.assert_close(found.float(), exact_attention(*given), rtol=0, atol=1e-6 if dtype != BF16 else 0.02)


def test_exact_attention_is_attention() -> None:
    torch.testing.assert_close(exact_attention(*tensors()), attention(*tensors()), rtol=0, atol=1e-6)


def test_masks_and_gradients_go_the_usual_way() -> None:
    query, key, value = tensors(10)

    def never(*_: torch.Tensor) -> torch.Tensor:
        raise AssertionError("kernels know neither")

    mask = torch.ones(10, 10, dtype=torch.bool).tril()
    assert torch.equal(attention(query, key, value, mask, never), attention(query, key, value, mask))
    assert attention(query.requires_grad_(), key, value, None, never).requires_grad


@pytest.mark.parametrize("answer", ["a tensor", "with sums"])
def test_a_package_becomes_an_operator(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, calls = f"test_{answer.replace(' ', '_')}", []

    def function(query, key, value, **settings):
        calls.append(settings)
        out = attention(query, key, value)
        return out if answer == "a tensor" else (out, out.sum())

    package = types.ModuleType("a_package")
    package.attend = function
    monkeypatch.setitem(sys.modules, "a_package", package)
    kernel = attention_backends._operator(name, "a_package", "attend", tensor_layout="NHD")
    torch.testing.assert_close(attention(*tensors(), None, kernel), attention(*tensors()))
    assert calls == [{"tensor_layout": "NHD"}]
    # The compiler does not look into it, and knows its shape.
    compiled = torch.compile(lambda *given: 2 * attention(*given, None, kernel), fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        torch.testing.assert_close(compiled(*tensors()), 2 * attention(*tensors()))


@pytest.mark.parametrize("name", ["sdpa", "flash", "math"])
def test_a_block_with_a_kernel_compiles_to_one_graph(name: str) -> None:
    model = small_transformer()
    model.use_attention(BACKENDS[name].make(DeviceFacts("cpu")))
    with torch.inference_mode():
        text, latents, time = random_text(model), random_latents(3), torch.zeros(1, 3)
        plain = model(latents, time, text)
        for block in model.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(model(latents, time, text), plain, rtol=0, atol=1e-5)


# ---- the choice


def slow_down(factor: float) -> Any:
    return lambda facts: lambda query, key, value: attention(query, key, value) * factor


def probe(backends: dict[str, Backend], times: dict[str, float]) -> AttentionChoice:
    """The choice on a Hopper that is told to take these times, call by call in the order of the backends."""
    usable = iter([times[name] for name in backends if name in times] * 2)
    return fastest(SHAPES, CPU, torch.float32, HOPPER, backends, lambda call: (call(), next(usable))[1])


PLAIN = Backend("torch", lambda facts: None)
RIGHT, WRONG = Backend("right", slow_down(1)), Backend("wrong", slow_down(1.01))
NEVER = Backend("NaN", slow_down(float("nan")))


def test_the_fastest_that_is_right_is_taken() -> None:
    choice = probe({"sdpa": PLAIN, "quick": RIGHT, "wrong": WRONG, "nan": NEVER}, {"sdpa": 3.0, "quick": 2.0})
    assert choice.name == "quick" and choice.kernel is not None
    assert choice.milliseconds == {"sdpa": 6.0, "quick": 4.0}
    assert "off by 1.0% in 70 x 70 tokens" in choice.unusable["wrong"] and "nan%" in choice.unusable["nan"]


def test_a_tie_is_not_decided_by_chance() -> None:
    choice = probe({"sdpa": PLAIN, "quick": RIGHT}, {"sdpa": 2.05, "quick": 2.0})
    assert (choice.name, choice.kernel) == ("sdpa", None)


def test_what_fails_or_approximates_is_passed_over() -> None:
    def broken(facts: DeviceFacts) -> Any:
        raise ImportError("undefined symbol: _ZN3c10\nand a long story")

    def never(call: Any) -> float:
        call()
        return 1.0

    backends = {
        "sdpa": PLAIN,
        "math": replace(RIGHT, reference=True),
        "broken": Backend("broken", broken),
        "rough": replace(RIGHT, approximate=True),
        "elsewhere": replace(RIGHT, lacks=lambda facts: f"not on {facts}"),
    }
    choice = fastest(SHAPES, CPU, torch.float32, HOPPER, backends, never)
    assert choice.name == "sdpa" and set(choice.milliseconds) == {"sdpa"}
    assert choice.unusable == {
        "broken": "it fails here (ImportError: undefined symbol: _ZN3c10)",
        "rough": "approximate: only where it is asked for",
        "elsewhere": "not on a GPU of capability 9.0",
    }


def test_if_none_is_right_it_says_why_of_each() -> None:
    backends = {"sdpa": replace(WRONG, title="torch"), "nan": NEVER, "math": replace(RIGHT, reference=True)}
    with pytest.raises(OptionUnavailable) as raised:
        probe(backends, {})
    assert str(raised.value).startswith("No attention gives the right numbers on a GPU of capability 9.0. sdpa: its")
    assert "off by 1.0%" in str(raised.value) and "nan: its result is off by nan%" in str(raised.value)
    choice = probe({"sdpa": WRONG, "slow": RIGHT}, {"slow": 9.0})
    assert choice.name == "slow" and set(choice.unusable) == {"sdpa"}


def test_the_real_list_survives_a_gpu_that_is_not_there() -> None:
    """Every kernel of a Hopper fails on this machine, and is told instead of raised."""
    choice = fastest(SHAPES, CPU, BF16, HOPPER, BACKENDS, lambda call: (call(), 1.0)[1])
    assert choice.name == "sdpa" and {"cudnn", "efficient", "fa3", "fa2"} <= set(choice.unusable)
    assert "fails here" in choice.unusable["cudnn"]


def test_probing_leaves_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    choose_attention("flash", SHAPES, CPU, torch.float32)
    assert torch.equal(torch.rand(1), expected)


def test_a_cpu_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_backends, "_checked", lambda *_: pytest.fail("nothing to choose"))
    assert choose_attention("auto", SHAPES, CPU, torch.float32) == AttentionChoice("sdpa", None)
    assert choose_attention("sdpa", SHAPES, CPU, torch.float32).title == "PyTorch's choice"


def test_forced_ones_are_taken_or_refused() -> None:
    assert choose_attention("math", SHAPES, CPU, torch.float32).name == "math"
    with pytest.raises(OptionUnavailable) as raised:
        choose_attention("cudnn", SHAPES, CPU, torch.float32)
    assert str(raised.value) == (
        "Attention 'cudnn' cannot be used: needs an NVIDIA GPU from Ampere on, not a CPU. Usable here: auto, "
        "sdpa, flash, math."
    )
    with pytest.raises(OptionUnavailable, match="'flash2' is unknown. Usable here: auto, sdpa"):
        choose_attention("flash2", SHAPES, CPU, torch.float32)
    with pytest.raises(OptionUnavailable, match="off by 1.0%"):
        choose_attention("odd", SHAPES, CPU, torch.float32, {"odd": WRONG})
    rough = {"sage": replace(WRONG, approximate=True)}
    assert choose_attention("sage", SHAPES, CPU, torch.float32, rough).title == "SageAttention (8 bits, approximate)"


# ---- where it goes


def test_it_attends_in_every_layer_also_after_loading_anew() -> None:
    calls = []

    def kernel(*given: torch.Tensor) -> torch.Tensor:
        calls.append(given[1].shape[1])
        return attention(*given)

    switches = TransformerOptions(small_transformer)
    other = TransformerOptions(small_transformer).apply(fp8=False, compile=False)
    switches.use_attention(kernel)
    for fp8 in (False, True, False):
        model = switches.apply(fp8=fp8, compile=False)
        calls.clear()
        with torch.inference_mode():
            text = random_text(model)
            model(random_latents(3), torch.zeros(1, 3), text)
        assert len(calls) == 4  # two layers: themselves and the text
    assert other.blocks[0].kernel is None  # another pipeline's


def test_two_pipelines_have_their_own(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model_folder(tmp_path)
    request = GenerationRequest(prompt="a red balloon", seed=1, seconds=3, fps=12)
    auto = SelfForcingPipeline.from_pretrained(folder, device="cpu")
    plain = SelfForcingPipeline.from_pretrained(folder, device="cpu", attention="math")
    videos = [pipe.generate(request) for pipe in (auto, plain, auto)]
    assert [video.run.applied["attention"] for video in videos] == [
        "PyTorch's choice",
        "plain arithmetic",
        "PyTorch's choice",
    ]
    assert np.array_equal(videos[0].frames, videos[2].frames)
    assert np.abs(videos[0].frames.astype(int) - videos[1].frames).max() <= 1


def test_command_lines_take_it(tmp_path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(write_model_folder(tmp_path / "model"))
    arguments = ["a red balloon", "--model", folder, "--seconds", "1", "--output", str(tmp_path / "out.mp4"), "--json"]
    assert cli.main([*arguments, "--attention", "math"]) == 0
    assert json.loads(capsys.readouterr().out)["applied"]["attention"] == "plain arithmetic"
    assert cli.main([*arguments, "--attention", "cudnn"]) == 2
    assert "Attention 'cudnn' cannot be used: needs an NVIDIA GPU" in capsys.readouterr().err
    for main in (cli.main, app.main):
        assert main(["--attention", "best"] if main is app.main else [*arguments, "--attention", "best"]) == 2
        assert "invalid choice: 'best'" in capsys.readouterr().err
    given = []
    monkeypatch.setattr(app, "load_pipeline", lambda folder, device, **named: given.append(named))
    monkeypatch.setattr(app, "serve", lambda worker, *_: worker.wait_ready())
    app.main(["--attention", "flash"])
    assert given == [{"memory": "auto", "attention": "flash"}]


def test_the_doctor_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    report = doctor.examine(str(cli.EMBEDDED_MODEL), "cpu")
    assert report.attention["chosen"] == "sdpa" and "not a CPU" in report.attention["unusable"]["fa3"]
    assert "Attention   PyTorch's choice, untimed" in doctor.as_text(report)
    assert "FP8 is      weights only, because a CPU" in doctor.as_text(report)
    on_a_gpu = {
        "chosen": "cudnn",
        "title": "cuDNN",
        "milliseconds": {"sdpa": 3.0, "cudnn": 2.0},
        "unusable": {"fa3": "no"},
    }
    float8 = {"row_wise": False, "why": "torchao is not installed (pip install it)", "sentence": "Weights only."}
    text = doctor.as_text(replace(report, kind="cuda", attention=on_a_gpu, float8=float8))
    assert "Attention   cuDNN (a layer takes sdpa 3.00 ms, cudnn 2.00 ms)" in text and "not fa3: no" in text
    assert "pip install it" in " ".join(doctor.advice(replace(report, float8=float8)))
