"""What a model needs of a device's memory, found out by rehearsing it on tensors without content.

Every part is built from its config on torch's `meta` device and works there at its real size: a text is encoded, blocks
are denoised and decoded. Nothing is computed and nothing allocated, but each tensor that would be is counted as
long as it lives. So the figures follow the code and the configs, and no size of any model stands here.

Not counted are what libraries take for themselves: kernels' scratch space and the driver's context. `plan.py` leaves
room for those.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import UMT5Config, UMT5EncoderModel

from pipeline.cache import CacheWindow, KVCache
from pipeline.config import ModelSpec
from pipeline.decoder import StreamDecoder, TaehvStreamDecoder, WanStreamDecoder, encode_wan
from pipeline.errors import WeightsError
from pipeline.float8 import goes_row_wise, row_wise_bytes, store_in_8_bits
from pipeline.folder import ModelFolder
from pipeline.stored_layers import FP8_STORAGE
from pipeline.taehv import TAEHV
from pipeline.transformer import CausalWanTransformer3DModel

META = torch.device("meta")
GB = 2**30
"""Unit of memory, as cards have it."""


@dataclass(frozen=True)
class PartNeeds:
    """Bytes of one part.

    Attributes:
        weights: in the model's dtype.
        fp8_weights: with the layers in 8 bits that can be, their scales included; of the two forms of that, in the
            larger one.
        kept: what lives from block to block besides weights: a cache, a stream's memory.
        working: what a call takes at its peak besides weights and what is kept.
        fp8_working: that with weights in 8 bits, in the form that takes more; 0 for parts that have none.
    """

    weights: int
    fp8_weights: int
    kept: int
    working: int
    fp8_working: int = 0


@dataclass(frozen=True)
class ModelNeeds:
    """Bytes of a model's parts."""

    transformer: PartNeeds
    text_encoder: PartNeeds
    decoders: dict[str, PartNeeds]
    """`vae`, and `taehv` where the model has one."""
    kv_buffers: int
    """What of the transformer's `kept` grows with the cache's window; the rest is the prompt's keys and values."""
    encoding_start: int = 0
    """What encoding a picture or video takes at its peak besides weights, for clips that start from one."""
    encoding_start_tiled: int = 0
    """That in tiles."""

    @property
    def largest_part(self) -> int:
        """Weights of the part that takes most while it is loaded: each comes whole into the main memory first."""
        return max(part.weights for part in (self.transformer, self.text_encoder, *self.decoders.values()))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made on a device inside, as long as they live.

    Attributes:
        live: now; peak: the most so far.
    """

    def __init__(self, device: torch.device = META) -> None:
        super().__init__()
        self.device = device
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device == self.device:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: object) -> None:
            self._known.pop(key, None)
            self.live -= size

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


Builders = Mapping[str, Callable[[], nn.Module]]
"""Part of a model -> makes it, on the device that is torch's default then."""


def rehearse(builders: Builders, spec: ModelSpec, dtype: torch.dtype, device: torch.device = META) -> ModelNeeds:
    """What a model needs.

    Args:
        builders: of its transformer, text encoder and decoders.
        spec: its sizes.
        dtype: what it would be loaded in.
        device: another one than `META` does all of it in earnest, which shows whether the rehearsal is right.
    """
    decoders: dict[str, Callable[[Any], StreamDecoder]] = {"vae": WanStreamDecoder, "taehv": TaehvStreamDecoder}

    def part(name: str) -> nn.Module:
        with device:
            return builders[name]().to(dtype).eval()

    with torch.inference_mode():
        transformer = part("transformer")
        shape = (1, spec.frames_per_block, *spec.latent_shape(transformer.config.in_channels))
        return ModelNeeds(
            kv_buffers=_kv_buffers(transformer, spec, shape, dtype),
            transformer=_transformer_needs(
                transformer, lambda model: _denoise(model, spec, shape, dtype), dtype, device
            ),
            text_encoder=_needs(part("text_encoder"), lambda model: _encode(model, spec.text_len), dtype, device),
            decoders={
                name: _needs(part(name), lambda model, make=make: _decode(make(model), shape), dtype, device)
                for name, make in decoders.items()
                if name in builders
            },
            encoding_start=sum(_at_work(part("vae"), lambda vae: _encode_start(vae, spec), device)),
            encoding_start_tiled=sum(_at_work(part("vae"), lambda vae: _encode_tile(vae, spec), device))
            + spec.frames_in(spec.most_start_blocks) * 3 * spec.height * spec.width * dtype.itemsize,
        )


def builders_of(folder: Path) -> Builders:
    """Builders for the model in a folder, from its configs alone.

    Raises:
        WeightsError: a config is missing or cannot be read.
    """
    builders = {
        "transformer": lambda: CausalWanTransformer3DModel.from_config(_config(folder, "transformer")),
        "text_encoder": lambda: UMT5EncoderModel(UMT5Config.from_dict(_config(folder, "text_encoder"))),
        "vae": lambda: AutoencoderKLWan.from_config(_config(folder, "vae")),
    }
    if ModelFolder(folder).has("taehv"):
        builders["taehv"] = lambda: TAEHV.from_config(_config(folder, "taehv"))
    return builders


def _config(folder: Path, part: str) -> dict[str, Any]:
    path = folder / part / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(f"{folder.name} has no {part}/config.json. {ModelFolder(folder).mend}") from error
    except (OSError, ValueError) as error:
        raise WeightsError(f"{part}/config.json of {folder.name} cannot be read. {ModelFolder(folder).mend}") from error


def _bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, those that are shared counted once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def _needs(
    model: nn.Module, work: Callable[[Any], Iterator[None]], dtype: torch.dtype, device: torch.device
) -> PartNeeds:
    """Let a part work, a generator that stops after each call, and count; then once more, stored in 8 bits."""
    weights = _bytes(model)
    kept, working = _at_work(model, work, device)
    store_in_8_bits(model, dtype)
    stored = _bytes(model)
    fp8_working = _at_work(model, work, device)[1] if stored < weights else 0
    return PartNeeds(weights, stored, kept, working, fp8_working)


def _transformer_needs(
    model: CausalWanTransformer3DModel, work: Callable[[Any], Iterator[None]], dtype: torch.dtype, device: torch.device
) -> PartNeeds:
    """The larger figures of both forms of FP8: the device that decides which one it is may not be here."""
    row_wise = row_wise_bytes(model)
    hooks = [layer.register_forward_pre_hook(_round_input) for layer in model.blocks.modules() if goes_row_wise(layer)]
    _, working = _at_work(model, work, device)
    for hook in hooks:
        hook.remove()
    needs = _needs(model, work, dtype, device)
    return replace(needs, fp8_weights=max(needs.fp8_weights, row_wise), fp8_working=max(needs.fp8_working, working))


def _at_work(model: nn.Module, work: Callable[[Any], Iterator[None]], device: torch.device) -> tuple[int, int]:
    """Bytes that are kept from call to call, and those that a call takes besides."""
    with LiveBytes(device) as counted:
        for _ in work(model):
            kept = counted.live
        return kept, counted.peak - kept


def _round_input(_layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    """The tensors that torchao 0.18 makes when it rounds a layer's input without the compiler, all at once."""
    wide = inputs[0].float()
    scaled = wide / 1
    clamped = scaled.clamp(-1, 1)
    rounded = clamped.to(FP8_STORAGE)
    del wide, scaled, clamped, rounded


def _encode(model: UMT5EncoderModel, text_len: int) -> Iterator[None]:
    tokens = torch.zeros(1, text_len, dtype=torch.int64, device=model.device)
    model(input_ids=tokens)
    del tokens
    yield


def _denoise(
    model: CausalWanTransformer3DModel, spec: ModelSpec, shape: tuple[int, ...], dtype: torch.dtype
) -> Iterator[None]:
    """Two blocks, the first one's clean pass merged into the second's first step, as inference does.

    A fuller window takes no more: the cache has all its buffers from the start, and fused attention makes no scores.
    """
    device = model.device
    cache = _make_cache(model, spec, shape, dtype)
    text = model.encode_text(torch.zeros(1, spec.text_len, model.config.text_dim, device=device, dtype=dtype))
    for block in range(2):
        cache.begin_block(spec.frames_per_block, merged=block > 0)
        frames = spec.frames_per_block * (2 if block else 1)
        latents = torch.zeros(shape[0], frames, *shape[2:], device=device, dtype=dtype)
        model(latents, torch.zeros(shape[0], frames, device=device, dtype=torch.float32), text, cache=cache)
        del latents
        yield


def _make_cache(
    model: CausalWanTransformer3DModel, spec: ModelSpec, shape: tuple[int, ...], dtype: torch.dtype
) -> KVCache:
    window = CacheWindow(spec.frames_per_block, spec.window_frames, spec.sink_frames, spec.positions)
    return model.make_cache(window, *shape[-2:], device=model.device, dtype=dtype)


def _kv_buffers(model: CausalWanTransformer3DModel, spec: ModelSpec, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    with LiveBytes(model.device) as counted:
        cache = _make_cache(model, spec, shape, dtype)
        taken = counted.live
        del cache
    return taken


def _encode_start(vae: AutoencoderKLWan, spec: ModelSpec) -> Iterator[None]:
    """The longest start there can be would take no more than two groups of frames do: they are encoded in turn."""
    encode_wan(vae, _two_groups(vae, spec.height, spec.width))
    yield


def _encode_tile(vae: AutoencoderKLWan, spec: ModelSpec) -> Iterator[None]:
    """One tile at a time works, so that no more need be rehearsed. All frames besides are counted by the caller."""
    patch, spatial = vae.config.patch_size or 1, vae.config.scale_factor_spatial
    height, width = (
        min(whole, tile * patch // spatial * spatial)
        for whole, tile in (
            (spec.height, vae.tile_sample_min_height),
            (spec.width, vae.tile_sample_min_width),
        )
    )
    encode_wan(vae, _two_groups(vae, height, width), tiled=True)
    yield


def _two_groups(vae: AutoencoderKLWan, height: int, width: int) -> torch.Tensor:
    """Frames as they are encoded, on the CPU as a start's are, or without content if nothing else has any."""
    frames = 1 + vae.config.scale_factor_temporal
    place = META if vae.device == META else torch.device("cpu")
    return torch.zeros(1, frames, 3, height, width, device=place, dtype=vae.dtype)


def _decode(decoder: StreamDecoder, shape: tuple[int, ...]) -> Iterator[None]:
    """Two blocks: the first of a stream is another one than those that follow."""
    weights = next(decoder.weights.parameters())
    for _ in range(2):
        decoder.decode(torch.zeros(shape, device=weights.device, dtype=weights.dtype))
        yield
