"""How well the decoders of a model folder restore real clips that training never saw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from pipeline.decoder import StreamDecoder, TaehvStreamDecoder, WanStreamDecoder, encode_wan
from pipeline.folder import ModelFolder
from training.pca import TEMPORAL_STRIDE, PatchPCA, psnr

Array = np.ndarray
Encoder = Callable[[Array], Array]
"""Frames uint8 [T, H, W, 3] -> latents float [F, C, h, w]."""
Decoder = Callable[[Array], Array]
"""Latents float [F, C, h, w] -> frames float [T, H, W, 3] in 0..1."""

_SAME_SPACE = 0.5
"""Largest relative squared error of a model's own encoder that is taken for an imitation of the principal components;
one of another latent space is off by 1 and more."""


def model_decoders(folder: Path) -> tuple[AutoencoderKLWan, dict[str, Decoder]]:
    """The Wan VAE of a model folder, and its decoders as the pipeline uses them, by `psnr`'s names.

    Raises:
        WeightsError: the folder is no model, or a part of it is damaged.
    """
    source = ModelFolder(folder)
    vae = source.load("vae", torch.float32)
    decoders = {"wan": _whole_clip(WanStreamDecoder(vae))}
    if source.has("taehv"):
        decoders["taehv"] = _whole_clip(TaehvStreamDecoder(source.load("taehv", torch.float32)))
    return vae, decoders


def _whole_clip(decoder: StreamDecoder) -> Decoder:
    @torch.inference_mode()
    def decode(latents: Array) -> Array:
        decoder.reset()
        frames = decoder.decode(torch.from_numpy(np.ascontiguousarray(latents, dtype=np.float32))[None])
        return frames[0].permute(0, 2, 3, 1).float().numpy()

    return decode


def choose_encoder(vae: AutoencoderKLWan, pca: PatchPCA, clip: Array) -> tuple[Encoder, str]:
    """What encodes real clips for a model's decoders, and its name.

    A model of the procedural world decodes principal components, which its own encoder only imitates; any other model
    has nothing but its own encoder.
    """

    def encode(frames: Array) -> Array:
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)[None].float() / 255
        return encode_wan(vae, pixels)[0].float().numpy()

    own = encode(clip)
    fits = pca.mean.size == 3 * TEMPORAL_STRIDE * vae.config.scale_factor_spatial**2 and pca.channels == own.shape[1]
    if fits:
        linear = pca.encode(clip)
        if ((own - linear) ** 2).mean() < _SAME_SPACE * (linear**2).mean():
            return pca.encode, "principal components"
    return encode, "the model's own encoder"


def decoder_psnr(decoders: Mapping[str, Decoder], encode: Encoder, clips: Sequence[Array]) -> dict[str, float]:
    """PSNR in dB of each decoder on the latents of clips, uint8 [T, H, W, 3], over all pixels; the mean over clips."""
    scores: dict[str, list[float]] = {name: [] for name in decoders}
    for frames in clips:
        latents = encode(frames)
        for name, decode in decoders.items():
            scores[name].append(psnr(decode(latents), frames.astype(np.float32) / 255))
    return {name: float(np.mean(values)) for name, values in scores.items()}
