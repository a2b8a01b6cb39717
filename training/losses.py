"""The losses of Self-Forcing as pure functions: tensors in, a scalar or a gradient out, no network and no randomness.

A clip is [B, F, C, h, w], `clean` the generator's clip x, `real` and `fake` the clean estimates of the frozen teacher
and of the critic for the same noised clip. All noise levels come from one `FlowSchedule`: the authors give their score
networks another table than the one that noised the clip, which scales the critic's flow by 0.91 to 1.19.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.sampler import TRAIN_STEPS, shifted_time


def guided(with_text: Tensor, without: Tensor, guidance: float) -> Tensor:
    """c + guidance * (c - u), the authors' form: their 3.0 is 4.0 in the usual u + g * (c - u)."""
    return with_text + guidance * (with_text - without)


def score_timesteps(raw: Tensor, shift: float, low: float, high: float) -> Tensor:
    """Timesteps at which scores are compared: raw 0..999 (any shape), shifted towards noise, clamped to [low, high]."""
    return (shifted_time(raw / TRAIN_STEPS, shift) * TRAIN_STEPS).clamp(low, high)


def dmd_gradient(clean: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Direction in which the clip's likelihood falls (Yin et al. 2024): fake - real, scaled by each clip's own error.

    Where the clip already is what the teacher expects, the scale has no meaning: such entries become zero.
    """
    distance = (clean - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    return torch.nan_to_num((fake - real) / distance, nan=0.0, posinf=0.0, neginf=0.0)


def dmd_loss(clean: Tensor, gradient: Tensor, mask: Tensor | None = None) -> Tensor:
    """A float64 scalar whose gradient with respect to `clean` is `gradient` divided by the number of scored entries.

    Args:
        clean, gradient: [B, F, C, h, w].
        mask: boolean, broadcastable to clean: which entries are scored.
    """
    clean = clean.double()
    target = (clean - gradient.double()).detach()
    return 0.5 * masked_mean((clean - target).pow(2), mask)


def sid_loss(clean: Tensor, real: Tensor, fake: Tensor, alpha: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Score identity distillation (Zhou et al. 2024), float64. Gradients flow through both score networks.

    `alpha` 1 is the form used for video; larger values weigh the term that the plain form leaves out.
    """
    clean, real, fake = clean.double(), real.double(), fake.double()
    distance = (clean - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True).detach()
    product = (real - fake) * ((real - clean) - alpha * (real - fake))
    return masked_mean(torch.nan_to_num(product / distance), mask)


def flow_loss(flow: Tensor, clean: Tensor, noise: Tensor, weight: Tensor | None = None) -> Tensor:
    """Flow matching: mean squared error of the predicted flow against noise - clean.

    Args:
        weight: [B, F] or [B, F, C, h, w], of each entry. Every clip counts the same: weights are relative within a
            clip, so that a batch may be cut into parts without changing the loss.
    """
    error = (flow - (noise - clean)).pow(2)
    return weighted_mean(error, weight)


def clean_loss(predicted: Tensor, clean: Tensor, weight: Tensor | None = None) -> Tensor:
    """ODE regression: mean squared error of the predicted clean clip, weighted as in `flow_loss`."""
    return weighted_mean((predicted - clean).pow(2), weight)


def gan_generator_loss(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """softplus(-D(fake)), or with real clips' logits the relativistic softplus(D(real) - D(fake)). Logits [B, 1]."""
    return F.softplus(-(fake if real is None else fake - real)).mean()


def gan_discriminator_loss(fake: Tensor, real: Tensor, relativistic: bool = False) -> Tensor:
    """softplus(-D(real)) + softplus(D(fake)), or softplus(D(fake) - D(real)). Logits [B, 1]."""
    if relativistic:
        return F.softplus(fake - real).mean()
    return (F.softplus(-real) + F.softplus(fake)).mean()


def finite_difference_penalty(logits: Tensor, nudged: Tensor, scale: float) -> Tensor:
    """R1 (on real clips) or R2 (on fake ones): the squared slope of D towards x + scale * noise.

    A difference instead of a gradient, because double backward through attention kernels does not exist.
    """
    return ((nudged - logits) / scale).pow(2).mean()


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the entries where the mask is true, over all of them without one."""
    if mask is None:
        return values.mean()
    mask = mask.expand_as(values)
    return torch.where(mask, values, torch.zeros_like(values)).sum() / mask.sum()


def weighted_mean(error: Tensor, weight: Tensor | None) -> Tensor:
    """Mean over clips of each clip's weighted mean. error [B, F, C, h, w]; clips of zero weight count as zero."""
    if weight is None:
        return error.mean()
    weight = weight.view(*weight.shape, *[1] * (error.ndim - weight.ndim)).expand_as(error)
    inside = tuple(range(1, error.ndim))
    total = weight.sum(inside)
    return ((error * weight).sum(inside) / total.clamp(min=torch.finfo(total.dtype).tiny)).mean()
