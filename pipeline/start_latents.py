"""What a clip starts from, as latents for the KV cache and as the frames that its video begins with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from pipeline.config import ModelSpec
from pipeline.decoder import StreamDecoder, encode_wan, to_uint8
from pipeline.errors import NonFiniteOutput
from pipeline.start import Start


def encode_start(start: Start, vae: AutoencoderKLWan, spec: ModelSpec, tiled: bool = False) -> torch.Tensor:
    """Whole blocks of latents [1, F, C, h, w]; of a picture, one block.

    A picture stands still for a block; for a model with blocks of one frame it just is that frame. (To hold it in
    the first frame of a block that is made, with a timestep of its own, moved no more with the embedded model, and
    the published block-wise weights have never seen unequal timesteps in a block.) The encoder gives the mean of
    its posterior: nothing is drawn, and the same file gives the same latents.

    Args:
        tiled: see `encode_wan`.

    Raises:
        NonFiniteOutput: the encoder made invalid numbers of it.
    """
    frames = torch.tensor(start.frames).permute(0, 3, 1, 2)
    if start.kind == "image":
        frames = frames.expand(spec.frames_in(1), -1, -1, -1)
    latents = encode_wan(vae, frames[None].float().div(255), tiled)
    if not torch.isfinite(latents).all():
        raise NonFiniteOutput("The encoder produced invalid numbers from what the clip starts from.")
    return latents


def decode_start(start: Start, given: Sequence[torch.Tensor], decoder: StreamDecoder) -> list[np.ndarray]:
    """The frames a clip starts from as the decoder shows them, [T, H, W, 3] uint8 each; one of a picture.

    Not those of the file: the decoder's are a little softer, and the next ones follow from them. It has to see them
    anyway, or the next block would begin a clip of its own.
    """
    frames = [to_uint8(decoder.decode(latents), 0) for latents in given]
    return [frames[-1][-1:]] if start.kind == "image" else frames
