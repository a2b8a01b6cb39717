"""Frames that wait on the disk: exact, in order, and gone with the program however it ends."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Self

import numpy as np

from pipeline.errors import VideoError
from pipeline.video import write_error


class FrameFile:
    """A list of frames of one size, uint8 [H, W, 3], in a temporary file without a name.

    Without a name nobody has to remove it. Not in memory: a minute of the large model's frames takes over a gigabyte.

    Raises:
        VideoError: the file cannot be made.
    """

    def __init__(self) -> None:
        try:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `close`
        except OSError as error:
            raise write_error(error) from error
        self._shape: tuple[int, ...] = ()
        self._length = 0

    def append(self, frames: np.ndarray) -> None:
        """Add frames, uint8 [T, H, W, 3], at the end.

        Raises:
            VideoError: they have another size than those before, or the disk is full.
        """
        if self._shape not in ((), frames.shape[1:]):
            raise VideoError(f"The frame size changed from {self._shape} to {frames.shape[1:]} in the middle of a run.")
        self._shape = frames.shape[1:]
        try:
            self._file.seek(0, 2)
            self._file.write(np.ascontiguousarray(frames).tobytes())
            self._file.flush()
        except OSError as error:
            raise write_error(error) from error
        self._length += len(frames)

    def pieces(self, length: int) -> Iterator[np.ndarray]:
        """All frames again, `length` at a time: uint8 [T, H, W, 3]; the last piece may be shorter."""
        size = int(np.prod(self._shape))
        for start in range(0, self._length, length):
            self._file.seek(start * size)
            data = self._file.read(min(length, self._length - start) * size)
            yield np.frombuffer(data, np.uint8).reshape(-1, *self._shape)

    def __len__(self) -> int:
        return self._length

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
