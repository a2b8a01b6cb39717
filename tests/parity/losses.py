"""Golden case 7: the losses on recorded predictions of stubbed score networks."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.sampler import FlowSchedule, add_noise, clean_to_flow
from tests.parity.report import Row, largest_error
from tests.parity.rollout import TOLERANCE, read
from training.losses import dmd_gradient, dmd_loss, flow_loss, guided, score_timesteps, sid_loss

SHIFT, LOW, HIGH = 5.0, 20.0, 980.0


def check_losses(path: Path) -> list[Row]:
    """Every recorded quantity of DMD (four variants), the critic and SiD (two)."""
    config, _, data = read(path)
    schedule = FlowSchedule(SHIFT)
    rows: list[Row] = []

    def compare(name: str, value: torch.Tensor) -> None:
        expected = data[name]
        # Gradients are divided by the number of entries: they are compared relative to the largest of them.
        scale = expected.abs().max().item() if ".grad_" in name else 1.0
        rows.append(Row(name, largest_error(value.to(expected), expected) / scale, TOLERANCE))

    def noised(name: str, shift: float) -> torch.Tensor:
        raw = data[f"{name}.raw_timestep"].expand(data["x"].shape[:2])
        timestep = score_timesteps(raw, shift, LOW, HIGH)
        compare(f"{name}.timestep", timestep)
        sigma = schedule.sigma(timestep)[..., None, None, None]
        compare(f"{name}.noisy", add_noise(data["x"], data["noise"], sigma))
        return sigma

    for name, variant in config["variants"].items():
        noised(name, SHIFT if variant["shift"] is None else variant["shift"])
        clean = data["x"].clone().requires_grad_()
        real = guided(data["real_cond"], data["real_uncond"], variant["real_guidance_scale"])
        fake = guided(data["fake_cond"], data["fake_uncond"], variant["fg"] or 0.0)
        gradient = dmd_gradient(clean.detach(), real, fake)
        mask = None
        if variant["mask"]:
            mask = (torch.arange(clean.shape[1]) >= 3)[:, None, None, None]
        loss = dmd_loss(clean, gradient, mask)
        loss.backward()
        compare(f"{name}.kl_grad_unnormalized", fake - real)
        compare(f"{name}.kl_grad", gradient)
        compare(f"{name}.gradient_norm_log", gradient.abs().mean())
        compare(f"{name}.loss", loss)
        compare(f"{name}.grad_x", clean.grad)

    sigma = noised("critic", SHIFT)
    predicted = data["fake_cond"].clone().requires_grad_()
    flow = clean_to_flow(predicted, add_noise(data["x"], data["noise"], sigma), sigma)
    loss = flow_loss(flow, data["x"], data["noise"])
    loss.backward()
    compare("critic.loss", loss)
    compare("critic.grad_pred_x0", predicted.grad)

    for name in ("sid1.0", "sid1.2"):
        leaves = {key: data[key].clone().requires_grad_() for key in ("x", "real_cond", "real_uncond", "fake_cond")}
        real = guided(leaves["real_cond"], leaves["real_uncond"], config["variants"]["dmd"]["real_guidance_scale"])
        loss = sid_loss(leaves["x"], real, leaves["fake_cond"], alpha=float(name.removeprefix("sid")))
        loss.backward()
        compare(f"{name}.loss", loss)
        for key, leaf in leaves.items():
            compare(f"{name}.grad_{key}", leaf.grad)
    return rows


CASES = {"case7_losses": check_losses}
