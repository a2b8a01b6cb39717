"""What visitors send as the start of a video: checked, read and kept while it is used."""

from __future__ import annotations

import functools
import os
from contextlib import suppress
from pathlib import Path

from pipeline.config import ModelSpec
from pipeline.errors import InvalidRequest, OptionUnavailable
from pipeline.start import Start
from pipeline.start_file import read_start
from web.adapter import AdaptedPipeline

KEPT_STARTS = 2
"""Starts that stay in memory: a file is read for its preview, when Generate is pressed, and when its turn comes."""


class Starts:
    """Reads the files below a folder.

    Args:
        home: Where Gradio puts uploads. What lies elsewhere is not a visitor's.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self._read = functools.lru_cache(maxsize=KEPT_STARTS)(_read)

    def read(self, path: str | None, model: AdaptedPipeline) -> Start | None:
        """What a video starts from, cut for this model; None without a file. A bad file is removed.

        Raises:
            InvalidRequest: with a sentence for the visitor.
            OptionUnavailable: the model starts from nothing but noise.
        """
        if path is None:
            return None
        if not isinstance(path, str) or not Path(path).resolve().is_relative_to(self._home.resolve()):
            raise InvalidRequest("A file is needed to start from.")
        if not model.takes_start or model.spec is None:
            raise OptionUnavailable("This model cannot start from a picture or a video.")
        try:
            # What is used is not old: files go by their age.
            os.utime(path)
            return self._read(path, model.spec)
        except InvalidRequest:
            with suppress(OSError):
                Path(path).unlink()
            raise
        except OSError as error:
            raise InvalidRequest("The file to start from is gone. Choose it again.") from error


def _read(path: str, spec: ModelSpec) -> Start:
    return read_start(path, spec)
