"""Rollouts, windows, draws, averages and the small rules of the losses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.cache import CacheWindow
from pipeline.decoder import WanStreamDecoder, encode_wan
from tests.small import CHANNELS, HEIGHT, TEXT_DIM, TEXT_LEN, WIDTH, small_transformer
from tests.training_world import make_world
from training import losses
from training.draws import Draws
from training.network import load_vae
from training.optim import Muon, WeightAverage, matrices_and_rest, orthogonalise
from training.rollout import Rollout, RolloutPlan
from training.settings import OptimizerSettings, RolloutSettings
from training.window import scored_window

CPU, FLOAT = torch.device("cpu"), torch.float32


def settings(**changes: Any) -> RolloutSettings:
    sizes = {"height": HEIGHT, "width": WIDTH, "block_frames": 3, "num_blocks": 3, "window_frames": 9}
    return RolloutSettings(**(sizes | changes))


def test_noise_drawn_where_it_is_used_is_a_function_of_step_and_purpose() -> None:
    cpu = torch.device("cpu")
    draws = Draws(0, 1, range(4, 6), 8, "device")
    again, later = Draws(0, 1, range(4, 6), 8, "device"), Draws(0, 2, range(4, 6), 8, "device")
    noise = draws.normal("x", (3000,), cpu, torch.float32)
    assert noise.shape == (2, 3000) and abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(noise, again.normal("x", (3000,), cpu, torch.float32))
    assert not torch.equal(noise, later.normal("x", (3000,), cpu, torch.float32))
    assert not torch.equal(noise, draws.normal("y", (3000,), cpu, torch.float32))
    assert draws.uniform("u", 3).shape == (2, 3) and torch.equal(draws.uniform("u", 3), again.uniform("u", 3))


def make(network: Any, chosen: RolloutSettings) -> Rollout:
    return Rollout(network, chosen, (CHANNELS, HEIGHT, WIDTH), CPU, FLOAT)


def embeddings(batch: int = 1, seed: int = 3) -> torch.Tensor:
    return torch.randn(batch, TEXT_LEN, TEXT_DIM, generator=torch.Generator().manual_seed(seed))


def test_rollout_samples_like_the_pipeline() -> None:
    """With the same noise, a rollout of one clip is what inference would make; a sink, a window, noised context."""
    network = small_transformer()
    chosen = settings(window_frames=9, sink_frames=3, context_noise=50.0, num_blocks=6)
    rollout, draws = make(network, chosen), Draws(0, 0, range(1), 1)
    prompt = embeddings()
    latents = rollout.with_noise([prompt], RolloutPlan.full(chosen), draws, "x", gradients=False)
    text = network.encode_text(prompt)
    cache = network.make_cache(CacheWindow(3, 9, 3), HEIGHT, WIDTH)

    def noise(block: int, step: int) -> torch.Tensor:
        return draws.normal(f"x/{block}/{step}", (3, CHANNELS, HEIGHT, WIDTH), CPU, FLOAT)

    for block in range(6):
        cache.begin_block(3)
        x = noise(block, 0)
        for step, (time, sigma) in enumerate(zip(rollout.steps.timesteps, rollout.steps.sigmas, strict=True)):
            clean = x - sigma * network(x, torch.full((1, 3), time), text, cache=cache)
            if step < 3:
                following = rollout.steps.sigmas[step + 1]
                x = (1 - following) * clean + following * noise(block, step + 1)
        torch.testing.assert_close(latents[:, 3 * block : 3 * block + 3], clean, rtol=0, atol=2e-5)
        network(0.95 * clean + 0.05 * noise(block, 4), torch.full((1, 3), 50.0), text, cache=cache)


def test_gradients_reach_the_exit_call_of_the_last_frames_only() -> None:
    network = small_transformer().requires_grad_(True)
    chosen = settings(gradient_frames=6, num_blocks=5, window_frames=15)
    plan = RolloutPlan(5, (1, 0, 3, 2, 1))
    latents = make(network, chosen).with_noise([embeddings(2)], plan, Draws(0, 0, range(2), 2), "x", gradients=True)
    weight = network.proj_out.weight
    early = torch.autograd.grad(latents[:, :9].sum(), weight, retain_graph=True, allow_unused=True)[0]
    assert early is None or not early.any()
    assert torch.autograd.grad(latents[:, 9:].sum(), weight)[0].any()


@pytest.mark.parametrize(("cache", "leaks"), [("detached", False), ("leaky", True)])
def test_only_the_leaky_cache_leads_gradients_back(cache: Any, leaks: bool) -> None:
    network = small_transformer().requires_grad_(True)
    chosen = settings(cache_gradients=cache, positions="absolute", denoising_steps=(1000.0,))
    start = torch.randn(3, 1, 3, CHANNELS, HEIGHT, WIDTH, requires_grad=True)
    plan = RolloutPlan(3, (0, 0, 0))

    def noise(block: int, step: int) -> torch.Tensor:
        return start[block] if step == 0 else torch.zeros(1, 3, CHANNELS, HEIGHT, WIDTH)

    latents = make(network, chosen)([embeddings()], plan, noise, gradients=True)
    (gradient,) = torch.autograd.grad(latents[:, 6:].sum(), start)
    assert [bool(gradient[block].any()) for block in range(3)] == [leaks, leaks, True]


def test_a_switched_prompt_changes_the_clip_from_its_block_on() -> None:
    network, chosen = small_transformer(), settings()
    draws, prompts = Draws(0, 0, range(1), 1), [embeddings(seed=1), embeddings(seed=2)]
    whole = make(network, chosen).with_noise(prompts[:1], RolloutPlan(3, (3,) * 3), draws, "x", gradients=False)
    switched = make(network, chosen).with_noise(prompts, RolloutPlan(3, (3,) * 3, 1), draws, "x", gradients=False)
    assert torch.equal(whole[:, :3], switched[:, :3])
    assert not torch.equal(whole[:, 3:6], switched[:, 3:6])


def test_plans_are_the_same_on_every_process() -> None:
    chosen = settings(long_share=0.5, long_blocks=(4, 6), switch_share=0.5, exit_per_block=True)
    plans = [RolloutPlan.random(chosen, Draws(0, step, range(3), 8), "x") for step in range(40)]
    others = [RolloutPlan.random(chosen, Draws(0, step, range(5, 8), 8), "x") for step in range(40)]
    assert plans == others
    assert {plan.num_blocks for plan in plans} == {3, 4, 5, 6}
    assert any(len(set(plan.exit_steps)) > 1 for plan in plans)
    switches = [(plan.num_blocks, plan.switch_block) for plan in plans if plan.switch_block is not None]
    assert 5 < len(switches) < 35 and all(max(1, blocks - 2) <= switch < blocks for blocks, switch in switches)
    together = [RolloutPlan.random(settings(), Draws(0, step, range(1), 1), "x").exit_steps for step in range(40)]
    assert all(len(set(steps)) == 1 for steps in together) and len({steps[0] for steps in together}) == 4
    last = RolloutPlan.random(settings(last_step_only=True), Draws(0, 0, range(1), 1), "x")
    assert last.exit_steps == (3, 3, 3)


def test_draws_do_not_depend_on_how_a_batch_is_cut() -> None:
    whole = Draws(7, 3, range(6), 6)
    parts = [Draws(7, 3, range(0, 2), 6), Draws(7, 3, range(2, 6), 6)]
    shape = (2, 3)
    assert torch.equal(
        whole.normal("a", shape, CPU, FLOAT), torch.cat([p.normal("a", shape, CPU, FLOAT) for p in parts])
    )
    assert torch.equal(whole.spread("a", 2), torch.cat([part.spread("a", 2) for part in parts]))
    assert torch.equal(whole.integers("a", 9, 2), torch.cat([part.integers("a", 9, 2) for part in parts]))
    noise = whole.normal("a", (50, 50), CPU, FLOAT)
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    for other in (Draws(8, 3, range(6), 6), Draws(7, 4, range(6), 6)):
        assert not torch.equal(whole.uniform("a", 1), other.uniform("a", 1))
    assert not torch.equal(whole.uniform("a", 1), whole.uniform("b", 1))


def numbered(frames: int) -> torch.Tensor:
    return torch.arange(float(frames)).view(1, frames, 1, 1, 1)


def test_window_of_a_clip_that_fits_is_the_clip() -> None:
    prompts = [torch.zeros(1, 2, 2), torch.ones(1, 2, 2)]
    scored = scored_window(numbered(9), RolloutPlan(3, (0,) * 3), settings(), prompts[:1])
    assert scored.clips.flatten().tolist() == list(range(9)) and scored.mask is None and scored.weight is None
    scored = scored_window(numbered(9), RolloutPlan(3, (0,) * 3, 2), settings(), prompts)
    assert scored.counted.tolist() == [False] * 6 + [True] * 3
    assert torch.equal(scored.embeds, prompts[1]) and scored.weight is not None


def test_late_window_is_sink_and_recent_frames() -> None:
    chosen = settings(sink_frames=3, long_share=1.0, long_blocks=(4, 6), long_window="sink")
    scored = scored_window(numbered(18), RolloutPlan(6, (0,) * 6), chosen, [torch.zeros(1, 2, 2)])
    assert scored.clips.flatten().tolist() == [0, 1, 2, 12, 13, 14, 15, 16, 17]
    assert scored.counted.tolist() == [False] * 3 + [True] * 6


def test_late_window_begins_with_its_re_encoded_picture(tmp_path: Path) -> None:
    vae = load_vae(str(make_world(tmp_path) / "vae"))
    latents = torch.randn(2, 15, 4, 2, 4)
    chosen = settings(height=2, width=4, long_share=1.0, long_blocks=(4, 6))
    scored = scored_window(latents, RolloutPlan(5, (0,) * 5), chosen, [torch.zeros(2, 2, 2)], vae)
    assert torch.equal(scored.clips[:, 1:], latents[:, 7:])
    assert scored.counted.tolist() == [False] * 3 + [True] * 6
    pictures = WanStreamDecoder(vae).decode(latents[:, :7])
    assert pictures.shape[1] == 25
    torch.testing.assert_close(scored.clips[:, :1], encode_wan(vae, pictures[:, -1:]))


def test_weighted_losses_count_every_clip_the_same() -> None:
    """So a batch may be cut into parts; and an unweighted frame changes nothing."""
    flow, clean, noise = torch.randn(3, 4, 5, 2, 2, 2).unbind(0)
    weight = torch.tensor([[1.0, 0, 2, 0, 1], [0, 0, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    whole = losses.flow_loss(flow, clean, noise, weight)
    parts = [losses.flow_loss(flow[i : i + 1], clean[i : i + 1], noise[i : i + 1], weight[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(whole, torch.stack(parts).mean())
    assert parts[3] == 0
    changed = flow.clone()
    changed[1, 0] += 100
    torch.testing.assert_close(losses.flow_loss(changed, clean, noise, weight), whole)


def test_gan_losses() -> None:
    fake, real = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [-1.0]])
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    assert losses.gan_generator_loss(fake).item() == pytest.approx((softplus(0) + softplus(-2)) / 2)
    assert losses.gan_generator_loss(fake, real).item() == pytest.approx((softplus(1) + softplus(-3)) / 2)
    plain = (softplus(-1) + softplus(0) + softplus(1) + softplus(2)) / 2
    assert losses.gan_discriminator_loss(fake, real).item() == pytest.approx(plain)
    assert losses.gan_discriminator_loss(fake, real, True).item() == pytest.approx((softplus(-1) + softplus(3)) / 2)
    assert losses.finite_difference_penalty(fake, fake + 0.01, 0.01).item() == pytest.approx(1.0, rel=1e-4)


def test_dmd_gradient_points_from_the_teacher_to_the_critic() -> None:
    clean = torch.zeros(2, 3, 1, 1, 1)
    real, fake = clean + torch.tensor([2.0, 4.0]).view(2, 1, 1, 1, 1), clean.clone()
    assert torch.equal(losses.dmd_gradient(clean, real, fake), -torch.ones_like(clean))
    assert torch.equal(losses.dmd_gradient(clean, clean, clean), clean)  # nothing to scale by


def test_orthogonalise() -> None:
    matrices = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))
    for result in (orthogonalise(matrices), orthogonalise(matrices.mT)):
        values = torch.linalg.svdvals(result)
        assert values.min() > 0.6 and values.max() < 1.3


def test_muon_and_average() -> None:
    network = small_transformer()
    matrices, rest = matrices_and_rest(network)
    assert len(matrices) + len(rest) == len(list(network.parameters()))
    assert matrices and all(matrix.ndim == 2 for matrix in matrices)
    target = torch.randn(32, 24, generator=torch.Generator().manual_seed(0))
    weight = torch.nn.Parameter(torch.zeros(32, 24))
    muon, average = Muon([weight]), WeightAverage([weight], 0.9)
    for step in range(200):
        weight.grad = weight.detach() - target
        muon.param_groups[0]["lr"] = 0.1 * (1 - step / 200)
        muon.step()
        average.update()
    assert (weight - target).norm() < 0.1 * target.norm()
    assert (average.average[0] - target).norm() < 0.2 * target.norm()


def test_rates_warm_up_and_fall() -> None:
    chosen = OptimizerSettings(warmup_steps=4, flat_until=0.5, floor=0.1)
    scales = [chosen.scale(step, 100) for step in (0, 3, 49, 75, 99)]
    assert scales == pytest.approx([0.25, 1.0, 1.0, 0.5, 0.1])
    assert OptimizerSettings().scale(10**6, 10**6) == 1.0
    assert np.isclose(OptimizerSettings(warmup_steps=2).scale(0, 1), 0.5)
