"""Files that visitors might send: pictures and videos, good and odd."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.config import ModelSpec
from pipeline.video import ffmpeg_binary

SPEC = ModelSpec(
    name="small",
    height=64,
    width=112,
    fps=16,
    native_fps=16,
    frames_per_block=3,
    text_len=8,
    denoising_steps=(1000,),
    shift=5.0,
    window_frames=9,
    sink_frames=3,
)


def picture(width: int = 96, height: int = 80, mode: str = "RGB") -> Image.Image:
    """A smooth picture with some noise, so that its file has some length."""
    y, x = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(0).integers(0, 40, (height, width))
    channels = [x * 200 // width + noise, y * 200 // height + noise, (x + y) * 200 // (width + height)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """The bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_video(
    path: Path, num_frames: int, size: tuple[int, int] = (160, 120), fps: float = 16, options: tuple[str, ...] = ()
) -> Path:
    """A video whose frame n has the grey level 4 n, as far as there are levels; `size` is width and height."""
    width, height = size
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    frames[:] = np.minimum(16 + 4 * np.arange(num_frames), 255).astype(np.uint8)[:, None, None, None]
    command = [ffmpeg_binary(), "-loglevel", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-video_size", f"{width}x{height}", "-framerate", f"{fps:g}", "-i", "pipe:0", "-pix_fmt", "yuv420p"]
    subprocess.run([*command, "-g", "8", *options, str(path)], input=frames.tobytes(), check=True)
    return path
