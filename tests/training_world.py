"""A data set of noise, a random text encoder and settings small enough to train on in a test."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from pipeline.taehv import TAEHV
from training.data import DatasetInfo
from training.network import build_network, save_network
from training.pca import SPATIAL_STRIDE, TEMPORAL_STRIDE, PatchPCA
from training.settings import NetworkSizes
from training.settings_file import build
from training.stages import STAGES
from training.text import CaptionClassifier, UMT5EncoderModel, build_tokenizer, encoder_config
from training.world import sample_params

SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "ffn_dim": 32,
    "num_layers": 2,
    "freq_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 128,
}
INFO = DatasetInfo(clips=12, validation=2, pixel_clips=2, channels=4, num_frames=49, height=32, width=64)


def make_world(folder: Path) -> Path:
    """A data set of noise with the real files, a text encoder and decoders, none of them trained."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    frames, _, rows, columns = INFO.latent_shape
    np.save(folder / "latents.npy", rng.standard_normal((INFO.clips, *INFO.latent_shape)).astype(np.float16))
    np.save(folder / "masks.npy", rng.integers(0, 255, (INFO.clips, frames, rows, columns), dtype=np.uint8))
    np.save(
        folder / "pixels.npy", rng.integers(0, 255, (2, INFO.num_frames, INFO.height, INFO.width, 3), dtype=np.uint8)
    )
    params = [sample_params(rng, split="train").to_dict() for _ in range(INFO.clips)]
    (folder / "params.json").write_text(json.dumps(params))
    patch = 3 * TEMPORAL_STRIDE * SPATIAL_STRIDE**2
    PatchPCA.fit(rng.standard_normal((900, patch)).astype(np.float32), np.ones(900, np.float32), 4).save(
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
    patches = {"patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": SPATIAL_STRIDE}
    AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **patches, **statistics
    ).half().save_pretrained(folder / "vae")
    TAEHV(latent_channels=4, decoder_widths=(8, 8, 8, 8), encoder_width=8, patch_size=2).half().save_pretrained(
        folder / "taehv"
    )
    network = build_network(NetworkSizes(**SIZES))
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():  # a fresh network's output is zero: nothing before it would have a gradient
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    save_network(network, {name: value.detach() for name, value in network.named_parameters()}, folder / "transformer")
    return folder


def stage_settings(name: str, world: Path, out: Path, **changes: Any) -> Any:
    """Settings of a stage on that data set; changes are `section__name=value` or `name=value`."""
    run = {"out": str(out), "steps": 3, "batch": 4, "checkpoint_every": 100, "device": "cpu"}
    fast = {"rate": 1e-2, "weight_decay": 0.0, "clip": 1e9}
    values: dict[str, Any] = {
        "run": run,
        "network": {"init": str(world / "transformer")},
        "text": {"folder": str(world / "text"), "length": 32},
        "optimizer": dict(fast),
    }
    clips = {"folder": str(world), "frames": 6}
    rollout = {"height": 2, "width": 4, "block_frames": 3, "num_blocks": 2, "window_frames": 6}
    rollout |= {"denoising_steps": [1000.0, 500.0]}
    score = {"teacher": {"init": str(world / "transformer")}}
    if name in ("dmd", "sid", "gan"):
        values |= {"rollout": rollout, "generator_every": 2, "critic_optimizer": dict(fast)}
    values |= {
        "teacher": {"clips": clips},
        "causal": {"clips": clips, "forcing": "diffusion", "block_frames": 3, "clean_blocks": 0.3},
        "ode_pairs": {"rollout": rollout, "solver_steps": 4},
        "ode": {"rollout": rollout, "pairs": str(world / "pairs")},
        "dmd": {"score": score},
        "sid": {"score": score},
        "gan": {
            "clips": clips,
            "taps": [0, 1],
            "r1_weight": 0.1,
            "r2_weight": 0.1,
            "weight": 1.0,
            "critic_weight": 1.0,
        },
    }[name]
    for key, value in changes.items():
        place = values
        *sections, last = key.split("__")
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return build(STAGES[name].settings_kind, json.loads(json.dumps(values)))


def toml_lines(values: dict, prefix: str = "") -> list[str]:
    """Lines of a settings file: JSON's lists, numbers and texts are TOML's, so one line a setting will do."""
    lines = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines += toml_lines(value, f"{prefix}{name}.")
        elif value is not None:
            lines.append(f"{prefix}{name} = {json.dumps(value)}")
    return lines
