"""What only a process of its own can show: from its start to the first frame, peak memory, and compiling.

`measure` starts such a process. Run as a program, this file is what runs in it: it says at each event how long its
videos took, one JSON object a line.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.session import PROMPT, SEED, Session
from pipeline.errors import SelfForcingError

ROOT = Path(__file__).resolve().parent.parent
_FIRST, _VIDEO = "first", "video"


def cold(session: Session) -> dict[str, Any]:
    """From the start of a process to the first frame, and the memory it took for a video."""
    events = measure(session, {"blocks": session.scale.clip_blocks})
    return {
        "first_frame": events[_FIRST]["at"],
        "peak_memory": events[_VIDEO]["memory"],
        "peak_gpu_memory": events[_VIDEO]["gpu_memory"],
        "peak_gpu_reserved": events[_VIDEO]["gpu_reserved"],
    }


def compiling(session: Session) -> dict[str, Any]:
    """What compiling costs a process that nobody compiled for before, and one that finds the compiler's files.

    Both make two videos. The second one shows what the first one would have taken without compiling.
    """
    reason = session.pipeline().unavailable_options().get("compile")
    if reason:
        return {"cold": None, "cached": None, "why_null": reason}
    found = {}
    with tempfile.TemporaryDirectory(prefix="compiled-") as cache:
        for name in ("cold", "cached"):
            asked = {"blocks": 3, "compile": True, "videos": 2}
            videos = measure(session, asked, {"TORCHINDUCTOR_CACHE_DIR": cache})["videos"]
            found[name] = max(0.0, videos[0] - videos[1])
    return found


def measure(session: Session, asked: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Start a process that makes videos. Returns its events; `at` is seconds after it was started.

    Args:
        asked: `blocks` of each video; `compile` and `videos`, how many, are optional.
        environment: what it has besides this process's.

    Raises:
        SelfForcingError: it failed.
    """
    order = {"folder": str(Path(session.folder).resolve()), "device": str(session.device), **asked}
    command = [sys.executable, "-m", "benchmarks.fresh", json.dumps(order)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    threads = {"OMP_NUM_THREADS": str(session.threads)}
    began, events = time.perf_counter(), {}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path} | threads | dict(environment or {}),
    ) as process:
        for line in process.stdout:
            event = json.loads(line)
            events[event["event"]] = event | {"at": time.perf_counter() - began}
        said = process.stderr.read()
    if process.returncode or _VIDEO not in events:
        raise SelfForcingError(f"A process of its own failed with code {process.returncode}: {said.strip()[-300:]}")
    return events | {"videos": events[_VIDEO]["videos"]}


def events_of(order: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Load the model and make the videos."""
    import torch

    from pipeline.cli import load_pipeline
    from pipeline.config import GenerationRequest

    pipeline = load_pipeline(Path(order["folder"]), order["device"])
    seconds = pipeline.spec.frames_in(order["blocks"]) / pipeline.spec.fps
    request = GenerationRequest(prompt=PROMPT, seed=SEED, seconds=seconds, compile=order.get("compile", False))
    videos = []
    for _ in range(order.get("videos", 1)):
        for block in pipeline.stream(request):
            if not videos and block.index == 0:
                yield {"event": _FIRST}
        videos.append(block.elapsed)
    gpu = pipeline.device.type == "cuda"
    yield {
        "event": _VIDEO,
        "videos": videos,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "gpu_memory": torch.cuda.max_memory_allocated(pipeline.device) if gpu else None,
        "gpu_reserved": torch.cuda.max_memory_reserved(pipeline.device) if gpu else None,
    }


if __name__ == "__main__":
    for happened in events_of(json.loads(sys.argv[1])):
        sys.stdout.write(json.dumps(happened) + "\n")
        sys.stdout.flush()
