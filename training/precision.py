"""Whether a device computes in bfloat16, or only imitates it."""

from __future__ import annotations

import torch


def has_bfloat16(device: torch.device) -> bool:
    """True unless products in bfloat16 are emulated: on a processor without AVX-512, a hundred times as slow."""
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
