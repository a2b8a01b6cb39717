"""Decoders and encoders on tiny random modules: splits, interleaved streams, counts, and errors."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import Tensor

from pipeline.decoder import StreamDecoder, TaehvStreamDecoder, WanStreamDecoder, encode_taehv, encode_wan
from pipeline.errors import InvalidRequest, WeightsError
from pipeline.taehv import TAEHV
from pipeline.upsampling import UpsamplingConv
from pipeline.wan_layers import speed_up

CHANNELS = 4
TOLERANCE = 2e-5  # RMS norms over few channels amplify rounding; the golden cases hold the tight tolerance
KINDS = ("wan", "taehv")


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.7, 1.0, 2.0]}
    model = AutoencoderKLWan(base_dim=8, z_dim=CHANNELS, dim_mult=[1, 2, 2, 2], num_res_blocks=1, **statistics)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def taehv() -> TAEHV:
    torch.manual_seed(1)
    model = TAEHV(latent_channels=CHANNELS, decoder_widths=(12, 8, 6, 4), encoder_width=6)
    for parameter in model.decoder.parameters():
        parameter.data *= 1.5
    return model.eval()


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture()
def decoder(kind: str, vae: AutoencoderKLWan, taehv: TAEHV) -> StreamDecoder:
    return WanStreamDecoder(vae) if kind == "wan" else TaehvStreamDecoder(taehv)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "residual"])
def patched(request: pytest.FixtureRequest) -> AutoencoderKLWan:
    """A VAE on pixel patches; with residual blocks too, as Wan 2.2's is."""
    torch.manual_seed(2)
    model = AutoencoderKLWan(
        base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True, False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.7, 1.0, 2.0],
        is_residual=request.param,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    )
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def patched_taehv() -> TAEHV:
    torch.manual_seed(3)
    model = TAEHV(latent_channels=CHANNELS, decoder_widths=(12, 8, 6, 14), encoder_width=6, patch_size=2)
    for parameter in model.decoder.parameters():
        parameter.data *= 1.5
    return model.eval()


def latents(frames: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(batch, frames, CHANNELS, 3, 4, generator=torch.Generator().manual_seed(seed))


def close(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and (left - right).abs().max().item() <= TOLERANCE


@pytest.mark.parametrize("sizes", [[1] * 7, [3, 3, 1], [1, 3, 3], [2, 5], [6, 1], [4, 1, 2]])
def test_blocks_of_any_size_equal_the_whole_clip(decoder: StreamDecoder, sizes: list[int]) -> None:
    clip = latents(7)
    whole = decoder.decode(clip)
    decoder.reset()
    parts = [decoder.decode(part) for part in clip.split(sizes, 1)]
    assert close(torch.cat(parts, 1), whole)
    assert whole.std() > 0.01  # not saturated: the comparison says something


def test_counts_range_and_size(decoder: StreamDecoder) -> None:
    first, second = decoder.decode(latents(3)), decoder.decode(latents(2, seed=1))
    assert first.shape == (1, 1 + 4 * 2, 3, 24, 32)
    assert second.shape == (1, 4 * 2, 3, 24, 32)
    frames = torch.cat([first, second], 1)
    assert frames.min() >= 0 and frames.max() <= 1


def test_reset_forgets_the_stream(decoder: StreamDecoder) -> None:
    fresh = decoder.decode(latents(2))
    decoder.decode(latents(3, seed=1))
    decoder.reset()
    assert torch.equal(decoder.decode(latents(2)), fresh)


def test_interleaved_streams_do_not_disturb_each_other(kind: str, vae: AutoencoderKLWan, taehv: TAEHV) -> None:
    def stream() -> StreamDecoder:
        return WanStreamDecoder(vae) if kind == "wan" else TaehvStreamDecoder(taehv)

    clips = [latents(5, seed=seed) for seed in (1, 2)]
    alone = []
    for clip in clips:
        decoder = stream()
        alone.append(torch.cat([decoder.decode(part) for part in clip.split(2, 1)], 1))
    left, right = stream(), stream()
    together: tuple[list[Tensor], list[Tensor]] = ([], [])
    for first, second in zip(clips[0].split(2, 1), clips[1].split(2, 1), strict=True):
        together[0].append(left.decode(first))
        together[1].append(right.decode(second))
        if kind == "wan":
            encode_wan(vae, torch.rand(1, 5, 3, 24, 32))
    for got, expected in zip(together, alone, strict=True):
        assert torch.equal(torch.cat(got, 1), expected)


def test_one_tile_is_the_whole(vae: AutoencoderKLWan, patched: AutoencoderKLWan) -> None:
    for module in (vae, patched):
        frames = torch.rand(2, 9, 3, 32, 48)
        kept = frames.clone()
        assert close(encode_wan(module, frames, tiled=True), encode_wan(module, frames))
        assert torch.equal(frames, kept)


def test_tiles_leave_nothing_behind_also_when_they_fail(vae: AutoencoderKLWan, monkeypatch) -> None:
    vae = copy.deepcopy(vae)
    encode_wan(vae, torch.rand(1, 5, 3, 24, 32), tiled=True)
    assert not any(isinstance(kept, Tensor) for kept in vae._enc_feat_map)
    monkeypatch.setattr(vae.quant_conv, "forward", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encode_wan(vae, torch.rand(1, 5, 3, 24, 32), tiled=True)
    assert not any(isinstance(kept, Tensor) for kept in vae._enc_feat_map)


def test_samples_of_a_batch_are_independent(decoder: StreamDecoder) -> None:
    clip = latents(4, batch=2)
    both = torch.cat([decoder.decode(part) for part in clip.split([1, 3], 1)], 1)
    for index in range(2):
        decoder.reset()
        assert close(decoder.decode(clip[index : index + 1]), both[index : index + 1])


def test_frames_do_not_change_when_the_stream_goes_on(decoder: StreamDecoder) -> None:
    first = decoder.decode(latents(3))
    kept = first.clone()
    decoder.decode(latents(3, seed=1))
    assert torch.equal(first, kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(kind: str, vae: AutoencoderKLWan, taehv: TAEHV, dtype: torch.dtype) -> None:
    module, build = (vae, WanStreamDecoder) if kind == "wan" else (taehv, TaehvStreamDecoder)
    exact = build(module).decode(latents(3))
    half = type(module).from_config(module.config)
    half.load_state_dict(module.state_dict())
    frames = build(half.to(dtype)).decode(latents(3).to(dtype))
    assert frames.dtype == dtype
    assert (frames.float() - exact).abs().max() < 0.05


def test_faster_layers_change_nothing_but_rounding(vae: AutoencoderKLWan, tmp_path: Path) -> None:
    faster = copy.deepcopy(vae)
    speed_up(faster)
    frames = torch.rand(2, 9, 3, 24, 32)
    assert close(
        WanStreamDecoder(faster).decode(latents(4, batch=2)),
        WanStreamDecoder(vae).decode(latents(4, batch=2)),
    )
    assert close(encode_wan(faster, frames), encode_wan(vae, frames))
    faster.save_pretrained(tmp_path)
    loaded = AutoencoderKLWan.from_pretrained(tmp_path)
    assert torch.equal(WanStreamDecoder(loaded).decode(latents(2)), WanStreamDecoder(vae).decode(latents(2)))


@pytest.mark.parametrize(
    ("device", "dtype", "version", "changed"),
    [
        ("cuda", torch.bfloat16, 91002, True),
        ("cuda", torch.float16, 90800, True),
        ("cuda", torch.bfloat16, 91500, False),
        ("cuda", torch.bfloat16, 90701, False),
        ("cuda", torch.bfloat16, None, False),
        ("cuda", torch.float32, 91002, False),
        ("cpu", torch.bfloat16, 91002, False),
    ],
)
def test_where_cudnn_is_at_fault_channels_come_last_and_nothing_else_changes(
    vae: AutoencoderKLWan, monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype, version: int, changed: bool
) -> None:
    """No GPU has run it: here the order of memory is looked at, and that frames are the same."""
    plain, other = (copy.deepcopy(vae).to(dtype) for _ in range(2))
    with monkeypatch.context() as there:
        there.setattr(AutoencoderKLWan, "device", property(lambda self: torch.device(device)))
        there.setattr(torch.backends.cudnn, "version", lambda: version)
        speed_up(other)
    for module in other.modules():
        if isinstance(module, WanCausalConv3d) and max(module.kernel_size) > 1:
            assert module.weight.is_contiguous(memory_format=torch.channels_last_3d) == changed
            assert module.weight.is_contiguous() != changed
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in other.state_dict().items())
    frames, expected = (WanStreamDecoder(one).decode(latents(3).to(dtype)) for one in (other, plain))
    assert (frames.float() - expected.float()).abs().max() < 0.05


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (1, 3, 1, 1), (3, 2, 1, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_doubled_picture_need_not_be_made_to_be_convolved(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(4)
    layer = UpsamplingConv(shape[1], 7, bias=bias).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    plain = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(x), plain, rtol=0, atol=1e-13)
    weight = torch.randn_like(plain)
    ours, theirs = (torch.autograd.grad((out * weight).sum(), [x, layer.weight]) for out in (layer(x), plain))
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_in_half_precision_the_doubled_picture_is_made() -> None:
    layer = UpsamplingConv(3, 4).bfloat16()
    x = torch.randn(1, 3, 5, 6).bfloat16()
    plain = F.conv2d(F.interpolate(x, scale_factor=2), layer.weight, layer.bias, padding=1)
    assert torch.equal(layer(x), plain)


def test_wan_equals_diffusers(vae: AutoencoderKLWan) -> None:
    assert_equals_diffusers(vae)


def test_wan_on_patches_equals_diffusers(patched: AutoencoderKLWan) -> None:
    assert_equals_diffusers(patched)


def assert_equals_diffusers(vae: AutoencoderKLWan) -> None:
    clip = latents(4)
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    with torch.no_grad():
        expected = vae.decode(clip.transpose(1, 2) / (1 / std) + mean).sample.transpose(1, 2)
        assert close(WanStreamDecoder(vae).decode(clip) * 2 - 1, expected)
        scale = vae.config.scale_factor_spatial
        frames = torch.rand(2, 9, 3, 3 * scale, 4 * scale)
        mode = vae.encode(frames.transpose(1, 2) * 2 - 1).latent_dist.mode()
        assert close(encode_wan(vae, frames), ((mode - mean) / std).transpose(1, 2))


@pytest.mark.parametrize("sizes", [[1] * 7, [3, 3, 1], [2, 5]])
def test_blocks_of_patches_equal_the_whole_clip(
    patched: AutoencoderKLWan, patched_taehv: TAEHV, sizes: list[int]
) -> None:
    clip = latents(7)
    for decoder in (WanStreamDecoder(patched), TaehvStreamDecoder(patched_taehv)):
        whole = decoder.decode(clip)
        assert whole.shape == (1, 25, 3, 48, 64)
        assert whole.std() > 0.01
        decoder.reset()
        assert close(torch.cat([decoder.decode(part) for part in clip.split(sizes, 1)], 1), whole)


def test_faster_layers_change_patches_only_by_rounding(patched: AutoencoderKLWan) -> None:
    faster = copy.deepcopy(patched)
    speed_up(faster)
    frames = torch.rand(1, 5, 3, 48, 64)
    assert close(WanStreamDecoder(faster).decode(latents(3)), WanStreamDecoder(patched).decode(latents(3)))
    assert close(encode_wan(faster, frames), encode_wan(patched, frames))


def test_frames_that_cut_a_patch_are_refused(patched: AutoencoderKLWan, patched_taehv: TAEHV) -> None:
    frames = torch.zeros(1, 5, 3, 40, 64)  # a multiple of 8, which would do without patches
    for encode, module in ((encode_wan, patched), (encode_taehv, patched_taehv)):
        with pytest.raises(InvalidRequest, match="16"):
            encode(module, frames)


def test_taehv_on_patches_is_the_plain_one_between_two_shuffles(patched_taehv: TAEHV) -> None:
    frames = torch.rand(2, 8, 3, 48, 64)
    assert patched_taehv.spatial_scale == 16
    with torch.no_grad():
        # Each colour of a 2x2 patch in the order of rows.
        cut = [frames[:, :, :, y::2, x::2] for y in (0, 1) for x in (0, 1)]
        patches = torch.stack(cut, 3).flatten(2, 3)
        encoded = patched_taehv.run(patched_taehv.encoder, patches)
        assert close(patched_taehv.encode_raw(frames), encoded)
        decoded = patched_taehv.run(patched_taehv.decoder, encoded).unflatten(2, (3, 4))
        pixels = patched_taehv.decode_raw(encoded)
        for place, (y, x) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
            assert torch.equal(pixels[:, :, :, y::2, x::2], decoded[:, :, :, place])


@pytest.mark.parametrize("count", [1, 5, 9, 13])
def test_encoders_make_one_latent_for_the_first_frame_and_one_for_each_four(
    vae: AutoencoderKLWan, taehv: TAEHV, count: int
) -> None:
    frames = torch.rand(2, count, 3, 24, 32)
    expected = (2, 1 + (count - 1) // 4, CHANNELS, 3, 4)
    assert encode_wan(vae, frames).shape == expected
    assert encode_taehv(taehv, frames).shape == expected


def test_taehv_encoder_is_aligned_with_the_first_frame_alone(taehv: TAEHV) -> None:
    """A change in frame 1 must not reach the first latent, and frames 1-4 share the second."""
    frames = torch.rand(1, 9, 3, 24, 32)
    before = encode_taehv(taehv, frames)
    changed = frames.clone()
    changed[:, 1] = 0
    after = encode_taehv(taehv, changed)
    assert torch.equal(before[:, 0], after[:, 0])
    assert not torch.equal(before[:, 1], after[:, 1])


def test_taehv_raw_encode_fills_the_last_group_with_its_last_frame(taehv: TAEHV) -> None:
    frames = torch.rand(1, 9, 3, 24, 32)
    with torch.no_grad():
        filled = torch.cat([frames, frames[:, -1:].repeat(1, 3, 1, 1, 1)], 1)
        assert torch.equal(taehv.encode_raw(frames), taehv.encode_raw(filled))
        memory = taehv.new_memory(taehv.encoder)
        parts = [taehv.encode_raw(part, memory) for part in filled.split(4, 1)]
        assert close(torch.cat(parts, 1), taehv.encode_raw(filled))


@pytest.mark.parametrize("shape", [(1, CHANNELS, 3, 4), (1, 2, CHANNELS + 1, 3, 4), (1, 0, CHANNELS, 3, 4)])
def test_latents_of_another_shape_are_refused(decoder: StreamDecoder, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest, match=str(list(shape))[1:-1]):
        decoder.decode(torch.zeros(shape))


def test_a_stream_keeps_its_shape(decoder: StreamDecoder) -> None:
    decoder.decode(latents(2))
    with pytest.raises(InvalidRequest, match="reset"):
        decoder.decode(latents(2, batch=2))
    decoder.reset()
    decoder.decode(latents(2, batch=2))


@pytest.mark.parametrize(
    "shape", [(1, 4, 3, 24, 32), (1, 0, 3, 24, 32), (1, 5, 3, 20, 32), (5, 3, 24, 32), (1, 5, 1, 24, 32)]
)
def test_frames_of_another_shape_are_refused(vae: AutoencoderKLWan, taehv: TAEHV, shape: tuple[int, ...]) -> None:
    for encode, module in ((encode_wan, vae), (encode_taehv, taehv)):
        with pytest.raises(InvalidRequest):
            encode(module, torch.zeros(shape))


def test_published_weights_with_larger_grow_layers(taehv: TAEHV) -> None:
    """A published file may hold rows for two frames where the module makes one: the last rows count."""
    weights = dict(taehv.state_dict())
    grow = next(key for key, tensor in weights.items() if key.endswith(".conv.weight") and key.startswith("decoder"))
    weights[grow] = torch.cat([torch.full_like(weights[grow], math.nan), weights[grow]])
    loaded = TAEHV.from_published(weights).eval()
    assert loaded.config["decoder_widths"] == taehv.config["decoder_widths"]
    assert loaded.config["encoder_width"] == taehv.config["encoder_width"]
    assert torch.equal(TaehvStreamDecoder(loaded).decode(latents(2)), TaehvStreamDecoder(taehv).decode(latents(2)))


def test_published_weights_that_do_not_fit_are_named(taehv: TAEHV) -> None:
    weights = dict(taehv.state_dict())
    with pytest.raises(WeightsError, match="not TAEHV"):
        TAEHV.from_published({"a.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"decoder\.3\.conv\.2\.bias"):
        TAEHV.from_published({key: tensor for key, tensor in weights.items() if key != "decoder.3.conv.2.bias"})
    with pytest.raises(WeightsError, match="unknown"):
        TAEHV.from_published({**weights, "extra": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"decoder\.3\.conv\.2\.bias"):
        TAEHV.from_published({**weights, "decoder.3.conv.2.bias": torch.zeros(5)})


def test_taehv_folder_round_trip(taehv: TAEHV, tmp_path: Path) -> None:
    taehv.save_pretrained(tmp_path)
    loaded = TAEHV.from_pretrained(tmp_path)
    assert torch.equal(TaehvStreamDecoder(loaded).decode(latents(3)), TaehvStreamDecoder(taehv).decode(latents(3)))


def test_published_weights_tell_the_patch_size(patched_taehv: TAEHV) -> None:
    weights = dict(patched_taehv.state_dict())
    loaded = TAEHV.from_published(weights).eval()
    assert loaded.config["patch_size"] == 2
    whole = TaehvStreamDecoder(patched_taehv).decode(latents(2))
    assert torch.equal(TaehvStreamDecoder(loaded).decode(latents(2)), whole)
    end = max(int(key.split(".")[1]) for key in weights if key.startswith("decoder."))
    for parameter in ("weight", "bias"):
        weights[f"decoder.{end}.{parameter}"] = weights[f"decoder.{end}.{parameter}"][:3]
    with pytest.raises(WeightsError, match="not TAEHV"):
        TAEHV.from_published(weights)


def test_taehv_on_patches_survives_a_folder(patched_taehv: TAEHV, tmp_path: Path) -> None:
    patched_taehv.save_pretrained(tmp_path)
    loaded = TAEHV.from_pretrained(tmp_path)
    whole = TaehvStreamDecoder(patched_taehv).decode(latents(3))
    assert torch.equal(TaehvStreamDecoder(loaded).decode(latents(3)), whole)


def test_unsupported_configs_are_refused() -> None:
    with pytest.raises(WeightsError, match="stages"):
        TAEHV(decoder_widths=(8, 8))
    with pytest.raises(WeightsError, match="alike"):
        TAEHV(decoder_widths=(8, 8, 8, 8), encoder_time_downscale=(True, True, True))
