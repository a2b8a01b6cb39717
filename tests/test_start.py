"""Going on from a picture or a video: what is in the cache, what the decoder knows, and what comes out."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from pipeline import GenerationRequest, SelfForcingPipeline
from pipeline.cli import EMBEDDED_MODEL
from pipeline.control import RunControl
from pipeline.decoder import TaehvStreamDecoder, WanStreamDecoder, encode_wan
from pipeline.errors import Cancelled, InvalidRequest, NonFiniteOutput, VideoError
from pipeline.memory import META, LiveBytes
from pipeline.plan import Placement
from pipeline.recipe import build_recipe, needed_start, request_from_recipe, settings_from_recipe
from pipeline.start import Start
from pipeline.start_file import read_start
from pipeline.start_latents import encode_start
from pipeline.transformer import TimeEmbedding
from tests.pictures import encoded, picture, write_video
from tests.small import write_blocks, write_model_folder
from training.world import ClipParams, render

PROMPT = "a red balloon rises over the mountains"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> SelfForcingPipeline:
    folder = write_model_folder(tmp_path_factory.mktemp("model"), context_noise=100.0)
    return SelfForcingPipeline.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def embedded() -> SelfForcingPipeline:
    return SelfForcingPipeline.from_pretrained(EMBEDDED_MODEL, device="cpu")


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    """Frames of the embedded model's world: uint8 [33, 128, 224, 3]."""
    frames, _, _ = render(ClipParams("mountains", "sunset", "clear", "balloon", "red", "right"), seed=3, num_frames=33)
    return (frames * 255).round().astype(np.uint8)


def request(**changes: Any) -> GenerationRequest:
    return GenerationRequest(**({"prompt": PROMPT, "seed": 7, "seconds": 3} | changes))


def noise_frames(count: int, height: int = 16, width: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def image(**changes: Any) -> Start:
    return Start(**({"kind": "image", "frames": noise_frames(1), "sha256": "ab" * 32} | changes))


def video(count: int = 21) -> Start:
    return Start(kind="video", frames=noise_frames(count), sha256="cd" * 32)


@contextmanager
def recorded(pipe: SelfForcingPipeline, taehv: bool = False) -> Iterator[list[torch.Tensor]]:
    """All latents that reach the decoder meanwhile."""
    decoder, latents = pipe._decoders[taehv], []
    decode = decoder.decode
    decoder.decode = lambda block: (latents.append(block), decode(block))[1]
    try:
        yield latents
    finally:
        del decoder.decode


# ---- the whole path


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("given", [1, 2, 5])  # the window holds three
def test_going_on_from_own_blocks_is_as_if_they_had_been_made_in_this_run(
    pipe: SelfForcingPipeline, monkeypatch: pytest.MonkeyPatch, given: int, merged: bool
) -> None:
    monkeypatch.setattr(pipe, "merge_clean_pass", merged)
    blocks = given + 2
    with recorded(pipe) as latents:
        whole = pipe.generate(request(seconds=pipe.spec.frames_in(blocks) / pipe.spec.fps))
    kept = [pipe._cache.in_order(layer) for layer in range(2)]
    first = torch.cat(latents[:given], dim=1)
    monkeypatch.setattr("pipeline.generator.encode_start", lambda *_: first)
    start = video(pipe.spec.frames_in(given))
    with recorded(pipe) as again:
        rest = pipe.generate(request(seconds=2, start=start))
    assert rest.run.num_blocks == 2 and rest.frames.shape == whole.frames.shape
    for ours, theirs in zip(again, latents, strict=True):
        assert torch.allclose(ours, theirs, atol=2e-5)
    assert np.abs(rest.frames.astype(int) - whole.frames).max() <= 1
    for layer, (key, value) in enumerate(kept):
        ours = pipe._cache.in_order(layer)
        assert torch.allclose(ours[0], key, atol=2e-5) and torch.allclose(ours[1], value, atol=2e-5)
    if given == 1 or not merged:  # the same calls in the same order
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, latents, strict=True))
        assert np.array_equal(rest.frames, whole.frames)


def test_what_it_starts_from_matters(pipe: SelfForcingPipeline) -> None:
    one = pipe.generate(request(start=video()))
    other = pipe.generate(request(start=replace(video(), frames=noise_frames(21, seed=1))))
    assert not np.array_equal(one.frames[21:], other.frames[21:])
    assert not np.array_equal(one.frames[21:], pipe.generate(request()).frames[: len(one.frames) - 21])
    assert np.array_equal(pipe.generate(request(start=video())).frames, one.frames)
    assert not np.array_equal(pipe.generate(request(start=video(), seed=8)).frames[21:], one.frames[21:])


@pytest.mark.parametrize("taehv", [False, True])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_the_decoder_goes_on_without_a_seam(pipe: SelfForcingPipeline, taehv: bool, kind: str) -> None:
    start = image() if kind == "image" else video()
    with recorded(pipe, taehv) as latents:
        made = pipe.generate(request(start=start, taehv=taehv)).frames
    decoder = TaehvStreamDecoder(pipe._decoders[True].weights) if taehv else WanStreamDecoder(pipe._vae)
    at_once = decoder.decode(torch.cat(latents, 1))[0].permute(0, 2, 3, 1).mul(255).round().byte().numpy()
    hidden = 8 if kind == "image" else 0  # the picture stands still for a block, of which one frame is shown
    assert len(made) == len(at_once) - hidden
    assert np.abs(made.astype(int) - at_once[hidden:]).max() <= 1


def test_counts(pipe: SelfForcingPipeline) -> None:
    # 2 s at 12 FPS are two blocks of 12 frames, whatever comes before.
    for start, before in ((image(), 1), (video(9), 9), (video(45), 45)):
        blocks = list(pipe.stream(request(start=start, seconds=2)))
        assert [len(block.frames) for block in blocks] == [before + 12, 12]
        assert [block.start_frame for block in blocks] == [0, before + 12]
        assert (blocks[0].run.num_blocks, blocks[0].run.num_frames) == (2, before + 24)
    assert pipe.plan(request(start=image(), seconds=0.1)).num_frames == 13


def test_an_image_is_encoded_as_a_picture_that_stands_still(pipe: SelfForcingPipeline) -> None:
    with recorded(pipe) as latents:
        pipe.generate(request(start=image(), seconds=1))
    still = torch.tensor(np.repeat(image().frames, 9, 0)).permute(0, 3, 1, 2)[None] / 255
    assert torch.allclose(latents[0], encode_wan(pipe._vae, still), atol=1e-6)


def test_a_run_takes_tiles_where_the_plan_wants_them(pipe: SelfForcingPipeline, monkeypatch) -> None:
    whole, calls = pipe.generate(request(start=video(9), seconds=1)), []
    tiled_encode = AutoencoderKLWan.tiled_encode
    monkeypatch.setattr(
        AutoencoderKLWan, "tiled_encode", lambda vae, pixels: calls.append(pixels.shape) or tiled_encode(vae, pixels)
    )
    pipe.generate(request(start=video(9), seconds=1))
    assert not calls and "start" not in whole.run.applied
    monkeypatch.setattr(pipe, "placement", Placement(start_tiled=True))
    tiled = pipe.generate(request(start=video(9), seconds=1))
    assert len(calls) == 1 and tiled.run.applied["start"] == "encoded in tiles"
    assert np.abs(tiled.frames.astype(int) - whole.frames).max() <= 1  # the picture is smaller than a tile
    assert "start" not in pipe.plan(request()).applied


def test_latents_are_normalised(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path)
    plain = SelfForcingPipeline.from_pretrained(folder, device="cpu")
    config = folder / "vae" / "config.json"
    text = config.read_text().replace("1.0", "2.0")
    assert text != config.read_text()
    config.write_text(text)
    halved = SelfForcingPipeline.from_pretrained(folder, device="cpu")
    one, two = (encode_start(video(), p._vae, p.spec) for p in (plain, halved))
    assert torch.allclose(one, 2 * two, atol=1e-6)
    assert np.abs(one.numpy()).max() > 0


# ---- frame-wise models


def test_a_frame_wise_model_takes_a_picture_as_its_first_frame(tmp_path: Path) -> None:
    folder = write_model_folder(
        tmp_path,
        frames_per_block=1,
        window_frames=7,
        sink_frames=1,
        denoising_steps=[1000],
        first_block_steps=[1000, 750, 500, 250],
    )
    pipe = SelfForcingPipeline.from_pretrained(folder, device="cpu")
    pipe.merge_clean_pass = False
    model = pipe._transformer.apply(fp8=False, compile=False)
    calls: list[tuple[int, float, range]] = []
    forward, embed_time, caches = model.forward, model.embed_time, []
    times: dict[int, float] = {}

    def embedded(timestep: torch.Tensor) -> TimeEmbedding:
        made = embed_time(timestep)
        times[id(made)] = float(timestep[0, 0])
        return made

    def noted(latents: torch.Tensor, timestep: TimeEmbedding, *args: Any, cache: Any) -> torch.Tensor:
        calls.append((latents.shape[1], times[id(timestep)], cache.positions(latents.shape[1])))
        flow = forward(latents, timestep, *args, cache=cache)
        if len(calls) == 1:
            caches.append([tuple(part.clone() for part in cache.in_order(layer)) for layer in range(2)])
        return flow

    model.forward, model.embed_time = noted, embedded
    with recorded(pipe) as latents:
        made = pipe.generate(request(start=image(), seconds=1))
    model.forward, model.embed_time = forward, embed_time
    assert [len(made.frames), made.run.num_blocks] == [13, 3]
    # The picture: one clean pass at position 0. Then the first frame that is made takes the steps of a first block.
    assert calls[0] == (1, 0.0, range(1))
    assert [count for count, _, _ in calls] == [1] * len(calls)
    assert [place.start for _, _, place in calls] == [0, 1, 1, 1, 1, 1, 2, 2, 3]
    assert [time for _, time, place in calls if place.start == 1][-1] == 0
    window = pipe._cache.window
    alone = model.make_cache(window, *latents[0].shape[-2:])
    text = model.encode_text(pipe.text(PROMPT))
    write_blocks(model, alone, latents[0], text, 1, timestep=0.0)
    for layer, (key, value) in enumerate(caches[0]):
        assert torch.equal(alone.in_order(layer)[0], key) and torch.equal(alone.in_order(layer)[1], value)


# ---- refusals


def test_frames_of_another_model_are_refused_before_anything_is_made(pipe: SelfForcingPipeline) -> None:
    with pytest.raises(InvalidRequest, match="64x48 pixels, but this model makes 32x16"):
        pipe.generate(request(start=image(frames=noise_frames(1, 48, 64))))
    with pytest.raises(InvalidRequest, match="10 frames cannot be continued.* 9, 21 or 33"):
        pipe.generate(request(start=video(10)))
    with pytest.raises(InvalidRequest, match="start is 'a.png'"):
        request(start="a.png")
    assert len(pipe.generate(request()).frames) == 33


def test_a_run_that_is_stopped_encodes_nothing(pipe: SelfForcingPipeline) -> None:
    control = RunControl()
    control.cancel()
    with control.active(), pytest.raises(Cancelled):
        next(pipe.stream(request(start=video())))


def test_invalid_numbers_of_the_encoder_are_noticed(pipe: SelfForcingPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.start_latents.encode_wan", lambda *_: torch.full((1, 3, 4, 2, 4), torch.nan))
    with pytest.raises(NonFiniteOutput, match="encoder"):
        pipe.generate(request(start=image()))


# ---- recipes


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_recipe_tells_of_the_start_and_asks_for_it_again(
    pipe: SelfForcingPipeline, kind: str, tmp_path: Path
) -> None:
    if kind == "image":
        path = tmp_path / "a.png"
        path.write_bytes(encoded(picture(), "PNG"))
    else:
        path = write_video(tmp_path / "a.mp4", 40)
    start = read_start(path, pipe.spec)
    asked = request(start=start, seconds=1, fps=12)
    made = pipe.generate(asked)
    recipe = build_recipe(made.run, len(made.frames))
    told = recipe["start"]
    assert (told["kind"], told["sha256"]) == (kind, start.sha256) and str(path) not in str(recipe)
    assert needed_start(recipe) == told
    assert request_from_recipe(recipe, read_start(path, pipe.spec)).start.matches(told)
    assert replace(request_from_recipe(recipe, start), start=None) == settings_from_recipe(recipe)
    for other in (None, image(), video(9)):
        with pytest.raises(
            VideoError, match=f"began with {'a picture' if kind == 'image' else 'a video'}.*{start.sha256[:12]}"
        ):
            request_from_recipe(recipe, other)


def test_a_recipe_without_a_start_is_as_it_was(pipe: SelfForcingPipeline) -> None:
    made = pipe.generate(request(seconds=1, fps=12))
    recipe = build_recipe(made.run, len(made.frames))
    assert recipe["version"] == 1 and "start" not in recipe
    assert needed_start(recipe) is None
    assert request_from_recipe(recipe) == settings_from_recipe(recipe) == request(seconds=1, fps=12)
    # Programs that do not know of starts must not take such a recipe for one of theirs.
    made = pipe.generate(request(seconds=1, start=image()))
    assert build_recipe(made.run, len(made.frames))["version"] == 2


# ---- the embedded model


def test_the_embedded_encoder_and_decoder_keep_what_a_clip_shows(
    embedded: SelfForcingPipeline, clip: np.ndarray
) -> None:
    frames = torch.tensor(clip).permute(0, 3, 1, 2)[None] / 255
    latents = encode_wan(embedded._vae, frames)
    assert latents.shape[1] == 9 and torch.equal(encode_wan(embedded._vae, frames), latents)
    again = WanStreamDecoder(embedded._vae).decode(latents)
    assert psnr(again, frames) > 24
    assert psnr(WanStreamDecoder(embedded._vae).decode(encode_wan(embedded._vae, frames[:, :1])), frames[:, :1]) > 24


def test_tiles_give_nearly_the_same_latents(embedded: SelfForcingPipeline, clip: np.ndarray) -> None:
    """Measured: 0.9 % with tiles of 256 cells and 2.2 % with 128 on a picture of 832 x 480."""
    vae = copy.deepcopy(embedded._vae)
    vae.enable_tiling(64, 64, 48, 48)  # cells of 2 x 2 pixels: six tiles, where the plan's would cover all of it
    frames = torch.tensor(clip[:9]).permute(0, 3, 1, 2)[None] / 255
    whole, tiled = encode_wan(vae, frames), encode_wan(vae, frames, tiled=True)
    assert 0 < (tiled - whole).norm() / whole.norm() < 0.1
    shown = [WanStreamDecoder(vae).decode(latents) for latents in (whole, tiled)]
    assert psnr(*shown) > 30


def test_the_embedded_model_goes_on_from_a_picture_and_from_a_video(
    embedded: SelfForcingPipeline, clip: np.ndarray
) -> None:
    prompt = "a red balloon moves to the right over the mountains at sunset"
    for start in (Start(kind="image", frames=clip[:1]), Start(kind="video", frames=clip)):
        made = embedded.generate(GenerationRequest(prompt=prompt, seed=1, seconds=1.5, start=start)).frames
        shown = len(start.frames)
        assert len(made) == shown + 24
        last = torch.tensor(start.frames[-1]) / 255
        assert psnr(torch.tensor(made[shown - 1]) / 255, last) > 22, "it begins with what it starts from"
        assert psnr(torch.tensor(made[shown]) / 255, last) > 17, "the next frame follows from it"
        change = np.abs(np.diff(made[shown:].astype(float), axis=0)).mean(axis=(1, 2, 3))
        real = np.abs(np.diff(clip.astype(float), axis=0)).mean()
        assert change.min() > 0.5 * real, "it moves"


def psnr(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float(-10 * torch.log10((ours - theirs).square().mean()))


@pytest.mark.parametrize("published", [False, True])
def test_encoding_a_start_takes_less_memory_than_decoding(published: bool, embedded: SelfForcingPipeline) -> None:
    # So a plan in which the Wan VAE decodes has room for it: nothing else of the run is there yet.
    with META:
        vae = AutoencoderKLWan() if published else AutoencoderKLWan.from_config(embedded._vae.config)
    height, width, frames = (480, 832, 81) if published else (128, 224, 33)
    scale = vae.config.scale_factor_spatial
    shape = (1, 3, vae.config.z_dim, height // scale, width // scale)
    with torch.inference_mode(), LiveBytes() as decoding:
        decoder = WanStreamDecoder(vae)
        for _ in range(2):
            decoder.decode(torch.zeros(shape, device=META))
    with torch.inference_mode(), LiveBytes() as encoding:
        encode_wan(vae, torch.zeros(1, frames, 3, height, width))
    assert 0 < encoding.peak < decoding.peak
