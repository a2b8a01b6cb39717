"""How a command behaves as a process: what it says, which signals it heeds, and how it ends."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import warnings
from typing import NoReturn


def quiet_libraries(verbose: bool) -> None:
    """Keep other people's warnings off the terminal: what a user has to know, this program says itself."""
    if verbose:
        logging.basicConfig(level=logging.INFO)
        return
    logging.basicConfig(level=logging.CRITICAL + 1)
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


def terminate_like_interrupt() -> None:
    """Treat a polite kill as Ctrl-C: half-written files go away."""
    if threading.current_thread() is threading.main_thread():  # the only one that may say so
        # Not by way of SIGINT: a shell that starts a program in the background has it ignored there.
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def ignore_interrupts() -> None:
    """After the first signal there is nothing more to stop; `timeout`, for one, sends its signal twice."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def leave_at_once(code: int) -> NoReturn:
    """End the process under a thread that torch does not let go of."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
