"""The pipeline on a small random model folder."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch._dynamo.utils import counters

import pipeline as package
from pipeline import GenerationRequest, SelfForcingPipeline, device
from pipeline.blocks import FrameBlock
from pipeline.control import RunControl
from pipeline.errors import (
    DeadlineExceeded,
    OptionUnavailable,
    SelfForcingError,
    WeightsError,
)
from pipeline.folder import ModelFolder, index_entries
from pipeline.memory import builders_of
from tests.hub import write_umt5_tokenizer
from tests.small import SMALL_SETTINGS, write_model_folder

PROMPT = "a red balloon rises over the mountains"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pipe(folder: Path) -> SelfForcingPipeline:
    return SelfForcingPipeline.from_pretrained(folder, device="cpu")


def request(**changes: Any) -> GenerationRequest:
    return GenerationRequest(**({"prompt": PROMPT, "seed": 7, "seconds": 3} | changes))


def frames(pipe: SelfForcingPipeline, **changes: Any) -> np.ndarray:
    return pipe.generate(request(**changes)).frames


def test_public_names() -> None:
    assert set(package.__all__) >= {"SelfForcingPipeline", "GenerationRequest"}
    assert all(getattr(package, name).__name__ == name for name in package.__all__)


def test_a_video_does_not_depend_on_torchs_default_dtype(tmp_path: Path) -> None:
    """Which is another one while weights are loaded on another thread."""
    noisy = write_model_folder(tmp_path, context_noise=123.4)  # of which nothing is exact in bfloat16
    plain = frames(SelfForcingPipeline.from_pretrained(noisy, device="cpu"))
    pipe = SelfForcingPipeline.from_pretrained(noisy, device="cpu")
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert np.array_equal(frames(pipe), plain)
    finally:
        torch.set_default_dtype(torch.float32)


def test_blocks_are_streamed(pipe: SelfForcingPipeline) -> None:
    blocks = list(pipe.stream(request()))
    assert [block.index for block in blocks] == [0, 1, 2]
    assert [block.frames.shape for block in blocks] == [(9, 16, 32, 3), (12, 16, 32, 3), (12, 16, 32, 3)]
    assert [block.start_frame for block in blocks] == [0, 9, 21]
    assert all(block.frames.dtype == np.uint8 for block in blocks)
    assert [block.elapsed for block in blocks] == sorted(block.elapsed for block in blocks)
    run = blocks[0].run
    assert (run.seed, run.fps, run.num_blocks, run.num_frames, run.seconds) == (7, 12, 3, 33, 33 / 12)
    assert run.applied == {
        "device": "cpu",
        "precision": "float32",
        "attention": "PyTorch's choice",
        "decoder": "Wan VAE",
        "compile": "off",
    }
    assert len(run.weights_sha256) == 64


def test_generate_drains_the_stream(pipe: SelfForcingPipeline) -> None:
    video = pipe.generate(request())
    assert np.array_equal(video.frames, np.concatenate([block.frames for block in pipe.stream(request())]))
    assert (video.seed, video.fps) == (7, 12)
    assert 0 < video.time_to_first_frame < video.elapsed


def test_seed_and_prompt_make_the_clip(pipe: SelfForcingPipeline) -> None:
    first = frames(pipe)
    assert not np.array_equal(frames(pipe, seed=8), first)
    assert not np.array_equal(frames(pipe, prompt="a blue car"), first)


def test_a_stream_that_was_left_half_read_changes_nothing(pipe: SelfForcingPipeline) -> None:
    first = frames(pipe)
    abandoned = pipe.stream(request(seed=9))
    next(abandoned)
    assert np.array_equal(frames(pipe), first)


def test_a_random_seed_is_reported_and_reproduces(pipe: SelfForcingPipeline) -> None:
    one, two = pipe.generate(request(seed=-1)), pipe.generate(request(seed=-1))
    assert one.seed != two.seed
    assert np.array_equal(frames(pipe, seed=one.seed), one.frames)


def test_a_long_clip_begins_with_the_short_one(pipe: SelfForcingPipeline) -> None:
    short, long = frames(pipe, seconds=1), frames(pipe, seconds=8)
    assert len(short) == 9 and len(long) == 93
    assert np.array_equal(long[:9], short)


def test_fps_changes_the_number_of_frames_only(pipe: SelfForcingPipeline) -> None:
    slow, fast = frames(pipe, fps=6), frames(pipe, fps=24)
    assert (len(slow), len(fast)) == (21, 69)
    assert np.array_equal(fast[:21], slow)


def test_merged_clean_pass_changes_nothing(pipe: SelfForcingPipeline) -> None:
    merged = frames(pipe)
    pipe.merge_clean_pass = False
    apart = frames(pipe)
    pipe.merge_clean_pass = True
    # One rounding step of uint8 where float32 rounds differently.
    assert np.abs(merged.astype(int) - apart.astype(int)).max() <= 1


def test_the_first_block_may_take_other_steps(tmp_path: Path, pipe: SelfForcingPipeline) -> None:
    other = SelfForcingPipeline.from_pretrained(
        write_model_folder(tmp_path, denoising_steps=[1000], first_block_steps=[1000, 750, 500, 250]), device="cpu"
    )
    steps: list[int] = []
    forward = type(other._transformer.apply(fp8=False, compile=False)).forward
    other._transformer.apply(fp8=False, compile=False).forward = lambda latents, *args, **kwargs: (
        steps.append(latents.shape[1]),
        forward(other._transformer.apply(fp8=False, compile=False), latents, *args, **kwargs),
    )[1]
    first, *later = list(other.stream(request()))
    assert steps == [3, 3, 3, 3, 6, 6], "four steps, then one each, with the block before them in the same call"
    four = list(pipe.stream(request()))
    assert np.array_equal(first.frames, four[0].frames)
    assert not np.array_equal(later[0].frames, four[1].frames)


def test_context_noise_is_reproducible(tmp_path: Path) -> None:
    noisy = SelfForcingPipeline.from_pretrained(write_model_folder(tmp_path, context_noise=100.0), device="cpu")
    first = frames(noisy)
    assert np.array_equal(frames(noisy), first)
    noisy.merge_clean_pass = False
    assert np.abs(frames(noisy).astype(int) - first.astype(int)).max() <= 1


def test_options_act_on_the_next_run_and_can_be_switched_back(pipe: SelfForcingPipeline) -> None:
    plain = frames(pipe)
    taehv = pipe.generate(request(taehv=True))
    assert taehv.frames.shape == plain.shape and not np.array_equal(taehv.frames, plain)
    assert taehv.run.applied["decoder"].startswith("TAEHV")
    fp8 = pipe.generate(request(fp8=True))
    assert not np.array_equal(fp8.frames, plain)
    assert fp8.run.applied["precision"] == "float8 weights, float32 arithmetic"
    stored = {p.dtype for name, p in pipe._transformer._transformer.named_parameters() if "attn1.to_q.weight" in name}
    assert stored == {torch.float8_e4m3fn}
    assert np.array_equal(frames(pipe), plain)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compile_can_be_switched_on_and_off(pipe: SelfForcingPipeline) -> None:
    pipe.compiled.decoder_steps[False].backend = "eager"  # takes as long again; `test_compiling` has its calls
    plain, long = frames(pipe, seconds=5), frames(pipe, seconds=9)
    compiled = pipe.generate(request(seconds=5, compile=True))
    assert compiled.run.applied["compile"] == "on"
    assert np.abs(compiled.frames.astype(int) - plain).max() <= 1
    graphs = counters["stats"]["unique_graphs"]
    assert np.abs(frames(pipe, seconds=9, compile=True).astype(int) - long).max() <= 1
    assert counters["stats"]["unique_graphs"] == graphs  # a longer video compiles nothing new
    assert np.array_equal(frames(pipe, seconds=5), plain)


def test_a_folder_without_taehv_works_and_says_so(tmp_path: Path) -> None:
    bare = SelfForcingPipeline.from_pretrained(write_model_folder(tmp_path, taehv=False), device="cpu")
    assert "taehv" in bare.unavailable_options()
    for make in (bare.plan, bare.generate):
        with pytest.raises(OptionUnavailable, match="no TAEHV decoder"):
            make(request(taehv=True))
    assert len(frames(bare)) == 33


def test_the_published_tokenizer_spells_what_is_rare_in_bytes(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model")
    shutil.rmtree(folder / "tokenizer")
    write_umt5_tokenizer(folder / "tokenizer")
    tokenizer = ModelFolder(folder).load_tokenizer()
    ids = tokenizer("a Ω balloon", padding="max_length", max_length=10, truncation=True).input_ids
    spelt = ["\u2581a", "\u2581", "<0xCE>", "<0xA9>", "\u2581balloon", "</s>", *4 * ["<pad>"]]
    assert ids == tokenizer.convert_tokens_to_ids(spelt)
    assert Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json")).encode("a Ω balloon").ids == ids[:6]


@pytest.mark.parametrize(("has", "decoder"), [(True, "TAEHV in bfloat16"), (False, "TAEHV")])
def test_taehv_works_in_bfloat16_where_the_processor_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch, has: bool, decoder: str
) -> None:
    monkeypatch.setattr(device, "has_bfloat16", lambda device: has)
    plain = SelfForcingPipeline.from_pretrained(folder, "cpu", torch.float32).generate(request(taehv=True))
    mixed = SelfForcingPipeline.from_pretrained(folder, "cpu").generate(request(taehv=True))
    assert plain.run.applied["decoder"] == "TAEHV" and mixed.run.applied["decoder"] == decoder
    assert mixed.run.applied["precision"] == plain.run.applied["precision"] == "float32"
    differ = np.abs(mixed.frames.astype(int) - plain.frames)
    assert differ.max() > 0 and differ.mean() < 1 if has else not differ.any()


def test_taehv_is_there_where_the_index_says_so(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"taehv": None}))
    assert "taehv" not in builders_of(folder)
    assert "taehv" in SelfForcingPipeline.from_pretrained(folder, "cpu").unavailable_options()


def test_decoders_of_other_strides_are_refused(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model", temporal_stride=2)
    with pytest.raises(WeightsError, match="vae of small makes 8 pixels and 4 frames of a latent cell, but .* 2"):
        SelfForcingPipeline.from_pretrained(folder, "cpu")


def test_a_model_of_one_frame_blocks_played_fast_can_begin(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model", frames_per_block=1, window_frames=3, sink_frames=1, fps=60)
    pipe = SelfForcingPipeline.from_pretrained(folder, "cpu")
    pipe.warm_up()
    assert pipe.learning_request(request()).seconds >= 0.1


def test_words(pipe: SelfForcingPipeline) -> None:
    assert pipe.unknown_words("A RED zebra, blue-red Zebra") == ["zebra"]
    assert pipe.unknown_words("the balloon's café & 3") == ["s", "café", "3"]
    assert pipe.unknown_words("a car over the red blue mountains rises a red balloon") == ["rises", "balloon"]
    assert pipe.known_words() == sorted(["a", "balloon", "blue", "car", "mountains", "over", "red", "rises", "the"])


def test_prompt_embeddings_are_zero_after_the_text_and_remembered(pipe: SelfForcingPipeline) -> None:
    embeds = pipe.text("a red balloon")
    assert embeds.shape == (1, 8, 8)
    assert (embeds[0, 4:] == 0).all() and (embeds[0, :4] != 0).any(-1).all()
    assert pipe.text("  a red   balloon ") is embeds
    for number in range(16):
        pipe.text(f"a car {number}")
    assert pipe.text("a red balloon") is not embeds


def drive(pipe: SelfForcingPipeline, control: RunControl, **changes: Any) -> Iterator[FrameBlock]:
    with control.active():
        yield from pipe.stream(request(**changes))


def test_deadline(pipe: SelfForcingPipeline) -> None:
    with pytest.raises(DeadlineExceeded, match="longer than the 0 s"):
        list(drive(pipe, RunControl(max_seconds=0)))


def test_a_second_stream_ends_the_first(pipe: SelfForcingPipeline) -> None:
    first = pipe.stream(request())
    next(first)
    next(pipe.stream(request(seed=8)))
    with pytest.raises(SelfForcingError, match="Another run"):
        next(first)


def test_a_second_stream_takes_the_first_ones_cache_away(pipe: SelfForcingPipeline) -> None:
    first = pipe.stream(request())
    next(first)
    rollout = pipe._rollout
    second = pipe.stream(request(seed=8))
    next(second)
    assert rollout is not None and next(rollout, None) is None
    second.close()


@pytest.mark.parametrize("ending", ["drained", "closed", "failed"])
def test_a_stream_that_has_ended_holds_no_cache(pipe: SelfForcingPipeline, ending: str) -> None:
    """A rollout is never drained: it would go on to the last block's clean pass, which nobody needs."""
    stream = pipe.stream(request())
    next(stream)
    cache = weakref.ref(pipe._cache)
    if ending == "drained":
        list(stream)
    elif ending == "closed":
        stream.close()
    else:
        pipe._stream_number += 1
        with pytest.raises(SelfForcingError, match="Another run"):
            next(stream)
    pipe._cache = None
    gc.collect()
    assert cache() is None and pipe._rollout is None


def test_inference_mode_does_not_leak_out_of_a_stream(pipe: SelfForcingPipeline) -> None:
    stream = pipe.stream(request())
    next(stream)
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def broken(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "broken"))


def test_folders_that_are_none(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="'nothing' is not a model folder: it has no model_index.json"):
        SelfForcingPipeline.from_pretrained(tmp_path / "nothing")
    spoiled = broken(folder, tmp_path)
    (spoiled / "model_index.json").write_text("{")
    with pytest.raises(WeightsError, match="cannot be read"):
        SelfForcingPipeline.from_pretrained(spoiled)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"frames_per_block": 0}, "frames_per_block is 0"),
        ({"denoising_steps": ["a"]}, "denoising_steps is"),
        ({"denoising_steps": 5}, "denoising_steps is 5"),
        ({"denoising_steps": [1500, 750]}, "numbers from 1 to 1000"),
        ({"denoising_steps": [250, 500]}, "must fall from step to step"),
        ({"fps": "16"}, "fps is '16'"),
        ({"shift": 0}, "shift is 0"),
        ({"window_frames": 7}, "not multiples of"),
        ({"positions": "other"}, "positions is 'other'"),
    ],
)
def test_settings_that_cannot_work_are_named(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    index = {**index_entries(), "settings": SMALL_SETTINGS | settings}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=said):
        SelfForcingPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"_class_name": "WanPipeline"},
        {"transformer": ["diffusers", "WanTransformer3DModel"]},
        {"vae": None},
        {"settings": {"name": "x"}},
    ],
)
def test_other_pipelines_are_refused(folder: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    spoiled = broken(folder, tmp_path)
    index = json.loads((spoiled / "model_index.json").read_text())
    (spoiled / "model_index.json").write_text(json.dumps(index | change))
    with pytest.raises(WeightsError):
        SelfForcingPipeline.from_pretrained(spoiled)


@pytest.mark.parametrize("part", ["transformer", "vae", "taehv", "text_encoder"])
def test_damaged_weights_are_refused(folder: Path, tmp_path: Path, part: str) -> None:
    spoiled = broken(folder, tmp_path)
    weights = next((spoiled / part).glob("*.safetensors"))
    content = weights.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"{" + content[1:]):
        weights.write_bytes(damaged)
        with pytest.raises(WeightsError, match=part) as caught:
            SelfForcingPipeline.from_pretrained(spoiled)
        assert str(tmp_path) not in str(caught.value)
    weights.unlink()
    with pytest.raises(WeightsError, match=part):
        SelfForcingPipeline.from_pretrained(spoiled)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda state: state.pop("proj_out.bias"), "1 missing keys, the first is proj_out.bias"),
        (lambda state: state.update(colour=torch.zeros(1)), "1 unexpected keys, the first is colour"),
        (lambda state: state.update({"proj_out.bias": torch.zeros(5)}), "cannot be loaded|mismatched"),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder: Path, tmp_path: Path, spoil: Any, said: str) -> None:
    spoiled = broken(folder, tmp_path)
    path = next((spoiled / "transformer").glob("*.safetensors"))
    state = load_file(path)
    spoil(state)
    save_file(state, path)
    with pytest.raises(WeightsError, match=said):
        SelfForcingPipeline.from_pretrained(spoiled)


def test_stock_transformer_weights_load(folder: Path, tmp_path: Path, pipe: SelfForcingPipeline) -> None:
    same = broken(folder, tmp_path)
    WanTransformer3DModel.from_pretrained(same / "transformer").save_pretrained(same / "transformer")
    assert np.array_equal(frames(SelfForcingPipeline.from_pretrained(same, device="cpu")), frames(pipe))
