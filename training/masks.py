"""Who sees whom when a whole clip is processed at once, as training does: boolean masks by latent frame.

Row i, column j is true where frame i may look at frame j. `frame_mask` turns a mask by frame into one by token.
"""

from __future__ import annotations

import torch


def block_ends(frames: int, block_frames: int, first_frame: bool = False) -> torch.Tensor:
    """For every frame, the first frame after its block: int64 [F]. With `first_frame` blocks are 1, n, n, ..."""
    index = torch.arange(frames)
    alone = 1 if first_frame else 0
    ends = ((index - alone).div(block_frames, rounding_mode="floor") + 1) * block_frames + alone
    return ends.clamp(min=alone, max=frames)


def block_causal(
    frames: int, block_frames: int, *, first_frame: bool = False, window: int | None = None
) -> torch.Tensor:
    """Boolean [F, F]: every frame sees its own block and all blocks before it.

    Args:
        first_frame: the first frame is a block of its own, as for models that go on from an image.
        window: with it, only the last `window` frames up to the end of the own block.
    """
    ends = block_ends(frames, block_frames, first_frame)[:, None]
    seen = torch.arange(frames)[None, :]
    visible = seen < ends
    return visible if window is None else visible & (seen >= ends - window)


def teacher_forcing(frames: int, block_frames: int, *, first_frame: bool = False) -> torch.Tensor:
    """Boolean [2F, 2F] for a clip's clean frames followed by its noisy ones.

    Clean frames are block-causal among themselves; a noisy block sees itself and the clean blocks before it.
    """
    ends = block_ends(frames, block_frames, first_frame)
    before = ends[None, :] < ends[:, None]
    same = ends[None, :] == ends[:, None]
    return torch.cat(
        [torch.cat([before | same, torch.zeros_like(same)], 1), torch.cat([before, same], 1)],
    )


def frame_mask(visible: torch.Tensor, frame_tokens: int) -> torch.Tensor:
    """Expand who-sees-whom by frame, boolean [F, F], to tokens, [F * tokens, F * tokens]."""
    return visible.repeat_interleave(frame_tokens, 0).repeat_interleave(frame_tokens, 1)
