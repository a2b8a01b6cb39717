"""The processes of a training run and how a network is spread over them: torch's own FSDP2, on any number of them.

Started by `torchrun`, the processes find each other; started plainly, there is one, and everything runs the same way
with a group of one. Every network is sharded by itself: block by block, so that one block's weights are whole at a
time, and what remains as a last group.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from pipeline.errors import InvalidSettings, OptionUnavailable
from pipeline.options import missing_for_compile
from training.settings import RunSettings

_COMPUTE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class Processes:
    """This process among its peers."""

    rank: int
    count: int
    device: torch.device
    mesh: DeviceMesh
    compute_dtype: torch.dtype
    """What networks compute in."""
    master_dtype: torch.dtype
    """What trained weights and their optimiser are kept in."""
    cpu_offload: bool
    keep_gathered: bool = False
    """Whether one process alone has every network as one group that stays gathered."""

    @property
    def leads(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def shard(self, module: nn.Module, *, exact: bool = False) -> nn.Module:
        """Spread a network over the processes, on the run's device. Frozen ones keep their dtype.

        Args:
            exact: compute in the dtype of the weights, whatever the run's precision.
        """
        rounded = self.compute_dtype != self.master_dtype and not exact
        policy = MixedPrecisionPolicy(
            param_dtype=self.compute_dtype if rounded else None,
            reduce_dtype=self.master_dtype,
            # Inputs are cast where they should be: timesteps and rotary angles must stay in float32.
            cast_forward_inputs=False,
        )
        offload = CPUOffloadPolicy() if self.cpu_offload else OffloadPolicy()
        options = {
            "mesh": self.mesh,
            "mp_policy": policy,
            "offload_policy": offload,
            "reshard_after_forward": False if self.keep_gathered else None,
        }
        module = module.to(self.device)
        for block in () if self.keep_gathered else getattr(module, "blocks", ()):
            fully_shard(block, **options)
            if hasattr(block, "text_kv"):
                register_fsdp_forward_method(block, "text_kv")
        fully_shard(module, **options)
        if hasattr(module, "encode_text"):
            register_fsdp_forward_method(module, "encode_text")
        return module

    def mean(self, value: Tensor) -> float:
        """The mean of a scalar over all processes."""
        value = value.detach().double().to(self.device)
        dist.all_reduce(value)
        return (value / self.count).item()

    def agreed(self, decision: bool) -> bool:
        """The first process's decision, on all of them."""
        shared = torch.tensor([int(decision)], device=self.device)
        dist.broadcast(shared, 0)
        return bool(shared.item())

    def leaders(self, value: float) -> float:
        """The first process's number, on all of them."""
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(shared, 0)
        return shared.item()

    def barrier(self) -> None:
        self.agreed(True)


@contextmanager
def processes(settings: RunSettings) -> Iterator[Processes]:
    """Join the other processes of this run, and leave them in the end.

    A group that exists already is used and kept: a program may run several stages in it.

    Raises:
        OptionUnavailable: a GPU was asked for and there is none, or there are fewer than processes.
        InvalidSettings: the batch cannot be shared out, weights cannot be kept off a GPU that is not there, or there is
            no compiler for `run.compile`.
    """
    # Raised for every block; nothing here changes what a network returns in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    count = int(os.environ.get("WORLD_SIZE", "1"))
    settings.check_processes(count)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise OptionUnavailable("run.device is 'cuda', but torch finds no GPU on this machine.")
    gpu = torch.cuda.is_available() if settings.device == "auto" else settings.device == "cuda"
    if settings.keep_gathered and (count > 1 or settings.cpu_offload):
        raise InvalidSettings(
            f"run.keep_gathered is true, but that is for one process (here {count}) without run.cpu_offload."
        )
    if settings.cpu_offload and not gpu:
        raise InvalidSettings("run.cpu_offload is true, but there is no GPU whose memory it could spare.")
    missing = missing_for_compile(torch.device("cuda" if gpu else "cpu")) if settings.compile else None
    if missing is not None:
        raise InvalidSettings(f"run.compile needs {missing} on this machine. Install it, or set run.compile=false.")
    if gpu:
        torch.cuda.set_device(own_gpu())
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    joined = dist.is_initialized()
    if joined:
        pass
    elif count == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend)
    leave = count == 1
    try:
        compute = _COMPUTE[settings.precision]
        yield Processes(
            rank=dist.get_rank(),
            count=count,
            device=torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu"),
            mesh=init_device_mesh("cuda" if gpu else "cpu", (count,)),
            compute_dtype=compute,
            master_dtype=torch.float64 if compute == torch.float64 else torch.float32,
            cpu_offload=settings.cpu_offload,
            keep_gathered=settings.keep_gathered,
        )
        leave = True
    finally:
        # After an error of one of several, leaving in good order could wait for peers that are gone, or busy.
        if leave and not joined:
            dist.destroy_process_group()


def own_gpu() -> int:
    """Number of the GPU that is this process's on its machine."""
    index, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    wanted = max(index + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if wanted > found:
        raise OptionUnavailable(
            f"{wanted} processes were started on this machine, but torch finds {found} GPUs: start one for each GPU "
            f"(torchrun --nproc-per-node {found}), or set run.device to 'cpu'."
        )
    return index


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor; in-place changes to it are changes of the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process."""
    if not isinstance(tensor, DTensor):
        return tensor
    # One process has all of it, unless its weights wait in main memory and are to be computed with on the GPU.
    here = tensor.device_mesh.size() == 1 and tensor.to_local().device.type == tensor.device_mesh.device_type
    return tensor.to_local() if here else tensor.full_tensor()


def gather_again(module: nn.Module) -> None:
    """Drop gathered copies of weights, after the weights themselves were changed by hand."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
