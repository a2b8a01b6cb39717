"""Streaming text-to-video with Self-Forcing on the Wan2.1 architecture."""

from __future__ import annotations

from pipeline.config import GenerationRequest, ModelSpec

__all__ = ["GenerationRequest", "ModelSpec"]
