"""Golden case 1: the sigma table and the conversions, equal to the last bit."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from pipeline.sampler import FlowSchedule, add_noise, clean_to_flow, euler_step, flow_to_clean
from tests.parity.report import Row, largest_error

EXACT = 0.0
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def check_scheduler(path: Path) -> list[Row]:
    data = load_file(path)
    rows: list[Row] = []

    def compare(name: str, value: torch.Tensor) -> None:
        if name in data:
            rows.append(Row(name, largest_error(value, data[name]), EXACT))

    for name in sorted({key.split(".")[0] for key in data if key.startswith("shift")}):
        schedule = FlowSchedule(float(name.removeprefix("shift")))
        compare(f"{name}.sigmas", schedule.sigmas)
        compare(f"{name}.timesteps", schedule.timesteps)
        compare(f"{name}.training_weights", schedule.training_weights)
        compare(f"{name}.warped", schedule.warp([1000, 750, 500, 250]))
        compare(f"{name}.warped_with_zero", schedule.warp([1000, 750, 500, 250, 0]))

        clean, noise, flow, timestep = (data[f"ex.{key}"] for key in ("clean", "noise", "flow", "t"))
        compare(f"ex.{name}.nearest_id", schedule.nearest(timestep))
        sigma = schedule.sigma(timestep).view(-1, *[1] * (clean.ndim - 1))
        for label, dtype in DTYPES.items():
            noisy = add_noise(clean.to(dtype), noise.to(dtype), sigma)
            compare(f"ex.{name}.xt_{label}", noisy)
            compare(f"ex.{name}.x0_from_flow_{label}", flow_to_clean(flow.to(dtype), noisy, sigma))
            compare(f"ex.{name}.flow_from_x0_{label}", clean_to_flow(clean.to(dtype), noisy, sigma))
        euler = f"ex.{name}.euler_step_f32"
        if euler in data:
            rows_used = len(data[euler])
            index = schedule.nearest(timestep[:rows_used])
            # The authors step every sample to zero as soon as one of them stands on the last row.
            last = bool((index + 1 >= len(schedule.sigmas)).any())
            following = torch.zeros(rows_used) if last else schedule.sigmas[index + 1]
            shape = (-1, *[1] * (clean.ndim - 1))
            step = euler_step(flow[:rows_used], clean[:rows_used], sigma[:rows_used], following.view(shape))
            compare(euler, step)

    for name in sorted({key.split(".")[0] for key in data if key.startswith("ode")}):
        levels, shift = name.removeprefix("ode").split("_shift")
        schedule = FlowSchedule(float(shift), num_levels=int(levels))
        compare(f"{name}.sigmas", schedule.sigmas)
        compare(f"{name}.timesteps", schedule.timesteps)
    return rows


CASES = {"case1_scheduler": check_scheduler}
