"""Checkpoint files of every kind and condition on their way to a transformer folder. (Downloads: `test_weights.py`.)"""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoint import strip_prefixes, transformer_from_wan
from pipeline.errors import DownloadError, WeightsError
from pipeline.transformer import CausalWanTransformer3DModel
from tests.hub import golden_weights
from weights.convert import convert_transformer, write_transformer, write_weights

WEIGHTS, ABOUT = golden_weights("case3_kv_chunkwise.safetensors")
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(ABOUT["model"]))
    return path


@pytest.fixture
def converted(tmp_path: Path, config: Path) -> Callable[..., Path]:
    def convert(content: Any, name: str = "file.pt", **more: Any) -> Path:
        source = tmp_path / name
        if isinstance(content, bytes):
            source.write_bytes(content)
        elif name.endswith(".safetensors"):
            save_file(content, source)
        else:
            torch.save(content, source)
        convert_transformer(source, tmp_path / "out", config, **more)
        return tmp_path / "out"

    return convert


def named(pattern: str) -> Tensors:
    """The weights under names of another form; `*` stands for the published one."""
    return {pattern.replace("*", name): tensor for name, tensor in WEIGHTS.items()}


def inside(infix: str) -> Tensors:
    """The infix before the last part of every name, where checkpointed and compiled modules leave it."""
    return {"model." + name.replace(".", f".{infix}", 1): tensor for name, tensor in WEIGHTS.items()}


LAYOUTS: dict[str, Any] = {
    "flat": WEIGHTS,
    "model": named("model.*"),
    "generator": {"generator": named("model.*"), "critic": {"x": torch.zeros(1)}},
    "generator_ema": {"generator": {"model.bad": torch.zeros(1)}, "generator_ema": named("model.*"), "step": 3},
    "trainer": {"model": WEIGHTS},
    "fsdp": {"generator_ema": named("model._fsdp_wrapped_module.*")},
    "fsdp inside": {"generator_ema": inside("_fsdp_wrapped_module.")},
    "checkpointed": {"generator": inside("_checkpoint_wrapped_module.")},
    "compiled": {"generator": named("_orig_mod.model.*")},
    "data parallel": {"generator": named("module.model.*")},
    "all at once": {"generator": named("module._orig_mod.model._fsdp_wrapped_module.*")},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_transformer(converted, layout: str) -> None:
    model = CausalWanTransformer3DModel.from_pretrained(converted(LAYOUTS[layout]))
    expected = transformer_from_wan(ABOUT["model"], WEIGHTS).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_safetensors_and_old_torch_files_too(converted, tmp_path: Path, config: Path) -> None:
    first = load_file(converted(named("model.*"), "file.safetensors") / WEIGHTS_FILE)
    torch.save({"generator": WEIGHTS}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    convert_transformer(tmp_path / "old.pth", tmp_path / "out2", config)
    second = load_file(tmp_path / "out2" / WEIGHTS_FILE)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_key_can_be_chosen_and_the_type_too(converted) -> None:
    other = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
    out = converted({"generator_ema": WEIGHTS, "generator": other}, key="generator", dtype=torch.float16)
    found = load_file(out / WEIGHTS_FILE)
    assert torch.equal(found["proj_out.bias"], other["head.head.bias"].half())


def test_a_download_whose_entry_is_called_otherwise_is_taken(tmp_path: Path, config: Path) -> None:
    torch.save({"generator": named("model.*")}, tmp_path / "generator.pt")
    settings = json.loads(config.read_text())
    write_transformer(tmp_path / "generator.pt", tmp_path, settings, "generator_ema", None, strict=False)
    assert torch.equal(load_file(tmp_path / WEIGHTS_FILE)["proj_out.bias"], WEIGHTS["head.head.bias"])
    with pytest.raises(WeightsError, match="no entry 'generator_ema'; it has generator"):
        write_transformer(tmp_path / "generator.pt", tmp_path, settings, "generator_ema", None)


def test_what_is_converted_already_is_said_to_be(converted) -> None:
    with pytest.raises(WeightsError, match="in diffusers' layout already"):
        converted(transformer_from_wan(ABOUT["model"], WEIGHTS).state_dict(), "done.safetensors")


def test_large_weights_are_written_in_pieces_that_load(tmp_path: Path) -> None:
    model = transformer_from_wan(ABOUT["model"], WEIGHTS)
    model.save_config(tmp_path)
    write_weights(model.state_dict(), tmp_path, "diffusion_pytorch_model", None, piece_bytes=200_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    again = CausalWanTransformer3DModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def without(name: str) -> Tensors:
    return {key: tensor for key, tensor in WEIGHTS.items() if key != name}


WRONG: dict[str, tuple[Any, str]] = {
    "missing": (without("head.head.bias"), r"1 tensors are missing \(first: proj_out.bias\)"),
    "extra": (WEIGHTS | {"lora": torch.zeros(1)}, r"1 are unknown \(first: lora\)"),
    "shape": (WEIGHTS | {"head.head.bias": torch.zeros(3)}, r"proj_out.bias has shape \(3,\), the config says"),
    "type": (WEIGHTS | {"head.head.bias": torch.zeros(64, dtype=torch.int64)}, "torch.int64, not of real numbers"),
    "nan": (WEIGHTS | {"head.head.bias": torch.full((64,), torch.nan)}, "proj_out.bias holds invalid numbers"),
    "inf": (WEIGHTS | {"head.head.bias": torch.full((64,), torch.inf)}, "proj_out.bias holds invalid numbers"),
    "twice": (WEIGHTS | {"model.head.head.bias": torch.zeros(64)}, "holds head.head.bias twice"),
    "a list": ([1, 2], "holds a list, not a dictionary"),
    "no tensors": ({"generator": {"a": 1}}, "does not hold a plain set of tensors"),
    "a number under the key": ({"generator": 3}, "does not hold a plain set of tensors"),
    "nothing": ({}, "tensors are missing"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_does_not_fit_is_said_and_leaves_nothing(converted, tmp_path: Path, kind: str) -> None:
    content, sentence = WRONG[kind]
    with pytest.raises(WeightsError, match=sentence) as raised:
        converted(content)
    assert str(tmp_path) not in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "file.pt"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dim": "wide"}, "dim is 'wide', but must be a whole number"),
        ({"num_layers": None}, "num_layers is None"),
        ({"num_heads": 7}, "its width a multiple of its heads"),
        ({"model_type": "i2v"}, "of type 'i2v'"),
        ({"num_layers": 4}, "tensors are missing"),
        ({"dim": 48}, "has shape"),
        ({"patch_size": 3}, "one of its patch_size"),
        ({"patch_size": [1]}, "has shape"),
        ({"patch_size": "abc"}, "one of its patch_size"),
        ({"in_dim": "many"}, "one of its patch_size"),
        ({"out_dim": -4}, "one of its patch_size"),
        ({"text_dim": [3]}, "one of its patch_size"),
        ({"freq_dim": None}, "one of its patch_size"),
    ],
)
def test_a_config_that_does_not_fit_is_said(tmp_path: Path, config: Path, change: dict, sentence: str) -> None:
    config.write_text(json.dumps(ABOUT["model"] | change))
    torch.save(WEIGHTS, tmp_path / "file.pt")
    with pytest.raises(WeightsError, match=sentence):
        convert_transformer(tmp_path / "file.pt", tmp_path / "out", config)


@pytest.mark.parametrize("content", ["", "{", "[]", "3"])
def test_a_config_that_is_none_is_said(tmp_path: Path, config: Path, content: str) -> None:
    config.write_text(content)
    torch.save(WEIGHTS, tmp_path / "file.pt")
    with pytest.raises(WeightsError, match=r"config config\.json"):
        convert_transformer(tmp_path / "file.pt", tmp_path / "out", config)


def as_bytes(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("number", range(40))
def test_a_truncated_file_is_never_converted(converted, number: int) -> None:
    whole = as_bytes({"generator": WEIGHTS})
    length = random.Random(number).randrange(len(whole))
    with pytest.raises(WeightsError, match="file.pt is damaged"):
        converted(whole[:length])


class Gadget:
    """Something that runs when it is unpickled carelessly."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple:
        return self._call


@pytest.mark.parametrize(
    "wrap",
    [
        lambda gadget: gadget,
        lambda gadget: {"generator": gadget},
        lambda gadget: {"generator_ema": WEIGHTS | {"x": gadget}},
        lambda gadget: [gadget],
    ],
    ids=["top", "entry", "nested", "list"],
)
@pytest.mark.parametrize("function", [os.mkdir, exec, eval], ids=["os.mkdir", "exec", "eval"])
@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_nothing_in_a_file_is_executed(converted, tmp_path: Path, wrap, function, form: str) -> None:
    trap = tmp_path / "trap"
    gadget = Gadget(function, str(trap) if function is os.mkdir else f"__import__('os').mkdir({str(trap)!r})")
    content = as_bytes(wrap(gadget)) if form == "torch" else pickle.dumps(wrap(gadget))
    with pytest.raises(WeightsError, match="not a checkpoint of plain tensors"):
        converted(content)
    assert not trap.exists()


def test_a_folder_with_the_temporary_name_is_not_touched(converted, tmp_path: Path) -> None:
    mine = tmp_path / "out.partial" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("precious")
    with pytest.raises(WeightsError, match=r"out\.partial exists already"):
        converted(WEIGHTS)
    assert mine.read_text() == "precious" and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("code", "advice"), [(errno.ENOSPC, "Free some space"), (errno.EACCES, "who may write there")])
def test_what_cannot_be_written_is_said_with_what_helps(converted, tmp_path, monkeypatch, code, advice) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("weights.convert.save_file", refuse)
    with pytest.raises(DownloadError, match=advice) as raised:
        converted(WEIGHTS)
    assert ("Free some space" in str(raised.value)) == (code == errno.ENOSPC)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "file.pt"]


def test_no_more_than_one_piece_exists_at_a_time(tmp_path: Path) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    most = [0]

    def finish(name: str, tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        made.append(weakref.ref(copy))
        most[0] = max(most[0], sum(ref() is not None for ref in made))
        return copy

    state = {f"w{number}": torch.zeros(1000) for number in range(6)}
    write_weights(state, tmp_path, "model", None, finish, piece_bytes=8000)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3 and most == [2]


def test_names_that_only_look_like_prefixes_stay() -> None:
    assert list(strip_prefixes({"blocks.0.model.weight": torch.zeros(1)})) == ["blocks.0.model.weight"]
