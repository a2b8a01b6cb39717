"""Time and memory of Self-Forcing DMD at given sizes with random weights: `python scripts/bench_training.py`.

Builds generator, critic and frozen teacher at the sizes in a settings file (default: the 1.3B model's), takes a few
steps of both kinds, and prints one JSON object: seconds a step, peak memory, and the options it was measured with.
Prompts are random embeddings; no weights and no data are needed. Runs under torchrun, too.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.errors import SelfForcingError  # noqa: E402
from training.dmd import DMDStage  # noqa: E402
from training.draws import Draws  # noqa: E402
from training.parallel import Processes, processes  # noqa: E402
from training.settings_file import load_settings  # noqa: E402
from training.stage_settings import DMDSettings  # noqa: E402

GIB = 1024**3


class BenchStage(DMDStage):
    """DMD without a text encoder."""

    def load_text(self) -> Any:
        return SimpleNamespace(tokenizer=None)

    def embed(self, prompts: Sequence[str]) -> torch.Tensor:
        shape = (self.settings.text.length, self._text_dim)
        noise = Draws(0, 0, range(len(prompts)), len(prompts)).normal("text", shape, torch.device("cpu"), torch.float32)
        return noise.to(self.processes.device, self.processes.compute_dtype)

    @property
    def _text_dim(self) -> int:
        sizes = self.settings.network.sizes
        if sizes is None:
            raise SystemExit("The benchmark draws its weights: network must have sizes, not init.")
        return sizes.text_dim


def measure(settings: DMDSettings, group: Processes, steps: int) -> dict[str, Any]:
    """Seconds of a step with and without a generator update, after one of each to warm up, and peak memory."""
    stage = BenchStage(settings, group)
    every = settings.generator_every
    if group.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds: dict[str, list[float]] = {"generator_and_critic": [], "critic_only": []}
    for step in [0, 1, *(offset + kind for offset in range(every, (steps + 1) * every, every) for kind in (0, 1))]:
        began = time.perf_counter()
        stage.step(step)
        if group.device.type == "cuda":
            torch.cuda.synchronize()
        if step > 1:
            seconds["critic_only" if step % every else "generator_and_critic"].append(time.perf_counter() - began)
    if group.device.type == "cuda":
        peak, device = torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()
    else:
        peak, device = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "cpu"
    run = settings.run
    return {
        "device": device,
        "processes": group.count,
        "parameters": sum(parameter.numel() for parameter in stage.trainees["generator"].network.parameters()),
        "frames": settings.rollout.frames,
        "latent": [settings.rollout.height, settings.rollout.width],
        "options": {
            "precision": run.precision,
            "batch": run.batch,
            "gradient_checkpointing": run.gradient_checkpointing,
            "cpu_offload": run.cpu_offload,
        },
        "seconds": {kind: round(min(values), 3) for kind, values in seconds.items() if values},
        "peak_memory_gib": round(peak / GIB, 2),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python scripts/bench_training.py", description=__doc__.splitlines()[0])
    parser.add_argument("--settings", type=Path, default=Path("training/configs/wan_dmd_bench.toml"))
    parser.add_argument("--steps", type=int, default=2, help="measured steps of each kind")
    parser.add_argument("override", nargs="*", metavar="section.name=value")
    options = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as out:
            overrides = [f"run.out={json.dumps(out)}", *options.override]
            settings = load_settings(DMDSettings, options.settings, overrides)
            with processes(settings.run) as group:
                result = measure(settings, group, options.steps)
                if group.leads:
                    print(json.dumps(result))
    except SelfForcingError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
