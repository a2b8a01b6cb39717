"""Frames to video: one MPEG-TS segment per block while a run goes on, one MP4 file at its end.

All of it is done by the ffmpeg binary that the imageio-ffmpeg package brings along; nothing is needed on PATH. Segments
play gaplessly in a row and join into a correct stream, because each starts with a key frame, carries the time stamp
that follows from the number of frames before it, and continues the packet counters of the one before.

Each segment has its own short-lived encoder process (11 ms to start): a process that lived as long as the run could not
be told to put out a whole number of frames now.
"""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import subprocess
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import VideoError
from pipeline.mp4 import count_frames

__all__ = ["Segment", "SegmentEncoder", "encoded_size", "join_segments"]

logger = logging.getLogger(__name__)

MIN_SHORT_SIDE = 384
"""Frames smaller than this (pixels) are enlarged by a whole number before encoding: see `encoded_size`."""

_CRF = 20
_START_SECONDS = 10
"""Where the streams' clock starts. MPEG-TS cannot hold a time before 0, and players take 10 s for granted."""
_TIMEOUT_SECONDS = 120
_PACKET = 188
_NULL_PID = 0x1FFF


@dataclass(frozen=True, eq=False)
class Segment:
    """A playable piece of the video."""

    data: bytes
    """MPEG-TS, H.264."""
    duration: float
    """Seconds."""
    num_frames: int


class SegmentEncoder:
    """Turns the blocks of one run into segments, and all of them into one file.

    Args:
        fps: Playback rate. Any number from 1 to 60; time stamps come from whole frame counts, so nothing drifts.
    """

    def __init__(self, fps: float) -> None:
        self.fps = float(fps)
        self.num_frames = 0
        self._rate = Fraction(self.fps).limit_denominator(1001)
        self._frame_size: tuple[int, int] | None = None
        self._counters: dict[int, int] = {}
        self._segments: list[bytes] = []

    @property
    def duration(self) -> float:
        """Seconds of video encoded so far."""
        return float(self.num_frames / self._rate)

    def encode(self, frames: np.ndarray) -> Segment:
        """Encode the next frames, uint8 [T, H, W, 3] RGB, as one segment.

        Raises:
            VideoError: the frames have another type or size than they must, or the encoder failed.
        """
        frames = self._checked(frames)
        height, width = frames.shape[1:3]
        out_height, out_width = encoded_size(height, width)
        offset = Fraction(_START_SECONDS) + self.num_frames / self._rate
        data = _ffmpeg(
            ["-f", "rawvideo", "-pix_fmt", "rgb24", "-video_size", f"{width}x{height}"]
            + ["-framerate", f"{self._rate.numerator}/{self._rate.denominator}", "-i", "pipe:0"]
            + ["-vf", _filters(out_height, out_width)]
            + ["-c:v", "libx264", "-preset", "superfast", "-tune", "zerolatency", "-bf", "0", "-crf", str(_CRF)]
            # One key frame, at the start: the browser can begin at any segment, and no bits go to further ones.
            + ["-g", str(len(frames) + 1), "-sc_threshold", "0"]
            + ["-output_ts_offset", f"{float(offset):.9f}", "-muxdelay", "0", "-muxpreload", "0"]
            + ["-f", "mpegts", "pipe:1"],
            stdin=[frames.tobytes()],
        )
        data = _continue_counters(data, self._counters)
        segment = Segment(data, float(len(frames) / self._rate), len(frames))
        self._segments.append(data)
        self.num_frames += len(frames)
        return segment

    def write_mp4(self, path: str | Path, recipe: dict[str, Any] | None = None) -> None:
        """Write everything encoded so far as one MP4 file that plays while it downloads. May be called again later.

        The pictures are those of the segments, unchanged. A file already at `path` is replaced at the last moment, by a
        complete one.

        Raises:
            VideoError: there is nothing to write, or it could not be written; then nothing is left behind.
        """
        if not self._segments:
            raise VideoError("There is no video to write: not a single block was finished.")
        _write_whole(self._segments, Path(path), self._rate, self.num_frames, recipe)

    def _checked(self, frames: np.ndarray) -> np.ndarray:
        if not (isinstance(frames, np.ndarray) and frames.dtype == np.uint8 and frames.ndim == 4):
            kind = f"{getattr(frames, 'dtype', type(frames).__name__)} {list(getattr(frames, 'shape', []))}"
            raise VideoError(f"Frames must be uint8 [T, H, W, 3], but are {kind}.")
        if frames.shape[3] != 3 or 0 in frames.shape:
            raise VideoError(f"Frames must be [T, H, W, 3] and not empty, but are {list(frames.shape)}.")
        size = frames.shape[1:3]
        if self._frame_size not in (None, size):
            raise VideoError(f"The frame size changed from {self._frame_size} to {size} in the middle of the video.")
        self._frame_size = size
        out_height, out_width = encoded_size(*size)
        if out_height % 2 or out_width % 2:  # H.264 with 4:2:0 colour needs even sizes: repeat the last row or column
            frames = np.pad(frames, ((0, 0), (0, size[0] % 2), (0, size[1] % 2), (0, 0)), mode="edge")
        return np.ascontiguousarray(frames)


def join_segments(segments: Sequence[bytes], path: str | Path) -> None:
    """Write the data of consecutive segments, which need not be all of a run, as one MP4 file without a recipe.

    Raises:
        VideoError: as `SegmentEncoder.write_mp4`.
    """
    if not segments:
        raise VideoError("There is no video to write: not a single block was finished.")
    _write_whole(segments, Path(path))


def _write_whole(
    segments: Sequence[bytes],
    path: Path,
    rate: Fraction | None = None,
    num_frames: int | None = None,
    recipe: dict[str, Any] | None = None,
) -> None:
    part = path.with_name(f".{path.stem[:40]}-{uuid.uuid4().hex[:8]}.part")
    options: list[str] = []
    if rate is not None:
        # MPEG-TS counts in 1/90000 s, which few frame rates divide. A coarser clock that the frame rate does divide
        # rounds every time stamp to where it belongs, so that all frames are equally long.
        options += ["-video_track_timescale", str(rate.numerator * max(1, 60_000 // rate.numerator))]
    if recipe is not None:
        text = json.dumps(recipe, ensure_ascii=False, allow_nan=False)
        options += ["-metadata", f"title={recipe.get('prompt', '')}", "-metadata", f"comment={text}"]
    try:
        _ffmpeg(
            ["-f", "mpegts", "-i", "pipe:0", "-map", "0:v:0", "-c", "copy", *options]
            # By itself the beginning of "12:30.mp4" would be a protocol.
            + ["-movflags", "+faststart", "-f", "mp4", "-y", f"file:{part}"],
            stdin=segments,
        )
        written = count_frames(part)
        if num_frames not in (None, written):
            raise VideoError(f"The MP4 file came out with {written} frames instead of {num_frames}.")
        os.replace(part, path)
    except OSError as error:
        raise write_error(error) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def encoded_size(height: int, width: int) -> tuple[int, int]:
    """Height and width (pixels) at which frames of this size are encoded.

    H.264 as browsers play it keeps colour at half the resolution, and they enlarge a small video with a blur: at
    224x128 little is left. So frames are enlarged by a whole number until their short side is at least
    `MIN_SHORT_SIDE`.
    """
    factor = -(-MIN_SHORT_SIDE // min(height, width))
    return height * factor, width * factor


def _filters(height: int, width: int) -> str:
    # Enlarging is the encoder's: nothing of it is the model's work. A filter that looks for edges (xBR) looks the same
    # on a model's frames, and builds a table in each process: a quarter of a second, three times as long as the rest.
    scale = f"scale={width}:{height}:flags=lanczos+accurate_rnd+full_chroma_int"
    tags = "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
    return f"{scale}:out_color_matrix=bt709:out_range=tv,format=yuv420p,{tags}"


def _continue_counters(data: bytes, counters: dict[int, int]) -> bytes:
    """Renumber the continuity counter of every MPEG-TS packet so that it follows the segment before, per stream (PID).

    Each segment comes from its own process, which counts from 0: a player takes the jump for lost packets.
    """
    if len(data) % _PACKET or any(data[at] != 0x47 for at in range(0, len(data), _PACKET)):
        raise VideoError("The video encoder put out something that is not an MPEG transport stream.")
    buffer = bytearray(data)
    for at in range(0, len(buffer), _PACKET):
        pid = (buffer[at + 1] & 0x1F) << 8 | buffer[at + 2]
        if pid == _NULL_PID:
            continue
        has_payload = buffer[at + 3] & 0x10
        # ISO 13818-1: the counter grows with each packet that has a payload; one without repeats the last value.
        value = (counters.get(pid, 15) + (1 if has_payload else 0)) & 0x0F
        buffer[at + 3] = buffer[at + 3] & 0xF0 | value
        counters[pid] = value
    return bytes(buffer)


@functools.cache
def ffmpeg_binary() -> str:
    """Path of the ffmpeg binary of the imageio-ffmpeg package.

    Raises:
        VideoError: the package is missing or has no binary for this platform.
    """
    try:
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise VideoError("There is no video encoder. Install it with: pip install imageio-ffmpeg") from error


def _ffmpeg(arguments: list[str], stdin: Sequence[bytes]) -> bytes:
    """Run ffmpeg on the joined `stdin` and return what it wrote to its standard output."""
    command = [ffmpeg_binary(), "-hide_banner", "-nostdin", "-loglevel", "error", *arguments]
    try:
        # Its own session: Ctrl-C in a terminal is for this program, which then decides what becomes of the encoder.
        result = subprocess.run(
            command,
            input=b"".join(stdin),
            capture_output=True,
            timeout=_TIMEOUT_SECONDS,
            start_new_session=True,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise VideoError(f"The video encoder did not finish within {_TIMEOUT_SECONDS} s.") from error
    except OSError as error:
        raise VideoError(f"The video encoder could not be started ({error.strerror}).") from error
    if result.returncode == 0:
        return result.stdout
    message = result.stderr.decode(errors="replace").strip()
    logger.error("ffmpeg ended with code %d: %s", result.returncode, message)
    if os.strerror(errno.ENOSPC) in message:
        raise write_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    cause = subprocess.CalledProcessError(result.returncode, command, stderr=result.stderr)
    raise VideoError(f"The video encoder failed (code {result.returncode}).") from cause


def write_error(error: OSError) -> VideoError:
    if error.errno == errno.ENOSPC:
        return VideoError("The disk is full, so the video could not be written. Free some space and try again.")
    return VideoError(f"The video could not be written ({error.strerror or type(error).__name__}).")
