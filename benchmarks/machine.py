"""What a benchmark ran on: device, versions, load, and the rate of matrix products that it reached there."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

try:
    import resource
except ImportError:  # on Windows
    resource = None

from pipeline import container
from pipeline.device import processor_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "diffusers", "transformers", "numpy", "imageio-ffmpeg", "triton", "torchao")
_PRODUCT_SIZES = {"cpu": 768, "cuda": 8192}
_PRODUCT_TRIES = 8


def describe(device: torch.device, threads: int) -> dict[str, Any]:
    """Machine and versions."""
    gpu = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {
            "name": properties.name,
            "memory": properties.total_memory,
            "capability": list(torch.cuda.get_device_capability(device)),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return {
        "processor": processor_name(),
        "processors": os.cpu_count(),
        "usable_processors": container.processors(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "memory": psutil.virtual_memory().total,
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
    }


def peak_memory() -> int:
    """Most bytes of main memory that this process has had at once."""
    if hasattr(memory := psutil.Process().memory_info(), "peak_wset"):  # on Windows
        return memory.peak_wset
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def seconds_of_children() -> float:
    """Processor time of those that have ended; 0 on Windows. psutil would tell it in steps of 10 ms, not on macOS."""
    if resource is None:
        return 0.0
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def load() -> float:
    """How many programs wanted a processor in the last minute, this one included; 0 where it is not known."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """The fastest of a few large matrix products, in FLOP per second (a product and a sum are two)."""
    size = _PRODUCT_SIZES["cuda" if device.type == "cuda" else "cpu"]
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(_PRODUCT_TRIES):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        one @ other
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def gpu_state() -> str | None:
    """What nvidia-smi tells of clocks, power and other programs; None without it."""
    fields = "name,clocks.sm,clocks.mem,power.draw,temperature.gpu,utilization.gpu"
    try:
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        others = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader"]
        said = [subprocess.run(command, capture_output=True, text=True, timeout=20) for command in (query, others)]
    except (OSError, subprocess.TimeoutExpired):
        return None
    state, programs = (result.stdout.strip().replace("\n", "; ") for result in said)
    return f"{state}; programs: {programs or 'none'}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
