"""Last stage: put the parts together into a model folder: `python -m training.export --out weights/embedded`."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import UMT5EncoderModel

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


def blended_weights(
    checkpoint: Path, base: Path | None = None, share: float = 1.0
) -> tuple[NetworkConfig, dict[str, torch.Tensor]]:
    """Averaged weights of a checkpoint, or a straight line's point between those of `base` (0) and its own (1).

    Distribution matching seeks modes: the longer it runs, the surer the subject and the less it moves. The network it
    started from moves well and is less sure. Weights between the two, which the short way from one to the other makes
    possible, have most of both.
    """
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    weights = state["average"]
    if base is not None:
        start = torch.load(base, map_location="cpu", weights_only=True)["average"]
        weights = {name: torch.lerp(start[name], value, share) for name, value in weights.items()}
    return NetworkConfig(**state["config"]), weights


def export(
    checkpoint: Path,
    data: Path,
    out: Path,
    rollout: RolloutConfig | None = None,
    base: Path | None = None,
    share: float = 1.0,
) -> None:
    """Write the folder beside its place and move it there whole.

    Args:
        checkpoint: of any stage; its averaged weights are taken, in half precision.
        data: the data set's folder, with text/, vae/ and taehv/ in it.
        base, share: see `blended_weights`.
        out: the model folder; replaced if it exists, but for the files this stage does not write (its model card).
    """
    config, weights = blended_weights(checkpoint, base, share)
    network = build_network(config)
    network.load_state_dict(weights)
    info = ClipDataset(data).info
    spec = embedded_spec(rollout or RolloutConfig(), info.height, info.width, info.fps)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as place:
        folder = Path(place)
        network.half().save_pretrained(folder / "transformer")
        UMT5EncoderModel.from_pretrained(data / "text" / "text_encoder").half().save_pretrained(folder / "text_encoder")
        for name, source in (
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
    parser.add_argument("--base", type=Path, default=Path("training/cache/base/base.pt"))
    parser.add_argument("--share", type=float, default=0.6, help="1: the checkpoint itself; 0: the base")
    options = parser.parse_args(argv)
    export(options.checkpoint, options.data, options.out, base=options.base, share=options.share)


if __name__ == "__main__":
    main()
