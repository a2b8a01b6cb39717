"""What a container leaves a program of its machine, which the system's own counts do not say.

Memory and processors of a container are limited by Linux control groups, of the second or the first version. A program
that takes the whole machine's is killed for the one, and for the other stopped many times a second: threads that have
used up what all of them may have wait for the next tenth of a second, each one for the others.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil


def total_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory that this process may ever use.

    Args:
        root: of the file system that tells, as for all functions here.
    """
    limits = (limit for limit, _ in _memory_limits(root))
    return min((psutil.virtual_memory().total, *limits))


def free_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory that this process may still use."""
    left = (max(0, limit - used) for limit, used in _memory_limits(root))
    return min((psutil.virtual_memory().available, *left))


def processors(root: Path = Path("/")) -> int:
    """How many processors this process may keep busy all the time, parts of one rounded up."""
    of_the_system = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min((of_the_system, *(max(1, math.ceil(share)) for share in _processor_limits(root))))


def limit_threads() -> None:
    """Let torch, on this thread and those to come, use no more threads than there are processors. Imports torch."""
    import torch

    most = processors()
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > most:
        torch.set_num_threads(most)


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use, in bytes, of every group around this process that has a limit.

    Files that were read and can be forgotten count as used there, but not here.
    """
    versions = (
        ("", "memory.max", "memory.current", ""),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    )
    for controller, limit_file, used_file, prefix in versions:
        for group in _groups(root, controller):
            limit, used = _number(group / limit_file), _number(group / used_file)
            if limit is None or used is None:
                continue
            entries = dict(line.split()[:2] for line in _text(group / "memory.stat").splitlines() if " " in line)
            yield limit, used - sum(int(entries.get(f"{prefix}{name}_file", 0)) for name in ("active", "inactive"))


def _processor_limits(root: Path) -> Iterator[float]:
    """Processors' worth of time that each limited group around this process gets."""
    for group in _groups(root, ""):
        match _text(group / "cpu.max").split():
            case [quota, period] if quota.isdigit():
                yield int(quota) / int(period)
    for group in _groups(root, "cpu"):
        quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        if quota is not None and period is not None and quota > 0:
            yield quota / period


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the groups this process is in, from its own outwards.

    Args:
        controller: of the first version; empty for the second version, which has one tree for all.
    """
    for line in filter(None, _text(root / "proc/self/cgroup").splitlines()):
        _, controllers, path = line.split(":", 2)
        if controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / controller
        inner = PurePosixPath(path.lstrip("/"))
        # A container may see its own group as the top, under a name that only the machine outside knows.
        yield from (top / folder for folder in (inner, *inner.parents) if (top / folder).is_dir())


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""


def _number(file: Path) -> int | None:
    """None where there is no such file, or no limit."""
    try:
        return int(_text(file))
    except ValueError:
        return None
