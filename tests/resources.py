"""What a program takes from the machine it runs on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

PROCESS = Path("/proc/self")


def resident_bytes() -> int:
    """Memory that this program has at the moment."""
    return int(_about_us("statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_resident_bytes(since_now: bool = False) -> int:
    """The most memory it has ever had, or had since the last call with `since_now`."""
    if since_now:
        _about_us("clear_refs").write_text("5")
    (line,) = (line for line in _about_us("status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def open_files() -> int:
    """Files, sockets and pipes that it holds."""
    return len(os.listdir(_about_us("fd")))


def disk_bytes(folder: Path) -> int:
    """What all files below a folder take."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _about_us(name: str) -> Path:
    if not (PROCESS / name).exists():
        pytest.skip("only Linux tells what a program uses without another package")
    return PROCESS / name
