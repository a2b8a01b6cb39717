"""The list of published checkpoints: what ships, and one sentence for whatever could be wrong with another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import InvalidRequest, WeightsError
from tests.hub import write_published
from weights.manifest import load_manifest


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("published"))


def test_the_manifest_that_ships() -> None:
    manifest = load_manifest()
    assert list(manifest.models) == [
        "self-forcing-dmd",
        "self-forcing-sid",
        "self-forcing-sid-v2",
        "self-forcing-gan",
        "self-forcing-ode-init",
        "causal-forcing-chunkwise",
        "causal-forcing-framewise",
        "causal-forcing-pp-2step",
        "causal-forcing-pp-1step",
    ]
    dmd = manifest.model("self-forcing-dmd")
    assert dmd.transformer.known_bytes == 5_676_252_553 and dmd.transformer.key == "generator_ema"
    assert (dmd.spec.fps, dmd.spec.shift, dmd.spec.window_frames, dmd.spec.frames_per_block) == (6, 5.0, 21, 3)
    assert [part.kind for part in dmd.parts] == ["transformer", "text_encoder", "tokenizer", "vae", "taehv"]
    fast = manifest.model("causal-forcing-pp-1step").spec
    assert fast.denoising_steps == (1000,) and fast.first_block_steps == (1000, 750, 500, 250)
    assert manifest.parts["umt5-xxl-fp8"].known_bytes == 6_735_906_897
    for model in manifest.models.values():
        assert model.spec.frames_in(21 // model.spec.frames_per_block) == 81
        for part in model.parts:
            assert part.licence.terms and "diffusion_pytorch_model" not in part.files[0].path


def test_unknown_names_are_answered_with_the_known_ones(published: Path) -> None:
    manifest = load_manifest(published)
    with pytest.raises(InvalidRequest, match="no model 'tiny'. Choose one of: small, other"):
        manifest.model("tiny")
    with pytest.raises(InvalidRequest, match="no text encoder 'vae'. Choose one of: text, text-fp8"):
        manifest.part("vae", "text_encoder")


CHANGES: list[tuple[str, list[Any], Any, str]] = [
    # name, path to the field, its new value (... for none), part of the sentence
    ("version", ["version"], 2, "has version 2; this program reads 1"),
    ("no models", ["models"], ..., "the manifest has no models"),
    ("not a list", ["parts"], {}, "parts of the manifest is {}, but must be of type list"),
    ("left over", ["author"], "me", "the manifest has the unknown field 'author'"),
    ("unknown field", ["models", 0, "colour"], "red", "'small' has the unknown field 'colour'"),
    ("no id", ["models", 0, "id"], ..., "entry 1 of models of the manifest has no id"),
    ("bad id", ["models", 0, "id"], "../up", "id of '../up' is '../up', but must be of the form"),
    ("same id", ["models", 1, "id"], "small", "id of 'small' is 'small', but must be used only once"),
    ("id of a part", ["models", 1, "id"], "vae", "must be used only once"),
    ("kind", ["models", 0, "kind"], "vae", "must be 'transformer' for a model"),
    ("shared transformer", ["parts", 0, "kind"], "transformer", "a transformer is an entry of models"),
    ("unknown kind", ["parts", 0, "kind"], "audio", "must be one of transformer, text_encoder"),
    ("branch", ["models", 0, "revision"], "main", "revision of 'small' is 'main', but must be of the form"),
    ("short hash", ["models", 0, "revision"], "0123456", "must be of the form"),
    ("repository", ["models", 0, "repository"], "https://x/y/z", "repository of 'small'"),
    ("no files", ["models", 0, "files"], [], "must be one file, or several of a tokenizer"),
    ("two files", ["models", 0, "files", 1], {"path": "b.pt", "bytes": 1, "sha256": None}, "must be one file"),
    ("way out", ["models", 0, "files", 0, "path"], "a/../../b.pt", "must be a path inside the repository"),
    ("absolute", ["models", 0, "files", 0, "path"], "/etc/passwd", "must be a path inside the repository"),
    ("bytes", ["models", 0, "files", 0, "bytes"], -1, "must be at least 1, or null"),
    ("bytes of words", ["models", 0, "files", 0, "bytes"], "many", "must be of type int"),
    ("boolean bytes", ["models", 0, "files", 0, "bytes"], True, "must be of type int"),
    ("sha256", ["models", 0, "files", 0, "sha256"], "abc", "sha256 of entry 1 of files of 'small'"),
    ("licence", ["models", 0, "licence"], "MIT", "the licence of 'small' is 'MIT', but must be an object"),
    ("no terms", ["models", 0, "licence", "terms"], " ", "must be filled in"),
    ("config", ["models", 0, "config"], "nowhere.json", "must be a file beside the manifest"),
    ("no config", ["models", 0, "config"], None, "null for a tokenizer and a file for everything else"),
    ("dtype", ["models", 0, "dtype"], "int8", "must be one of bfloat16"),
    ("unknown part", ["models", 0, "parts", 0], "nothing", "must be among text, text-fp8"),
    ("missing part", ["models", 0, "parts"], ["text", "words"], "complete: the vae is missing"),
    ("two encoders", ["models", 0, "parts"], ["text", "text-fp8", "words", "vae"], "must be one of each kind"),
    ("setting", ["models", 0, "settings", "shift"], 0, "'small' has settings that cannot work: .*shift is 0"),
    ("unknown setting", ["models", 0, "settings", "colour"], 1, "unknown settings colour"),
    ("window", ["models", 0, "settings", "window_frames"], 3, "leaves -3 recent frames"),
]


@pytest.mark.parametrize(("path", "value", "sentence"), [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES])
def test_a_bad_manifest_is_one_sentence(published: Path, path: list[Any], value: Any, sentence: str) -> None:
    data = json.loads(published.read_text())
    place = data
    for step in path[:-1]:
        place = place[step]
    if value is ...:
        del place[path[-1]]
    elif isinstance(place, list) and path[-1] == len(place):
        place.append(value)
    else:
        place[path[-1]] = value
    bad = published.with_name("bad.json")
    bad.write_text(json.dumps(data))
    with pytest.raises(WeightsError, match=sentence) as raised:
        load_manifest(bad)
    assert "\n" not in str(raised.value) and str(bad.parent) not in str(raised.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "3"])
def test_what_is_no_manifest_is_said(published: Path, content: str) -> None:
    bad = published.with_name("bad.json")
    bad.write_text(content)
    with pytest.raises(WeightsError, match="[Mm]anifest"):
        load_manifest(bad)
