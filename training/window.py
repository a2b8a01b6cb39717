"""What of a rollout is scored: a window of fixed length, the frames of it that count, and the prompt they follow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from pipeline.decoder import WanStreamDecoder, encode_wan
from training.rollout import RolloutPlan
from training.settings import RolloutSettings


@dataclass
class Scored:
    """Clips as the losses see them."""

    clips: Tensor
    """[B, F, C, h, w]"""
    counted: Tensor
    """Boolean [F]: the frames a loss is taken on."""
    embeds: Tensor
    """Of the prompt that the counted frames follow, [B, text_len, text_dim]."""

    @property
    def mask(self) -> Tensor | None:
        """Boolean, broadcastable to clips; None if all frames count."""
        return None if bool(self.counted.all()) else self.counted.to(self.clips.device)[:, None, None, None]

    @property
    def weight(self) -> Tensor | None:
        """The same as weights [B, F]."""
        if self.mask is None:
            return None
        return self.counted.to(self.clips).expand(len(self.clips), -1)

    def detached(self) -> Scored:
        return Scored(self.clips.detach(), self.counted, self.embeds)


def scored_window(
    latents: Tensor,
    plan: RolloutPlan,
    settings: RolloutSettings,
    prompts: list[Tensor],
    vae: AutoencoderKLWan | None = None,
) -> Scored:
    """Cut the window out of a rollout [B, F_total, C, h, w].

    A clip longer than the window has lost its beginning, and a score network that was trained on whole clips expects
    one: either the window's first frame is made one, by re-encoding it as a single picture, or the window begins with
    the sink. Neither of these counts. After a prompt switch only what follows the new prompt counts.
    """
    total, frames = latents.shape[1], settings.frames
    counted = torch.ones(frames, dtype=torch.bool)
    numbers = torch.arange(total - frames, total)
    window = latents[:, total - frames :]
    if total > frames and settings.long_window == "reencoded":
        if vae is None:
            raise ValueError("a window that begins with a re-encoded picture needs the VAE")
        first = reencoded(vae, latents[:, : total - frames + 1])
        window = torch.cat([first.to(window), window[:, 1:]], dim=1)
        counted[: settings.block_frames] = False
    elif total > frames:
        sink = settings.sink_frames
        window = torch.cat([latents[:, :sink], window[:, sink:]], dim=1)
        counted[:sink] = False
    embeds = prompts[0]
    if plan.switch_block is not None:
        embeds = prompts[1]
        counted &= numbers >= plan.switch_block * settings.block_frames
    return Scored(window, counted, embeds)


@torch.no_grad()
def reencoded(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """The last picture of latents [B, F, C, h, w], encoded as a clip's first frame: [B, 1, C, h, w]."""
    pictures = WanStreamDecoder(vae).decode(latents.detach().to(vae.device, vae.dtype))[:, -1:]
    return encode_wan(vae, pictures)
