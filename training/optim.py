"""Optimisation: Muon for matrices, an average of the weights, and a network with everything that moves it.

All of it works on whole tensors and on sharded ones (`DTensor`) alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from pipeline.device import has_bfloat16
from pipeline.errors import NonFiniteOutput
from training.parallel import gather_again, local, whole
from training.settings import OptimizerSettings

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration that drives all singular values towards one (K. Jordan's Muon)."""


def orthogonalise(gradients: Tensor, iterations: int = 5) -> Tensor:
    """Replace each matrix [N, rows, columns] by an approximation of its nearest orthogonal one."""
    a, b, c = NEWTON_SCHULZ
    x = gradients.to(torch.bfloat16 if has_bfloat16(gradients.device) else torch.float32)
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).float()


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised. Matrices of one shape are stepped together: one batched product instead of dozens.

    torch has a Muon of its own since 2.9; this one also runs on 2.8, takes a third of its time here, and steps sharded
    matrices, which it gathers for the product.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float = 1e-2, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike[matrix.shape].append(matrix)
            for shape, matrices in alike.items():
                updates = torch.stack([whole(momentum) for momentum in self._momenta(matrices, group["momentum"])])
                updates = orthogonalise(updates) * max(1, shape[0] / shape[1]) ** 0.5
                for matrix, update in zip(matrices, updates.to(matrices[0].dtype).unbind(), strict=True):
                    local(matrix).add_(_like(update, matrix), alpha=-group["lr"])

    def _momenta(self, matrices: Sequence[nn.Parameter], momentum: float) -> list[Tensor]:
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["velocity"] = torch.zeros_like(matrix)
        velocities = [self.state[matrix]["velocity"].lerp_(matrix.grad, 1 - momentum) for matrix in matrices]
        return [matrix.grad.lerp(velocity, momentum) for matrix, velocity in zip(matrices, velocities, strict=True)]


def _like(update: Tensor, matrix: Tensor) -> Tensor:
    """This process's part of an update that every process has whole."""
    if not isinstance(matrix, DTensor) or matrix.device_mesh.size() == 1:
        return update.to(local(matrix).device)
    part = distribute_tensor(update, matrix.device_mesh, matrix.placements, src_data_rank=None).to_local()
    return part.to(local(matrix).device)  # weights that wait in main memory are not where the mesh is


class WeightAverage:
    """Exponential moving average of parameters.

    Args:
        ramp: short at first, so that early weights do not linger; for an average that begins with the first step.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float, *, ramp: bool = True) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.ramp = ramp
        self.steps = 0
        self.average = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps)) if self.ramp else self.decay
        averages, parameters = [local(average) for average in self.average], [local(p) for p in self.parameters]
        torch._foreach_lerp_(averages, parameters, 1 - decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew at the present weights."""
        self.steps = 0
        self.copy_from(self.parameters)

    @torch.no_grad()
    def copy_from(self, parameters: Sequence[Tensor]) -> None:
        for parameter, average in zip(parameters, self.average, strict=True):
            local(average).copy_(local(parameter.detach()))

    @torch.no_grad()
    def copy_to(self, parameters: Sequence[nn.Parameter]) -> None:
        for parameter, average in zip(parameters, self.average, strict=True):
            local(parameter.detach()).copy_(local(average))


def matrices_and_rest(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The blocks' weight matrices, which Muon steps, and everything else."""
    matrices = [
        parameter
        for name, parameter in network.named_parameters()
        if name.startswith("blocks.") and parameter.ndim == 2 and "scale_shift" not in name
    ]
    chosen = {id(parameter) for parameter in matrices}
    return matrices, [parameter for parameter in network.parameters() if id(parameter) not in chosen]


class Trainee:
    """A sharded network that learns, its optimisers and its average.

    Args:
        network: sharded already: optimisers must see the shards.
        settings: how it moves.
        steps: of the whole run, for the schedule.
    """

    def __init__(self, network: nn.Module, settings: OptimizerSettings, steps: int) -> None:
        self.network = network
        self.settings = settings
        self.steps = steps
        self.optimizers: list[torch.optim.Optimizer] = []
        rest = list(network.parameters())
        if settings.kind == "muon":
            matrices, rest = matrices_and_rest(network)
            self.optimizers.append(Muon(matrices, settings.matrix_rate))
        self.optimizers.append(
            torch.optim.AdamW(
                rest, lr=settings.rate, betas=settings.betas, weight_decay=settings.weight_decay, foreach=True
            )
        )
        self._rates = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]
        parameters = list(network.parameters())
        self.average = None
        if settings.average_decay:
            self.average = WeightAverage(parameters, settings.average_decay, ramp=not settings.average_from)
        self._make_optimizer_state()

    def _make_optimizer_state(self) -> None:
        """Moments of zero, before the first step.

        A checkpoint needs them to be there, and torch would make them by a step of its own, which Adam then counts: a
        run that is saved before its first step would go on in another way than one that is not.
        """
        for parameter in self.network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            optimizer.step()
            for state in optimizer.state.values():
                if "step" in state:
                    state["step"].zero_()
        self.forget_gradients()

    def step(self, step: int) -> float:
        """Clip, move the weights by their gradients, and let the average follow. Returns the norm before clipping.

        Raises:
            NonFiniteOutput: the gradient is no number; the weights are untouched.
        """
        settings = self.settings
        for parameter in self.network.parameters():
            if parameter.grad is None:  # what no loss reaches has an optimiser state, too: checkpoints expect one
                parameter.grad = torch.zeros_like(parameter)
        norm = whole(nn.utils.clip_grad_norm_(self.network.parameters(), settings.clip)).item()
        if not norm < float("inf"):
            raise NonFiniteOutput(
                f"The gradient became {norm} in step {step + 1}. Lower the rate, or look at the data."
            )
        scale = settings.scale(step, self.steps)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"] = rate * scale
        for optimizer in self.optimizers:
            optimizer.step()
        self.forget_gradients()
        if self.average is not None:
            if step >= settings.average_from:
                self.average.update()
            else:
                self.average.restart()
        return norm

    def forget_gradients(self) -> None:
        for parameter in self.network.parameters():
            parameter.grad = None

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The network with its averaged weights, inside the `with`."""
        if self.average is None:
            yield self.network
            return
        parameters = self.average.parameters
        kept = [local(parameter.detach()).clone() for parameter in parameters]
        self.average.copy_to(parameters)
        gather_again(self.network)
        try:
            yield self.network
        finally:
            for parameter, values in zip(parameters, kept, strict=True):
                local(parameter.detach()).copy_(values)
            gather_again(self.network)

    def averaged_weights(self) -> dict[str, Tensor]:
        """The whole averaged weights (without an average: the weights), on the CPU. Every process must ask for them."""
        return {name: whole(value.detach()).cpu() for name, value in self._averages().items()}

    def _averages(self) -> dict[str, Tensor]:
        named = dict(self.network.named_parameters())
        return named if self.average is None else dict(zip(named, self.average.average, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Everything a continued run needs, sharded as it is."""
        state: dict[str, Any] = {
            "weights": get_model_state_dict(self.network),
            "optimizer": get_optimizer_state_dict(self.network, self.optimizers),
        }
        if self.average is not None:
            state |= {"average": self._averages(), "average_steps": torch.tensor(self.average.steps)}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_model_state_dict(self.network, state["weights"])
        set_optimizer_state_dict(self.network, self.optimizers, state["optimizer"])
        if self.average is not None:
            self.average.copy_from(list(state["average"].values()))
            self.average.steps = int(state["average_steps"])
