"""What only a process of its own can show: from its start to the first frame, peak memory, and compiling.

`measure` starts such a process. Run as a program, this file is what runs in it: it tells what happens, one JSON
object a line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.machine import peak_memory
from benchmarks.session import PROMPT, SEED, Session
from pipeline.errors import SelfForcingError

ROOT = Path(__file__).resolve().parent.parent
_FIRST, _VIDEO, _COMPILED = "first", "video", "compiled"
_COMMAND = (sys.executable, "-m", "benchmarks.fresh")
_TIMEOUT = 900.0
"""Seconds after which such a process is given up: loading and compiling a large model takes minutes."""


class ProcessFailed(SelfForcingError):
    """A process of its own failed, or took too long."""


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

    Both make a video without compiling first, so that loading, encoding the text and whatever else happens only once is
    over. Then they wait for all that is compiled: the short clip that shows what there is to compile, the import of
    the compiler and its work.
    """
    reason = session.pipeline().unavailable_options().get("compile")
    if reason:
        return {"cold": None, "cached": None, "why_null": reason}
    found = {}
    with tempfile.TemporaryDirectory(prefix="compiled-") as cache:
        for name in ("cold", "cached"):
            events = measure(session, {"blocks": 3, "compile": True}, {"TORCHINDUCTOR_CACHE_DIR": cache})
            found[name] = events[_COMPILED]["seconds"]
    return found | {"compilations": events[_COMPILED]["compilations"]}


def measure(
    session: Session,
    asked: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
    timeout: float = _TIMEOUT,
) -> dict[str, Any]:
    """Start a process that makes a video. Returns its events; `at` is seconds after it was started.

    Args:
        asked: `blocks` of the video; `compile`, optional: compile afterwards, as a further event.
        environment: what it has besides this process's.
        timeout: seconds after which it is stopped.

    Raises:
        ProcessFailed: it failed, or took too long.
    """
    order = {"folder": str(Path(session.folder).resolve()), "device": str(session.device), **asked}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    threads = {"OMP_NUM_THREADS": str(session.threads)}
    began, events = time.perf_counter(), {}
    # What it says besides goes to a file: a pipe that nobody empties would hold it up.
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said,
        subprocess.Popen(
            [*_COMMAND, json.dumps(order)],
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            errors="replace",
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path} | threads | dict(environment or {}),
        ) as process,
    ):
        watchdog = threading.Timer(timeout, process.kill)
        watchdog.start()
        try:
            for line in process.stdout:
                if event := _event_in(line):
                    events[event["event"]] = event | {"at": time.perf_counter() - began}
            process.wait()
        finally:  # also when this is interrupted
            late = not watchdog.is_alive()
            watchdog.cancel()
            process.kill()
        said.seek(0)
        told = said.read().strip()[-300:]
    if process.returncode and late:
        raise ProcessFailed(f"A process of its own was not done after {timeout:g} s. {told}".strip())
    expected = {_FIRST, _VIDEO} | ({_COMPILED} if asked.get("compile") else set())
    if process.returncode or expected - events.keys():
        raise ProcessFailed(f"A process of its own failed with code {process.returncode}: {told}")
    return events


def _event_in(line: str) -> dict[str, Any] | None:
    """The event that a line tells; None: it is something else, which a library printed."""
    try:
        event = json.loads(line)
    except json.JSONDecodeError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def events_of(order: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Load the model, make the video, and compile if that is asked for."""
    import torch

    from pipeline.cli import load_pipeline
    from pipeline.config import GenerationRequest

    pipeline = load_pipeline(Path(order["folder"]), order["device"])
    seconds = pipeline.spec.frames_in(order["blocks"]) / pipeline.spec.fps
    request = GenerationRequest(prompt=PROMPT, seed=SEED, seconds=seconds)
    for block in pipeline.stream(request):
        if block.index == 0:
            yield {"event": _FIRST}
    gpu = pipeline.device.type == "cuda"
    yield {
        "event": _VIDEO,
        "memory": peak_memory(),
        "gpu_memory": torch.cuda.max_memory_allocated(pipeline.device) if gpu else None,
        "gpu_reserved": torch.cuda.max_memory_reserved(pipeline.device) if gpu else None,
    }
    if order.get("compile"):
        compiled = replace(request, compile=True)
        began = time.perf_counter()
        pipeline.compiled.complete(compiled, pipeline.stream)
        took = time.perf_counter() - began
        yield {"event": _COMPILED, "seconds": took, "compilations": pipeline.compile_state(compiled).done}


if __name__ == "__main__":
    for happened in events_of(json.loads(sys.argv[1])):
        sys.stdout.write(json.dumps(happened) + "\n")
        sys.stdout.flush()
