"""Reading published Self-Forcing checkpoints: which entry, which prefixes, which names."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from pipeline.errors import WeightsError
from pipeline.transformer import CausalWanTransformer3DModel

GENERATOR_KEYS = ("generator_ema", "generator", "model")
"""Entries of a training checkpoint that may hold the network, best first."""
WRAPPER_INFIXES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def load_checkpoint(path: str | Path, key: str | None = None) -> dict[str, torch.Tensor]:
    """State dict of the generator in a `.pt` file, with the names of the original Wan layout.

    Args:
        path: a file written by `torch.save`; it is read with `weights_only=True` and nothing in it is executed.
        key: which entry to take; by default the first of `GENERATOR_KEYS` that is there, or the file itself.

    Raises:
        WeightsError: not such a file, or without the entry.
    """
    name = Path(path).name
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise WeightsError(f"{name} is damaged or not a checkpoint of plain tensors, so it was not loaded.") from error
    except OSError as error:
        raise WeightsError(f"{name} cannot be read: {error.strerror}.") from error
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{name} holds a {type(loaded).__name__}, not a dictionary of tensors.")
    if key is None:
        key = next((candidate for candidate in GENERATOR_KEYS if candidate in loaded), None)
    elif key not in loaded:
        raise WeightsError(f"{name} has no entry {key!r}; it has {', '.join(map(str, list(loaded)[:6]))}.")
    state = loaded if key is None else loaded[key]
    if not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise WeightsError(f"{name} does not hold a plain set of tensors under {key!r}.")
    return strip_prefixes(state)


def strip_prefixes(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove what training wrappers leave in parameter names: FSDP, checkpointing and compile infixes, a `model.`."""
    clean = {}
    for name, value in state.items():
        for infix in WRAPPER_INFIXES:
            name = name.replace(infix, "")
        clean[name.removeprefix("model.")] = value
    return clean


def transformer_from_wan(config: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> CausalWanTransformer3DModel:
    """Build the causal transformer from a config and weights in Wan's original naming.

    Args:
        config: as in the published `config.json`: dim, ffn_dim, num_heads, num_layers, text_dim, ...
        state: tensors under their original names, without prefixes.

    Raises:
        WeightsError: missing, left over or wrongly shaped tensors, naming the first of them.
    """
    width, heads = config["dim"], config["num_heads"]
    channels = config.get("in_dim", 16)
    model = CausalWanTransformer3DModel(
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
    load_state(model, convert_wan_transformer_to_diffusers(dict(state)))
    return model.eval()


def load_state(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """`load_state_dict` that is strict about names and shapes and says in one sentence what is wrong."""
    expected = model.state_dict()
    missing = sorted(expected.keys() - state.keys())
    left_over = sorted(state.keys() - expected.keys())
    if missing or left_over:
        parts = [f"{len(missing)} tensors are missing (first: {missing[0]})"] if missing else []
        parts += [f"{len(left_over)} are unknown (first: {left_over[0]})"] if left_over else []
        raise WeightsError(f"The weights do not fit the model: {' and '.join(parts)}.")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise WeightsError(
                f"The weights do not fit the model: {name} has shape {tuple(tensor.shape)}, the config says "
                f"{tuple(expected[name].shape)}."
            )
    model.load_state_dict(state)
