"""Reading published Self-Forcing checkpoints: which entry, which prefixes, which names."""

from __future__ import annotations

import errno
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors import SafetensorError
from safetensors.torch import load_file

from pipeline.errors import WeightsError
from pipeline.transformer import CausalWanTransformer3DModel

GENERATOR_KEYS = ("generator_ema", "generator", "model")
"""Entries of a training checkpoint that may hold the network, best first."""
WRAPPER_INFIXES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
WRAPPER_PREFIXES = ("module.", "model.")


def load_checkpoint(path: str | Path, key: str | None = None, *, strict: bool = True) -> dict[str, torch.Tensor]:
    """State dict of the generator in a `.pt`, `.pth` or `.safetensors` file, with the names of the original Wan layout.

    The tensors are views of the file, which is mapped into memory: what is not looked at takes none.

    Args:
        path: a file written by `torch.save`, read with `weights_only=True` so that nothing in it is executed; or
            safetensors, which hold one network.
        key: which entry to take; by default the first of `GENERATOR_KEYS` that is there, or the file itself.
        strict: whether only that entry will do. Otherwise the default is taken where it is not there.

    Raises:
        WeightsError: not such a file, or without the entry.
    """
    name = Path(path).name
    loaded = load_tensors(path)
    if key is None or not (strict or key in loaded):
        key = next((candidate for candidate in GENERATOR_KEYS if candidate in loaded), None)
    elif key not in loaded:
        raise WeightsError(f"{name} has no entry {key!r}; it has {', '.join(map(str, list(loaded)[:6]))}.")
    state = loaded if key is None else loaded[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise WeightsError(f"{name} does not hold a plain set of tensors under {key!r}.")
    return strip_prefixes(state)


def load_tensors(path: str | Path) -> Mapping[str, Any]:
    """What a file of weights holds, mapped into memory.

    Raises:
        WeightsError: it is damaged or something else.
    """
    name = Path(path).name
    try:
        if name.endswith(".safetensors"):
            return load_file(path)
        # Only the zip archives of newer versions of torch can be mapped.
        loaded = torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, SafetensorError, OSError) as error:
        # A file that is cut off may send its reader to places before its beginning, which is EINVAL.
        if not isinstance(error, OSError) or error.errno in (None, errno.EINVAL):
            raise WeightsError(
                f"{name} is damaged or not a checkpoint of plain tensors, so it was not loaded."
            ) from error
        raise WeightsError(f"{name} cannot be read: {error.strerror}.") from error
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{name} holds a {type(loaded).__name__}, not a dictionary of tensors.")
    return loaded


def strip_prefixes(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove what training wrappers leave in parameter names: FSDP, checkpointing and compile infixes, a `model.`."""
    clean: dict[str, torch.Tensor] = {}
    for full_name, value in state.items():
        name = full_name
        for infix in WRAPPER_INFIXES:
            name = name.replace(infix, "")
        while name.startswith(WRAPPER_PREFIXES):
            name = name.split(".", 1)[1]
        if name in clean:
            raise WeightsError(f"The checkpoint holds {name} twice: once as {full_name}.")
        clean[name] = value
    return clean


def wan_transformer(config: Mapping[str, Any]) -> CausalWanTransformer3DModel:
    """The causal transformer of a config in Wan's original naming, with whatever weights.

    Args:
        config: as in the published `config.json`: dim, ffn_dim, num_heads, num_layers, text_dim, ...

    Raises:
        WeightsError: the config is incomplete or of a model of another kind.
    """
    for name in ("dim", "ffn_dim", "num_heads", "num_layers"):
        if type(config.get(name)) is not int or config[name] < 1:
            raise WeightsError(
                f"The config's {name} is {config.get(name)!r}, but must be a whole number of at least 1."
            )
    width, heads = config["dim"], config["num_heads"]
    if config.get("model_type", "t2v") != "t2v" or width % heads:
        raise WeightsError(
            f"The config is of a model of type {config.get('model_type', 't2v')!r} with width {width} and {heads} "
            "heads; it must be of type 't2v', and its width a multiple of its heads."
        )
    try:
        channels = config.get("in_dim", 16)
        return CausalWanTransformer3DModel(
            patch_size=tuple(config.get("patch_size", (1, 2, 2))),
            num_attention_heads=heads,
            attention_head_dim=width // heads,
            in_channels=channels,
            out_channels=config.get("out_dim", channels),
            text_dim=config.get("text_dim", 4096),
            freq_dim=config.get("freq_dim", 256),
            ffn_dim=config["ffn_dim"],
            num_layers=config["num_layers"],
            cross_attn_norm=config.get("cross_attn_norm", True),
            eps=config.get("eps", 1e-6),
        )
    except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError) as error:
        raise WeightsError(
            "No network can be built of the config: one of its patch_size, in_dim, out_dim, text_dim, freq_dim and eps "
            f"is of no use ({type(error).__name__}). Compare it with the published config.json."
        ) from error


def transformer_from_wan(config: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> CausalWanTransformer3DModel:
    """Build the causal transformer from a config and weights in Wan's original naming.

    Args:
        config: see `wan_transformer`.
        state: tensors under their original names, without prefixes.

    Raises:
        WeightsError: missing, left over or wrongly shaped tensors, naming the first of them.
    """
    model = wan_transformer(config)
    load_state(model, convert_wan_transformer_to_diffusers(dict(state)))
    return model.eval()


def check_state(
    expected: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], what: str = "The weights"
) -> None:
    """Raises `WeightsError` unless names and shapes are the expected ones and every tensor holds real numbers."""
    missing = sorted(expected.keys() - state.keys())
    left_over = sorted(state.keys() - expected.keys())
    if missing or left_over:
        parts = [f"{len(missing)} tensors are missing (first: {missing[0]})"] if missing else []
        parts += [f"{len(left_over)} are unknown (first: {left_over[0]})"] if left_over else []
        raise WeightsError(f"{what} do not fit the model: {' and '.join(parts)}.")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise WeightsError(
                f"{what} do not fit the model: {name} has shape {tuple(tensor.shape)}, the config says "
                f"{tuple(expected[name].shape)}."
            )
        if not tensor.is_floating_point():
            raise WeightsError(f"{what} do not fit the model: {name} is of type {tensor.dtype}, not of real numbers.")


def load_state(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """`load_state_dict` that is strict about names and shapes and says in one sentence what is wrong."""
    check_state(model.state_dict(), state)
    model.load_state_dict(state)
