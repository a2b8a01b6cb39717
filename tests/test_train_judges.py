"""What the judging networks do to the generator inside a stage, and that sharding changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import InvalidSettings
from tests.training_world import make_world, stage_settings
from training.draws import Draws
from training.losses import sid_loss
from training.parallel import Processes, processes, whole
from training.stage import Stage
from training.stages import STAGES
from training.window import Scored

EXACT = 1e-9


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("judges") / "world")


def learnt(name: str, world: Path, out: Path, saved: tuple[int, ...] = (), **changes: Any) -> dict[str, Tensor]:
    """All weights after three steps; the state is asked for after some of them, as for a checkpoint."""
    settings = stage_settings(name, world, out, run__precision="float64", **changes)
    with processes(settings.run) as group:
        stage = STAGES[name](settings, group)
        for step in range(settings.run.steps):
            stage.step(step)
            if step in saved:
                for trainee in stage.trainees.values():
                    trainee.state_dict()
        return {
            f"{key}.{part}": whole(value.detach()).clone()
            for key, trainee in stage.trainees.items()
            for part, value in trainee.network.named_parameters()
        }


def assert_equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=EXACT, atol=EXACT, msg=name)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("dmd", {}),
        ("sid", {}),
        ("gan", {"r1_weight": 0.1, "r2_weight": 0.1}),
        ("dmd", {"run__gradient_checkpointing": True, "run__micro_batch": 2, "rollout__cache_gradients": "leaky"}),
    ],
)
def test_sharded_networks_learn_what_plain_ones_do(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, changes: dict[str, Any]
) -> None:
    sharded = learnt(name, world, tmp_path, **changes)
    monkeypatch.setattr(Processes, "shard", lambda self, module, **_: module.to(self.device))
    plain = learnt(name, world, tmp_path, **changes)
    assert plain.keys() == sharded.keys()
    # All weights together: Adam makes a whole step of a gradient that is nothing but rounding.
    one, other = (torch.cat([values[key].flatten() for key in plain]) for values in (plain, sharded))
    assert (one - other).norm() < 1e-6 * one.norm()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_checkpoint_before_the_first_move_changes_nothing(world: Path, tmp_path: Path, kind: str) -> None:
    changes = {"critic_warmup": 2, "optimizer__kind": kind}
    assert_equal(learnt("dmd", world, tmp_path, **changes), learnt("dmd", world, tmp_path, saved=(0,), **changes))


def stage_of(name: str, world: Path, out: Path, group: Processes, **changes: Any) -> Stage:
    return STAGES[name](stage_settings(name, world, out, run__precision="float64", **changes), group)


def some_clips(stage: Any) -> tuple[Scored, Draws]:
    """Clips a generator could have made, as a leaf that gathers gradients."""
    draws = Draws(0, 0, range(2), 2)
    with torch.no_grad():
        scored = stage.roll(draws, "generator", gradients=False)
    return Scored(scored.clips.detach().requires_grad_(), scored.counted, scored.embeds), draws


@pytest.mark.parametrize(("name", "flows"), [("dmd", False), ("sid", True)])
def test_only_sid_leads_gradients_through_the_score_networks(
    world: Path, tmp_path: Path, name: str, flows: bool
) -> None:
    settings = stage_settings(name, world, tmp_path, run__precision="float64")
    with processes(settings.run) as group:
        stage: Any = STAGES[name](settings, group)
        scored, draws = some_clips(stage)
        stage.generator_loss(scored, draws).backward()
        reached = [parameter.grad is not None for parameter in stage.trainees["critic"].network.parameters()]
        assert any(reached) == flows
        if flows:
            alone = scored.clips.detach().requires_grad_()
            real, fake = (value.detach() for value in stage.estimates(scored, draws))
            sid_loss(alone, real, fake, settings.alpha).backward()
            assert (scored.clips.grad - alone.grad).norm() > 1e-3 * alone.grad.norm()


def test_the_generator_wants_to_be_taken_for_real_and_the_judge_to_tell(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = stage_settings("gan", world, tmp_path, run__precision="float64")
    with processes(settings.run) as group:
        stage: Any = STAGES["gan"](settings, group)
        scored, draws = some_clips(stage)
        real = stage._clean(draws, "critic")

        def verdicts(on_real: float, on_fake: float) -> Any:
            def logits(clips: Tensor, *_: Any) -> Tensor:
                return torch.full((len(clips), 1), on_real if torch.equal(clips, real) else on_fake).double()

            return logits

        losses = {}
        for told in (True, False):
            monkeypatch.setattr(stage, "logits", verdicts(3.0, -3.0) if told else verdicts(-3.0, 3.0))
            losses[told] = (stage.critic_loss(draws).item(), stage.generator_loss(scored, draws).item())
        assert losses[True][0] < losses[False][0]
        assert losses[True][1] > losses[False][1]


def test_penalties_take_the_slope_at_the_noised_clip_and_have_their_own_weight(world: Path, tmp_path: Path) -> None:
    changes = {"r1_weight": 2.0, "r2_weight": 0.0, "critic_weight": 0.0}
    settings = stage_settings("gan", world, tmp_path, run__precision="float64", **changes)
    with processes(settings.run) as group:
        stage: Any = STAGES["gan"](settings, group)
        nn.init.normal_(stage.head.head[-1].weight, std=1.0)
        scored, draws = some_clips(stage)
        clips = scored.clips.detach()
        times = torch.full(clips.shape[:2], 1000.0)
        noise, nudge = stage.noise_like(draws, "a", clips), stage.noise_like(draws, "b", clips)
        plain = stage.logits(clips, times, noise, scored.embeds)
        # Nothing of the clip is left at the highest level: only what is added to the noised clip can still be seen.
        torch.testing.assert_close(stage.logits(clips + nudge, times, noise, scored.embeds), plain)
        assert not torch.allclose(stage.logits(clips, times, noise, scored.embeds, nudge), plain, rtol=1e-3)
        assert stage.critic_loss(draws).item() > 0


def test_the_judge_may_begin_as_another_network(world: Path, tmp_path: Path) -> None:
    settings = stage_settings("gan", world, tmp_path, critic={"init": str(world)})
    assert settings.critic.init == str(world)
    STAGES["gan"].check(settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout__switch_share": 0.5}, "no real clips whose prompt changes"),
        ({"rollout__long_share": 0.5, "rollout__long_blocks": [3, 4]}, "no re-encoded picture"),
        (
            {"rollout__long_share": 0.5, "rollout__long_blocks": [3, 4], "rollout__long_window": "sink"},
            "later_windows is 0.0 and rollout.long_share 0.5",
        ),
    ],
)
def test_a_gan_refuses_windows_that_real_clips_do_not_have(
    world: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    changes = changes | {"rollout__sink_frames": 3, "vae": str(world / "vae")}
    with pytest.raises(InvalidSettings, match=message):
        stage_settings("gan", world, tmp_path, **changes)
