"""Golden cases of the decoders: TAEHV (8 and, at the published widths, 8b) and the Wan VAE (11).

Sizes come from the files: any widths, frame counts and latent sizes are checked by the same code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors import safe_open
from torch import Tensor

from pipeline.decoder import StreamDecoder, TaehvStreamDecoder, WanStreamDecoder, encode_wan
from pipeline.taehv import TAEHV
from tests.parity.report import Row, largest_error

__all__ = ["CASES", "check_taehv_formula", "check_taehv_small", "check_wan_vae_small"]

TOLERANCE = 5e-6
ROUNDING = 1e-5
"""Of float32 at the published widths: without AVX-512, sums over 256 channels round by up to 8e-6."""


def check_taehv_small(path: Path) -> list[Row]:
    """Case 8: TAEHV with stored weights, both halves, whole and block by block."""
    config, tensors = _read(path)
    upscale = tuple(config.get("decoder_time_upscale", (False, True, True)))
    return _check_taehv(TAEHV.from_published(_weights(tensors), upscale), tensors)


def check_taehv_formula(path: Path) -> list[Row]:
    """Case 8b: TAEHV whose weights follow from a formula in the metadata."""
    config, tensors = _read(path)
    upscale = tuple(config.get("decoder_time_upscale", (False, True, True)))
    weights = _formula_weights(config["shapes"], config["last_bias_key"])
    rows = _check_taehv(TAEHV.from_published(weights, upscale), tensors, ROUNDING)
    with torch.no_grad():  # in float64 there is no rounding of ours in the error
        raw = TAEHV.from_published(weights, upscale).eval().double().decode_raw(tensors["latents"].double())
    error = largest_error(raw.float(), tensors["raw_untrimmed_unclamped"])
    return [*rows, Row("decode raw in float64", error, TOLERANCE)]


def check_wan_vae_small(path: Path) -> list[Row]:
    """Case 11: the Wan VAE, decoded through the streaming cache in several splits, and encoded."""
    config, tensors = _read(path)
    weights = convert_wan_vae_to_diffusers(_weights(tensors))
    vae = AutoencoderKLWan(
        base_dim=config["dim"],
        z_dim=config["z_dim"],
        dim_mult=config["dim_mult"],
        num_res_blocks=config.get("num_res_blocks", 2),
        latents_mean=tensors["mean"].tolist(),
        latents_std=tensors["std"].tolist(),
    )
    vae.load_state_dict(weights)
    vae.eval()
    expected = tensors["decode_full"].add(1).div(2)
    # The golden frames lie in [-1, 1] and ours in [0, 1]: the error is counted in the golden's units.
    rows = _check_splits(WanStreamDecoder(vae), tensors["latents"], expected, scale=2.0, block=config.get("block"))
    frames = tensors["encode_in"].transpose(1, 2).add(1).div(2)
    encoded = tensors["encode_out"]
    return [*rows, Row("encode", largest_error(encode_wan(vae, frames), encoded), TOLERANCE)]


def _check_taehv(taehv: TAEHV, tensors: dict[str, Tensor], tolerance: float = TOLERANCE) -> list[Row]:
    taehv.eval()
    latents = tensors["latents"]
    rows = []
    with torch.no_grad():
        raw = taehv.decode_raw(latents)
        rows.append(Row("decode raw", largest_error(raw, tensors["raw_untrimmed_unclamped"]), tolerance))
        rows += _check_splits(TaehvStreamDecoder(taehv), latents, tensors["full_trimmed_clamped"], tolerance=tolerance)
        if "encode_in" in tensors:
            encoded = taehv.encode_raw(tensors["encode_in"])
            rows.append(Row("encode", largest_error(encoded, tensors["encode_out"]), tolerance))
    return rows


def _check_splits(
    decoder: StreamDecoder,
    latents: Tensor,
    expected: Tensor,
    scale: float = 1.0,
    block: int | None = None,
    tolerance: float = TOLERANCE,
) -> list[Row]:
    """One row for each way of cutting the clip into blocks; the decoder is reset before each."""
    rows = []
    for name, sizes in _splits(latents.shape[1], block):
        decoder.reset()
        frames = torch.cat([decoder.decode(part) for part in latents.split(sizes, 1)], 1)
        rows.append(Row(f"decode {name}", largest_error(frames, expected) * scale, tolerance))
    return rows


def _splits(count: int, block: int | None) -> Iterator[tuple[str, list[int]]]:
    yield "whole", [count]
    for size in dict.fromkeys([1, 2, block or 3]):
        yield f"by {size}", [min(size, count - start) for start in range(0, count, size)]
    if count > 2:
        yield "1 + rest", [1, count - 1]
        yield "rest + 1", [count - 1, 1]


def _formula_weights(shapes: dict[str, list[int]], raised_bias: str) -> dict[str, Tensor]:
    """Weights of case 8b: a float64 sine of the flat index; tensors are counted in the order of `shapes`."""
    weights = {}
    for position, (key, shape) in enumerate(shapes.items()):
        index = np.arange(math.prod(shape), dtype=np.float64)
        phase = 12.9898 * (index + 1) + 7.1 * position + 0.001 * (index % 997) * (index % 991)
        scale = 0.05 if key.endswith("bias") else 1.6 / math.sqrt(math.prod(shape[1:]))
        weights[key] = torch.from_numpy((scale * np.sin(phase)).astype(np.float32).reshape(shape))
    weights[raised_bias] = weights[raised_bias] + 0.5
    return weights


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """Config and tensors of a golden file."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()["config"]), tensors


def _weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("w."): tensor for key, tensor in tensors.items() if key.startswith("w.")}


CASES: dict[str, Callable[[Path], list[Row]]] = {
    "case8_taehv_small": check_taehv_small,
    "case8b_taehv_fullwidth_formula": check_taehv_formula,
    "case11_wan_vae_small": check_wan_vae_small,
}
