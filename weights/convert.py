"""Published weight files to the folders of a pipeline: names, shapes and types checked, then written in pieces.

A network is built on torch's meta device, so it takes no memory; the file is mapped; and of what is written, no more
than one piece exists at a time. A checkpoint of 6 GB passes through less than two.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from pipeline.checkpoint import check_state, load_checkpoint, load_tensors, wan_transformer
from pipeline.errors import WeightsError
from pipeline.taehv import TAEHV
from weights.manifest import Part
from weights.store import partial_of, write_whole
from weights.text_names import umt5_names, unscaled

PIECE_BYTES = 1 << 30
DIFFUSERS_STEM, TRANSFORMERS_STEM = "diffusion_pytorch_model", "model"

Finish = Callable[[str, Tensor], Tensor]
"""(name, tensor of the file) -> the tensor as it is written."""


def convert_part(part: Part, sources: list[Path], folder: Path) -> None:
    """Fill the folder of a part out of its downloaded files.

    Raises:
        WeightsError: the files are damaged or of another kind.
        OSError, SafetensorError: the folder cannot be written; `write_whole` explains them.
    """
    dtype = None if part.dtype is None else getattr(torch, part.dtype)
    config = {} if part.config is None else read_config(part.config)
    if part.kind == "tokenizer":
        for source in sources:
            shutil.copyfile(source, folder / source.name)
    elif part.kind == "transformer":
        # Whoever wrote the manifest may never have opened the file: what it holds is checked name by name all the same.
        write_transformer(sources[0], folder, config, part.key, dtype, strict=False)
    elif part.kind == "text_encoder":
        write_text_encoder(sources[0], folder, config, dtype)
    elif part.kind == "vae":
        write_vae(sources[0], folder, config, dtype)
    else:
        write_taehv(sources[0], folder, config, dtype)


def convert_transformer(
    source: Path, out: Path, config: Path, key: str | None = None, dtype: torch.dtype | None = None
) -> None:
    """Make a transformer folder out of one checkpoint file. `out` appears whole or not at all.

    Args:
        source: `.pt`, `.pth` or `.safetensors`.
        out: must not exist yet.
        config: JSON in the published naming.
        key: entry of the checkpoint; default: the best that is there.
        dtype: of the weights; default: as in the file.
    """
    for place in (out, partial_of(out)):
        if place.exists():  # the second may be a user's, or of a conversion that was killed, or goes on
            raise WeightsError(f"{place.name} exists already. Choose another folder, or remove this one first.")
    settings = read_config(config)
    write_whole(out, lambda folder: write_transformer(source, folder, settings, key, dtype))


def read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"The config {path.name} cannot be read as JSON.") from error
    if not isinstance(config, dict):
        raise WeightsError(f"The config {path.name} holds a {type(config).__name__}, not an object.")
    return config


def write_transformer(
    source: Path,
    folder: Path,
    config: Mapping[str, Any],
    key: str | None,
    dtype: torch.dtype | None,
    *,
    strict: bool = True,
) -> None:
    with torch.device("meta"):
        model = wan_transformer(config)
    tensors = load_checkpoint(source, key, strict=strict)
    if "condition_embedder.time_embedder.linear_1.weight" in tensors:
        raise WeightsError(
            f"{source.name} is in diffusers' layout already. Put it into a folder with its config.json instead."
        )
    state = convert_wan_transformer_to_diffusers(tensors)
    check_state(model.state_dict(), state, f"The weights in {source.name}")
    model.save_config(folder)
    write_weights(state, folder, DIFFUSERS_STEM, dtype)


def write_text_encoder(source: Path, folder: Path, config: Mapping[str, Any], dtype: torch.dtype | None) -> None:
    """From the names of the original Wan layout, or from transformers' own with scaled 8-bit weights."""
    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config(**config))
    state, scales = unscaled(load_tensors(source))
    state = umt5_names(state)
    expected = model.state_dict()
    tied = "encoder.embed_tokens.weight"  # the same tensor as `shared.weight`; a file holds it once
    check_state(
        {name: tensor for name, tensor in expected.items() if name != tied}, state, f"The weights in {source.name}"
    )
    if dtype is not None:
        model.config.dtype = dtype
    model.config.architectures = [UMT5EncoderModel.__name__]
    model.config.save_pretrained(folder)

    def rescaled(name: str, tensor: Tensor) -> Tensor:
        scale = scales.get(name)
        return tensor if scale is None else tensor.float() * scale.float()

    write_weights(state, folder, TRANSFORMERS_STEM, dtype, rescaled)


def write_vae(source: Path, folder: Path, config: Mapping[str, Any], dtype: torch.dtype | None) -> None:
    with torch.device("meta"):
        model = AutoencoderKLWan.from_config(dict(config))
    state = convert_wan_vae_to_diffusers(dict(load_tensors(source)))
    check_state(model.state_dict(), state, f"The weights in {source.name}")
    model.save_config(folder)
    write_weights(state, folder, DIFFUSERS_STEM, dtype)


def write_taehv(source: Path, folder: Path, config: Mapping[str, Any], dtype: torch.dtype | None) -> None:
    model = TAEHV.from_published(dict(load_tensors(source)), **config)
    model.save_config(folder)
    write_weights(model.state_dict(), folder, DIFFUSERS_STEM, dtype)


def write_weights(
    state: Mapping[str, Tensor],
    folder: Path,
    stem: str,
    dtype: torch.dtype | None,
    finish: Finish = lambda name, tensor: tensor,
    piece_bytes: int = PIECE_BYTES,
) -> None:
    """Write tensors as one safetensors file, or several with an index, in the layout of the Hugging Face libraries."""
    planned = {
        name: torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device="meta") for name, tensor in state.items()
    }
    pieces = split_torch_state_dict_into_shards(
        planned, filename_pattern=f"{stem}{{suffix}}.safetensors", max_shard_size=piece_bytes
    )
    for file, names in pieces.filename_to_tensors.items():
        piece = {name: finish(name, state[name]).to(planned[name].dtype).contiguous() for name in names}
        if bad := next((name for name, tensor in piece.items() if not _is_finite(tensor)), None):
            raise WeightsError(f"{bad} holds invalid numbers (NaN or infinity), so the checkpoint cannot be used.")
        save_file(piece, folder / file, metadata={"format": "pt"})
        del piece  # or the next one would be made beside it
    if pieces.is_sharded:
        index = {"metadata": pieces.metadata, "weight_map": pieces.tensor_to_filename}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def _is_finite(tensor: Tensor) -> bool:
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # 8-bit types do not know the question
    return bool(torch.isfinite(wide).all())
