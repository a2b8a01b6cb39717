"""The two forms of 8 bits, and which of them a device gets.

*Row-wise arithmetic* (torchao, NVIDIA GPUs from Ada on): weights are rounded once, a scale to each row; the input of a
layer is rounded as it comes, a scale to each token; the tensor cores multiply the two in 8 bits and add in float32.
*Weights only* (`stored_layers.py`, everywhere): they are stored in 8 bits, a scale to each row, and computed with in
the model's dtype. Memory halves, speed does not rise.

In both, only the matrices inside the transformer's blocks are rounded. What stands around them, the embeddings of
text, time and patches and the head, is small, and its errors would reach every token or every layer.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipeline.device import DeviceFacts, dtype_name
from pipeline.stored_layers import store

if TYPE_CHECKING:
    from pipeline.transformer import CausalWanTransformer3DModel

_KEPT_WHOLE = ("patch_embed", "norm", r"^proj_out$", r"\.wo$", "relative_attention_bias")
"""Layers that are not stored in 8 bits, by name, besides those that a model names itself. T5 casts its activations to
whatever `wo` is stored in; its table of distances is small and goes into every layer's attention."""

SIZE_STEP = 16
"""8-bit matrix products want both sizes of a weight to be multiples of this."""
SMALLEST_PEAK = 1e-12
"""Taken for the largest number of a token where all are zero, whose scale would be zero, too, and its values 0 / 0."""

TRIED_SIZE = 64
"""Rows and columns of the matrices of a trial: a multiple of all that kernels want."""
TRIED_TOLERANCE = 0.1
"""Largest relative error of a trial. Rounding to 8 bits gives some hundredths."""

INSTALL_TORCHAO = 'pip install "torchao>=0.18,<0.19"'


@dataclass(frozen=True)
class Float8Form:
    """Which form a transformer gets.

    Attributes:
        row_wise: arithmetic in 8 bits, not storage alone.
        why: why it is only storage; empty for row-wise.
    """

    row_wise: bool
    why: str = ""

    def precision(self, dtype: torch.dtype) -> str:
        """What a run says of its arithmetic; `dtype`: the model's."""
        if self.row_wise:
            return "float8 row-wise arithmetic (torchao)"
        return f"float8 weights, {dtype_name(dtype)} arithmetic"

    def sentence(self) -> str:
        """For people."""
        if self.row_wise:
            return "Row-wise arithmetic in 8 bits (torchao): faster with torch.compile only."
        return f"Weights only, because {self.why}."


def float8_form(facts: DeviceFacts, dtype: torch.dtype, problem: str | None) -> Float8Form:
    """The better form that works.

    Args:
        facts: of the device.
        dtype: of the model.
        problem: why torchao cannot be used, as from `torchao_problem()` or `row_wise_problem()`; None if it can.
    """
    if not facts.at_least(8, 9):
        return Float8Form(False, f"{facts} cannot multiply in 8 bits (NVIDIA GPUs can from capability 8.9 on)")
    if dtype != torch.bfloat16:
        return Float8Form(False, f"the model is in {dtype_name(dtype)}, not bfloat16")
    if problem is not None:
        return Float8Form(False, problem)
    return Float8Form(True)


def form_on(
    device: torch.device, dtype: torch.dtype, trial: Callable[[torch.device], str | None] | None = None
) -> Float8Form:
    """The form on this machine.

    Args:
        device, dtype: of the model.
        trial: why a product fails on the device, None if it does not. Default: `row_wise_problem`, which makes one.
    """
    facts = DeviceFacts.of(device)
    # torchao takes seconds to import: only where it is the last question left.
    asked = float8_form(facts, dtype, None)
    if not asked.row_wise:
        return asked
    return float8_form(facts, dtype, torchao_problem() or (trial or row_wise_problem)(device))


def torchao_problem() -> str | None:
    """Why torchao cannot be used; None if it can. Imports it."""
    if importlib.util.find_spec("torchao") is None:
        return f"torchao is not installed ({INSTALL_TORCHAO})"
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_  # noqa: F401
    except Exception as error:  # made for another torch, it fails in many ways
        return f"torchao does not work with torch {torch.__version__} ({type(error).__name__}; {INSTALL_TORCHAO})"
    return None


@torch.no_grad()
def row_wise_problem(device: torch.device) -> str | None:
    """Why row-wise arithmetic fails on a device; None if it works. torchao is there, and multiplies a small matrix."""
    from torchao.quantization import quantize_

    try:
        with _current(device):
            # Torch's own random numbers are left alone. Rows of a diagonal are rounded to themselves.
            layer = nn.utils.skip_init(nn.Linear, TRIED_SIZE, TRIED_SIZE, bias=False, device=device)
            layer.weight.copy_(torch.eye(TRIED_SIZE))
            layer = nn.Sequential(layer.to(torch.bfloat16))
            quantize_(layer, _row_wise())
            with torch.inference_mode():  # as in a run, whose weights were made without it; see `options.py`
                tokens = torch.linspace(-1, 1, TRIED_SIZE**2, device=device, dtype=torch.float32).view(TRIED_SIZE, -1)
                error = ((layer(tokens.to(torch.bfloat16)).float() - tokens).norm() / tokens.norm()).item()
    except Exception as error:  # a kernel that was built for other GPUs, a library that lacks one: whatever they raise
        reason = str(error).strip().partition("\n")[0][:160].rstrip(".")
        return f"torchao fails here ({type(error).__name__}: {reason})"
    # Also where it is no number.
    return None if error <= TRIED_TOLERANCE else f"torchao's product in 8 bits is off by {error:.0%} here"


def store_in_8_bits(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights of a model's large layers in 8 bits; each computes in `dtype` all the same."""
    kept = re.compile("|".join((*(getattr(model, "_skip_layerwise_casting_patterns", None) or ()), *_KEPT_WHOLE)))
    store(model, dtype, lambda name: kept.search(name) is None)


def multiply_in_8_bits(model: CausalWanTransformer3DModel) -> None:
    """Round the weights of a bfloat16 model, and let its layers compute in 8 bits from now on."""
    from torchao.quantization import quantize_

    with _current(model.device):
        quantize_(model.blocks, _row_wise(), lambda module, _name: goes_row_wise(module) and not _has_empty_row(module))


def _row_wise() -> Any:
    """torchao's settings."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    return Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(),
        activation_value_lb=SMALLEST_PEAK,
        set_inductor_config=False,  # it would set the compiler, and float32 products, for the whole process
    )


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """What torchao computes then goes to this GPU, if it is one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def goes_row_wise(module: nn.Module) -> bool:
    """Whether a module of a block is one that row-wise arithmetic takes, by its kind and its sizes."""
    return isinstance(module, nn.Linear) and module.in_features % SIZE_STEP == module.out_features % SIZE_STEP == 0


def _has_empty_row(module: nn.Linear) -> bool:
    """A row of zeros would get the scale zero."""
    return bool((module.weight.abs().amax(1) == 0).any())


def row_wise_bytes(model: CausalWanTransformer3DModel) -> int:
    """What weights and buffers take after `multiply_in_8_bits`: a byte a weight, a float32 scale a row, biases whole.

    Counted without torchao, for a plan on a machine that need not have it.
    """
    whole = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    layers = [module for module in model.blocks.modules() if goes_row_wise(module)]
    saved = sum(layer.weight.numel() * (layer.weight.element_size() - 1) - 4 * layer.out_features for layer in layers)
    return whole - saved
