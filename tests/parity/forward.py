"""Golden case 6: whole clips at once under training's masks."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.checkpoint import transformer_from_wan
from pipeline.sampler import FlowSchedule, flow_to_clean
from tests.parity.report import Row, largest_error
from tests.parity.rollout import TOLERANCE, read
from training.masks import block_causal, frame_mask, teacher_forcing

EXACT = 0.0


@torch.no_grad()
def check_training_forward(path: Path) -> list[Row]:
    """Mask, flow and clean estimate of each variant."""
    config, weights, data = read(path)
    model = transformer_from_wan(config["model"], weights)
    schedule = FlowSchedule(config["shift"])
    text = model.encode_text(data["prompt_embeds"])
    rows = []
    for name, variant in config["variants"].items():
        frames, block, first = variant["frames"], variant["num_frame_per_block"], variant["independent_first_frame"]
        noisy, timestep = data[f"{name}.x"], data[f"{name}.t"]
        if variant["teacher_forcing"]:
            visible = teacher_forcing(frames, block, first_frame=first)
            levels = data.get(f"{name}.aug_t", torch.zeros_like(timestep))
            latents = torch.cat([data[f"{name}.clean_x"], noisy], 1)
            times, positions = torch.cat([levels, timestep], 1), [*range(frames), *range(frames)]
        else:
            window = None if variant["local_attn_size"] < 0 else variant["local_attn_size"]
            visible = block_causal(frames, block, first_frame=first, window=window)
            latents, times, positions = noisy, timestep, range(frames)
        mask = frame_mask(visible, config["tokens_per_frame"])
        flow = model(latents, times, text, mask=mask, positions=positions)[:, -frames:]
        clean = flow_to_clean(flow, noisy, schedule.sigma(timestep)[..., None, None, None])
        rows.append(Row(f"{name}.mask", largest_error(visible, data[f"{name}.mask_frames"]), EXACT))
        rows.append(Row(f"{name}.flow", largest_error(flow, data[f"{name}.flow"]), TOLERANCE))
        rows.append(Row(f"{name}.x0", largest_error(clean, data[f"{name}.x0"]), TOLERANCE))
    return rows


CASES = {"case6_training_forward": check_training_forward}
