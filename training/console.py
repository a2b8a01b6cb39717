"""How the programs of training end: with 0, or with one sentence and 2, also where a disk is full."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from pipeline.errors import SelfForcingError


def run(work: Callable[[], object]) -> int:
    """Do the work of a program; returns its exit code. What was wrong with its input is one sentence on stderr."""
    try:
        work()
    except SelfForcingError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except OSError as error:
        name = f": {error.filename}" if error.filename else ""
        sys.stderr.write(f"A file cannot be read or written ({error.strerror or error}{name}).\n")
        return 2
    return 0


def whole_number(low: int) -> Callable[[str], int]:
    """An argparse type: a whole number of at least `low`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {low}")
        return value

    return read
