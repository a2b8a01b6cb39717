"""The three switches of a request, applied to the loaded model between runs and undone again.

`taehv` picks the decoder. `fp8` stores the transformer's weights in 8 bits and computes in the model's own dtype
(diffusers' layerwise casting): memory halves, speed does not rise. `compile` compiles one transformer block and
reuses it for all.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable

import torch

from pipeline.config import GenerationRequest
from pipeline.errors import OptionUnavailable
from pipeline.transformer import CausalWanTransformer3DModel

FP8_STORAGE = torch.float8_e4m3fn


class TransformerOptions:
    """Brings the transformer into the state a request asks for.

    Args:
        load: returns a pristine transformer. Weights that went through 8 bits have lost what cannot be put back, so
            switching fp8 off means loading them again.
    """

    def __init__(self, load: Callable[[], CausalWanTransformer3DModel]) -> None:
        self._load = load
        self.transformer = load()
        self.fp8 = False
        self.compiled = False

    def apply(self, *, fp8: bool, compile: bool) -> CausalWanTransformer3DModel:
        """The transformer as asked for; the same object as before if nothing changes."""
        if self.fp8 and not fp8:
            self.transformer = self._load()
            self.fp8 = self.compiled = False
        if fp8 and not self.fp8:
            dtype = self.transformer.dtype
            self.transformer.enable_layerwise_casting(storage_dtype=FP8_STORAGE, compute_dtype=dtype)
            self.fp8 = True
        if compile != self.compiled:
            for block in self.transformer.blocks:
                # `Module.compile` has no counterpart; this attribute is all that it sets.
                block.compile(dynamic=None) if compile else setattr(block, "_compiled_call_impl", None)
            self.compiled = compile
        return self.transformer


def unavailable_options(device: torch.device, has_taehv: bool) -> dict[str, str]:
    """Option -> one sentence why it cannot work with this model on this machine."""
    reasons = {}
    if not has_taehv:
        reasons["taehv"] = "This model folder has no TAEHV decoder."
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            reasons["compile"] = "torch.compile needs the package triton here. Install it with pip install triton."
    elif not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++", "cl")):
        reasons["compile"] = "torch.compile needs a C++ compiler. Install g++ (Debian: apt install g++) and restart."
    return reasons


def check_available(request: GenerationRequest, reasons: dict[str, str]) -> None:
    """Refuse a request that asks for something that cannot work, before the model is touched."""
    for option, reason in reasons.items():
        if getattr(request, option):
            raise OptionUnavailable(reason)
