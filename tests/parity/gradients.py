"""Golden case 10: the gradients of a training rollout, with the cache detached and with a leaky one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from pipeline.checkpoint import transformer_from_wan
from tests.parity.report import Row, largest_error
from tests.parity.rollout import TOLERANCE, Tensors, read
from training.rollout import Rollout, RolloutPlan
from training.settings import RolloutSettings

STEPS, GRADIENT_FRAMES = (1000.0, 750.0, 500.0, 250.0), 21
CACHES = {"asis": "leaky", "detached": "detached"}


def check_gradients(path: Path) -> list[Row]:
    """Output and gradients for every exit step, with both kinds of cache; with and without checkpointing."""
    config, weights, data = read(path)
    rows = []
    for variant in config["variants"]:
        exit_name, cache = variant.split(".")
        if cache not in CACHES:
            continue
        for checkpointing in (False, True):
            name = f"{variant}, recomputed" if checkpointing else variant
            model = transformer_from_wan(config["model"], weights).requires_grad_(True)
            if checkpointing:
                model.enable_gradient_checkpointing()
            noise = data["noise"].clone().requires_grad_(f"{variant}.grad_noise" in data)
            output = roll_out(model, config, data, noise, exit_name, CACHES[cache])
            rows.append(Row(f"{name}.output", largest_error(output, data[f"{exit_name}.output"]), TOLERANCE))
            (output * data["grad_output"]).sum().backward()
            gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
            for key, expected in data.items():
                prefix = f"{variant}.grad."
                if key.startswith(prefix):
                    ((renamed, expected),) = convert_wan_transformer_to_diffusers(
                        {key.removeprefix(prefix): expected}
                    ).items()
                    rows.append(relative(f"{name} {renamed}", gradients[renamed], expected))
            if noise.requires_grad:
                rows.append(relative(f"{name} noise", noise.grad, data[f"{variant}.grad_noise"]))
    return rows


def roll_out(model, config: dict, data: Tensors, noise: torch.Tensor, exit_name: str, cache: str) -> torch.Tensor:
    size, blocks = config["num_frame_per_block"], config["frames"] // config["num_frame_per_block"]
    height, width = config["latent"]
    settings = RolloutSettings(
        height=height,
        width=width,
        block_frames=size,
        num_blocks=blocks,
        window_frames=config["frames"],
        positions="absolute",
        denoising_steps=STEPS,
        context_sigma="table",
        gradient_frames=GRADIENT_FRAMES,
        cache_gradients=cache,  # type: ignore[arg-type]
    )
    exit_step = int(exit_name.removeprefix("exit"))

    def recorded() -> Iterator[torch.Tensor]:
        count = 0
        while True:
            yield data[f"{exit_name}.draw.{count}"]
            count += 1

    draws = recorded()

    def draw(block: int, step: int) -> torch.Tensor:
        start = noise[:, block * size : (block + 1) * size]
        return start if step == 0 else next(draws).view_as(start)

    plan = RolloutPlan(blocks, (exit_step,) * blocks)
    rollout = Rollout(model, settings, (noise.shape[2], height, width), noise.device, noise.dtype)
    return rollout([data["prompt_embeds"]], plan, draw, gradients=True)


def relative(name: str, measured: torch.Tensor, expected: torch.Tensor) -> Row:
    """Gradients are compared by the norm of their difference, relative to their own."""
    return Row(name, ((measured - expected).norm() / expected.norm()).item(), TOLERANCE)


CASES = {"case10_rollout_gradients": check_gradients}
