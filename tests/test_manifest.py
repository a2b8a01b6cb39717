"""The list of published checkpoints: what ships, and one sentence for whatever could be wrong with another one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import InvalidRequest, WeightsError
from tests.hub import write_published
from weights.manifest import MANIFEST_FILE, load_manifest
from weights.progress import about


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("published"))


def test_the_manifest_that_ships() -> None:
    manifest = load_manifest()
    assert {*manifest.models} >= {
        "self-forcing-dmd",
        "self-forcing-sid",
        "self-forcing-sid-v2",
        "self-forcing-gan",
        "self-forcing-ode-init",
        "causal-forcing-chunkwise",
        "causal-forcing-framewise",
        "causal-forcing-pp-2step",
        "causal-forcing-pp-1step",
    }
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


# As published: written down here a second time, so that a slip in the manifest is noticed.
WAN = ("Wan-AI/Wan2.1-T2V-1.3B", "37ec512624d61f7aa208f7ea8140a131f93afc9a")
COMFY = ("Comfy-Org/Wan_2.1_ComfyUI_repackaged", "617a7633e636506f850e043bc4605f290a466a8e")
TAEW = ("ionden/taew2.1", "2ac5ae1c3291a8607a2d6c423b9a0337cef45f2b")
SELF_FORCING = ("gdhe17/Self-Forcing", "2f8b779212da279d212c22a509b66ad6552f350e")
CAUSAL_FORCING = ("zhuhz22/Causal-Forcing", "2f8eb8bb6eeb1238da9d13e5420d342a74d634a6")
PUBLISHED = [
    # id, (repository, revision), file, bytes, sha256, key
    (
        "umt5-xxl-bf16",
        WAN,
        "models_t5_umt5-xxl-enc-bf16.pth",
        11_361_920_418,
        "7cace0da2b446bbbbc57d031ab6cf163a3d59b366da94e5afe36745b746fd81d",
        None,
    ),
    (
        "umt5-xxl-fp8",
        COMFY,
        "split_files/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors",
        6_735_906_897,
        "c3355d30191f1f066b26d93fba017ae9809dce6c627dda5f6a66eaa651204f68",
        None,
    ),
    (
        "umt5-xxl-tokenizer",
        WAN,
        "google/umt5-xxl/spiece.model",
        4_548_313,
        "e3909a67b780650b35cf529ac782ad2b6b26e6d1f849d3fbb6a872905f452458",
        None,
    ),
    (
        "umt5-xxl-tokenizer",
        WAN,
        "google/umt5-xxl/tokenizer.json",
        16_837_417,
        "6e197b4d3dbd71da14b4eb255f4fa91c9c1f2068b20a2de2472967ca3d22602b",
        None,
    ),
    (
        "umt5-xxl-tokenizer",
        WAN,
        "google/umt5-xxl/tokenizer_config.json",
        61_728,
        "ed9a3a8b0faa71a70a32847e0435fe036e6e112d4df4edb7bb48a921e344dc05",
        None,
    ),
    (
        "umt5-xxl-tokenizer",
        WAN,
        "google/umt5-xxl/special_tokens_map.json",
        6_623,
        "7b8a9f5040adb67b5805abdfd42c1f8d0f3d0e711f10726580eb3789cd0ad61d",
        None,
    ),
    (
        "wan2.1-vae",
        WAN,
        "Wan2.1_VAE.pth",
        507_609_880,
        "38071ab59bd94681c686fa51d75a1968f64e470262043be31f7a094e442fd981",
        None,
    ),
    (
        "taew2_1",
        TAEW,
        "taew2_1.safetensors",
        22_642_902,
        "04766eac0221b5390b985ae3fdcca652cbb4b1e8b82b28ea7ff89dfad1b1a93f",
        None,
    ),
    (
        "self-forcing-dmd",
        SELF_FORCING,
        "checkpoints/self_forcing_dmd.pt",
        5_676_252_553,
        "a0413986d9734e02c09504e1520f5697ba6df731bb2f0f35577485e9cc8f56a3",
        "generator_ema",
    ),
    ("self-forcing-sid", SELF_FORCING, "checkpoints/self_forcing_sid.pt", None, None, "generator_ema"),
    ("self-forcing-sid-v2", SELF_FORCING, "checkpoints/self_forcing_sid_v2.pt", None, None, "generator_ema"),
    ("self-forcing-gan", SELF_FORCING, "checkpoints/self_forcing_gan.pt", None, None, "generator_ema"),
    ("self-forcing-ode-init", SELF_FORCING, "checkpoints/ode_init.pt", None, None, "generator"),
    (
        "causal-forcing-chunkwise",
        CAUSAL_FORCING,
        "chunkwise/causal_forcing.pt",
        5_676_282_643,
        "cf75ee5cc6f4e2e336c59c973f5544655d8f0aa481761efe6de1b9cb2eb0cd9d",
        "generator",
    ),
    (
        "causal-forcing-framewise",
        CAUSAL_FORCING,
        "framewise/causal_forcing.pt",
        5_676_220_819,
        "70cae8c3b0b7191fa9840b4f6fe8655ba0cf5c6520c87ba85a46b861c3735cd3",
        "generator_ema",
    ),
    (
        "causal-forcing-pp-2step",
        CAUSAL_FORCING,
        "causal-forcing++/framewise-2step.pt",
        5_676_220_819,
        "8f899a016dffb9539788fac82c6200e43ef6e23b6e61ec6b885bb507a760ce42",
        "generator_ema",
    ),
    (
        "causal-forcing-pp-1step",
        CAUSAL_FORCING,
        "causal-forcing++/framewise-1step.pt",
        5_676_220_819,
        "bdb1b475fc88d528f510158a0990cd457f02c661b527ceb11ca9e4728533e2d0",
        "generator_ema",
    ),
]


def test_every_entry_is_the_published_file() -> None:
    manifest = load_manifest()
    parts = [*manifest.parts.values(), *(model.transformer for model in manifest.models.values())]
    found = [
        (part.id, (part.repository, part.revision), file.path, file.bytes, file.sha256, part.key)
        for part in parts
        for file in part.files
    ]
    assert found == PUBLISHED


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


def test_unknown_sizes_are_estimated_from_the_same_network() -> None:
    manifest = load_manifest()
    sid, dmd = manifest.model("self-forcing-sid"), manifest.model("self-forcing-dmd")
    assert sid.transformer.known_bytes is None
    known = [model.transformer.known_bytes for model in manifest.models.values()]
    assert manifest.likely_bytes(sid.transformer) == max(size for size in known if size is not None)
    assert manifest.likely_bytes(dmd.transformer) == dmd.transformer.known_bytes
    alone = replace(sid.transformer, config=MANIFEST_FILE)
    assert manifest.likely_bytes(alone) is None
    assert about(17_589_879_834) == "about 17.6 GB" and about(203_000) == "about 203 kB"
