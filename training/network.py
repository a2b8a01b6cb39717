"""Networks and the text encoder of a run: from a folder of weights or fresh, and back into a folder."""

from __future__ import annotations

import inspect
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer, UMT5EncoderModel

from pipeline.errors import InvalidSettings, TrainingError, WeightsError
from pipeline.text import TextEncoder
from pipeline.transformer import CausalWanTransformer3DModel
from training.settings import NetworkSettings, NetworkSizes, RolloutSettings, TextSettings, require

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
DEFAULT_PATCH = inspect.signature(CausalWanTransformer3DModel.__init__).parameters["patch_size"].default
"""Frames, rows and columns that the class joins into a token where a config does not say."""


def build_network(sizes: NetworkSizes, seed: int = 0) -> CausalWanTransformer3DModel:
    """A fresh network. Residual branches start small and the output at zero, so that it begins as the identity."""
    torch.manual_seed(seed)
    network = CausalWanTransformer3DModel(**asdict(sizes))
    width, depth = sizes.num_attention_heads * sizes.attention_head_dim, sizes.num_layers
    branch_std = 0.3 / width**0.5 / depth**0.5
    for block in network.blocks:
        nn.init.normal_(block.attn1.to_out[0].weight, std=branch_std)
        nn.init.normal_(block.attn2.to_out[0].weight, std=branch_std)
        nn.init.normal_(block.ffn.net[2].weight, std=branch_std / 2)
    nn.init.normal_(network.condition_embedder.time_proj.weight, std=0.02)
    nn.init.zeros_(network.condition_embedder.time_proj.bias)
    nn.init.zeros_(network.proj_out.weight)
    nn.init.zeros_(network.proj_out.bias)
    return network


def transformer_folder(folder: str) -> Path:
    """The folder itself, or the `transformer/` in it.

    Raises:
        WeightsError: neither holds a transformer.
    """
    for path in (Path(folder) / "transformer", Path(folder)):
        if (path / "config.json").is_file():
            return path
    exists = Path(folder).is_dir()
    found = "it has neither a config.json nor a folder transformer/" if exists else "there is no such folder"
    raise WeightsError(
        f"{folder} holds no transformer: {found}. It is the result of an earlier stage (see docs/training.md) or the "
        "folder of a model."
    )


def load_network(
    settings: NetworkSettings, dtype: torch.dtype = torch.float32, seed: int = 0
) -> CausalWanTransformer3DModel:
    """The network that the settings name, on the CPU.

    Raises:
        WeightsError: there is none, or it is damaged or of another kind.
    """
    if settings.sizes is not None:
        network = build_network(settings.sizes, seed)
        return network if dtype == torch.float32 else network.to(dtype)
    folder = transformer_folder(settings.init)
    try:
        network, report = CausalWanTransformer3DModel.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"The transformer in {folder} is damaged or of another kind: {error}.") from error
    problems = [*report.get("missing_keys", ()), *report.get("unexpected_keys", ())]
    if problems:
        raise WeightsError(f"The transformer in {folder} does not fit its config (first: {problems[0]}).")
    return network


def network_config(settings: NetworkSettings) -> dict[str, Any]:
    """The network's config without loading it, for checks before anything starts."""
    if settings.sizes is not None:
        return asdict(settings.sizes)
    folder = transformer_folder(settings.init)
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"The config.json in {folder} is damaged.") from error


def clip_shape(settings: RolloutSettings, network: NetworkSettings) -> tuple[int, int, int, int]:
    """F, C, h, w of the clips a rollout is scored on.

    Raises:
        InvalidSettings: the network cannot cut their frames into its patches.
    """
    config = network_config(network)
    _, rows, columns = config.get("patch_size", DEFAULT_PATCH)
    for name, size, patch in (("height", settings.height, rows), ("width", settings.width, columns)):
        require(size % patch == 0, f"rollout.{name} is {size}, but must be a multiple of the network's patch, {patch}.")
    return settings.frames, config["in_channels"], settings.height, settings.width


def save_network(config: CausalWanTransformer3DModel, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write a diffusers folder beside its place and move it there whole.

    Args:
        config: a network of this shape; its weights are not looked at.
        weights: by name, whole, on the CPU.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        # A sharded network has a class of torch's making; the file must name the one that loads it.
        plain = json.loads(config.to_json_string()) | {"_class_name": CausalWanTransformer3DModel.__name__}
        (partial / "config.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
        save_file({name: value.contiguous() for name, value in weights.items()}, partial / WEIGHTS_FILE)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise TrainingError(f"The weights could not be written to {folder}: {error}.") from error


def load_text_encoder(settings: TextSettings, device: torch.device | str = "cpu") -> TextEncoder:
    """The frozen text encoder.

    Raises:
        WeightsError: the folder holds none.
    """
    folder = Path(settings.folder)
    for part in ("text_encoder", "tokenizer"):
        if not (folder / part).is_dir():
            raise WeightsError(f"{folder} holds no text encoder: it has no folder {part}/.")
    try:
        model = UMT5EncoderModel.from_pretrained(folder / "text_encoder", use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"The text encoder in {folder} is damaged: {error}.") from error
    return TextEncoder(model.to("cpu" if settings.device == "cpu" else device), tokenizer, settings.length)


def load_vae(folder: str, device: torch.device | str = "cpu") -> AutoencoderKLWan:
    """The Wan VAE in a folder, frozen, in float32.

    Raises:
        WeightsError: the folder holds none.
    """
    try:
        vae = AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"{folder} holds no Wan VAE: {error}.") from error
    return vae.eval().requires_grad_(False).to(device)


def check_vae(name: str, folder: str, channels: int) -> None:
    """Refuse a folder that `load_vae` could not load, without loading it, or one for other latents.

    Args:
        name: of the setting that names the folder.
        channels: the network's.

    Raises:
        InvalidSettings: naming both.
    """
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        kind, found = config["_class_name"], config["z_dim"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidSettings(f"{name} {folder} holds no Wan VAE: it has no config.json of one.") from error
    require(kind == AutoencoderKLWan.__name__, f"{name} {folder} holds no Wan VAE, but a {kind}.")
    require(
        any(Path(folder).glob("*.safetensors")), f"{name} {folder} holds no Wan VAE: it has a config, but no weights."
    )
    require(found == channels, f"{name} {folder} is for latents of {found} channels, but the network has {channels}.")


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """A killed run leaves the last whole checkpoint, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)
