"""A file somebody sent, read into a `Start`. Nothing is believed of it: neither its name, its sizes nor its content."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from pipeline.config import ModelSpec
from pipeline.errors import InvalidRequest
from pipeline.start import Start, centre_crop
from pipeline.start_video import read_last_frames

MAX_PIXELS = 16_000_000
"""Most pixels of a picture, or of a video's frame. Looked at before anything is decoded."""
MAX_ASPECT = 8
"""Largest ratio of the longer side to the shorter."""
MAX_FILE_BYTES = 500_000_000
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
START_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".mp4", ".mov", ".webm", ".mkv")
"""What such files are usually called. Only their content counts."""

Kind = Literal["image", "video"]
_NAMES = {"image": "a picture", "video": "a video"}
_STILL_BRANDS = (b"heic", b"heix", b"mif1", b"msf1", b"avif", b"avis")
_HEAD_BYTES = 12


def read_start(path: str | Path, spec: ModelSpec, kind: Kind | None = None) -> Start:
    """Read a picture, or the end of a video, and cut it to the frames of a model.

    The middle is cut out in the model's shape and scaled. Of a video, brought to the model's native rate, the last
    frames are taken that make whole blocks: as many as the model can see at once, or all there are.

    Args:
        path: PNG, JPEG or WEBP; MP4, MOV, WebM or MKV.
        spec: of the model.
        kind: what it has to be; None: either.

    Raises:
        InvalidRequest: it cannot be read, is no such file, too large, too long or too short.
    """
    path = Path(path)
    found, demuxer = _kind_of(path)
    if kind is not None and kind != found:
        raise InvalidRequest(f"{_NAMES[kind].capitalize()} is needed here, but the file is {_NAMES[found]}.")
    return _read_image(path, spec) if found == "image" else _read_video(path, spec, demuxer)


def _kind_of(path: Path) -> tuple[Kind, str]:
    """What a file is by its first bytes, and for a video the name of ffmpeg's reader for it.

    ffmpeg is never left to guess: of what it knows, playlists lead to other files and to addresses.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise InvalidRequest(
            f"The file to start from cannot be read ({getattr(error, 'strerror', None) or 'bad name'})."
        ) from error
    if size > MAX_FILE_BYTES:
        raise InvalidRequest(
            f"The file to start from has {size / 1e6:,.0f} MB; at most {MAX_FILE_BYTES / 1e6:,.0f} MB are allowed."
        )
    if head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")) or (head[:4] == b"RIFF" and head[8:] == b"WEBP"):
        return "image", ""
    if head[4:8] == b"ftyp" and head[8:12] in _STILL_BRANDS:
        raise InvalidRequest("HEIC and AVIF pictures cannot be read here. Save the picture as JPEG or PNG.")
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "video", "mov"
    if head.startswith(b"\x1aE\xdf\xa3"):
        return "video", "matroska"
    raise InvalidRequest(
        "The file to start from is neither a picture (PNG, JPEG, WEBP) nor a video (MP4, MOV, WebM, MKV)."
    )


def _read_image(path: Path, spec: ModelSpec) -> Start:
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            check_size(image.size)
            # Only now is anything decoded.
            upright = _as_rgb(ImageOps.exif_transpose(image))
    except InvalidRequest:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # Pillow looked before we did
        raise InvalidRequest(
            f"The picture is too large; at most {MAX_PIXELS / 1e6:g} megapixels are allowed."
        ) from error
    except Exception as error:  # what a decoder raises on damaged data is not told anywhere
        raise InvalidRequest("The picture is damaged or incomplete and cannot be read.") from error
    target = (spec.width, spec.height)
    left, top, width, height = crop = centre_crop(upright.size, target)
    scaled = upright.crop((left, top, left + width, top + height)).resize(target, Image.Resampling.LANCZOS)
    return Start(
        kind="image",
        frames=np.array(scaled)[None],
        sha256=_sha256(path),
        source_size=upright.size,
        crop=crop,
    )


def _read_video(path: Path, spec: ModelSpec, demuxer: str) -> Start:
    most = spec.frames_in(spec.most_start_blocks)
    video = read_last_frames(path, demuxer, most, (spec.width, spec.height), spec.native_fps, check_size, MAX_PIXELS)
    count, fps = len(video.frames), spec.native_fps
    blocks = spec.blocks_in(count)
    if not blocks:
        least = spec.frames_in(1)
        raise InvalidRequest(
            f"The video is too short: it has {count} frame{'s' * (count != 1)} ({count / fps:.2f} s) at {fps:g} FPS, "
            f"and this model needs at least {least} ({least / fps:.2f} s) to go on from."
        )
    return Start(
        kind="video",
        # The surplus goes from the front: the clip goes on from the very end.
        frames=video.frames[-spec.frames_in(blocks) :],
        sha256=_sha256(path),
        source_size=video.size,
        crop=centre_crop(video.size, (spec.width, spec.height)),
        source_frames=video.num_frames,
    )


def check_size(size: tuple[int, int]) -> None:
    """Refuse a width and height (pixels) that are too many or too unlike; `InvalidRequest` says which."""
    width, height = size
    if width * height > MAX_PIXELS:
        raise InvalidRequest(
            f"The picture has {width}x{height} pixels ({width * height / 1e6:.1f} megapixels); at most "
            f"{MAX_PIXELS / 1e6:g} megapixels are allowed. Make it smaller."
        )
    if max(size) > MAX_ASPECT * min(size):
        raise InvalidRequest(
            f"The picture has {width}x{height} pixels; its longer side may be at most {MAX_ASPECT} times the shorter. "
            "Cut it."
        )


def _as_rgb(image: Image.Image) -> Image.Image:
    """In RGB, 8 bits a channel; what is transparent becomes white."""
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
