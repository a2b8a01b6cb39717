"""The three switches of a request, applied to the loaded model between runs and undone again.

`taehv` picks the decoder. `fp8` keeps the transformer's weights in 8 bits, in the form that the device can use best:
see `float8.py`. `compile` compiles the parts of one transformer block, see `compiling.py`, and all blocks use them.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import MethodType

import torch

from pipeline.attention import Kernel
from pipeline.compiling import Compiler, Piece
from pipeline.control import checkpoint
from pipeline.float8 import form_on, multiply_in_8_bits, store_in_8_bits
from pipeline.transformer import CausalWanBlock, CausalWanTransformer3DModel


class TransformerOptions:
    """Brings the transformer into the state a request asks for.

    Args:
        load: returns a pristine transformer. Weights that went through 8 bits have lost what cannot be put back, so
            switching fp8 off means loading them again.
        compiler: of the parts of a block that `compile` puts compiled ones in the place of.
    """

    def __init__(self, load: Callable[[], CausalWanTransformer3DModel], compiler: Compiler | None = None) -> None:
        self._load = load
        self._kernel: Kernel | None = None
        self.compiler = compiler or Compiler()
        self._pieces: dict[bool, tuple[Piece, ...]] = {}
        self._installed: tuple[Piece, ...] = ()
        self._transformer: CausalWanTransformer3DModel | None = load()
        self.config = self._transformer.config
        self.device = self._transformer.device
        self.dtype = self._transformer.dtype
        """What it computes in, whatever the weights are stored in."""
        self.fp8_form = form_on(self.device, self.dtype)
        self.fp8 = False

    def use_attention(self, kernel: Kernel | None) -> None:
        """Attend with this kernel from the next run on, also after the weights were loaded anew."""
        self._kernel = kernel
        if self._transformer is not None:
            self._transformer.use_attention(kernel)

    def apply(self, *, fp8: bool, compile: bool) -> CausalWanTransformer3DModel:
        """The transformer as asked for; the same object as before if nothing changes.

        Raises:
            Cancelled, DeadlineExceeded: from `control.checkpoint`, while it waits for the compiler to let go of weights
                that are to change.
        """
        if fp8 != self.fp8:
            self.compiler.withdraw(self.pieces(self.fp8), checkpoint)
        transformer = self._in_8_bits() if fp8 else self._whole()
        pieces = self.pieces(fp8) if compile else ()
        if pieces != self._installed:
            for block in transformer.blocks:
                for name in CausalWanBlock.COMPILED:
                    vars(block).pop(name, None)
                for name, piece in zip(CausalWanBlock.COMPILED, pieces, strict=False):
                    vars(block)[name] = MethodType(piece, block)  # in front of the class's own
            self._installed = pieces
        return transformer

    # A run is made in inference mode. Weights are not: tensors of that mode are of another kind to the compiler, and
    # all that was compiled for the weights before would be compiled once more.

    @torch.inference_mode(False)
    @torch.no_grad()
    def _whole(self) -> CausalWanTransformer3DModel:
        if self.fp8:
            # The old weights go first: on a card that the model just fits, there is no room for both.
            self._transformer = None
            gc.collect()
        if self._transformer is None:
            self._transformer = self._load()
            self._transformer.use_attention(self._kernel)
            self.fp8, self._installed = False, ()
        return self._transformer

    @torch.inference_mode(False)
    @torch.no_grad()
    def _in_8_bits(self) -> CausalWanTransformer3DModel:
        if self._transformer is not None and self.fp8:
            return self._transformer
        transformer = self._whole()
        self._transformer = None  # half-way through it is neither: load it anew
        if self.fp8_form.row_wise:
            multiply_in_8_bits(transformer)
        else:
            store_in_8_bits(transformer, self.dtype)
        self._transformer, self.fp8 = transformer, True
        return transformer

    def compiles(self, fp8: bool) -> bool:
        """Whether blocks can be compiled in this state. Triton cannot read 8-bit floats below capability 8.9, which is
        mostly where weights are only stored in them."""
        return not fp8 or self.fp8_form.row_wise

    def pieces(self, fp8: bool) -> tuple[Piece, ...]:
        """`CausalWanBlock.COMPILED`, for weights in this form; none if they cannot be compiled."""
        if fp8 not in self._pieces:
            names = CausalWanBlock.COMPILED if self.compiles(fp8) else ()
            self._pieces[fp8] = tuple(Piece(getattr(CausalWanBlock, name), self.compiler) for name in names)
        return self._pieces[fp8]


def unavailable_options(device: torch.device, has_taehv: bool) -> dict[str, str]:
    """Option -> one sentence why it cannot work with this model on this machine."""
    reasons = {}
    if not has_taehv:
        reasons["taehv"] = "This model folder has no TAEHV decoder."
    if missing := missing_for_compile(device):
        reasons["compile"] = f"torch.compile needs {missing} on this machine. Install it and restart."
    return reasons


def missing_for_compile(device: torch.device) -> str | None:
    """What torch's compiler lacks here. On Windows it wants Microsoft's, elsewhere any; both link against Python."""
    compilers = ("cl",) if sys.platform == "win32" else ("c++", "g++", "clang++", "gcc", "clang", "cc")
    chosen = os.environ.get("CXX") or os.environ.get("CC")
    if not any(shutil.which(name) for name in ((chosen, *compilers) if chosen else compilers)):
        return "Visual C++" if sys.platform == "win32" else "a C++ compiler (Debian: g++)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python's header files (Debian: python3-dev)"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "the package triton"
    return None
