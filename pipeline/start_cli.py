"""`--image` and `--video`: what a video starts from, on the command line."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.config import ModelSpec
from pipeline.errors import InvalidRequest
from pipeline.start import Start


def add_start_arguments(parser: argparse.ArgumentParser) -> None:
    """What the video starts from. `--seconds` does not count it."""
    parser.add_argument("--image", type=Path, metavar="FILE", help="picture to start from: PNG, JPEG or WEBP")
    parser.add_argument(
        "--video", type=Path, metavar="FILE", help="video whose end to go on from: MP4, MOV, WebM or MKV, at most 60 s"
    )


def read_start_arguments(options: argparse.Namespace) -> Start | None:
    """Read the file, if one is named, for the model in `options.model`. Does not import torch.

    Raises:
        InvalidRequest: both are named, or the file is nothing to start from.
        WeightsError: the model's settings cannot be read.
    """
    if options.image is not None and options.video is not None:
        raise InvalidRequest("--image and --video cannot be used together: a video starts from one file.")
    path = options.image if options.image is not None else options.video
    if path is None:
        return None
    from pipeline.start_file import read_start  # here: without a file nobody waits for Pillow

    return read_start(path, ModelSpec.of_folder(options.model), "image" if options.image is not None else "video")
