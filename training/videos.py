"""Encode a folder of one's own captioned videos: `python -m training.videos FOLDER --vae FOLDER --out FOLDER`.

The folder holds `.mp4` files of one size, each with its caption in a `.txt` file of the same name, or all captions in
`captions.jsonl`, one `{"file": "name.mp4", "caption": "..."}` a line. Every file is read once before anything is
encoded; what cannot be used is refused by name. The result is a data set for `clips.folder`: `latents.npy` float16
[N, F, C, h, w] and `captions.json`.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from diffusers import AutoencoderKLWan
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.decoder import encode_wan
from pipeline.errors import TrainingDataError, TrainingError
from training import console
from training.files import write_whole
from training.network import load_vae
from training.prompts import checked_caption

logger = logging.getLogger(__name__)
Array = np.ndarray

LATENTS_FILE, CAPTIONS_FILE, VIDEO_MARKER = "latents.npy", "captions.json", "videos.json"
LIST_FILE = "captions.jsonl"


@dataclass(frozen=True)
class Video:
    """A file and what it shows."""

    path: Path
    caption: str


def find_videos(folder: Path, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Video]:
    """The folder's videos with their captions, in the order of their names.

    Raises:
        TrainingDataError: naming the file that is missing or has no usable caption.
    """
    if not folder.is_dir():
        raise TrainingDataError(f"{folder} is no folder of videos.")
    listed = _read_list(folder / LIST_FILE) if (folder / LIST_FILE).is_file() else None
    names = sorted(path.name for path in folder.glob("*.mp4")) if listed is None else list(listed)
    if not names:
        raise TrainingDataError(f"{folder} holds no .mp4 files.")
    videos = []
    for name in names:
        path = folder / name
        if not path.is_file():
            raise TrainingDataError(f"{LIST_FILE} names {name}, which is not in {folder}.")
        if listed is not None:
            text, where = listed[name], f"The caption of {name} in {LIST_FILE}"
        else:
            beside = path.with_suffix(".txt")
            if not beside.is_file():
                raise TrainingDataError(f"{name} has no caption: {beside.name} is missing.")
            text, where = beside.read_text(encoding="utf-8", errors="replace"), f"The caption {beside.name}"
        videos.append(Video(path, checked_caption(text, where, tokenizer, length)))
    return videos


def _read_list(path: Path) -> dict[str, str]:
    """File name -> caption."""
    captions = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            entry = json.loads(line)
            name, caption = entry["file"], entry["caption"]
        except (ValueError, KeyError, TypeError) as error:
            raise TrainingDataError(
                f'Line {number} of {path.name} must be like {{"file": "name.mp4", "caption": "..."}}.'
            ) from error
        captions[str(name)] = str(caption)
    return captions


def read_frames(video: Video, count: int, size: tuple[int, int] | None = None) -> Array:
    """The first `count` frames, uint8 [T, H, W, 3].

    Raises:
        TrainingDataError: the file is damaged, too short, or not of `size` (height, width).
    """
    name = video.path.name
    try:
        frames = list(islice(iio.imiter(video.path, plugin="FFMPEG"), count))
    except Exception as error:  # a damaged file makes the reader fail in many ways, none documented
        raise TrainingDataError(f"{name} cannot be decoded: it is damaged or no video.") from error
    if len(frames) < count:
        raise TrainingDataError(f"{name} has {len(frames)} frames, but {count} are needed.")
    height, width = frames[0].shape[:2]
    if size is not None and (height, width) != size:
        raise TrainingDataError(f"{name} is {width}x{height}, but the videos before it are {size[1]}x{size[0]}.")
    return np.stack(frames)


def check_videos(videos: list[Video], count: int, stride: int) -> tuple[int, int]:
    """Read every file once; returns the height and width they all have."""
    size: tuple[int, int] | None = None
    for video in tqdm(videos, desc="checking", unit="video", disable=None):
        size = read_frames(video, count, size).shape[1:3]
        if size[0] % stride or size[1] % stride:
            raise TrainingDataError(f"{video.path.name} is {size[1]}x{size[0]}: both must be multiples of {stride}.")
    if size is None:
        raise TrainingDataError("There are no videos.")
    return size


def encode_videos(videos: list[Video], count: int, vae: AutoencoderKLWan) -> Iterator[Array]:
    """Latents float16 [F, C, h, w] of the first `count` frames of each."""
    for video in tqdm(videos, desc="encoding", unit="video", disable=None):
        frames = torch.from_numpy(read_frames(video, count)).permute(0, 3, 1, 2)[None].float() / 255
        yield encode_wan(vae, frames.to(vae.device))[0].cpu().half().numpy()


def _write_clips(path: Path, shape: tuple[int, ...], clips: Iterator[Array]) -> None:
    """A float16 .npy file, one clip after the other: a full disk is an error here, and a signal in a mapped file."""
    with path.open("wb") as file:
        described = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float16)), "fortran_order": False}
        np.lib.format.write_array_header_1_0(file, described | {"shape": shape})
        for clip in clips:
            file.write(np.ascontiguousarray(clip, np.float16).data)


def build(folder: Path, out: Path, latent_frames: int, vae: AutoencoderKLWan, text: Path, length: int) -> None:
    """Check and encode a folder; the marker is written last, so a broken run leaves no data set."""
    tokenizer = AutoTokenizer.from_pretrained(text / "tokenizer")
    videos = find_videos(folder, tokenizer, length)
    count = 1 + (latent_frames - 1) * vae.config.scale_factor_temporal
    stride = 2 * vae.config.scale_factor_spatial  # the transformer joins two by two
    height, width = check_videos(videos, count, stride)
    out.mkdir(parents=True, exist_ok=True)
    (out / VIDEO_MARKER).unlink(missing_ok=True)
    spatial = vae.config.scale_factor_spatial
    shape = (len(videos), latent_frames, vae.config.z_dim, height // spatial, width // spatial)
    try:
        _write_clips(out / LATENTS_FILE, shape, encode_videos(videos, count, vae))
        write_whole(out / CAPTIONS_FILE, json.dumps([video.caption for video in videos]))
        write_whole(out / VIDEO_MARKER, json.dumps({"videos": len(videos), "height": height, "width": width}))
    except OSError as error:
        (out / LATENTS_FILE).unlink(missing_ok=True)
        raise TrainingError(f"{out} cannot be written to ({error.strerror or error}): no data set was made.") from error
    logger.info("%d videos of %dx%d", len(videos), width, height)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.videos", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vae", required=True, help="folder of the Wan VAE")
    parser.add_argument("--text", type=Path, required=True, help="model folder with the tokenizer")
    parser.add_argument("--text-length", type=int, required=True, help="tokens the text encoder reads")
    parser.add_argument("--frames", type=int, required=True, help="latent frames of a clip")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def work() -> None:
        vae = load_vae(options.vae, options.device)
        build(options.folder, options.out, options.frames, vae, options.text, options.text_length)

    return console.run(work)


if __name__ == "__main__":
    sys.exit(main())
