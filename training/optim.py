"""Optimisation for small models on few cores: Muon for matrices, AdamW for the rest, an average of the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration that drives all singular values towards one (K. Jordan's Muon)."""


def orthogonalise(gradients: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Replace each matrix [N, rows, columns] by an approximation of its nearest orthogonal one."""
    a, b, c = NEWTON_SCHULZ
    x = gradients.bfloat16()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).float()


class Muon:
    """Momentum, orthogonalised. Matrices of one shape are stepped together: one batched product instead of dozens.

    torch has a Muon of its own since 2.9; this one also runs on 2.8 and, batched, takes a third of its time here.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], momentum: float = 0.95) -> None:
        self.momentum = momentum
        self._groups: dict[torch.Size, list[nn.Parameter]] = {}
        for matrix in matrices:
            self._groups.setdefault(matrix.shape, []).append(matrix)
        self._velocity = {
            shape: torch.zeros(len(group), *shape, device=group[0].device) for shape, group in self._groups.items()
        }

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for shape, group in self._groups.items():
            gradient = torch.stack([matrix.grad for matrix in group])
            velocity = self._velocity[shape].lerp_(gradient, 1 - self.momentum)
            update = orthogonalise(gradient.lerp(velocity, self.momentum)) * max(1, shape[0] / shape[1]) ** 0.5
            for matrix, change in zip(group, update.unbind(), strict=True):
                matrix.add_(change, alpha=-rate)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {str(tuple(shape)): velocity for shape, velocity in self._velocity.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for shape, velocity in self._velocity.items():
            velocity.copy_(state[str(tuple(shape))])


class WeightAverage:
    """Exponential moving average of parameters, short at first so that early weights do not linger."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.steps = 0
        self.average = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def copy_to(self, parameters: Sequence[nn.Parameter]) -> None:
        for parameter, average in zip(parameters, self.average, strict=True):
            parameter.copy_(average)


class MixedPrecision:
    """A bfloat16 working copy of a float32 model: forward and backward on the copy, steps on the master.

    The authors' network is bfloat16 throughout, so this is its own arithmetic; autocast would convert weights and
    activations back and forth at every layer.
    """

    def __init__(self, master: nn.Module, worker: nn.Module) -> None:
        self.master_parameters = list(master.parameters())
        self.worker_parameters = list(worker.parameters())
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the master's weights into the working copy."""
        torch._foreach_copy_(self.worker_parameters, self.master_parameters)

    @torch.no_grad()
    def reduce_gradients(self, clip: float) -> float:
        """Average the copy's gradients over all processes into the master's, clipped. Returns the unclipped norm."""
        flat = torch.cat(
            [
                (p.grad if p.grad is not None else torch.zeros_like(p)).reshape(-1).float()
                for p in self.worker_parameters
            ]
        )
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
        norm = flat.norm().item()
        flat *= min(1.0, clip / (norm + 1e-6))
        parts = flat.split([p.numel() for p in self.master_parameters])
        for parameter, part in zip(self.master_parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        for parameter in self.worker_parameters:
            parameter.grad = None
        return norm
