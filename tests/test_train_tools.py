"""What measures a training and writes down its results, at sizes of a test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import TrainingError
from training.document import put_into
from training.frechet import frechet_distance

ROOT = Path(__file__).resolve().parent.parent


def test_frechet_distance() -> None:
    rng = np.random.default_rng(0)
    one = rng.standard_normal((20_000, 3))
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(one, one + [3, 0, 0]) == pytest.approx(9, abs=1e-6)
    # N(0, 1) against N(0, 4) in each of three dimensions: (2 - 1)^2 each.
    assert frechet_distance(one, 2 * rng.standard_normal((20_000, 3))) == pytest.approx(3, rel=0.05)


def test_results_go_between_their_marks(tmp_path: Path) -> None:
    begin, end = marks = "<!-- here: begin -->", "<!-- here: end -->"
    document = tmp_path / "results.md"
    document.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    put_into(document, "new\n\nlines", *marks)
    assert document.read_text() == f"before\n{begin}\nnew\n\nlines\n{end}\nafter\n"
    for nowhere in ("no place", f"{end}\n{begin}\n"):
        document.write_text(nowhere)
        with pytest.raises(TrainingError, match="has no place for the results"):
            put_into(document, "new", *marks)
        assert document.read_text() == nowhere


def test_benchmark_at_tiny_sizes() -> None:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 2, "freq_dim": 16}
    sizes |= {"in_channels": 4, "out_channels": 4, "text_dim": 16}
    overrides = [f"{name}.sizes.{key}={value}" for name in ("network", "score.teacher") for key, value in sizes.items()]
    overrides += ["run.device=cpu", "run.precision=float32", "text.length=8", "rollout.height=2", "rollout.width=4"]
    overrides += ["rollout.num_blocks=2", "rollout.window_frames=6"]
    command = [sys.executable, "scripts/bench_training.py", "--steps", "1", *overrides]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["parameters"] == 19832 and result["frames"] == 6
    assert result["seconds"].keys() == {"generator_and_critic", "critic_only"} and result["peak_memory_gib"] > 0
