"""Last stage: put the parts together into a model folder: `python -m training.export --out weights/embedded`."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from pipeline.config import ModelSpec
from pipeline.folder import INDEX_FILE, index_entries
from training.captions import MAX_TOKENS
from training.data import ClipDataset
from training.network import NetworkConfig, build_network
from training.rollout import RolloutConfig

NAME = "Self-Forcing embedded"


def embedded_spec(rollout: RolloutConfig, height: int, width: int, fps: int) -> ModelSpec:
    """What the model folder says about the model: the rollout it was trained with is the one it samples with."""
    return ModelSpec(
        name=NAME,
        height=height,
        width=width,
        fps=fps,
        native_fps=fps,
        frames_per_block=rollout.block_frames,
        text_len=MAX_TOKENS,
        denoising_steps=rollout.denoising_steps,
        shift=rollout.shift,
        window_frames=rollout.window_frames,
        sink_frames=rollout.sink_frames,
        positions=rollout.window.positions,
        context_noise=rollout.context_noise,
    )


def export(checkpoint: Path, data: Path, out: Path, rollout: RolloutConfig | None = None) -> None:
    """Write the folder beside its place and move it there whole.

    Args:
        checkpoint: of any stage; its averaged weights are taken, in half precision.
        data: the data set's folder, with text/, vae/ and taehv/ in it.
        out: the model folder; replaced if it exists, but for the files this stage does not write (its model card).
    """
    state = torch.load(checkpoint, weights_only=True)
    network = build_network(NetworkConfig(**state["config"]))
    network.load_state_dict(state["average"])
    info = ClipDataset(data).info
    spec = embedded_spec(rollout or RolloutConfig(), info.height, info.width, info.fps)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as place:
        folder = Path(place)
        network.half().save_pretrained(folder / "transformer")
        for name, source in (
            ("text_encoder", data / "text" / "text_encoder"),
            ("tokenizer", data / "text" / "tokenizer"),
            ("vae", data / "vae"),
            ("taehv", data / "taehv"),
        ):
            shutil.copytree(source, folder / name)
        (folder / INDEX_FILE).write_text(json.dumps({**index_entries(), "settings": asdict(spec)}, indent=2) + "\n")
        for part in folder.iterdir():
            target = out / part.name
            if target.is_dir():
                shutil.rmtree(target)
            part.replace(target)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.export", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("training/cache/dmd/dmd.pt"))
    parser.add_argument("--data", type=Path, default=Path("training/cache"))
    parser.add_argument("--out", type=Path, default=Path("weights/embedded"))
    options = parser.parse_args(argv)
    export(options.checkpoint, options.data, options.out)


if __name__ == "__main__":
    main()
