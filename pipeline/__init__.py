"""Streaming text-to-video with Self-Forcing on the Wan2.1 architecture.

Names are imported on first use: a command line that only has to refuse a bad request does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.blocks import FrameBlock, GeneratedVideo, RunInfo, StreamingPipeline
    from pipeline.config import GenerationRequest, ModelSpec
    from pipeline.generator import SelfForcingPipeline
    from pipeline.transformer import CausalWanTransformer3DModel
    from pipeline.worker import ModelWorker

_HOMES = {
    "CausalWanTransformer3DModel": "pipeline.transformer",
    "FrameBlock": "pipeline.blocks",
    "GeneratedVideo": "pipeline.blocks",
    "GenerationRequest": "pipeline.config",
    "ModelSpec": "pipeline.config",
    "ModelWorker": "pipeline.worker",
    "RunInfo": "pipeline.blocks",
    "SelfForcingPipeline": "pipeline.generator",
    "StreamingPipeline": "pipeline.blocks",
}

__all__ = [
    "CausalWanTransformer3DModel",
    "FrameBlock",
    "GeneratedVideo",
    "GenerationRequest",
    "ModelSpec",
    "ModelWorker",
    "RunInfo",
    "SelfForcingPipeline",
    "StreamingPipeline",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
