"""Where the parts of a model go, and whether it has room at all, asked before anything of it is loaded.

On an NVIDIA GPU there is a plan, see `plan.py`. On a CPU nothing is made smaller, so a model fits in the main memory or
does not; the system would end the whole program in the middle of loading, without a word.
"""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from pipeline import container
from pipeline.device import chosen_device, default_dtype
from pipeline.errors import OptionUnavailable
from pipeline.file_hashes import weight_bytes
from pipeline.folder import ModelFolder
from pipeline.loading import report_loading
from pipeline.memory import GB, builders_of, rehearse
from pipeline.plan import AS_THE_MODEL_HAS_IT, MemoryPlan, Placement, evaluated, plan_for, usable, without_losses

SMALL_SHARE = 0.05
"""A model whose files are a smaller share of the free memory is not rehearsed, which takes seconds. In float32 the
weights are twice as large; the published 1.3B with all it works with, three and a half times."""


def placement_for(folder: Path, device: str | None, memory: str) -> Placement:
    """Where the parts of the model in a folder should be.

    Args:
        device: None takes the GPU if there is one.
        memory: `auto`: by what is free; a number: as if the GPU had so many GB; `off`: all is on the device, room
            or not.

    Raises:
        OptionUnavailable: the model does not fit, however small it is made, or not in the main memory, through which it
            comes to a GPU, too; or a number for what is no NVIDIA GPU.
        WeightsError: the folder's configs cannot be read.
    """
    target = chosen_device(device)
    if target.type != "cuda" and memory not in ("auto", "off"):
        raise OptionUnavailable(
            f"--memory {memory} plans the memory of an NVIDIA GPU, but the device is {target.type}, where there is "
            "nothing to plan. Leave it out."
        )
    if target.type == "cpu" and memory == "auto":
        check_main_memory(folder)
    if target.type != "cuda" or memory == "off":
        return AS_THE_MODEL_HAS_IT
    # What is free is told after the driver has taken its share.
    budget = without_losses(torch.cuda.mem_get_info(target)[0]) if memory == "auto" else usable(float(memory) * GB)
    return _gpu_plan(folder, target, budget, container.free_memory()).placement


def _gpu_plan(folder: Path, target: torch.device, budget: int, main_memory: int) -> MemoryPlan:
    """The plan for so many bytes of a GPU, and so many of the main memory, through which all parts come.

    Raises:
        OptionUnavailable: one of them is too small.
    """
    report_loading("Planning the memory", 0.0)
    spec = ModelFolder(folder).spec
    needs = rehearse(builders_of(folder), spec, default_dtype(target))
    plan = plan_for(needs, spec, budget)
    if not plan.fits:
        raise OptionUnavailable(
            f"{spec.name} needs {plan.total / GB:.1f} GB of GPU memory even with everything made small, and "
            f"{budget / GB:.1f} GB can be used. Close other programs that use the GPU, choose another device, or try "
            "all the same with --memory off."
        )
    if needs.largest_part > main_memory:
        raise OptionUnavailable(
            f"{spec.name} is loaded through the main memory, a part at a time: {needs.largest_part / GB:.1f} GB, and "
            f"{main_memory / GB:.1f} GB are free. Close other programs, or try all the same with --memory off."
        )
    return plan


def check_main_memory(folder: Path, freed: int = 0) -> None:
    """Refuse a model that takes more main memory than is free.

    Args:
        folder: of the model.
        freed: bytes that will be free besides once it is loaded.

    Raises:
        OptionUnavailable: with both numbers, and what to do.
        WeightsError: the folder's configs cannot be read.
    """
    free = container.free_memory() + freed
    if sum(map(weight_bytes, folder.glob("*"))) <= SMALL_SHARE * free:
        return
    report_loading("Planning the memory", 0.0)
    spec, dtype = ModelFolder(folder).spec, default_dtype(torch.device("cpu"))
    needed = evaluated(rehearse(builders_of(folder), spec, dtype), spec, AS_THE_MODEL_HAS_IT).total
    if needed > free:
        raise OptionUnavailable(
            f"{spec.name} needs about {needed / GB:.1f} GB of main memory on a CPU, where it works in float32, and "
            f"{free / GB:.1f} GB are free. Close other programs, take a machine with a GPU or the embedded model, or "
            "try all the same with --memory off."
        )


def check_exchange(folder: Path, device: str | None, memory: str) -> None:
    """Refuse a model that has no room, while another one is still loaded, whose memory this one will have.

    All that this process holds counts as that model's, a language model included, and on a GPU all that anybody holds:
    where only that makes the difference, the refusal comes after the old model has gone, and it is loaded again.

    Args:
        device, memory: as `placement_for` has them; nothing is asked with memory `off`.

    Raises:
        OptionUnavailable, WeightsError: as `placement_for`.
    """
    target = chosen_device(device)
    if memory == "off" or target.type not in ("cpu", "cuda"):
        return
    held = psutil.Process().memory_info()
    # What is shared, mapped files above all, is in part told to be free already.
    freed = held.rss - getattr(held, "shared", 0)
    if target.type == "cpu":
        check_main_memory(folder, freed)
    else:
        size = torch.cuda.mem_get_info(target)[1] if memory == "auto" else float(memory) * GB
        _gpu_plan(folder, target, usable(size), container.free_memory() + freed)
