"""What the machine can do to a run (no memory, no disk, no peer, a signal), each said in one sentence."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.errors import OutOfMemory, SelfForcingError, TrainingError
from training.parallel import Processes

_LOST_PEER = ("connection closed", "connection reset", "broken pipe", "gloo/transport")
"""What gloo says, in plain RuntimeErrors, when the other end has gone."""


@contextmanager
def explained(
    out: Path, processes: Processes, saved: Callable[[], str], when: Callable[[], str] | str
) -> Iterator[None]:
    """Errors of the machine become those of this project.

    Args:
        out: the run's folder.
        saved: a sentence about what a continued run finds.
        when: ending of a sentence, like "in step 3".

    Raises:
        TrainingError: the disk is full, or another process ended.
        OutOfMemory: says which settings need less.
    """
    try:
        yield
    except SelfForcingError:
        raise
    except (RuntimeError, MemoryError, OSError) as error:
        time = when if isinstance(when, str) else when()
        if device := _without_memory(error):
            raise OutOfMemory(
                f"The {device} ran out of memory {time}. Lower run.micro_batch, set run.gradient_checkpointing or "
                f"run.cpu_offload, or take more processes. {saved()}"
            ) from error
        if processes.count > 1 and _lost_peer(error):
            raise TrainingError(f"Another process of this run ended {time}. {saved()}") from error
        if isinstance(error, OSError):
            place = error.filename or out
            raise TrainingError(
                f"{place} cannot be read or written {time} ({error.strerror or error}). {saved()}"
            ) from error
        raise


def _without_memory(error: Exception) -> str | None:
    """What ran out of memory, if that is what the error says."""
    if isinstance(error, torch.OutOfMemoryError):
        return "GPU"
    # The allocator of the main memory has no class of its own.
    return "machine" if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error) else None


def _lost_peer(error: Exception) -> bool:
    """Whether an error is what a process sees when one it talks to has gone."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(sign in text for sign in _LOST_PEER)


class LastWords:
    """The one sentence a program ends with, also when it is told to end from outside.

    `torchrun` ends all processes when one of them is gone, and the others may then stand in a collective operation
    that never returns to Python. So the signal is waited for by a thread: Python's own handler runs between two steps
    of the main thread only, but the signal's number is written to a file the moment it comes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._said = False
        self._restore: Callable[[], None] | None = None

    def say(self, sentence: str) -> None:
        with self._lock:
            if not self._said:
                self._said = True
                sys.stderr.write(f"\n{sentence}\n")
                sys.stderr.flush()

    def watch(self, sentence: Callable[[], str]) -> None:
        """From now on SIGTERM ends the program with this sentence and 1. To be called in the main thread."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        handler = signal.signal(signal.SIGTERM, lambda *_: None)
        wakeup = signal.set_wakeup_fd(writer)

        def wait() -> None:
            while numbers := os.read(reader, 1):
                if numbers[0] == signal.SIGTERM:
                    with self._lock:  # a sentence that is being said is said to its end
                        if not self._said:
                            self._said = True
                            # Not through sys.stderr: its lock may be held by the thread that never returns.
                            os.write(2, f"\n{sentence()}\n".encode())
                    os._exit(1)
            os.close(reader)

        def restore() -> None:
            signal.set_wakeup_fd(wakeup)
            signal.signal(signal.SIGTERM, handler)
            os.close(writer)

        self._restore = restore
        threading.Thread(target=wait, name="last words", daemon=True).start()

    def forget(self) -> None:
        """Let SIGTERM do what it did before."""
        if self._restore is not None:
            self._restore()
            self._restore = None
