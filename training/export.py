"""Last stage: put the parts together into a model folder: `python -m training.export --out weights/embedded`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import UMT5EncoderModel

from pipeline.config import ModelSpec
from pipeline.errors import InvalidSettings, WeightsError
from pipeline.folder import INDEX_FILE, index_entries
from pipeline.transformer import CausalWanTransformer3DModel
from training import console, enhancing
from training.checkpoints import SETTINGS_FILE
from training.data import ClipDataset
from training.network import load_network
from training.pca import SPATIAL_STRIDE
from training.settings import NetworkSettings, RolloutSettings
from training.settings_file import build

NAME = "Self-Forcing embedded"


def embedded_spec(
    rollout: RolloutSettings, text_len: int, height: int, width: int, fps: int, pictures: bool = False
) -> ModelSpec:
    """What the model folder says about the model: the rollout it was trained with is the one it samples with."""
    return ModelSpec(
        name=NAME,
        height=height,
        width=width,
        fps=fps,
        native_fps=fps,
        frames_per_block=rollout.block_frames,
        text_len=text_len,
        spatial_stride=SPATIAL_STRIDE,
        denoising_steps=rollout.denoising_steps,
        shift=rollout.shift,
        window_frames=rollout.window_frames,
        sink_frames=rollout.sink_frames,
        positions=rollout.positions,
        context_noise=rollout.context_noise,
        trained_on_pictures=pictures,
    )


def read_run(run: Path) -> tuple[RolloutSettings, int]:
    """The rollout and the text length that a finished stage was trained with.

    Raises:
        WeightsError: the folder holds no finished stage with a rollout.
    """
    try:
        settings = json.loads((run / SETTINGS_FILE).read_text(encoding="utf-8"))["settings"]
        return build(RolloutSettings, settings["rollout"]), settings["text"]["length"]
    except (OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{run} holds no finished stage that rolls out clips: dmd, sid, gan or ode.") from error


def blend(network: CausalWanTransformer3DModel, other: CausalWanTransformer3DModel, share: float) -> None:
    """Move a network's weights towards those of another, 0..1 of the way.

    Two that were trained on from one network can be better together than either: what one does well, the mean mostly
    does, too (Wortsman et al. 2022, arXiv 2203.05482).

    Raises:
        WeightsError: they are of different sizes.
        InvalidSettings: a share outside 0..1, which would be no mean.
    """
    if not 0 <= share <= 1:
        raise InvalidSettings(f"--share is how far towards the other run to go, 0 to 1, not {share}.")
    theirs = other.state_dict()
    if {name: value.shape for name, value in network.state_dict().items()} != {n: v.shape for n, v in theirs.items()}:
        raise WeightsError("The two runs are of networks of different sizes, which have no mean.")
    with torch.no_grad():
        for name, value in network.state_dict().items():
            value.lerp_(theirs[name], share)


def export(
    run: Path, data: Path, out: Path, other: Path | None = None, share: float = 0.5, pictures: bool = False
) -> None:
    """Write the folder beside its place and move it there whole.

    Args:
        run: folder of a finished stage that rolls out clips; its weights are taken, in half precision.
        data: the data set's folder, with text/, vae/ and taehv/ in it.
        out: the model folder; replaced if it exists, but for the files this stage does not write (its model card).
        other, share: another run's folder, and how far towards its weights to go.
        pictures: whether its base was trained on windows that stand still, as a picture to start from does.

    Raises:
        WeightsError: `run` is no finished stage with a rollout, or was trained on clips of another size.
    """
    rollout, text_len = read_run(run)
    network = load_network(NetworkSettings(init=str(run)))
    if other is not None:
        blend(network, load_network(NetworkSettings(init=str(other))), share)
    info = ClipDataset(data).info
    size = SPATIAL_STRIDE * rollout.height, SPATIAL_STRIDE * rollout.width
    if size != (info.height, info.width):
        raise WeightsError(
            f"{run} was trained on clips of {size[1]}x{size[0]} pixels, but those in {data} have "
            f"{info.width}x{info.height}."
        )
    spec = embedded_spec(rollout, text_len, info.height, info.width, info.fps, pictures)
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
        enhancing.write(folder)
        for part in sorted(
            folder.iterdir(), key=lambda path: path.name == INDEX_FILE
        ):  # last: it says that all is there
            target = out / part.name
            if target.is_dir():
                shutil.rmtree(target)
            part.replace(target)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.export", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("training/cache/dmd"))
    parser.add_argument("--data", type=Path, default=Path("training/cache"))
    parser.add_argument("--out", type=Path, default=Path("weights/embedded"))
    parser.add_argument("--blend", type=Path, metavar="RUN", help="take the mean with another run's weights")
    parser.add_argument("--share", type=float, default=0.5, help="of that other run, 0 to 1 (default: 0.5)")
    parser.add_argument("--pictures", action="store_true", help="its base was trained with clips.still_windows")
    options = parser.parse_args(argv)
    return console.run(
        lambda: export(options.run, options.data, options.out, options.blend, options.share, options.pictures)
    )


if __name__ == "__main__":
    sys.exit(main())
