"""What a device is, as far as the choice of kernels depends on it."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class DeviceFacts:
    """Asked of the driver once, and never of a device's name: an H200 is a Hopper without the word in it.

    Attributes:
        kind: `cpu`, `cuda` or `xpu`.
        capability: of an NVIDIA GPU, (8, 9) for Ada and (9, 0) for Hopper; None for anything else.
        rocm: AMD's GPUs are called `cuda` as well.
    """

    kind: str
    capability: tuple[int, int] | None = None
    rocm: bool = False

    @classmethod
    def of(cls, device: torch.device) -> DeviceFacts:
        rocm = torch.version.hip is not None
        if device.type != "cuda" or rocm:
            return cls(device.type, rocm=rocm)
        return cls("cuda", torch.cuda.get_device_capability(device))

    def at_least(self, major: int, minor: int = 0) -> bool:
        """Whether it is an NVIDIA GPU of this capability or a later one."""
        return self.capability is not None and self.capability >= (major, minor)

    def __str__(self) -> str:
        if self.capability is not None:
            return f"a GPU of capability {self.capability[0]}.{self.capability[1]}"
        return {"cpu": "a CPU", "cuda": "an AMD GPU"}.get(self.kind, self.kind)


def chosen_device(name: str | torch.device | None) -> torch.device:
    """The device of a name; without one a GPU if there is one, else the CPU."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def default_dtype(device: torch.device) -> torch.dtype:
    """What a model is loaded in where nobody chose: half as wide on anything but a CPU, which gains little by it."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def dtype_name(dtype: torch.dtype) -> str:
    """Such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def has_bfloat16(device: torch.device) -> bool:
    """True unless products in bfloat16 are emulated: on a processor without AVX-512, a hundred times as slow."""
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def taehv_dtype(device: torch.device) -> torch.dtype:
    """What TAEHV is loaded in where nobody chose: its convolutions gain by bfloat16 on a CPU, too, if it has that.

    With the embedded model a block takes 95 instead of 150 ms of an AMD EPYC's core; the frames differ by 54 dB PSNR
    from those in float32. The transformer and the Wan VAE gain less than a tenth and stay as `default_dtype` has it.
    """
    return torch.bfloat16 if has_bfloat16(device) else default_dtype(device)


def processor_name() -> str:
    """Such as `AMD EPYC 9R14`; the machine's kind where it is not told."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
