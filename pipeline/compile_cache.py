"""Where compiled code is kept from one start to the next. What is in there may be removed at any time.

torch's compiler looks everything up in one folder, by a hash of the code, the shapes, the device and its own version.
Its default is a temporary folder that is gone after a restart of the machine; here it is one that stays.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path

from pipeline.compile_cache_room import make_room

logger = logging.getLogger(__name__)

TORCH_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
"""Whoever has set this has chosen a folder, and looks after it."""
HOME_VARIABLE = "SELF_FORCING_CACHE"

_own: Path | None = None
"""The folder that `use` chose; None if somebody else did."""
_given_up = False


def folder() -> Path:
    """Where compiled code is kept."""
    if _is_chosen():
        return Path(os.environ[TORCH_VARIABLE])
    home = os.environ.get(HOME_VARIABLE) or os.path.join(os.path.expanduser("~"), ".cache", "self-forcing")
    return Path(home) / "compile"


def _is_chosen() -> bool:
    """Whether the variable holds more than torch's default, which torch puts there as soon as it is imported."""
    chosen = os.environ.get(TORCH_VARIABLE)
    if not chosen:
        return False
    try:
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir
    except ImportError:  # it is no public name
        return True
    return os.path.abspath(chosen) != os.path.abspath(default_cache_dir())


def use() -> None:
    """Have torch's compiler use `folder`, if nobody has chosen another one and it can be written to.

    The first time in a process, what was not used for long is removed from it if there is too much.
    """
    global _own
    if _is_chosen():
        return
    chosen = folder()
    try:
        chosen.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=chosen):
            pass
    except OSError as error:
        logger.warning("Compiled code cannot be kept in %s (%s); it goes to a temporary folder", chosen, error.strerror)
        return
    os.environ[TORCH_VARIABLE] = str(chosen)
    _own = chosen
    if removed := make_room(chosen):
        logger.info("Removed %.0f MB of compiled code that was not used for long from %s", removed / 1e6, chosen)


def give_up() -> bool:
    """Remove what is kept, for it seems to be damaged. Returns whether there was anything; at most once a process."""
    global _given_up
    if _given_up or _own is None:
        return False
    try:
        there = _own.is_dir()
        if there and not any(_own.iterdir()):
            return False
        _given_up = True
        if there:
            # First out of the way: another process may be reading in it.
            aside = Path(tempfile.mkdtemp(prefix="damaged-", dir=_own.parent))
            os.replace(_own, aside / _own.name)
            shutil.rmtree(aside, ignore_errors=True)
        _own.mkdir(parents=True, exist_ok=True)  # somebody may have removed it: that was damage, too
    except OSError as error:
        logger.warning("Compiled code in %s cannot be removed (%s)", _own, error.strerror)
        return False
    return True


def size() -> int:
    """Bytes that are kept."""
    total = 0
    for parent, _, names in os.walk(folder()):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except OSError:  # gone meanwhile
                continue
    return total
