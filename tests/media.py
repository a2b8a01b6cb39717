"""What tests need to look into a video file, done with the ffmpeg binary of the imageio-ffmpeg package."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.video import ffmpeg_binary


@dataclass
class Media:
    frames: np.ndarray
    """uint8 [T, H, W, 3]."""
    timestamps: np.ndarray
    """Seconds, one a frame."""
    description: str
    """What ffmpeg says about the video stream, e.g. "h264 (High), yuv420p(tv, bt709, progressive), 448x256"."""


def read_media(path: str | Path) -> Media:
    """Decode a video file whole. Any complaint of the decoder is an error."""
    command = [ffmpeg_binary(), "-hide_banner", "-nostdin", "-i", str(path)]
    decode = [*command, "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"]
    result = subprocess.run(decode, capture_output=True, check=True)
    log = result.stderr.decode(errors="replace")
    description = re.search(r"Stream #0:0.*Video: (.*)", log)
    size = re.search(r", (\d+)x(\d+)", description[1])
    frames = np.frombuffer(result.stdout, np.uint8).reshape(-1, int(size[2]), int(size[1]), 3)
    complaints = subprocess.run([*command, "-loglevel", "warning", "-f", "null", "-"], capture_output=True, check=True)
    assert complaints.stderr == b"", complaints.stderr.decode(errors="replace")
    table = subprocess.run([*command, "-c", "copy", "-f", "framecrc", "pipe:1"], capture_output=True, check=True)
    lines = table.stdout.decode().splitlines()
    base = next(line for line in lines if line.startswith("#tb 0:")).split(":")[1].strip().split("/")
    ticks = [int(line.split(",")[2]) for line in lines if not line.startswith("#")]
    return Media(frames, np.array(ticks) * int(base[0]) / int(base[1]), description[1])
