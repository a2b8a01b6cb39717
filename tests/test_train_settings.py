"""Settings: what a file and the command line may say, and one sentence for what they may not."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import InvalidSettings, OptionUnavailable, SelfForcingError
from tests.training_world import SIZES, make_world, stage_settings
from training.settings import OptimizerSettings, RolloutSettings
from training.settings_file import load_settings
from training.stages import STAGES, run_stage

CONFIGS = sorted((Path(__file__).resolve().parent.parent / "training" / "configs").glob("*.toml"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("settings") / "world")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_settings_are_valid(path: Path) -> None:
    stage = path.stem.split("_", 1)[1].removesuffix("_bench").removesuffix("_context")
    assert load_settings(STAGES[stage].settings_kind, path).run.steps > 0


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    path = tmp_path / "adam.toml"
    path.write_text('rate = 1e-3\nkind = "muon"\n')
    settings = load_settings(OptimizerSettings, path, ["rate=2e-3", "kind=adamw", "betas=[0.5, 0.9]"])
    assert (settings.rate, settings.kind, settings.betas) == (2e-3, "adamw", (0.5, 0.9))
    path = tmp_path / "adam.json"
    path.write_text('{"rate": 1}')
    assert load_settings(OptimizerSettings, path).rate == 1.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rat=1", r"rat in adam.toml is no setting; did you mean rate\?"),
        ("zzz=1", r"zzz in adam.toml is no setting; there are kind, rate"),
        ("rate=fast", r"rate is 'fast' in adam.toml, but must be a number"),
        ("rate=true", "rate is True in adam.toml, but must be a number"),
        ("rate=-1", "optimizer.rate is -1.0, but must be between 0 and 1"),
        ("rate=nan", "optimizer.rate is nan"),
        ("kind=sgd", "kind is 'sgd' in adam.toml, but must be one of adamw, muon"),
        ("betas=[0.9]", r"betas is \[0.9\] in adam.toml, but must be a list of 2"),
        ("betas=0.9", "betas is 0.9 in adam.toml, but must be a list"),
        ("warmup_steps=1.5", "warmup_steps is 1.5 in adam.toml, but must be a whole number"),
        ("rate.x=1", "rate.x is no setting: rate has no parts"),
        ("rate", "'rate' is no setting: write section.name=value"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "adam.toml"
    path.write_text("rate = 1e-3\n")
    with pytest.raises(InvalidSettings, match=message):
        load_settings(OptimizerSettings, path, [override])


def test_a_section_keeps_its_own_defaults(world: Path, tmp_path: Path) -> None:
    """The critic's rate is not the generator's, however much of its section is given."""
    for given in ({}, {"clip": 1.0}):
        critic = stage_settings("dmd", world, tmp_path / "out", critic_optimizer=given).critic_optimizer
        assert (critic.rate, critic.average_decay) == (4e-7, 0.0)
    with pytest.raises(InvalidSettings, match="critic_optimizer.rate is 2.0"):
        stage_settings("dmd", world, tmp_path / "out", critic_optimizer={"rate": 2.0})


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="There is no settings file"):
        load_settings(OptimizerSettings, tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("rate = = 1")
    with pytest.raises(InvalidSettings, match="broken.toml cannot be read"):
        load_settings(OptimizerSettings, broken)
    listed = tmp_path / "list.json"
    listed.write_text("[1, 2]")
    with pytest.raises(InvalidSettings, match="list.json holds a list, but must hold sections"):
        load_settings(OptimizerSettings, listed)
    with pytest.raises(InvalidSettings, match="run is missing"):
        load_settings(STAGES["dmd"].settings_kind, None)


ROLLOUT = {"height": 2, "width": 4, "block_frames": 3, "num_blocks": 3, "window_frames": 9}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window_frames": 2}, "a window of 2 frames cannot hold"),
        ({"window_frames": 8}, "must be multiples of rollout.block_frames"),
        ({"denoising_steps": (500.0, 750.0)}, "must fall from at most 1000"),
        ({"sink_frames": 3, "cache_gradients": "leaky"}, "needs rollout.positions 'absolute'"),
        ({"long_share": 0.5}, r"rollout.long_blocks is \[0, 0\]"),
        ({"long_share": 0.5, "long_blocks": (4, 5), "long_window": "sink"}, "needs a sink"),
        ({"switch_share": 2.0}, "rollout.switch_share is 2.0"),
        ({"gradient_frames": 2}, "rollout.gradient_frames is 2, but must be 0 or at least the 3 frames of a block"),
        ({"gradient_frames": -3}, "rollout.gradient_frames is -3"),
        ({"denoising_steps": (1000.0, float("nan"), 250.0)}, "must fall from at most 1000"),
        ({"num_blocks": 1, "long_share": 1.0, "long_blocks": (2, 3)}, "nothing of a long rollout would be scored"),
    ],
)
def test_impossible_rollouts_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSettings, match=message):
        RolloutSettings(**(ROLLOUT | changes))


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("dmd", {"run__batch": 0}, "run.batch is 0"),
        ("dmd", {"network__init": "nowhere"}, "nowhere holds no transformer"),
        ("dmd", {"network": {}}, "network needs either init"),
        ("dmd", {"text__folder": "nowhere"}, "nowhere holds no text encoder"),
        ("dmd", {"run__sheet_every": 1}, "needs a decoder"),
        ("dmd", {"rollout__long_share": 1.0, "rollout__long_blocks": [3, 4]}, "needs the Wan VAE"),
        ("dmd", {"prompts__source": "none.txt"}, "The prompt file none.txt cannot be read"),
        ("gan", {"taps": [0, 7]}, "taps names layer 7 of 2"),
        ("gan", {"taps": []}, "must be rising layer numbers"),
        ("gan", {"clips__frames": 9}, "clips of the generator have 6"),
        ("gan", {"rollout__width": 6}, "but the generator's are"),
        ("causal", {"clips__frames": 30}, "have 13 latent frames, but clips.frames is 30"),
        ("causal", {"clips__folder": "nowhere"}, "nowhere holds no finished data set"),
        ("causal", {"forcing": "none"}, "must be one of teacher, diffusion"),
        ("causal", {"lengths": [1]}, "shifts has 0 values for 1 lengths"),
        ("causal", {"lengths": [1], "shifts": [1.0], "curriculum": [[0.0, 0.5, 0.6]]}, "shares of sum 1"),
        ("causal", {"block_frames": 4}, "6 frames do not divide into blocks of 4"),
        ("causal", {"block_frames": 0}, "block_frames is 0"),
        ("causal", {"window_frames": -1}, "window_frames is -1"),
        ("causal", {"window_frames": 2, "block_frames": 3}, "window_frames is 2, but must be 0 or hold a block of 3"),
        ("causal", {"shift": 0}, "shift is 0.0"),
        ("causal", {"subject_weight": -1}, "subject_weight is -1.0"),
        (
            "causal",
            {"lengths": [9], "shifts": [1.0], "curriculum": [[0.0, 0.5, 0.5]]},
            "lengths is 9, but must be between 1 and 6",
        ),
        ("causal", {"lengths": [3], "shifts": [0.0], "curriculum": [[0.0, 0.5, 0.5]]}, "shifts is 0.0"),
        ("causal", {"lengths": [3], "shifts": [1.0], "curriculum": [[0.0, -0.5, 1.5]]}, "shares of sum 1"),
        ("causal", {"lengths": [3], "shifts": [1.0], "curriculum": [[0.0, 1, 0], [0.5, 1, 0], [0.2, 0, 1]]}, "rise"),
        ("teacher", {"first_frame": True}, "first_frame is for causal attention"),
        ("teacher", {"clean_blocks": 0.5}, "clean_blocks is for causal attention"),
        ("teacher", {"window_frames": 3}, "window_frames is for causal attention"),
        ("teacher", {"block_frames": 3}, "block_frames is for causal attention"),
        ("gan", {"shift": -1}, "shift is -1.0"),
        ("gan", {"low": 900, "high": 100}, "high is 100.0, but must be between 900 and 1000"),
        ("gan", {"critic_warmup": -1}, "critic_warmup is -1"),
        ("gan", {"weight": -1}, "weight is -1.0"),
        ("gan", {"critic_weight": -1}, "critic_weight is -1.0"),
        ("gan", {"r1_weight": -1}, "r1_weight is -1.0"),
        ("gan", {"r2_weight": -1}, "r2_weight is -1.0"),
        ("sid", {"alpha": -1}, "alpha is -1.0"),
        ("dmd", {"score__fake_guidance": -1}, "score.fake_guidance is -1.0"),
        ("dmd", {"generator_every": 0}, "generator_every is 0"),
        ("dmd", {"rollout__height": 3}, "rollout.height is 3, but must be a multiple of the network's patch, 2"),
        ("ode_pairs", {"rollout__width": 3}, "rollout.width is 3, but must be a multiple"),
        ("ode_pairs", {"guidance": -1}, "guidance is -1.0"),
        ("dmd", {"text__length": 0}, "text.length is 0"),
        ("dmd", {"run__sheet_clips": 0}, "run.sheet_clips is 0"),
        ("teacher", {"network": {"sizes": SIZES | {"num_layers": 0}}}, "network.sizes.num_layers is 0"),
        ("teacher", {"network": {"sizes": SIZES | {"attention_head_dim": 7}}}, "attention_head_dim is 7"),
        ("teacher", {"network": {"sizes": SIZES | {"freq_dim": 15}}}, "freq_dim is 15"),
        ("teacher", {"network": {"sizes": SIZES | {"out_channels": 5}}}, "out_channels is 5"),
        ("teacher", {"run__sheet_every": 1, "run__decoder": "nowhere"}, "run.decoder nowhere holds no Wan VAE"),
        ("dmd", {"vae": "nowhere"}, "vae nowhere holds no Wan VAE"),
        ("ode_pairs", {"solver_steps": 5}, "none of the solver's 5 steps"),
        ("ode", {"pairs": "nowhere"}, "nowhere holds no ODE pairs"),
    ],
)
def test_stages_refuse_before_they_start(
    world: Path, tmp_path: Path, stage: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SelfForcingError, match=message) as refused:
        settings = stage_settings(stage, world, tmp_path / "out", **changes)
        kind = STAGES[stage]
        kind.check(settings)
    assert not (tmp_path / "out").exists()
    assert len(re.findall(r"\.(?: |$)", str(refused.value))) <= 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionUnavailable, match="run.device is 'cuda', but torch finds no GPU"):
        run_stage("dmd", stage_settings("dmd", world, tmp_path, run__device="cuda"))
    with pytest.raises(InvalidSettings, match="run.cpu_offload is true"):
        run_stage("dmd", stage_settings("dmd", world, tmp_path, run__cpu_offload=True))


def test_a_decoder_for_other_latents_is_refused(world: Path, tmp_path: Path) -> None:
    other = tmp_path / "vae"
    shutil.copytree(world / "vae", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"z_dim": 16}))
    with pytest.raises(InvalidSettings, match="run.decoder .* is for latents of 16 channels, but the network has 4"):
        run_stage("dmd", stage_settings("dmd", world, tmp_path / "out", run__sheet_every=1, run__decoder=str(other)))
    (other / "config.json").write_text("{")
    with pytest.raises(InvalidSettings, match="run.decoder .* holds no Wan VAE"):
        run_stage("dmd", stage_settings("dmd", world, tmp_path / "out", run__sheet_every=1, run__decoder=str(other)))


def test_a_folder_that_cannot_be_written_is_refused_before_networks_are_loaded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("a network was loaded")

    monkeypatch.setattr("training.stage.load_network", loaded)
    file = tmp_path / "file"
    file.write_text("")
    for out in (file, file / "out"):
        with pytest.raises(InvalidSettings, match=r"run.out .*file.* cannot be written to \("):
            run_stage("teacher", stage_settings("teacher", world, out))
        with pytest.raises(InvalidSettings, match=r"run.out .*file.* cannot be written to \("):
            run_stage("ode_pairs", stage_settings("ode_pairs", world, out))


def test_a_batch_must_divide_among_processes(world: Path, tmp_path: Path) -> None:
    settings = stage_settings("dmd", world, tmp_path)
    with pytest.raises(InvalidSettings, match="run.batch is 4, but must be a multiple of the 3 processes"):
        settings.run.check_processes(3)
    settings = stage_settings("dmd", world, tmp_path, run__micro_batch=3)
    with pytest.raises(InvalidSettings, match="run.micro_batch is 3, but must divide the 2 clips of a process"):
        settings.run.check_processes(2)
