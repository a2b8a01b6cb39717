"""What can attend here, and which of it does: found out with the model's real shapes, not from a device's name.

`auto` runs every exact backend on a GPU once the weights are there, compares it with plain float32 arithmetic, times
those that agree, and takes the fastest. A backend that is forced is compared likewise, and refused if it is not usable.

Kernels call torch's operators themselves instead of `torch.nn.attention.sdpa_kernel`, whose switches hold for the whole
process: a language model that writes a prompt in another thread would find its own attention switched off.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pipeline.attention import Kernel, attention
from pipeline.config import ModelSpec
from pipeline.device import DeviceFacts, dtype_name
from pipeline.errors import OptionUnavailable

WARM_UP_CALLS, TIMED_CALLS = 2, 5
CHECKED_ROWS = 64
"""Queries whose results are compared with exact ones; all of them would take gigabytes of scores."""
LIKELY_NOISE = 0.05
"""A backend must be faster than torch's own choice by this share: on a tie, chance would choose anew at every start."""
TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4, torch.float64: 1e-6}
"""Largest relative error of an exact backend, by the model's dtype: some roundings of numbers and probabilities."""
APPROXIMATE_TOLERANCE = 0.15
"""Largest relative error of an 8-bit backend: one with more is broken."""

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """One way to attend.

    Attributes:
        title: as people know it.
        make: returns its kernel for a device; imports the package, if it is one.
        lacks: why a device cannot have it; None if it can.
        package: that it needs.
        half_only: works in bfloat16 and float16 alone.
        approximate: changes the result by more than rounding: never taken unless it is asked for.
        reference: too slow to be worth timing.
    """

    title: str
    make: Callable[[DeviceFacts], Kernel | None]
    lacks: Callable[[DeviceFacts], str | None] = lambda facts: None
    package: str | None = None
    half_only: bool = False
    approximate: bool = False
    reference: bool = False

    def problem(self, facts: DeviceFacts, dtype: torch.dtype) -> str | None:
        """Why it cannot work, as far as that can be told without trying."""
        if problem := self.lacks(facts):
            return problem
        if self.half_only and facts.kind != "cpu" and dtype not in _HALF:
            return f"works in bfloat16 and float16, not {dtype_name(dtype)}"
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"the package {self.package} is not installed"
        return None


@dataclass(frozen=True)
class AttentionShapes:
    """What a model asks of attention: one length of queries, some of keys, in tokens."""

    heads: int
    head_dim: int
    queries: int
    keys: tuple[int, ...]
    """A clip's first block, a full cache, and the text."""

    @classmethod
    def of(cls, config: Any, spec: ModelSpec) -> AttentionShapes:
        """Those of a model, by its transformer's config and its spec."""
        _, patch_h, patch_w = config.patch_size
        _, height, width = spec.latent_shape(config.in_channels)
        frame = (height // patch_h) * (width // patch_w)
        block = spec.frames_per_block * frame
        keys = (block, spec.window_frames * frame, spec.text_len)
        return cls(config.num_attention_heads, config.attention_head_dim, block, keys)

    def tensors(self, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Random query, key and value for each length of keys. They leave torch's own random numbers alone."""
        generator = torch.Generator(device).manual_seed(0)

        def random(tokens: int) -> Tensor:
            shape = (1, tokens, self.heads, self.head_dim)
            return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

        query = random(self.queries)
        for keys in self.keys:
            yield query, random(keys), random(keys)


@dataclass(frozen=True)
class AttentionChoice:
    """What attends, and why.

    Attributes:
        name: in `BACKENDS`.
        kernel: None for torch's own choice.
        milliseconds: of the backends that were timed, for one layer's attention over a full cache and the text.
        unusable: backend -> why it is none here.
    """

    name: str = "sdpa"
    kernel: Kernel | None = None
    milliseconds: dict[str, float] = field(default_factory=dict)
    unusable: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        backend = BACKENDS[self.name]
        return f"{backend.title} (8 bits, approximate)" if backend.approximate else backend.title


def choose_attention(
    name: str,
    shapes: AttentionShapes,
    device: torch.device,
    dtype: torch.dtype,
    backends: dict[str, Backend] | None = None,
) -> AttentionChoice:
    """What shall attend. Takes some tenths of a second on a GPU, and lets go of all its memory.

    Args:
        name: `auto`, or one of `BACKENDS`, which is then the choice or refused. On what is no GPU, `auto` is torch's
            own choice, untimed: what a CPU that does other things as well takes would choose by chance.
        shapes, device, dtype: the model's.
        backends: to choose among; default: all there are.

    Raises:
        OptionUnavailable: the backend that is asked for is not usable here; says why, and what is.
    """
    backends = BACKENDS if backends is None else backends
    facts = DeviceFacts.of(device)
    if name == "sdpa" or (name == "auto" and facts.kind != "cuda"):
        return AttentionChoice()
    if name == "auto":
        with torch.cuda.device(device):
            return fastest(shapes, device, dtype, facts, backends)
    usable = [other for other in backends if backends[other].problem(facts, dtype) is None and other != name]
    can_be = f"Usable here: auto, {', '.join(usable)}."
    if name not in backends:
        raise OptionUnavailable(f"Attention {name!r} is unknown. {can_be}")
    try:
        return AttentionChoice(name, _checked(backends[name], shapes, device, dtype, facts))
    except _Unusable as why:
        raise OptionUnavailable(f"Attention {name!r} cannot be used: {why}. {can_be}") from why


@torch.inference_mode()
def fastest(
    shapes: AttentionShapes,
    device: torch.device,
    dtype: torch.dtype,
    facts: DeviceFacts,
    backends: dict[str, Backend],
    milliseconds: Callable[[Callable[[], Any]], float] | None = None,
) -> AttentionChoice:
    """The fastest exact backend that gives the right numbers; `milliseconds` times a call on the device.

    Raises:
        OptionUnavailable: none does; says why of each.
    """
    milliseconds = milliseconds or _milliseconds
    kernels: dict[str, Kernel | None] = {}
    unusable: dict[str, str] = {}
    for name, backend in backends.items():
        try:
            if backend.approximate and backend.problem(facts, dtype) is None:
                raise _Unusable("approximate: only where it is asked for")
            if not backend.reference:
                kernels[name] = _checked(backend, shapes, device, dtype, facts)
        except _Unusable as why:
            unusable[name] = str(why)
    if not kernels:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in unusable.items())
        raise OptionUnavailable(f"No attention gives the right numbers on {facts}. {reasons}.")
    times = dict.fromkeys(kernels, 0.0)
    for tensors in list(shapes.tensors(device, dtype))[1:]:  # the first block is soon over
        for name, kernel in kernels.items():
            times[name] += milliseconds(lambda kernel=kernel, tensors=tensors: attention(*tensors, None, kernel))
    best = min(times, key=times.__getitem__)
    if "sdpa" in times and times["sdpa"] * (1 - LIKELY_NOISE) <= times[best]:
        best = "sdpa"
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return AttentionChoice(best, kernels[best], {name: round(time, 3) for name, time in times.items()}, unusable)


class _Unusable(Exception):
    """Says why a backend cannot be used here."""


@torch.inference_mode()
def _checked(
    backend: Backend, shapes: AttentionShapes, device: torch.device, dtype: torch.dtype, facts: DeviceFacts
) -> Kernel | None:
    """The backend's kernel, if it gives the right numbers in all shapes."""
    if problem := backend.problem(facts, dtype):
        raise _Unusable(problem)
    allowed = APPROXIMATE_TOLERANCE if backend.approximate else TOLERANCES[dtype]
    try:
        kernel = backend.make(facts)
        for query, key, value in shapes.tensors(device, dtype):
            rows = torch.linspace(0, query.shape[1] - 1, CHECKED_ROWS, device=device, dtype=torch.float32).long()
            found = attention(query, key, value, None, kernel)[:, rows].float()
            exact = exact_attention(query[:, rows], key, value)
            error = ((found - exact).norm() / exact.norm()).item()
            if not error <= allowed:  # also where it is no number
                raise _Unusable(f"its result is off by {error:.1%} in {query.shape[1]} x {key.shape[1]} tokens")
    except _Unusable:
        raise
    except Exception as error:  # whatever a package raises that was built for something else
        reason = str(error).strip().partition("\n")[0][:160].rstrip(".")
        raise _Unusable(f"it fails here ({type(error).__name__}: {reason})") from error
    return kernel


def exact_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """In plain float32 arithmetic, a head at a time. Shapes as `attention.attention` has them."""
    heads = []
    for q, k, v in zip(query.unbind(2), key.unbind(2), value.unbind(2), strict=True):
        scores = q.float() @ k.float().transpose(1, 2) * q.shape[-1] ** -0.5
        heads.append(scores.softmax(-1) @ v.float())
    return torch.stack(heads, dim=2)


def _milliseconds(call: Callable[[], Any]) -> float:
    """Median time of `TIMED_CALLS` calls on the current GPU."""
    for _ in range(WARM_UP_CALLS):
        call()
    times = []
    for _ in range(TIMED_CALLS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[TIMED_CALLS // 2]


# ---- the kernels


def _heads_first(operator: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Kernel:
    """Torch's operators have [B, heads, tokens, head_dim]."""

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return operator(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)).transpose(1, 2)

    return kernel


def _flash(facts: DeviceFacts) -> Kernel:
    aten = torch.ops.aten
    on_cpu = facts.kind == "cpu"
    operator = aten._scaled_dot_product_flash_attention_for_cpu if on_cpu else aten._scaled_dot_product_flash_attention
    return _heads_first(lambda *tensors: operator(*tensors)[0])


def _cudnn(facts: DeviceFacts) -> Kernel:
    return _heads_first(lambda *tensors: torch.ops.aten._scaled_dot_product_cudnn_attention(*tensors, None, False)[0])


def _efficient(facts: DeviceFacts) -> Kernel:
    operator = torch.ops.aten._scaled_dot_product_efficient_attention
    return _heads_first(lambda *tensors: operator(*tensors, None, False)[0])


def _math(facts: DeviceFacts) -> Kernel:
    return _heads_first(lambda *tensors: torch.ops.aten._scaled_dot_product_attention_math(*tensors)[0])


@cache
def _operator(name: str, package: str, function: str, **settings: Any) -> Kernel:
    """A package's function as an operator of torch's, which the compiler leaves whole instead of looking into it."""
    attend = getattr(importlib.import_module(package), function)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = attend(query, key, value, **settings)
        return (out[0] if isinstance(out, tuple) else out).contiguous()  # FlashAttention 3 may add sums to it

    operator = torch.library.custom_op(
        f"self_forcing::{name}", call, mutates_args=(), schema="(Tensor query, Tensor key, Tensor value) -> Tensor"
    )
    operator.register_fake(lambda query, key, value: query.new_empty(query.shape))
    return operator


def _ampere(facts: DeviceFacts) -> str | None:
    return None if facts.at_least(8) else f"needs an NVIDIA GPU from Ampere on, not {facts}"


def _hopper(facts: DeviceFacts) -> str | None:
    hopper = facts.capability is not None and facts.capability[0] == 9
    return None if hopper else f"needs a Hopper GPU (capability 9.0), not {facts}"


def _torch_flash(facts: DeviceFacts) -> str | None:
    has_it = facts.kind == "cpu" or facts.at_least(8) or (facts.kind == "cuda" and facts.rocm)
    return None if has_it else f"torch has it for CPUs and for GPUs from Ampere on, not for {facts}"


def _any_gpu(facts: DeviceFacts) -> str | None:
    return None if facts.kind == "cuda" else f"needs a GPU, not {facts}"


BACKENDS: dict[str, Backend] = {
    "sdpa": Backend("PyTorch's choice", lambda facts: None),
    "cudnn": Backend("cuDNN", _cudnn, _ampere, half_only=True),
    "flash": Backend("PyTorch FlashAttention", _flash, _torch_flash, half_only=True),
    "efficient": Backend("PyTorch memory-efficient", _efficient, _any_gpu),
    "math": Backend("plain arithmetic", _math, reference=True),
    "fa3": Backend(
        "FlashAttention 3",
        lambda facts: _operator("fa3", "flash_attn_interface", "flash_attn_func"),
        _hopper,
        "flash_attn_interface",
        half_only=True,
    ),
    "fa2": Backend(
        "FlashAttention 2",
        lambda facts: _operator("fa2", "flash_attn", "flash_attn_func"),
        _ampere,
        "flash_attn",
        half_only=True,
    ),
    "sage": Backend(
        "SageAttention",
        lambda facts: _operator("sage", "sageattention", "sageattn", tensor_layout="NHD"),
        _ampere,
        "sageattention",
        half_only=True,
        approximate=True,
    ),
}
"""By the names of `config.ATTENTION_NAMES`, in which `auto` is none of these."""
