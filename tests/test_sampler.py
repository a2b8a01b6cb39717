"""Noise and schedule."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from pipeline.sampler import (
    DenoisingSteps,
    FlowSchedule,
    add_noise,
    block_noise,
    clean_to_flow,
    denoise_block,
    flow_to_clean,
    shifted_time,
)

STEPS = [1000, 750, 500, 250]
SHAPE = (1, 3, 4, 2, 2)


def test_noise_is_a_function_of_seed_block_and_step() -> None:
    reference = block_noise(7, 3, 2, SHAPE)
    block_noise(7, 4, 0, SHAPE)
    torch.manual_seed(0)
    assert torch.equal(block_noise(7, 3, 2, SHAPE), reference)
    others = [block_noise(*key, SHAPE) for key in ((8, 3, 2), (7, 4, 2), (7, 3, 1), (73, 2, 2), (7, 32, 2))]
    assert not any(torch.equal(other, reference) for other in others)
    assert reference.dtype == torch.float32 and reference.device.type == "cpu"


def test_largest_seed_and_statistics() -> None:
    noise = block_noise(2**32 - 1, 10**6, 3, (100, 1000))
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_warped_steps_agree_with_diffusers() -> None:
    schedule = FlowSchedule(5.0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0, stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=[step / 1000 for step in STEPS])
    torch.testing.assert_close(schedule.warp(STEPS), scheduler.timesteps.float(), rtol=0, atol=1e-3)


def test_the_table_does_not_depend_on_torchs_default_dtype() -> None:
    expected = FlowSchedule(5.0).warp([1000, 750, 500, 0])
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = FlowSchedule(5.0).warp([1000, 750, 500, 0])
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_steps_mean_the_same_in_a_shorter_table() -> None:
    found = FlowSchedule(5.0, num_levels=100).warp(STEPS)
    torch.testing.assert_close(found, FlowSchedule(5.0).warp(STEPS), rtol=0, atol=1e-3)


def test_conversions_are_inverse() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, *SHAPE, generator=generator).unbind()
    sigma = torch.tensor(0.8)
    noisy = add_noise(clean, noise, sigma)
    flow = noise - clean
    torch.testing.assert_close(flow_to_clean(flow, noisy, sigma), clean, rtol=0, atol=1e-6)
    torch.testing.assert_close(clean_to_flow(clean, noisy, sigma), flow, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_noised_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    clean, noise = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0)).to(dtype).unbind()
    sigma = torch.tensor(0.8333333)
    exact = (1 - sigma) * clean.float() + sigma * noise.float()
    assert torch.equal(add_noise(clean, noise, sigma), exact.to(dtype))


@pytest.mark.parametrize("exit_step", [None, 0, 2])
def test_denoise_block_visits_each_step_once(exit_step: int | None) -> None:
    steps = DenoisingSteps.from_schedule(FlowSchedule(5.0), STEPS)
    target = torch.full(SHAPE, 0.5)
    calls, draws = [], []

    def predict(latents: torch.Tensor, timestep: float, step: int) -> torch.Tensor:
        calls.append((round(timestep, 2), step))
        return clean_to_flow(target, latents, steps.sigmas[step])

    def noise(step: int) -> torch.Tensor:
        draws.append(step)
        return torch.randn(SHAPE, generator=torch.Generator().manual_seed(step))

    estimates = list(denoise_block(predict, noise, steps, exit_step))
    count = 4 if exit_step is None else exit_step + 1
    assert calls == [(1000.0, 0), (937.5, 1), (833.33, 2), (625.0, 3)][:count]
    assert draws == list(range(count))
    torch.testing.assert_close(estimates[-1], target, rtol=0, atol=1e-6)


def test_shift_must_be_positive() -> None:
    with pytest.raises(ValueError, match="shift must be positive"):
        shifted_time(torch.rand(3), float("nan"))
