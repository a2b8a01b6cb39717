"""Contact sheet of a checkpoint, before there is a decoder: `python -m training.preview CHECKPOINT OUT.png`.

Latents are decoded linearly, so pictures are soft; what counts is whether the right things are there and move.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from training.captions import make_caption
from training.data import ClipDataset
from training.network import NetworkConfig, build_network, load_text_encoder
from training.rollout import Rollout, RolloutConfig
from training.world import sample_params


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.preview", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=Path("training/cache"))
    parser.add_argument("--clips", type=int, default=12)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--columns", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)

    state = torch.load(options.checkpoint, weights_only=True)
    network = build_network(NetworkConfig(**state["config"]))
    network.load_state_dict(state["average"])
    text = load_text_encoder(options.data / "text")
    data = ClipDataset(options.data)
    rng = np.random.default_rng(options.seed)
    captions = [make_caption(sample_params(rng, split="held_out"), rng, full=True)[0] for _ in range(options.clips)]
    torch.manual_seed(options.seed)
    with torch.no_grad():
        rollout = Rollout(network, RolloutConfig(), data.info.latent_shape[1:])
        latents = rollout(
            network.encode_text(text.encode(captions)),
            options.blocks,
            guidance=options.guidance,
            empty_kv=network.encode_text(text.encode([""])),
        )
    rows = []
    for caption, clip in zip(captions, latents.float().numpy(), strict=True):
        frames = data.pca.decode(clip)
        shown = frames[np.linspace(0, len(frames) - 1, options.columns).round().astype(int)]
        rows.append(np.concatenate(list(shown), axis=1))
        print(caption)
    sheet = (np.concatenate(rows).clip(0, 1) * 255).astype(np.uint8)
    Image.fromarray(sheet).save(options.out)


if __name__ == "__main__":
    main()
