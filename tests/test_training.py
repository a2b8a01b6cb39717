"""Every stage end to end on a handful of random clips: it runs, resumes, and its result streams."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from pipeline import GenerationRequest, SelfForcingPipeline
from pipeline.cache import CacheWindow
from pipeline.sampler import TRAIN_STEPS
from pipeline.taehv import TAEHV
from training import base, dmd, export
from training.data import ClipDataset, DatasetInfo
from training.network import NetworkConfig, StageClock, build_network, matrices_and_rest
from training.optim import Muon, WeightAverage, orthogonalise
from training.pca import PatchPCA
from training.rollout import Rollout, RolloutConfig, last_window
from training.text import CaptionClassifier, UMT5EncoderModel, build_tokenizer, encoder_config
from training.world import sample_params

NETWORK = NetworkConfig(
    num_attention_heads=2, attention_head_dim=12, ffn_dim=32, num_layers=2, freq_dim=16, in_channels=4, out_channels=4
)
INFO = DatasetInfo(clips=12, validation=2, pixel_clips=2, channels=4, num_frames=49, height=16, width=32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of noise with the real files, a text encoder and decoders, none of them trained."""
    folder = tmp_path_factory.mktemp("cache")
    rng = np.random.default_rng(0)
    np.save(folder / "latents.npy", rng.standard_normal((INFO.clips, *INFO.latent_shape)).astype(np.float16))
    np.save(folder / "masks.npy", rng.integers(0, 255, (INFO.clips, 13, 2, 4), dtype=np.uint8))
    np.save(folder / "pixels.npy", rng.integers(0, 255, (2, 49, 16, 32, 3), dtype=np.uint8))
    params = [sample_params(rng, split="train").to_dict() for _ in range(INFO.clips)]
    (folder / "params.json").write_text(json.dumps(params))
    PatchPCA.fit(rng.standard_normal((900, 768)).astype(np.float32), np.ones(900, np.float32), 4).save(
        folder / "pca.npz"
    )
    (folder / "dataset.json").write_text(json.dumps(asdict(INFO)))
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    CaptionClassifier(UMT5EncoderModel(encoder_config(len(tokenizer)))).encoder.save_pretrained(
        folder / "text" / "text_encoder"
    )
    tokenizer.save_pretrained(folder / "text" / "tokenizer")
    statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **statistics).half().save_pretrained(
        folder / "vae"
    )
    TAEHV(latent_channels=4, decoder_widths=(8, 8, 8, 8), encoder_width=8).half().save_pretrained(folder / "taehv")
    return folder


def run_base(data: Path, out: Path, minutes: float) -> dict:
    config = base.BaseConfig(
        minutes=minutes,
        data=str(data),
        text=str(data / "text"),
        out=str(out),
        processes=1,
        network=NETWORK,
        frames_per_step=18,
        curriculum=((0.0, (0.4, 0.3, 0.3)),),
    )
    base.stage(0, config)
    return torch.load(out / "base.pt", weights_only=True)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base")
    first = run_base(data, out, minutes=0.05)
    assert first["step"] > 0
    second = run_base(data, out, minutes=0.1)  # goes on where the first ended
    assert second["step"] > first["step"]
    assert second["minutes"] >= 0.1
    changed = [name for name, value in second["master"].items() if not torch.equal(value, first["master"][name])]
    assert changed
    return out / "base.pt"


def run_dmd(data: Path, init: Path, out: Path, minutes: float) -> dict:
    config = dmd.DMDConfig(
        minutes=minutes,
        text=str(data / "text"),
        init=str(init),
        out=str(out),
        processes=1,
        latent_shape=(4, 2, 4),
        batch=2,
        critic_warmup=1,
        long_blocks=(4, 4),
    )
    dmd.stage(0, config)
    return torch.load(out / "dmd.pt", weights_only=True)


def test_all_stages_lead_to_a_model_that_streams(data: Path, trained: Path, tmp_path: Path) -> None:
    start = torch.load(trained, weights_only=True)["average"]
    first = run_dmd(data, trained, tmp_path / "dmd", minutes=0.05)
    second = run_dmd(data, trained, tmp_path / "dmd", minutes=0.1)
    assert second["step"] > first["step"] > 1
    assert any(not torch.equal(second["average"][name], start[name]) for name in start)
    export.export(tmp_path / "dmd" / "dmd.pt", data, tmp_path / "model")
    pipeline = SelfForcingPipeline.from_pretrained(tmp_path / "model", device="cpu")
    assert (pipeline.spec.height, pipeline.spec.width, pipeline.spec.fps) == (16, 32, 16)
    video = pipeline.generate(GenerationRequest(prompt="a red balloon rises over the mountains at sunset", seconds=2))
    assert video.frames.shape == (33, 16, 32, 3)
    assert "balloon" in pipeline.known_words()


def test_windows_are_what_a_rollout_sees(data: Path) -> None:
    clips = ClipDataset(data)

    class NoText:
        def encode(self, captions: list[str]) -> torch.Tensor:
            return torch.zeros(len(captions), 24, 128)

    config = base.BaseConfig(frames_per_step=9 * 40, later_windows=0.5)
    windows = base.WindowSampler(config, clips, NoText(), seed=0).draw(9)  # type: ignore[arg-type]
    late = windows.given[:, 0]
    assert 5 < late.sum() < 35 and not windows.given[:, 1:].any()
    firsts = torch.from_numpy(np.array(clips.latents[:, :3])).float()
    for window, is_late in zip(windows.clean, late, strict=True):
        clip = int((firsts - window[:3]).abs().amax((1, 2, 3, 4)).argmin())
        assert torch.equal(window[:3], firsts[clip])  # the sink, or the beginning: always the clip's first block
        whole = torch.from_numpy(np.array(clips.latents[clip])).float()
        start = int((whole.unfold(0, 6, 1).permute(0, 4, 1, 2, 3) - window[3:]).abs().amax((1, 2, 3, 4)).argmin())
        assert torch.equal(window[3:], whole[start : start + 6])
        assert start >= 3 if is_late else start == 3


def test_noise_levels_are_evenly_spread() -> None:
    torch.manual_seed(0)
    levels = base.noise_levels(100, 3, shift=1.0)
    for block in levels.T:
        assert torch.equal((block * 100).floor().sort().values, torch.arange(100.0))


def test_rollout_samples_like_the_pipeline(data: Path) -> None:
    """With the same noise, a rollout of one clip is what inference would make."""
    network = build_network(NETWORK)
    torch.nn.init.normal_(network.proj_out.weight, std=0.3)
    network.requires_grad_(False)
    config = RolloutConfig(context_noise=0.0, window_frames=6, sink_frames=0)
    text = network.encode_text(torch.randn(1, 24, 128))
    torch.manual_seed(5)
    latents = Rollout(network, config, (4, 2, 4))(text, 4)
    torch.manual_seed(5)
    cache = network.make_cache(CacheWindow(3, 6), 2, 4)
    for index in range(4):
        cache.begin_block(3)
        x = torch.randn(1, 3, 4, 2, 4)
        for step, (time, sigma) in enumerate(zip(config.steps.timesteps, config.steps.sigmas, strict=True)):
            clean = x - sigma * network(x, torch.full((1, 3), time), text, cache=cache)
            if step < 3:
                following = config.steps.sigmas[step + 1]
                x = (1 - following) * clean + following * torch.randn(1, 3, 4, 2, 4)
        torch.testing.assert_close(latents[:, 3 * index : 3 * index + 3], clean, rtol=0, atol=1e-5)
        network(clean, torch.zeros(1, 3), text, cache=cache)


def test_gradients_reach_the_exit_call_of_the_last_blocks_only(data: Path) -> None:
    network = build_network(NETWORK)
    torch.nn.init.normal_(network.proj_out.weight, std=0.3)
    text = network.encode_text(torch.randn(2, 24, 128))
    with torch.set_grad_enabled(True):
        latents = Rollout(network, RolloutConfig(), (4, 2, 4))(text, 5, exit_step=1, gradient_blocks=2)
    early = torch.autograd.grad(latents[:, :9].sum(), network.proj_out.weight, retain_graph=True, allow_unused=True)
    late = torch.autograd.grad(latents[:, 9:].sum(), network.proj_out.weight)
    assert early[0] is None or not early[0].any()
    assert late[0].any()


def test_last_window_is_sink_recent_current() -> None:
    latents = torch.arange(18.0).view(1, 18, 1, 1, 1)
    assert last_window(latents, RolloutConfig()).flatten().tolist() == [0, 1, 2, 12, 13, 14, 15, 16, 17]
    assert torch.equal(last_window(latents[:, :9], RolloutConfig()), latents[:, :9])


def test_dmd_moves_clips_towards_the_teacher(data: Path) -> None:
    """A critic that agrees with the teacher gives no gradient; one that does not gives one along their difference."""
    teacher = build_network(NETWORK)
    critic = build_network(NETWORK)
    config = dmd.DMDConfig(latent_shape=(4, 2, 4), guidance=1.0)
    scores = dmd.ScoreNetworks(config, teacher, critic)
    clips = dmd.Clips(torch.randn(3, 9, 4, 2, 4), torch.randn(3, 24, 128), late=False)
    empty = torch.zeros(1, 24, 128)
    torch.manual_seed(0)
    assert scores.gradient(clips, empty).abs().max() < 1e-5
    torch.nn.init.constant_(critic.proj_out.bias, 0.5)
    torch.manual_seed(0)
    gradient = scores.gradient(clips, empty)
    # fake - real = -sigma * 0.5 everywhere: the critic finds smaller values likelier, so the gradient points down.
    assert (gradient < 0).all()
    late = dmd.Clips(clips.latents, clips.text, late=True)
    assert scores.levels(3, late=True)[:, :3].eq(100.0 / TRAIN_STEPS).all()
    assert scores.critic_loss(late).isfinite()


def test_orthogonalise() -> None:
    matrices = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))
    for result in (orthogonalise(matrices), orthogonalise(matrices.mT)):
        values = torch.linalg.svdvals(result)
        assert values.min() > 0.6 and values.max() < 1.3


def test_muon_and_average() -> None:
    network = build_network(NETWORK)
    matrices, rest = matrices_and_rest(network)
    assert len(matrices) + len(rest) == len(list(network.parameters()))
    assert all(matrix.ndim == 2 for matrix in matrices)
    target = torch.randn(32, 24)
    weight = torch.nn.Parameter(torch.zeros(32, 24))
    muon, average = Muon([weight]), WeightAverage([weight], 0.9)
    for step in range(200):
        weight.grad = weight.detach() - target
        muon.step(0.1 * (1 - step / 200))
        average.update()
    assert (weight - target).norm() < 0.1 * target.norm()
    assert (average.average[0] - target).norm() < 0.2 * target.norm()


def test_clock_goes_on_where_it_was() -> None:
    assert StageClock(10.0, spent=5.0).progress() == pytest.approx(0.5, abs=0.01)
    assert StageClock(10.0, spent=11.0).progress() == 1.0
