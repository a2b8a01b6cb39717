"""Training of decoders and encoders, on a tiny synthetic data set."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file

from pipeline.decoder import TaehvStreamDecoder, WanStreamDecoder, encode_taehv, encode_wan
from pipeline.taehv import TAEHV
from training.codecs import Codec, TaehvCodec, WanCodec, _RMSNorm
from training.data import ClipDataset, DatasetInfo
from training.decoder_batches import Phase
from training.decoder_scores import measure, pictures
from training.decoders import DecoderConfig, Trainer
from training.pca import SPATIAL_STRIDE, PatchPCA, to_patches

CLIPS, CHANNELS = 4, 16
HEIGHT, WIDTH = 3 * SPATIAL_STRIDE, 4 * SPATIAL_STRIDE
KINDS = ("wan", "taehv")
PHASES = (
    Phase("linear", 0.4, samples=2, latents=2, crop=(2, 3)),
    Phase("decoder", 0.4, samples=1, latents=2),
    Phase("encoder", 0.2, samples=1, latents=2, crop=(2, 3)),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drifting colour waves, encoded as the world's clips are."""
    folder = tmp_path_factory.mktemp("data")
    info = DatasetInfo(
        clips=CLIPS, validation=1, pixel_clips=CLIPS, channels=CHANNELS, num_frames=13, height=HEIGHT, width=WIDTH
    )
    y, x = np.mgrid[: info.height, : info.width] / SPATIAL_STRIDE
    random = np.random.default_rng(0)
    clips = []
    for _ in range(CLIPS):
        phases, speeds = random.random(3) * 6, random.random(3) * 0.3
        waves = [
            np.stack([np.sin(x + y * p + p + s * t) for p, s in zip(phases, speeds, strict=True)], -1)
            for t in range(info.num_frames)
        ]
        clips.append(((np.stack(waves) * 0.4 + 0.5) * 255).astype(np.uint8))
    patches = np.concatenate([cut.reshape(-1, cut.shape[-1]) for cut in map(to_patches, clips)])
    pca = PatchPCA.fit(patches, np.ones(len(patches), np.float32), CHANNELS)
    pca.save(folder / "pca.npz")
    latents = np.stack([pca.encode(clip) for clip in clips]).astype(np.float16)
    np.save(folder / "latents.npy", latents)
    np.save(folder / "masks.npy", (latents[:, :, 0] > 0).astype(np.uint8) * 255)
    np.save(folder / "pixels.npy", np.stack(clips))
    (folder / "params.json").write_text("[]")
    (folder / "dataset.json").write_text(json.dumps(asdict(info)))
    return folder


def config(kind: str, folder: Path, out: Path, minutes: float = 0.03) -> DecoderConfig:
    return DecoderConfig(kind=kind, minutes=minutes, data=folder, out=out, phases=PHASES, held_out=1)


def codec(kind: str, patch: int) -> Codec:
    torch.manual_seed(0)
    if kind == "taehv":
        sizes = {"latent_channels": 4, "decoder_widths": (16, 12, 10, 8), "encoder_width": 6, "latent_limit": 1e3}
        return TaehvCodec(TAEHV(**sizes, patch_size=patch))
    colours = 3 * patch**2
    sizes = {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1}
    statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    pixels = {"in_channels": colours, "out_channels": colours, "scale_factor_spatial": 8 * patch}
    if patch > 1:
        pixels |= {"patch_size": patch, "temperal_downsample": [True, True, False]}
    return WanCodec(AutoencoderKLWan(dim_mult=[1, 3, 3, 3], **sizes, **statistics, **pixels))


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_training_form_equals_the_stream(kind: str, patch: int) -> None:
    trained = codec(kind, patch)
    for parameter in trained.module.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    latents, frames = torch.randn(2, 4, 4, 3, 4), torch.rand(2, 13, 3, 24 * patch, 32 * patch)
    streamed = (TaehvStreamDecoder if kind == "taehv" else WanStreamDecoder)(trained.module).decode(latents)
    encoded = (encode_taehv if kind == "taehv" else encode_wan)(trained.module, frames)
    groups = frames if kind == "wan" else torch.cat([frames[:, :1].repeat(1, 3, 1, 1, 1), frames], 1)
    with torch.no_grad():
        decoded = trained.decode(latents)[:, -streamed.shape[1] :].clamp(0, 1)
        assert (decoded - streamed).abs().max() < 1e-5
        assert (trained.encode(groups) - encoded).abs().max() < 1e-5


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_codec_begins_as_its_linear_decoder(kind: str, patch: int) -> None:
    trained = codec(kind, patch)
    linear = trained.linear()
    with torch.no_grad():
        # Small features, made colours last: the constant in Wan's last norm must dominate.
        linear.enter.weight.mul_(0.005)
        linear.enter.bias.mul_(0.005)
        linear.leave.weight.mul_(60)
        trained.begin_as(linear)
        latents = torch.randn(2, 4, 4, 3, 4)
        expected = linear(latents)
        assert expected.std() > 0.05
        assert (trained.decode(latents) - expected).abs().max() < 1e-3


def test_the_norm_of_training_has_the_right_gradient() -> None:
    x = torch.randn(2, 5, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    gamma = torch.rand(5, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    # The reductions are in float32, which bounds how well finite differences can agree.
    assert torch.autograd.gradcheck(lambda *inputs: _RMSNorm.apply(*inputs), (x, gamma), eps=1e-3, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_trains_and_the_result_is_a_diffusers_folder(kind: str, folder: Path, tmp_path: Path) -> None:
    trainer = Trainer(config(kind, folder, tmp_path / "run", minutes=0.4))  # time for every part on a slow processor
    before = {name: tensor.clone() for name, tensor in trainer.codec.module.state_dict().items()}
    trainer.run()
    after = trainer.codec.module.state_dict()
    for half in ("encoder.", "decoder."):
        assert any(not torch.equal(before[name], after[name]) for name in after if name.startswith(half))
    trainer.export(tmp_path / "model")
    loaded = (TAEHV if kind == "taehv" else AutoencoderKLWan).from_pretrained(tmp_path / "model")
    assert all(torch.isfinite(parameter).all() for parameter in loaded.parameters())
    stored = load_file(tmp_path / "model" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}

    further = Trainer(replace(trainer.config, out=tmp_path / "further", init=tmp_path / "model"))
    assert [phase.part for phase in further.phases] == ["decoder", "encoder"]
    assert sum(phase.share for phase in further.phases) == pytest.approx(1.0)
    for name, tensor in further.codec.module.state_dict().items():
        assert torch.equal(tensor, stored[name].float()), name

    data = ClipDataset(folder)
    scores = measure(trainer.codec, data, range(CLIPS - 1, CLIPS))
    assert all(np.isfinite(value) for value in scores.values())
    assert pictures(trainer.codec, data, [0])[0].shape == (13, 2 * HEIGHT, WIDTH, 3)


def test_a_run_goes_on_from_its_checkpoint(folder: Path, tmp_path: Path) -> None:
    short = replace(config("taehv", folder, tmp_path), minutes=1.0)
    first = Trainer(short)
    first._enter("linear")
    for _ in range(3):
        first._step(PHASES[0], 0.0)
    first.minutes = 0.1
    first.save()
    again = Trainer(short)
    assert (again.part, again.part_steps, again.steps, again.minutes) == ("linear", 3, 3, 0.1)
    random = torch.get_rng_state()  # loading has set it as it was when the checkpoint was written
    expected = first._step(PHASES[0], 0.0)
    torch.set_rng_state(random)
    assert again._step(PHASES[0], 0.0) == pytest.approx(expected, rel=1e-4)
    for left, right in zip(first.parameters, again.parameters, strict=True):
        torch.testing.assert_close(left, right)


def test_samples_hold_the_frames_of_their_latents(folder: Path, tmp_path: Path) -> None:
    """Encoding a sample's frames gives its latents again, all but the first."""
    trainer = Trainer(config("taehv", folder, tmp_path))
    pca = trainer.data.pca
    for crop in (None, (2, 3)):
        batch = trainer.batches.draw(Phase("decoder", 1.0, samples=8, latents=2, crop=crop))
        frames = (batch.frames.permute(0, 1, 3, 4, 2).numpy() * 255).round().astype(np.uint8)
        for latents, sample in zip(batch.latents.numpy(), frames, strict=True):
            # The encoder fills the first group by repetition: give it only that group's last frame.
            again = pca.encode(sample[3:])
            assert np.abs(again[1:] - latents[1:]).max() < 0.02


def test_held_out_clips_are_never_drawn(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing is left"):
        Trainer(replace(config("taehv", folder, tmp_path), held_out=CLIPS))
