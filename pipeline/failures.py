"""What a user is told of an exception in the model, and how the memory behind it comes back.

Imports in milliseconds: torch is looked at only if somebody else has loaded it.
"""

from __future__ import annotations

import errno
import gc
import logging
import sys
import traceback
from collections.abc import Iterator
from typing import cast

from pipeline.errors import InvalidRequest, OptionUnavailable, OutOfMemory, SelfForcingError

logger = logging.getLogger(__name__)


def load_failure(error: BaseException) -> SelfForcingError:
    """What is said of an unexpected error while loading."""
    clear_traces(error)
    failure: SelfForcingError
    if is_out_of_memory(error):
        _try_to_free_memory()
        failure = OutOfMemory("The device ran out of memory while the model was loaded. Close other programs.")
    else:
        failure = SelfForcingError(f"The model could not be loaded ({type(error).__name__}).")
    failure.__cause__ = error
    return failure


def both_failures(failure: BaseException, lost: BaseException) -> BaseException:
    """One error for two: the new model could not be loaded, nor the old one again."""
    both = type(failure)(f"{failure} The model before it could not be loaded again, either: {lost}")
    both.__cause__ = failure.__cause__
    return both


def again(error: BaseException) -> BaseException:
    """The same error to raise once more: one object would hold the frames of all who ever met it."""
    copy = type(error)(*error.args)
    copy.__cause__ = error.__cause__
    return copy


def presentable(error: BaseException, name: str) -> SelfForcingError:
    """What the visitor is told of an error in the model. The log gets all of it; memory gets back what it held."""
    expected = isinstance(error, SelfForcingError)
    if not isinstance(error, InvalidRequest | OptionUnavailable):  # those are the visitor's, and were told in full
        # As text: a log that keeps its records must not keep the error, and with it the run.
        logger.error("%s failed\n%s", name, "".join(traceback.format_exception(error)))
    clear_traces(error)
    if isinstance(error, OutOfMemory) or is_out_of_memory(error):
        _try_to_free_memory()
        if isinstance(error, OutOfMemory):
            return error
        return OutOfMemory(
            "The device ran out of memory. Switch FP8 or TAEHV on, or close other programs; the next run starts anew."
        )
    if expected:
        return cast(SelfForcingError, error)
    failure = SelfForcingError(f"The model failed unexpectedly ({type(error).__name__}, {name}).")
    failure.__cause__ = error
    return failure


def clear_traces(error: BaseException) -> None:
    """Empty the frames of an error and of those behind it: their local variables are what was loaded or did not fit."""
    for link in causes(error):
        traceback.clear_frames(link.__traceback__)


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those that led to it, each once: they may lead in a circle."""
    link: BaseException | None = error
    seen: list[BaseException] = []
    while link is not None and link not in seen:
        yield link
        seen.append(link)
        link = link.__cause__ or link.__context__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine had too little memory."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM  # a file that could not be mapped
    # CPUs, Apple GPUs and some libraries have no class of their own for it.
    signs = ("t allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def free_memory() -> None:
    """Give unused memory back to the device."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _try_to_free_memory() -> None:
    """As `free_memory`, for when there is an error to be told already."""
    try:
        free_memory()
    except Exception:  # a device that broke
        logger.exception("Memory could not be given back to the device")


def thread_died() -> SelfForcingError:
    return SelfForcingError("The model stopped working in the middle of this run. Try again: it has been restarted.")
