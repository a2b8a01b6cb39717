"""Frames that wait on the disk: exact, in order, and gone with the program however it ends."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator
from typing import Self

import numpy as np

from pipeline.errors import VideoError
from pipeline.video import write_error


def free_bytes() -> int:
    """Room for frames on the disk."""
    return shutil.disk_usage(tempfile.gettempdir()).free


class FrameFile:
    """A list of frames of one size, uint8 [H, W, 3], in a temporary file without a name.

    Without a name nobody has to remove it. Not in memory: a minute of the large model's frames takes over a gigabyte.

    Args:
        max_bytes: What it may take; None: as much as there is.

    Raises:
        VideoError: the file cannot be made.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        self._max_bytes = max_bytes
        try:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `close`
        except OSError as error:
            raise write_error(error) from error
        self._shape: tuple[int, ...] = ()
        self._length = 0

    def append(self, frames: np.ndarray) -> None:
        """Add frames, uint8 [T, H, W, 3], at the end.

        Raises:
            VideoError: they have another size than those before, or are too many, or the disk is full.
        """
        if self._shape not in ((), frames.shape[1:]):
            raise VideoError(f"The frame size changed from {self._shape} to {frames.shape[1:]} in the middle of a run.")
        self._shape = frames.shape[1:]
        if self._max_bytes is not None and (self._length + len(frames)) * math.prod(self._shape) > self._max_bytes:
            raise VideoError(f"The video takes more than {self._max_bytes / 1e9:g} GB. Ask for fewer seconds.")
        try:
            self._file.seek(0, 2)
            self._file.write(np.ascontiguousarray(frames).tobytes())
            self._file.flush()
        except OSError as error:
            raise write_error(error) from error
        self._length += len(frames)

    def pieces(self, length: int) -> Iterator[np.ndarray]:
        """All frames again, `length` at a time: uint8 [T, H, W, 3]; the last piece may be shorter.

        Raises:
            VideoError: they cannot be read.
        """
        size = math.prod(self._shape)
        for start in range(0, self._length, length):
            try:
                self._file.seek(start * size)
                data = self._file.read(min(length, self._length - start) * size)
            except OSError as error:
                raise VideoError(f"The frames could not be read again ({error.strerror or 'error'}).") from error
            yield np.frombuffer(data, np.uint8).reshape(-1, *self._shape)

    def __len__(self) -> int:
        return self._length

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
