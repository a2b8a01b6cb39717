"""Whether the reference mode makes the same video as the pipeline: without that, a ratio of speeds means nothing."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.watch import WatchedPipeline, WatchedReference
from pipeline.config import GenerationRequest
from pipeline.device import dtype_name

TOLERANCE = 1e-5
"""Of relative differences in float32."""
TAEHV_EXACT_BLOCKS = 2
"""How far the authors' way of decoding with TAEHV is exact; see `reference_decoder.py`."""


@dataclass(frozen=True)
class Agreement:
    """Relative differences between both, of whole blocks: the largest of all blocks.

    Attributes:
        dtype: of the arithmetic; only float32 is judged.
        blocks: how many were compared.
        latents: what the transformers made.
        frames: decoder -> what the decoders made of the same latents; of TAEHV in the first `TAEHV_EXACT_BLOCKS`.
        taehv_later: TAEHV's in the later blocks, where the authors' way is not exact; None if there are none.
    """

    dtype: str
    blocks: int
    latents: float
    frames: dict[str, float]
    taehv_later: float | None

    @property
    def holds(self) -> bool:
        return self.dtype == "float32" and max(self.latents, *self.frames.values()) <= TOLERANCE

    def as_dict(self) -> dict[str, Any]:
        return {"holds": self.holds, "tolerance": TOLERANCE, **asdict(self)}


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Norm of the difference as a share of the norm of `other`; infinite if there are numbers that are none."""
    found = ((one.double() - other.double()).norm() / other.double().norm()).item()
    return found if math.isfinite(found) else math.inf


@torch.inference_mode()
def compare(ours: WatchedPipeline, reference: WatchedReference, request: GenerationRequest) -> Agreement:
    """Make the same video with both and look at every block."""
    pairs = [
        (ours.latents, reference.latents) for _ in zip(ours.stream(request), reference.stream(request), strict=True)
    ]
    frames: dict[str, float] = {}
    later: float | None = None
    for taehv in (False, True)[: 1 + ours.has_taehv]:
        found = [
            difference(ours.decode(latents, taehv, not block), reference.decode(latents, taehv, not block))
            for block, (latents, _) in enumerate(pairs)
        ]
        exact = TAEHV_EXACT_BLOCKS if taehv else len(found)
        frames["taehv" if taehv else "vae"] = max(found[:exact])
        later = max(found[exact:], default=None)
    return Agreement(
        dtype=dtype_name(pairs[0][0].dtype),
        blocks=len(pairs),
        latents=max(difference(*pair) for pair in pairs),
        frames=frames,
        taehv_later=later,
    )
