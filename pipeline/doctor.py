"""`python -m pipeline doctor`: what this machine has, what a model needs of it, and what to change."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline import compile_cache, container
from pipeline.cli import (
    EMBEDDED_MODEL,
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    SentenceParser,
    check_device,
    check_device_name,
    say,
)
from pipeline.config import OPTIONS
from pipeline.disk import free_disk
from pipeline.errors import InvalidRequest, OptionUnavailable, WeightsError
from pipeline.process import quiet_libraries

PACKAGES = ("torch", "diffusers", "transformers", "gradio", "huggingface_hub", "imageio-ffmpeg", "torchao", "triton")
OPTIONAL_PACKAGES = {"torchao", "triton"}
GB = 2**30
"""Unit of memory, as cards have it; disks are told in 10^9 bytes, as they are sold."""


@dataclass
class Report:
    """What was found. Sizes are in bytes."""

    python: str
    system: str
    packages: dict[str, str | None]
    kind: str
    """`cpu`, `cuda` or `xpu`. Memory is known and planned for the second alone."""
    device: str
    memory: int | None
    free_memory: int | None
    main_memory: int
    free_main_memory: int
    processors: int
    """All three as far as a container may have them."""
    options: dict[str, str]
    """Option -> `works`, or why it does not."""
    float8: dict[str, Any]
    """What FP8 is here, see `float8.Float8Form`, in a sentence, too."""
    attention: dict[str, Any]
    """`chosen`; `milliseconds` of the backends that were timed; `unusable`: backend -> why."""
    free_disk: int
    compile_cache: str
    """Folder of what torch.compile made, and its size."""
    compile_cache_size: int
    model: str
    needs: dict[str, Any]
    """What each part takes in bfloat16; see `memory.ModelNeeds`."""
    plan: dict[str, Any]
    """In the dtype it is loaded in, for a GPU's free memory where that is known, else without a limit; see
    `plan.MemoryPlan`."""
    cards: dict[str, dict[str, Any]]
    """Size of a card in GB -> the plan for it."""
    advice: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, 1 where packages are missing, or 2 for a model or device that is not there."""
    try:
        options = parse(argv)
        quiet_libraries(verbose=False)
        if lacking := missing_packages({name: _version(name) for name in PACKAGES}):
            say(lacking)
            return EXIT_FAILED
        report = examine(options.model, check_device_name(options.device))
    except (InvalidRequest, OptionUnavailable, WeightsError) as error:
        say(str(error))
        return EXIT_BAD_INPUT
    sys.stdout.write((json.dumps(asdict(report)) if options.json else as_text(report)) + "\n")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = SentenceParser(
        prog="python -m pipeline doctor",
        allow_abbrev=False,
        description="Say what this machine can do, and what to change.",
    )
    parser.add_argument(
        "--model",
        default=str(EMBEDDED_MODEL),
        help="a model folder, or the name of a published model, which need not be here (default: weights/embedded)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one, else cpu)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv)


def examine(model: str, device_name: str | None = None) -> Report:
    """Look at machine and model.

    Raises:
        InvalidRequest: there is no such model.
        OptionUnavailable: there is no such device.
        WeightsError: the model's configs cannot be read.
    """
    check_device(device_name)
    import torch

    from pipeline.device import chosen_device, default_dtype
    from pipeline.float8 import form_on
    from pipeline.memory import rehearse
    from pipeline.plan import CARDS, plan_for, usable, without_losses
    from weights.store import default_home

    device = chosen_device(device_name)
    spec, builders = _find(model)
    needs, dtype = rehearse(builders, spec, torch.bfloat16), default_dtype(device)
    needs_here = needs if dtype == torch.bfloat16 else rehearse(builders, spec, dtype)
    float8 = form_on(device, dtype)
    free, memory = torch.cuda.mem_get_info(device) if device.type == "cuda" else (None, None)
    report = Report(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        packages={name: _version(name) for name in PACKAGES},
        kind=device.type,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        memory=memory,
        free_memory=free,
        main_memory=container.total_memory(),
        free_main_memory=container.free_memory(),
        processors=container.processors(),
        options=_options(device, "taehv" in builders),
        float8=asdict(float8) | {"sentence": float8.sentence()},
        attention=_attention(builders["transformer"], spec, device),
        free_disk=free_disk(default_home()),
        compile_cache=str(compile_cache.folder()),
        compile_cache_size=compile_cache.size(),
        model=spec.name,
        needs=asdict(needs) | {"largest_part": needs.largest_part},
        plan=plan_for(needs_here, spec, None if free is None else without_losses(free)).as_dict(),
        cards={str(size): plan_for(needs, spec, usable(size * GB)).as_dict() for size in CARDS},
    )
    report.advice = advice(report)
    return report


def _find(model: str) -> tuple[Any, Any]:
    """Spec and builders of a model folder or of a model in the manifest."""
    from pipeline import memory
    from pipeline.folder import INDEX_FILE, ModelFolder
    from weights import blueprints
    from weights.manifest import load_manifest

    folder = Path(model)
    if (folder / INDEX_FILE).is_file():
        return ModelFolder(folder).spec, memory.builders_of(folder)
    models = load_manifest().models
    if model not in models:
        raise InvalidRequest(
            f"model is {model!r}, which is neither a model folder nor one of the published models: {', '.join(models)}."
        )
    return models[model].spec, blueprints.builders_of(models[model])


def _options(device: Any, has_taehv: bool) -> dict[str, str]:
    from pipeline.options import unavailable_options

    missing = unavailable_options(device, has_taehv)
    return {name: missing.get(name, "works") for name in OPTIONS}


def _attention(build_transformer: Any, spec: Any, device: Any) -> dict[str, Any]:
    """What would attend; on a GPU all that can are timed, in the model's shapes."""
    import torch

    from pipeline.attention_backends import BACKENDS, AttentionShapes, choose_attention
    from pipeline.device import DeviceFacts, default_dtype

    dtype, facts = default_dtype(device), DeviceFacts.of(device)
    with torch.device("meta"):
        shapes = AttentionShapes.of(build_transformer().config, spec)
    choice = choose_attention("auto", shapes, device, dtype)
    problems = {name: backend.problem(facts, dtype) for name, backend in BACKENDS.items()}
    unusable = {name: why for name, why in problems.items() if why is not None} | choice.unusable
    return {"chosen": choice.name, "title": choice.title, "milliseconds": choice.milliseconds, "unusable": unusable}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing_packages(packages: dict[str, str | None]) -> str | None:
    """What must be installed before anything else can be looked at."""
    missing = [name for name, version in packages.items() if version is None and name not in OPTIONAL_PACKAGES]
    return f"Install {', '.join(missing)}: .venv/bin/pip install -r requirements.txt." if missing else None


def advice(report: Report) -> list[str]:
    """What to change, most important first; empty if nothing need be."""
    said = []
    if not report.plan["fits"]:
        short = report.plan["total"] - report.plan["budget"]
        said.append(
            f"{report.model} lacks {_size(short)} on this device even with everything made small. Close other "
            "programs that use it, or take another device."
        )
    said += [sentence for sentence in report.options.values() if sentence != "works"]
    if "torchao" in report.float8["why"]:
        said.append(f"FP8 stores weights in 8 bits here but does not compute in them: {report.float8['why']}.")
    if report.kind == "cpu" and report.plan["total"] > report.free_main_memory:
        said.append(
            f"{report.model} needs about {_size(report.plan['total'])} of main memory on a CPU, and "
            f"{_size(report.free_main_memory)} of {_size(report.main_memory)} are free: close other programs, take a "
            "machine with a GPU, or the embedded model."
        )
    if report.kind == "cuda" and report.needs["largest_part"] > report.free_main_memory:
        said.append(
            f"{report.model} is loaded through the main memory, a part at a time: "
            f"{_size(report.needs['largest_part'])}, and "
            f"{_size(report.free_main_memory)} are free. Close other programs."
        )
    return said


def as_text(report: Report) -> str:
    """For people."""
    packages = [f"{name} {version or 'not installed'}" for name, version in report.packages.items()]
    memory = (
        "" if report.memory is None else f", {report.memory / GB:.0f} GB, {(report.free_memory or 0) / GB:.1f} free"
    )
    lines = [
        f"Python      {report.python} on {report.system}",
        f"Packages    {', '.join(packages)}",
        f"Device      {report.device}{memory}",
        f"Machine     {report.processors} processors, {_size(report.main_memory)} of main memory, "
        f"{_size(report.free_main_memory)} free",
        *(f"{name:<12}{state}" for name, state in report.options.items()),
        f"FP8 is      {report.float8['sentence'][:1].lower()}{report.float8['sentence'][1:]}",
        f"Attention   {report.attention['title']}{_timings(report.attention['milliseconds'])}",
        *(
            f"            not {name}: {why}"
            for name, why in report.attention["unusable"].items()
            if report.kind != "cpu"
        ),
        f"Free disk   {report.free_disk / 1e9:.0f} GB for published models",
        f"Compiled    {_size(report.compile_cache_size)} in {report.compile_cache}, which may be removed",
        "",
        _on_this_device(report),
        *(f"  {note}" for note in report.plan["notes"]),
        "",
        "On a graphics card, in bfloat16 (computed; nothing was allocated):",
    ]
    for size, plan in report.cards.items():
        lines.append(f"  {size:>3} GB  {_plan_line(plan) if plan['fits'] else 'too small: ' + _plan_line(plan)}")
        lines += [f"          {note}" for note in plan["notes"]]
    lines += ["", *(report.advice or ["Nothing needs to be changed."])]
    return "\n".join(lines)


def _timings(milliseconds: dict[str, float]) -> str:
    times = ", ".join(f"{name} {time:.2f} ms" for name, time in milliseconds.items())
    return f" (a layer takes {times})" if times else ", untimed on this device"


def _on_this_device(report: Report) -> str:
    if report.kind == "cpu":
        total = _size(report.plan["total"])
        return f"{report.model} on a CPU: about {total} of main memory, in float32, everything loaded."
    unknown = "" if report.memory else "; how much memory it has is not known"
    return f"{report.model} on this device: {_plan_line(report.plan)}{unknown}"


def _plan_line(plan: dict[str, Any]) -> str:
    parts = {
        "weights": "weights",
        "kv_cache": "KV cache",
        "text_encoder": "text encoder",
        "decoder": "decoder",
        "workspace": "workspace",
    }
    amounts = [f"{title} {_size(plan[name])}" for name, title in parts.items() if plan[name]]
    return f"{_size(plan['total'])} ({', '.join(amounts)})"


def _size(count: int) -> str:
    return f"{count / GB:.1f} GB" if count >= GB / 10 else f"{count / GB * 1024:.0f} MB"
