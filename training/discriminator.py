"""The GAN's judge: a diffusion network whose features a few learned tokens read.

One register token for each tapped layer looks at that layer's features through cross-attention; a small head turns
what they have read into one number a clip. The network itself is the transformer, initialised from real weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.attention import attention

TIME_SCALE = 10.0
"""By which the time embedding is multiplied beside the tokens, as in the authors' code."""


class RegisterBlock(nn.Module):
    """A learned token that reads features: cross-attention, then a feed-forward layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.token = nn.Parameter(torch.empty(1, 1, width))
        self.norm_features = nn.LayerNorm(width)
        self.query, self.value, self.out = (nn.Linear(width, width) for _ in range(3))
        self.key = nn.Linear(width, width, bias=False)  # softmax would not see it, and Adam would move it by noise
        self.norm_token = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, tokens, C] -> what the token has read, [B, C]."""
        features = self.norm_features(features)
        token = self.token.expand(len(features), -1, -1)
        query, key, value = (
            layer(x).unflatten(2, (self.heads, -1))
            for layer, x in ((self.query, token), (self.key, features), (self.value, features))
        )
        token = token + self.out(attention(query, key, value).flatten(2))
        return (token + self.mlp(self.norm_token(token)))[:, 0]


class DiscriminatorHead(nn.Module):
    """Tokens and head; the network whose features are read is another module, sharded by itself.

    Args:
        width, heads: the network's.
        taps: layers that are read.
        time_embedding: whether the head sees the time embedding, too.
    """

    def __init__(self, width: int, heads: int, taps: Sequence[int], time_embedding: bool = False) -> None:
        super().__init__()
        self.taps = tuple(taps)
        self.time_embedding = time_embedding
        self.registers = nn.ModuleList(RegisterBlock(width, heads) for _ in taps)
        inputs = width * (len(self.taps) + time_embedding)
        self.head = nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, 1))

    def initialise(self, seed: int) -> DiscriminatorHead:
        """Draw fresh weights that depend on the seed alone."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
            else:
                nn.init.ones_(parameter) if name.endswith("weight") else nn.init.zeros_(parameter)
        return self

    def forward(self, features: Sequence[Tensor], time: Tensor) -> Tensor:
        """Features of each tapped layer [B, tokens, C] and the time embedding [B, C] -> logits [B, 1]."""
        read = [register(x) for register, x in zip(self.registers, features, strict=True)]
        if self.time_embedding:
            read.append(TIME_SCALE * time)
        return self.head(torch.cat(read, dim=1))
