"""The benchmark's reference mode: it makes the same video as the pipeline, and it does what the authors' code does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.agreement import TAEHV_EXACT_BLOCKS, TOLERANCE, Agreement, compare
from benchmarks.reference_decoder import ReferenceTaehvDecoder, original_layers
from benchmarks.watch import WatchedPipeline, WatchedReference
from pipeline import GenerationRequest
from pipeline.decoder import TaehvStreamDecoder
from pipeline.errors import InvalidRequest, OptionUnavailable
from pipeline.taehv import TAEHV
from pipeline.upsampling import UpsamplingConv
from tests.small import write_model_folder

BLOCKS = 6
"""Enough for a window of nine frames in blocks of three to be full and to move."""


def pair(folder: Path, **settings: Any) -> tuple[WatchedPipeline, WatchedReference]:
    ours = WatchedPipeline.from_pretrained(write_model_folder(folder, **settings), "cpu")
    return ours, WatchedReference.beside(ours)


def request(pipeline: WatchedPipeline, blocks: int = BLOCKS, **changes: Any) -> GenerationRequest:
    seconds = pipeline.spec.frames_in(blocks) / pipeline.spec.fps
    return GenerationRequest(prompt="a red balloon rises", seed=3, seconds=seconds, **changes)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"positions": "absolute"},
        {"context_noise": 100.0},
        {"sink_frames": 0},
        {"first_block_steps": [1000, 900, 750, 500, 250], "context_noise": 50.0},
        {"frames_per_block": 1, "window_frames": 4, "sink_frames": 1},
        {"taehv": False},
    ],
    ids=lambda settings: ",".join(settings) or "as published",
)
def test_it_makes_the_same_video(tmp_path: Path, settings: dict[str, Any]) -> None:
    ours, reference = pair(tmp_path, **settings)
    for _ in range(2):  # the second time with what the first one left behind
        found = compare(ours, reference, request(ours))
        assert found.blocks == BLOCKS
        assert found.holds, found
        assert found.frames.keys() == ({"vae"} if settings == {"taehv": False} else {"vae", "taehv"})


def test_other_weights_are_noticed(tmp_path: Path) -> None:
    ours, _ = pair(tmp_path / "one")
    other = WatchedPipeline.from_pretrained(tmp_path / "one", "cpu")
    with torch.no_grad():
        other._transformer.apply(fp8=False, compile=False).blocks[1].attn1.to_v.weight.mul_(1.001)
    assert not compare(ours, WatchedReference.beside(other), request(ours)).holds


def test_only_float32_and_all_of_it_is_judged() -> None:
    good = {"dtype": "float32", "blocks": 2, "latents": 0.0, "frames": {"vae": 0.0}, "taehv_later": 1.0}
    assert Agreement(**good).holds
    for bad in ({"dtype": "bfloat16"}, {"latents": 2 * TOLERANCE}, {"frames": {"vae": 0.0, "taehv": float("inf")}}):
        assert not Agreement(**good | bad).holds


def test_it_costs_what_the_authors_code_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, reference = pair(tmp_path)
    model = ours._transformer.apply(fp8=False, compile=False)
    steps, layers, blocks = len(ours.spec.denoising_steps), len(model.blocks), 3
    texts: list[int] = []
    reads: list[int] = []  # numbers read back from tensors, which on a GPU waits for it
    item = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: reads.append(1) or item(tensor))
    # The reference calls the pipeline's own layers, so the same hook sees both.
    model.condition_embedder.text_embedder.register_forward_hook(lambda *_: texts.append(1))

    read_by_block: list[int] = []

    def passes(pipeline: Any, blocks: int = blocks) -> list[int]:
        stream, found = pipeline.stream(request(ours, blocks)), []
        read_by_block.clear()
        for _ in range(blocks):
            texts.clear()
            reads.clear()
            next(stream)
            found.append(len(texts))
            read_by_block.append(len(reads))
        return found

    text_mlp = passes(reference)
    # A clean pass before the block is handed on, and none behind the last one.
    assert text_mlp == [steps + 1, steps + 1, steps]
    # Theirs asks for two numbers a layer and pass with global attention, which is what a whole window amounts to.
    assert ours.spec.window_frames == blocks * ours.spec.frames_per_block
    assert read_by_block == [2 * layers * count for count in text_mlp]
    # Behind it theirs is local: six numbers in a block's first pass, which moves the window, three in each later one.
    passes(reference, 5)
    assert read_by_block[3:] == [layers * (6 + 3 * steps), layers * (6 + 3 * (steps - 1))]
    assert passes(ours) == [1, 0, 0]
    assert read_by_block == [0, 0, 0]


def test_it_refuses_what_it_does_not_have(tmp_path: Path) -> None:
    _, reference = pair(tmp_path, fps=60)
    for option in ("fp8", "compile"):
        with pytest.raises(OptionUnavailable, match="reference"):
            next(reference.stream(request(reference, 1, **{option: True})))
    cache = reference._fresh_cache(reference._transformer.apply(fp8=False, compile=False))
    cache.begin_block(3)
    cache.current_frames = 1024
    with pytest.raises(InvalidRequest, match="1024"):
        cache.begin_block(3)


def test_the_vae_gets_its_published_layers_back(tmp_path: Path) -> None:
    ours, _ = pair(tmp_path)
    vae = ours._decoders[False].weights
    original = original_layers(vae)
    kinds = {type(module).__module__ for module in original.modules()}
    assert "pipeline.wan_layers" not in kinds
    assert "pipeline.wan_layers" in {type(module).__module__ for module in vae.modules()}
    for one, other in zip(vae.parameters(), original.parameters(), strict=True):
        assert one.data_ptr() == other.data_ptr()


def test_taehv_decodes_latents_again_and_is_exact_for_two_blocks() -> None:
    torch.manual_seed(0)
    taehv = TAEHV(latent_channels=4, decoder_widths=(8, 8, 8, 8), encoder_width=8).eval().double()
    for parameter in taehv.parameters():
        parameter.data.normal_(std=0.15)
    blocks = torch.randn(1, 12, 4, 2, 2, dtype=torch.float64).split(3, dim=1)
    exact, again = TaehvStreamDecoder(taehv), ReferenceTaehvDecoder(taehv)
    kinds = [type(layer) for layer in again._layers]
    assert kinds.count(nn.Upsample) == 3 and UpsamplingConv not in kinds  # theirs makes doubled pictures
    decoded: list[int] = []
    taehv.decoder[1].register_forward_hook(lambda module, inputs, output: decoded.append(len(output)))
    for index, block in enumerate(blocks):
        decoded.clear()
        one = exact.decode(block)
        assert sum(decoded) == 3
        decoded.clear()
        other = again.decode(block)
        assert decoded == [1] * (6 if index else 3)  # frame by frame, and the block before once more
        assert one.shape == other.shape
        assert torch.allclose(one, other, atol=1e-9) == (index < TAEHV_EXACT_BLOCKS)
