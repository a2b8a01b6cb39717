"""From a model folder to the parts of a pipeline, each where the memory plan wants it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline.attention_backends import AttentionShapes, choose_attention
from pipeline.container import limit_threads
from pipeline.device import chosen_device, default_dtype, taehv_dtype
from pipeline.errors import WeightsError
from pipeline.float8 import store_in_8_bits
from pipeline.folder import ModelFolder
from pipeline.loading import LOADED_SHARE, report_loading
from pipeline.options import TransformerOptions
from pipeline.plan import Placement
from pipeline.text import TextEncoder
from pipeline.wan_layers import speed_up


def load_parts(
    folder: str | Path,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    placement: Placement,
    attention: str,
) -> dict[str, Any]:
    """The arguments of `SelfForcingPipeline` by name. Its `from_pretrained` tells what is taken and raised here."""
    limit_threads()
    target = chosen_device(device)
    dtypes = {"taehv": dtype or taehv_dtype(target)}
    dtype = dtype or default_dtype(target)
    source = ModelFolder(folder)
    spec = placement.fitted(source.spec)

    def load(name: str) -> Any:
        report_loading(f"Loading the {name.replace('_', ' ')}", LOADED_SHARE * source.share_before(name))
        part = source.load(name, dtypes.get(name, dtype))
        if name != "text_encoder":
            return part.to(target)
        if placement.text_fp8:
            store_in_8_bits(part, dtype)
        return part.to(target) if placement.text_encoder == "device" else part

    # In the order of `CLASSES`, so that what is reported only grows.
    transformer = TransformerOptions(lambda: load("transformer"))
    # Before there is anything but weights: what the comparison takes of the device's memory, is free now.
    chosen = choose_attention(attention, AttentionShapes.of(transformer.config, spec), target, dtype)
    visits = target if placement.text_encoder == "offload" else None
    text = TextEncoder(load("text_encoder"), source.load_tokenizer(), spec.text_len, visits=visits)
    vae = load("vae")
    speed_up(vae)
    taehv = load("taehv") if source.has("taehv") else None
    strides = {"vae": (vae.config.scale_factor_spatial, vae.config.scale_factor_temporal)}
    if taehv is not None:
        strides["taehv"] = taehv.spatial_scale, taehv.temporal_scale
    for name, found in strides.items():
        if found != (said := (spec.spatial_stride, spec.temporal_stride)):
            raise WeightsError(
                f"The {name} of {spec.name} makes {found[0]} pixels and {found[1]} frames of a latent cell, but "
                f"model_index.json says spatial_stride {said[0]} and temporal_stride {said[1]}. {source.mend}"
            )
    return {
        "spec": spec,
        "transformer": transformer,
        "text": text,
        "vae": vae,
        "taehv": taehv,
        "enhancer": source.load_enhancer(text.vocabulary),
        "weights_sha256": source.sha256("transformer"),
        "placement": placement,
        "attention": chosen,
    }
