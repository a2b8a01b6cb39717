"""Scaled dot-product attention with the layout of the published code: [batch, tokens, heads, head_dim]."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""query, key, value -> result, in the layout of `attention`; without mask or gradients. See `attention_backends.py`."""


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    kernel: Kernel | None = None,
) -> torch.Tensor:
    """Attend, and return [B, Lq, heads, head_dim].

    Args:
        query: [B, Lq, heads, head_dim].
        key, value: [B, Lk, heads, head_dim].
        mask: boolean [Lq, Lk], true where a query may look; None for everywhere.
        kernel: does it where there is neither mask nor gradient; None: torch's own choice.
    """
    if query.is_meta:
        return torch.empty_like(query)  # what a fused kernel leaves: no scores
    if kernel is not None and mask is None and not query.requires_grad:
        return kernel(query, key, value)
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if query.device.type == "cpu" and query.requires_grad:
        out = _differentiable_on_cpu(query, key, value, mask)
    else:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return out.transpose(1, 2)


def _differentiable_on_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    # The backward pass of torch's fused CPU kernel takes about eight times its forward. At training lengths (a few
    # hundred tokens) two plain matrix products and a softmax are several times faster in sum.
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ value
