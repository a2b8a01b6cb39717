"""How well a trained autoencoder does on clips it has not seen, decoded block by block as the pipeline
does."""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.codecs import Codec
from training.data import ClipDataset
from training.pca import SPATIAL_STRIDE, TEMPORAL_STRIDE, psnr


@torch.no_grad()
def measure(codec: Codec, data: ClipDataset, clips: Iterable[int], block: int = 3) -> dict[str, float]:
    """Means over clips: PSNR in dB of decoding stored latents (all pixels; the subject's; by the linear
    inverse instead), of encoding and decoding, the squared error of encoded latents, and processor seconds to
    decode a block.
    """
    scores: dict[str, list[float]] = {}
    for clip in clips:
        frames, latents = data.pixels[clip].astype(np.float32) / 255, data.latents[clip].astype(np.float32)
        mask = torch.from_numpy((data.masks[clip] > 0).astype(np.float32))[None]
        mask = F.interpolate(mask, scale_factor=float(SPATIAL_STRIDE)).repeat_interleave(TEMPORAL_STRIDE, 1)
        subject = mask[0, TEMPORAL_STRIDE - 1 :].numpy()
        encoded = codec.encode_clip(torch.from_numpy(frames).permute(0, 3, 1, 2)[None])
        started = time.process_time()
        decoded = decode(codec, torch.from_numpy(latents)[None], block)
        seconds = (time.process_time() - started) * block / len(latents)
        values = {
            "psnr": psnr(decoded, frames),
            "psnr_linear": psnr(data.pca.decode(latents), frames),
            "psnr_round_trip": psnr(decode(codec, encoded, block), frames),
            "latent_mse": float(((encoded[0].numpy() - latents) ** 2).mean()),
            "seconds_per_block": seconds,
        }
        if subject.any():
            values["psnr_subject"] = psnr(decoded, frames, subject)
        for name, value in values.items():
            scores.setdefault(name, []).append(value)
    return {name: round(float(np.mean(values)), 4) for name, values in scores.items()}


@torch.no_grad()
def pictures(codec: Codec, data: ClipDataset, clips: Iterable[int], block: int = 3) -> list[np.ndarray]:
    """For each clip, uint8 [T, 2H, W, 3]: the original above the decoded one."""
    videos = []
    for clip in clips:
        latents = torch.from_numpy(data.latents[clip].astype(np.float32))[None]
        decoded = (decode(codec, latents, block) * 255 + 0.5).astype(np.uint8)
        videos.append(np.concatenate([data.pixels[clip], decoded], 1))
    return videos


def decode(codec: Codec, latents: Tensor, block: int) -> np.ndarray:
    """Latents [1, F, C, h, w] -> frames float [T, H, W, 3] through the streaming decoder."""
    decoder = codec.stream()
    frames = torch.cat([decoder.decode(part) for part in latents.split(block, 1)], 1)
    return frames[0].permute(0, 2, 3, 1).float().numpy()
