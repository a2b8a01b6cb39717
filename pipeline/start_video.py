"""The last frames of a video file, by the ffmpeg binary that the imageio-ffmpeg package brings along."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import InvalidRequest, VideoError
from pipeline.video import ffmpeg_binary

MAX_SECONDS = 60.0
"""Longest video."""
_SPARE_FRAMES = 1
"""What a video may have beyond that: the last frame is shown for a while, and another rate rounds up."""
_HEAD_SECONDS, _DECODE_SECONDS = 10, 30
"""Longest time for a look at the head of a file, and for all of it."""
_THREADS = "2"
"""Decoding goes on beside the model, which needs the other cores."""

Size = tuple[int, int]


@dataclass(frozen=True, eq=False)
class LastFrames:
    """The end of a video.

    Attributes:
        frames: uint8 [T, H, W, 3], RGB.
        num_frames: of the whole video, at the same rate.
        size: width and height (pixels) of the video's picture, upright and with square pixels.
    """

    frames: np.ndarray
    num_frames: int
    size: Size


def read_last_frames(
    path: Path, demuxer: str, count: int, target: Size, fps: float, check_size: Callable[[Size], None], max_pixels: int
) -> LastFrames:
    """Decode a video and keep its last frames, or all if it has fewer.

    Args:
        path: the file.
        demuxer: ffmpeg's name for what it is; nothing else is tried.
        count: how many frames are wanted.
        target: width and height they shall have; the middle is cut out in this shape and scaled.
        fps: the rate to which the video is brought.
        check_size: refuses a picture size.
        max_pixels: of a coded frame. The decoder gives up on larger ones, whatever the file's head says.

    Raises:
        InvalidRequest: it cannot be decoded, or is too large or too long.
        VideoError: there is no ffmpeg.
    """
    # Nothing but this file may be opened, whatever it refers to.
    source = ["-protocol_whitelist", "file", "-max_pixels", str(max_pixels), "-threads", _THREADS]
    source += ["-f", demuxer, "-i", f"file:{path.resolve()}"]
    began = time.monotonic()
    size = _size(source)
    check_size(size)
    width, height = target
    filters = (
        # Square pixels first. A shape that is told only later, past the check of the head, does not make them many.
        f"fps={fps:g},scale=w=min(iw*sar\\,8*iw):h=ih,setsar=1,"
        f"scale={width}:{height}:force_original_aspect_ratio=increase:flags=lanczos+accurate_rnd+full_chroma_int,"
        f"format=rgb24,crop={width}:{height}"
    )
    output = ["-map", "0:v:0", "-an", "-sn", "-dn", "-vf", filters, "-fps_mode", "passthrough"]
    output += ["-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"]
    frame_bytes = width * height * 3
    kept: deque[bytes] = deque(maxlen=count)
    most, total = round(MAX_SECONDS * fps) + _SPARE_FRAMES, 0
    overdue = threading.Event()
    # What it says goes to nobody: `_size` has asked what is to be known.
    with _started([*source, *output]) as process:
        assert process.stdout is not None
        left = max(0.0, began + _DECODE_SECONDS - time.monotonic())
        timer = threading.Timer(left, lambda: (overdue.set(), process.kill()))
        timer.start()
        try:
            while len(frame := process.stdout.read(frame_bytes)) == frame_bytes:
                kept.append(frame)
                total += 1
                if total > most:
                    raise InvalidRequest(
                        f"The video has more than {MAX_SECONDS:g} s. Cut it: only its end is needed to go on from."
                    )
        except BaseException:
            process.kill()
            raise
        finally:
            timer.cancel()
    if overdue.is_set():
        raise InvalidRequest(f"The video could not be decoded within {_DECODE_SECONDS} s. Make it shorter or smaller.")
    if process.returncode or not kept:
        raise InvalidRequest("The video is damaged, incomplete or in a format that cannot be decoded here.")
    frames = np.frombuffer(b"".join(kept), np.uint8).reshape(-1, height, width, 3)
    return LastFrames(frames, total, size)


def _size(source: list[str]) -> Size:
    """Width and height of the first video stream as it is shown, by what the file's head says."""
    try:
        result = subprocess.run(
            [ffmpeg_binary(), "-hide_banner", "-nostdin", *source],
            capture_output=True,
            timeout=_HEAD_SECONDS,
            start_new_session=True,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise InvalidRequest(f"The video could not be read within {_HEAD_SECONDS} s.") from error
    except OSError as error:
        raise VideoError(f"The video decoder could not be started ({error.strerror}).") from error
    said = result.stderr.decode(errors="replace")
    stream = re.search(r"Stream #0:\d+.*?: Video: .*", said)
    found = re.search(r", (\d+)x(\d+)(?: \[SAR (\d+):(\d+))?", stream[0]) if stream else None
    if stream is None or found is None or not int(found[1]) * int(found[2]):
        raise InvalidRequest("The video is damaged, or there is no picture in it.")
    width, height = int(found[1]), int(found[2])
    if found[3] and int(found[3]) * int(found[4]):
        width = max(1, width * int(found[3]) // int(found[4]))
    # The stream's own lines are indented; they end where the next stream begins.
    facts = re.split(r"\n {2}\S", said[stream.end() :])[0]
    turned = re.search(r"rotation of (-?[\d.]+) degrees", facts)
    upright = turned is None or round(float(turned[1])) % 180 == 0
    return (width, height) if upright else (height, width)


def _started(arguments: list[str]) -> subprocess.Popen[bytes]:
    command = [ffmpeg_binary(), "-hide_banner", "-nostdin", "-loglevel", "quiet", *arguments]
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        raise VideoError(f"The video decoder could not be started ({error.strerror}).") from error
