"""Every stage and every loss end to end through the command, and what the last one leaves streams."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline import GenerationRequest, SelfForcingPipeline
from pipeline.errors import InvalidSettings, WeightsError
from tests.training_world import SIZES, make_world, stage_settings
from training import export
from training.__main__ import main
from training.clips import ClipSampler
from training.draws import Draws
from training.flow import CausalStage, emphasised
from training.loop import steps_in_all, train
from training.network import WEIGHTS_FILE, build_network
from training.parallel import processes
from training.settings import ClipSettings, NetworkSizes
from training.settings_file import as_plain, load_settings
from training.stage_settings import CausalSettings
from training.stages import STAGES, run_stage
from training.window import Scored


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = make_world(tmp_path_factory.mktemp("stages") / "world")
    assert run_stage("ode_pairs", stage_settings("ode_pairs", world, world / "pairs")) == 3
    return world


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / WEIGHTS_FILE)


JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "teacher": ("teacher", {"run__sheet_every": 3, "run__sheet_clips": 1, "run__decoder": "vae"}),
    "teacher forcing": ("causal", {"forcing": "teacher", "context_level": 0.1}),
    "diffusion forcing": (
        "causal",
        {"lengths": [1, 3], "shifts": [1.0, 2.0], "curriculum": [[0, 0.5, 0.5, 0], [0.5, 0, 0.5, 0.5]]},
    ),
    "one frame alone": ("causal", {"first_frame": True, "clips__frames": 7, "window_frames": 4}),
    "ode": ("ode", {}),
    "dmd": ("dmd", {"run__sheet_every": 2, "run__sheet_clips": 2, "run__decoder": "vae"}),
    "dmd in bfloat16": ("dmd", {"run__precision": "bfloat16", "score__fake_guidance": 1.5}),
    "dmd, leaky": ("dmd", {"rollout__cache_gradients": "leaky", "rollout__positions": "absolute"}),
    "dmd, long": ("dmd", {"rollout__long_share": 1.0, "rollout__long_blocks": [3, 4], "vae": "vae"}),
    "dmd, sink": (
        "dmd",
        {
            "rollout__num_blocks": 3,
            "rollout__window_frames": 9,
            "rollout__sink_frames": 3,
            "rollout__long_share": 1.0,
            "rollout__long_blocks": [4, 5],
            "rollout__long_window": "sink",
            "rollout__switch_share": 1.0,
            "score__attention": "causal",
        },
    ),
    "sid": ("sid", {"alpha": 1.2}),
    "gan": ("gan", {}),
}


@pytest.mark.parametrize("job", JOBS)
def test_stage_trains_and_hands_on_its_weights(world: Path, tmp_path: Path, job: str) -> None:
    name, changes = JOBS[job]
    changes = {key: str(world / "vae") if value == "vae" else value for key, value in changes.items()}
    out = tmp_path / "out"
    settings = stage_settings(name, world, out, run__batch=2, **changes)
    assert run_stage(name, settings) == 3
    before, after = weights(world), weights(out)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert all(value.isfinite().all() for value in after.values())
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    tags = events.Tags()
    assert any(tag.endswith("loss") or "loss/" in tag for tag in tags["scalars"])
    assert tags["images"] == (["samples"] if settings.run.sheet_every else [])


def test_compiled_blocks_learn_the_same(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learnt, given = {}, []
    original = torch.compile

    def compile(function: Any, **how: Any) -> Any:
        given.append(function)
        return original(function, **how)

    monkeypatch.setattr(torch, "compile", compile)
    for compiled in (False, True):
        out = tmp_path / str(compiled)
        run_stage("causal", stage_settings("causal", world, out, run__steps=2, run__batch=2, run__compile=compiled))
        learnt[compiled] = weights(out)
    assert len(given) == SIZES["num_layers"]
    start = weights(world)
    assert any(not torch.equal(start[name], value) for name, value in learnt[True].items())
    for name, value in learnt[False].items():
        assert torch.allclose(learnt[True][name], value, atol=1e-3), (
            name
        )  # AdamW turns rounding of tiny slopes into steps


def test_command_line_chain_ends_in_a_model_that_streams(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ODE start, then DMD from it, then a model folder; a second start of a finished stage changes nothing."""
    for name, start in (("ode", world), ("dmd", tmp_path / "ode")):
        plain = as_plain(stage_settings(name, world, tmp_path / name, network={"init": str(start)}))
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(plain))
        assert main([name, str(path), "run.steps=2"]) == 0
    finished = weights(tmp_path / "dmd")
    config = json.loads((tmp_path / "dmd" / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "CausalWanTransformer3DModel"
    assert json.loads((tmp_path / "dmd" / "settings.json").read_text())["stage"] == "dmd"
    assert main(["dmd", str(tmp_path / "dmd.json"), "run.steps=2"]) == 0
    assert all(torch.equal(value, finished[key]) for key, value in weights(tmp_path / "dmd").items())
    assert main(["dmd", str(tmp_path / "dmd.json"), "optimizer.rat=1"]) == 2
    assert "did you mean optimizer.rate?" in capsys.readouterr().err

    # From a folder in which nothing lies: what an export takes is what it is given.
    monkeypatch.chdir(tmp_path)
    arguments = ["--run", str(tmp_path / "dmd"), "--data", str(world)]
    assert export.main([*arguments, "--out", str(tmp_path / "model")]) == 0
    pipeline = SelfForcingPipeline.from_pretrained(tmp_path / "model", device="cpu")
    spec = pipeline.spec
    assert (spec.height, spec.width, spec.denoising_steps, spec.window_frames) == (32, 64, (1000.0, 500.0), 6)
    video = pipeline.generate(GenerationRequest(prompt="a red balloon rises over the mountains at sunset", seconds=2))
    assert video.frames.shape == (33, 32, 64, 3)
    exported = weights(tmp_path / "model")
    assert exported.keys() == finished.keys()
    assert all(torch.equal(value, finished[key].half()) for key, value in exported.items())
    assert export.main([*arguments[:1], str(world), *arguments[2:], "--out", str(tmp_path / "none")]) == 2
    assert "holds no finished stage that rolls out clips" in capsys.readouterr().err


def test_weights_can_be_the_mean_of_two_runs() -> None:
    one, other = (build_network(NetworkSizes(**SIZES), seed) for seed in (0, 1))
    before = {name: value.clone() for name, value in one.state_dict().items()}
    export.blend(one, other, 0.25)
    for name, value in one.state_dict().items():
        assert torch.allclose(value, 0.75 * before[name] + 0.25 * other.state_dict()[name], atol=1e-6)
    assert not torch.equal(one.state_dict()["patch_embedding.weight"], before["patch_embedding.weight"])
    wider = build_network(NetworkSizes(**{**SIZES, "ffn_dim": 2 * SIZES["ffn_dim"]}))
    with pytest.raises(WeightsError, match="different sizes"):
        export.blend(one, wider, 0.5)
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(InvalidSettings, match="0 to 1"):
            export.blend(one, other, share)


def test_a_stage_stops_when_its_time_is_over_and_goes_on(world: Path, tmp_path: Path) -> None:
    changes = {"run__steps": 4, "run__minutes": 1e-6}
    assert run_stage("teacher", stage_settings("teacher", world, tmp_path, **changes)) == 1
    assert run_stage("teacher", stage_settings("teacher", world, tmp_path, **changes)) == 2
    assert run_stage("teacher", stage_settings("teacher", world, tmp_path, run__steps=4)) == 4


def test_gathered_weights_learn_the_same(world: Path, tmp_path: Path) -> None:
    for name in ("dmd", "causal"):
        for kept in (False, True):
            changes = {"run__keep_gathered": kept, "run__precision": "float64"}
            settings = stage_settings(name, world, tmp_path / f"{name}{kept}", **changes)
            assert run_stage(name, settings) == 3
        expected = weights(tmp_path / f"{name}False")
        for key, value in weights(tmp_path / f"{name}True").items():
            torch.testing.assert_close(value, expected[key], atol=1e-6, rtol=0)
    refused = stage_settings("dmd", world, tmp_path, run__workers=2)
    with pytest.raises(InvalidSettings, match="this stage has no work for them"):
        run_stage("dmd", refused)


def test_helpers_put_the_same_clips_together(world: Path, tmp_path: Path) -> None:
    """Also in a run that is continued, and whatever the number of helpers."""
    changes = {"run__steps": 4, "clips__later_windows": 0.5}
    alone = stage_settings("causal", world, tmp_path / "alone", **changes)
    assert run_stage("causal", alone) == 4
    helped = {"run__workers": 2, **changes}
    assert run_stage("causal", stage_settings("causal", world, tmp_path / "helped", **helped, run__minutes=1e-6)) == 1
    assert run_stage("causal", stage_settings("causal", world, tmp_path / "helped", **helped)) == 4
    expected = weights(tmp_path / "alone")
    assert all(torch.equal(value, expected[key]) for key, value in weights(tmp_path / "helped").items())


def test_rates_follow_the_clock_where_that_is_the_budget(world: Path, tmp_path: Path) -> None:
    assert steps_in_all(10, 0, 5.0, 0.5, 10**7) == 60 and steps_in_all(20, 10, 5.0, 0.5, 10**7) == 70
    assert steps_in_all(100, 0, 50.0, 0.5, 10**7) == 101  # over time: the step at hand is the last one
    assert steps_in_all(1, 0, 1e-3, 0.5, 40) == 40
    by_the_clock = {"run__steps": 10**6, "run__minutes": 0.03, "run__schedule": "minutes"}
    settings = stage_settings("teacher", world, tmp_path, **by_the_clock, optimizer__flat_until=0.5)
    with processes(settings.run) as group:
        stage = STAGES["teacher"](settings, group)
        steps = train(stage, "teacher", group)
    rate = stage.trainees["generator"].optimizers[0].param_groups[0]["lr"]
    assert stage.steps < 10 * steps and rate < 0.9 * settings.optimizer.rate
    with pytest.raises(InvalidSettings, match="say how many"):
        stage_settings("teacher", world, tmp_path, run__schedule="minutes")


@pytest.mark.parametrize("name", ["teacher", "ode"])
def test_regression_stages_learn(world: Path, tmp_path: Path, name: str) -> None:
    """The same batch over and over: its loss falls."""
    settings = stage_settings(name, world, tmp_path, run__steps=60, optimizer__betas=[0.9, 0.99])
    with processes(settings.run) as group:
        stage = STAGES[name](settings, group)
        losses = []
        for step in range(25):
            part = stage.parts(0)[0]
            value = stage.loss(part) if name == "ode" else stage.loss(stage.clips.draw(part, 6), part, 1.0, 0.0)
            value.backward()
            stage.trainees["generator"].step(step)
            losses.append(value.item())
    assert losses[-1] < 0.8 * losses[0]


def test_generator_moves_every_kth_step_after_the_warm_up(world: Path, tmp_path: Path) -> None:
    settings = stage_settings("sid", world, tmp_path, generator_every=2, critic_warmup=3)
    with processes(settings.run) as group:
        stage = STAGES["sid"](settings, group)
        moved = ["generator/loss" in stage.step(step) for step in range(5)]
    assert moved == [False, False, False, False, True]


def test_gan_leaves_the_critic_alone_in_the_generators_step(world: Path, tmp_path: Path) -> None:
    settings = stage_settings("gan", world, tmp_path)
    with processes(settings.run) as group:
        stage = STAGES["gan"](settings, group)
        before = {key: value.clone() for key, value in stage.trainees["critic"].averaged_weights().items()}
        generator = stage.trainees["generator"].averaged_weights()
        generator = {key: value.clone() for key, value in generator.items()}
        stage.critic_step = lambda step, parts: {}  # type: ignore[method-assign]
        metrics = stage.step(0)
        assert metrics["generator/norm"] > 0
        after = stage.trainees["critic"].averaged_weights()
        assert all(torch.equal(value, after[key]) for key, value in before.items())
        assert all(parameter.grad is None for parameter in stage.trainees["critic"].network.parameters())


def test_levels_of_forcing(world: Path, tmp_path: Path) -> None:
    """The last block is never context, sunk first blocks always are, and levels are evenly spread over the batch."""
    settings = stage_settings(
        "causal", world, tmp_path, run__batch=40, clips__later_windows=0.5, clips__frames=9, clean_blocks=0.3
    )
    with processes(settings.run) as group:
        stage = CausalStage(settings, group)
        draws = Draws(0, 0, range(40), 40)
        clips = stage.clips.draw(draws, 9)
        sunk = clips.given[:, 0]
        assert 5 < sunk.sum() < 35
        level, learnt = stage.levels(clips, draws, 1.0)
    assert learnt[:, 6:].all() and not learnt[sunk, :3].any()
    assert (level[learnt == 0] <= settings.clean_level).all()
    assert torch.equal((level[:, 8] * 40).floor().sort().values, torch.arange(40.0))
    blocks = level.unflatten(1, (3, 3))
    assert torch.equal(blocks, blocks[:, :, :1].expand(-1, -1, 3))


def test_a_subject_counts_more_first_at_every_noise_level_and_later_where_it_is_seen() -> None:
    level = torch.tensor([0.0, 0.25, 1.0])
    assert emphasised(level, 0.0).tolist() == [1, 1, 1]
    assert torch.allclose(emphasised(level, 0.45), torch.tensor([1.0, 0.75, 0.5]))
    assert emphasised(level, 1.0).tolist() == [1, 0.75, 0]


def test_late_windows_are_what_a_rollout_sees(world: Path, tmp_path: Path) -> None:
    """A late window is the clip's first block and later frames that follow on."""
    settings = stage_settings("causal", world, tmp_path, clips__later_windows=0.5, clips__frames=9)
    with processes(settings.run) as group:
        stage = CausalStage(settings, group)
        clips = stage.clips.draw(Draws(1, 0, range(60), 60), 9)
        source = stage.clips.source.latents
    starts = set()
    for window, given in zip(clips.latents.numpy(), clips.given, strict=True):
        clip = next(i for i in range(len(source)) if np.array_equal(source[i, :3], window[:3]))
        start = next(s for s in range(3, 8) if np.array_equal(source[clip, s : s + 6], window[3:]))
        assert given.tolist() == [bool(given[0])] * 3 + [False] * 6 and (given[0] or start == 3)
        starts.add(start)
    assert {3, 7} <= starts


def test_still_windows_stand_still_and_then_go_on(world: Path, tmp_path: Path) -> None:
    """Between the first block and the last one is the frame that the last one follows, and it is not learnt."""
    changes = {"clips__later_windows": 1.0, "clips__still_windows": 0.5, "clips__frames": 9, "clean_blocks": 0.0}
    settings = stage_settings("causal", world, tmp_path, run__batch=40, **changes)
    with processes(settings.run) as group:
        stage = CausalStage(settings, group)
        draws = Draws(2, 0, range(40), 40)
        clips = stage.clips.draw(draws, 9)
        _, learnt = stage.levels(clips, draws, 1.0)
        source = stage.clips.source.latents
    still = clips.given[:, 3]
    assert 8 < still.sum() < 32 and torch.equal(learnt == 0, clips.given)
    for window, stands in zip(clips.latents.numpy(), still, strict=True):
        clip = next(i for i in range(len(source)) if np.array_equal(source[i, :3], window[:3]))
        start = next(s for s in range(6, 11) if np.array_equal(source[clip, s : s + 3], window[6:]))
        between = [start - 1] * 3 if stands else range(start - 3, start)
        assert np.array_equal(source[clip, list(between)], window[3:6])


class Crossing:
    """Clips of 25 frames through which a bar goes, one column a frame; it is away for three frames of each turn.

    Latents are 100 times the clip's number, plus the frame's number where the bar is, minus 1 elsewhere.
    """

    count, width = 2, 9

    def __init__(self) -> None:
        place = (np.arange(25) + 4) % 12
        bar = place[:, None, None] == np.arange(self.width)[None, None]  # [F, 1, w]
        self.masks = np.repeat(bar, 2, axis=1).astype(np.float32)
        shown = np.where(self.masks > 0, np.arange(25)[:, None, None], -1)
        self.latents = np.stack([shown + 100 * clip for clip in range(2)])[:, :, None].astype(np.float32)

    def caption(self, clip: int, rng: np.random.Generator) -> str:
        return "a bar"

    def subject(self, clip: int, frames: Any) -> np.ndarray:
        return self.masks[list(frames)]


def test_in_empty_windows_the_subject_comes_back() -> None:
    """Nothing of it before the last block, at whose beginning there is least of it; what is made up is not learnt."""
    settings = ClipSettings(folder="", frames=9, later_windows=1.0, empty_windows=1.0)
    clips = ClipSampler(Crossing(), settings, 3).draw(Draws(0, 0, range(30), 30), 9)
    assert clips.given.tolist() == [[True] * 6 + [False] * 3] * 30
    for window in clips.latents:
        scene = 100 * (window.max() > 50) - 1
        assert (window[3:6] == scene).all()  # no frame's number: the bar is in none of its cells
        last = window[6:].amax((1, 2, 3)) - scene
        assert last[0] == 0 and last[2] > 0  # away, and there again
    assert clips.subject[:, 3:6].sum() == 0 < clips.subject[:, 6:].sum()


def test_subjects_that_never_leave_do_not_come_back() -> None:
    class Resting(Crossing):
        def __init__(self) -> None:
            super().__init__()
            self.masks[:] = self.masks[0]

    settings = ClipSettings(folder="", frames=9, later_windows=1.0, empty_windows=1.0)
    clips = ClipSampler(Resting(), settings, 3).draw(Draws(0, 0, range(10), 10), 9)
    assert clips.given.tolist() == [[True] * 3 + [False] * 6] * 10


@pytest.mark.parametrize("name", ["still", "empty"])
def test_made_up_context_is_for_diffusion_forcing(name: str) -> None:
    with pytest.raises(InvalidSettings, match="what they make up is never learnt"):
        load_settings(
            CausalSettings,
            Path("training/configs/embedded_causal.toml"),
            ["forcing=teacher", f"clips.{name}_windows=0.2"],
        )


@pytest.mark.parametrize("name", ["dmd", "sid"])
def test_with_clean_context_one_block_is_judged(world: Path, tmp_path: Path, name: str) -> None:
    clean = {"score__context": "clean", "score__attention": "causal", "rollout__context_noise": 100.0}
    settings = stage_settings(name, world, tmp_path, **clean)
    with processes(settings.run) as group:
        stage = STAGES[name](settings, group)
        ends = set()
        for step in range(8):
            draws = stage.parts(step)[0]
            rolled = stage.roll(draws, "generator", gradients=False)
            rolled.clips.requires_grad_()
            judged = stage.judged(rolled, draws, "generator")
            end = len(judged.counted)
            ends.add(end)
            times = stage.score_times(judged, draws, "generator/time")
            assert (times[:, : end - 3] == 100).all() and judged.counted.tolist() == [False] * (end - 3) + [True] * 3
            assert (times[:, end - 3 :] == times[:, -1:]).all()
            if name == "dmd":
                (gradient,) = torch.autograd.grad(stage.generator_loss(rolled, draws), rolled.clips)
                assert (gradient[:, end - 3 : end] != 0).any() and (gradient[:, : end - 3] == 0).all()
                assert (gradient[:, end:] == 0).all()
        assert ends == {3, 6}
        partly = Scored(rolled.clips, torch.tensor([False] * 3 + [True] * 3), rolled.embeds)
        assert {len(stage.judged(partly, stage.parts(step)[0], "critic").counted) for step in range(8)} == {6}
        assert stage.step(0)["critic/norm"] > 0
    settings = stage_settings(name, world, tmp_path, **clean, rollout__gradient_frames=3)
    with processes(settings.run) as group:
        stage = STAGES[name](settings, group)
        whole = Scored(rolled.clips, torch.ones(6, dtype=torch.bool), rolled.embeds)
        ends = {len(stage.judged(whole, stage.parts(step)[0], "generator").counted) for step in range(8)}
    assert ends == {6}  # what has no gradients is not judged


def test_clean_context_is_for_causal_score_networks(world: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="set score.attention to 'causal'"):
        stage_settings("dmd", world, tmp_path, score__context="clean")


def test_ode_pairs_go_on_where_they_were_and_end_at_the_clip(world: Path, tmp_path: Path) -> None:
    """A missing file is made again and is the same; other settings do not mix; states run from noise to a clip."""
    settings = stage_settings("ode_pairs", world, tmp_path, run__steps=2, run__micro_batch=2)
    run_stage("ode_pairs", settings)
    files = sorted(tmp_path.glob("pairs-*.safetensors"))
    assert [path.stem for path in files] == [
        f"pairs-00000{step}-0000{first}-0000{first + 1}" for step in (0, 1) for first in (0, 2)
    ]
    before, times = [path.read_bytes() for path in files], [path.stat().st_mtime_ns for path in files]
    files[2].unlink()
    run_stage("ode_pairs", settings)
    assert [path.read_bytes() for path in files] == before
    assert [path.stat().st_mtime_ns == time for path, time in zip(files, times, strict=True)] == [
        True,
        True,
        False,
        True,
    ]
    with pytest.raises(WeightsError, match="pairs was made with other settings: guidance was 5.0 and is now 1.0"):
        run_stage(
            "ode_pairs", stage_settings("ode_pairs", world, tmp_path, run__steps=2, run__micro_batch=2, guidance=1)
        )
    states = load_file(files[0])["states"]
    assert states.shape == (2, 3, 6, 4, 2, 4)
    noise = Draws(0, 0, range(2), 4).normal("noise", (6, 4, 2, 4), torch.device("cpu"), torch.float32)
    torch.testing.assert_close(states[:, 0].float(), noise, atol=2e-3, rtol=0)
