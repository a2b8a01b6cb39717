"""What a clip may start from: a picture, or the end of another video, already cut to what a model takes.

`start_file.read_start` makes one of a file. The pipeline encodes its frames, writes them into the KV cache as if it had
made them itself, and goes on from there.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pipeline.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True, eq=False)
class Start:
    """Frames of a model's size, and where they are from.

    Raises:
        InvalidRequest: the frames have another type or shape than they must.
    """

    kind: Literal["image", "video"]
    frames: np.ndarray
    """uint8 [T, H, W, 3], RGB. One of an image; of a video as many as make whole blocks of latents."""
    sha256: str = ""
    """SHA-256 of the file; for frames from no file, that of their own shape and bytes."""
    source_size: tuple[int, int] | None = None
    """Width and height (pixels) of the file's picture, upright."""
    crop: tuple[int, int, int, int] | None = None
    """Left, top, width, height (pixels) of what was cut out of it before it was scaled."""
    source_frames: int | None = None
    """How many frames the whole video has at the model's rate; `frames` are the last of them."""

    def __post_init__(self) -> None:
        frames = self.frames
        if self.kind not in ("image", "video"):
            raise InvalidRequest(f"A clip starts from an image or a video, not from {self.kind!r}.")
        if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
            kind = f"{getattr(frames, 'dtype', type(frames).__name__)} {list(getattr(frames, 'shape', []))}"
            raise InvalidRequest(f"The frames to start from must be uint8 [T, H, W, 3], but are {kind}.")
        if len(frames) < 1 or (self.kind == "image" and len(frames) != 1):
            raise InvalidRequest(
                f"There are {len(frames)} frames to start from; an image is one, a video at least one."
            )
        if not self.sha256:
            # Or a recipe would tell of any frames of the same number, and take others for them.
            digest = hashlib.sha256(repr(frames.shape).encode())
            digest.update(np.ascontiguousarray(frames))
            object.__setattr__(self, "sha256", digest.hexdigest())  # the dataclass is frozen

    def describe(self) -> dict[str, Any]:
        """For a recipe: enough to know the file, or the frames of none, again and to cut the same frames out."""
        return {
            "kind": self.kind,
            "sha256": self.sha256,
            "source_size": self.source_size and list(self.source_size),
            "crop": self.crop and list(self.crop),
            "frames": len(self.frames),
            "source_frames": self.source_frames,
        }

    def matches(self, described: Any) -> bool:
        """Whether this is what `describe` told of: then the same clip can be made again."""
        return self.describe() == described


def centre_crop(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int, int, int]:
    """The largest part in the middle of a picture that has the shape of `target`.

    Args:
        size, target: width and height in pixels.

    Returns:
        Left, top, width, height in pixels.
    """
    width, height = size
    cut_width = min(width, max(1, round(height * target[0] / target[1])))
    cut_height = min(height, max(1, round(width * target[1] / target[0])))
    return (width - cut_width) // 2, (height - cut_height) // 2, cut_width, cut_height
