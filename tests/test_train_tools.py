"""The comparison of the losses and the benchmark, at sizes of a test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import TrainingError
from tests.training_world import make_world, stage_settings
from training import compare
from training.probe import AttributeProbe
from training.settings_file import as_plain
from training.stages import run_stage

ROOT = Path(__file__).resolve().parent.parent


def test_frechet_distance() -> None:
    rng = np.random.default_rng(0)
    one = rng.standard_normal((20_000, 3))
    assert compare.frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    assert compare.frechet_distance(one, one + [3, 0, 0]) == pytest.approx(9, abs=1e-6)
    # N(0, 1) against N(0, 4) in each of three dimensions: (2 - 1)^2 each.
    assert compare.frechet_distance(one, 2 * rng.standard_normal((20_000, 3))) == pytest.approx(3, rel=0.05)


def test_table_says_what_improved(tmp_path: Path) -> None:
    start = dict.fromkeys(compare.ATTRIBUTES, 0.5) | {"distance": 2.0}
    better = dict.fromkeys(compare.ATTRIBUTES, 0.6) | {"distance": 1.0}
    runs = {"dmd": {0: better | {"minutes": 11.5}, 7: better | {"distance": 3.0}}, "sid": {0: start}}
    table = compare.as_table(start, runs, better)
    lines = table.splitlines()
    assert lines[2].startswith("| ODE start |") and lines[4].startswith("| DMD, seed 7 |")
    assert [line.split("|")[-3].strip() for line in lines[3:]] == ["both", "following", "no", ""]
    assert [line.split("|")[-2].strip() for line in lines[3:]] == ["12", "", "", ""]
    assert lines[-1].startswith("| real clips |")
    document = tmp_path / "training.md"
    document.write_text(f"before\n{compare.BEGIN}\nold\n{compare.END}\nafter\n")
    compare.put_into(document, table)
    assert document.read_text() == f"before\n{compare.BEGIN}\n{table}\n{compare.END}\nafter\n"
    document.write_text("no place")
    with pytest.raises(TrainingError, match="has no place for the table"):
        compare.put_into(document, table)


def test_comparison_trains_judges_and_writes_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = make_world(tmp_path / "world")
    AttributeProbe().eval().save(world / "probe")
    run_stage("ode_pairs", stage_settings("ode_pairs", world, world / "pairs", run__steps=1))
    start = tmp_path / "ode"
    run_stage("ode", stage_settings("ode", world, start, run__steps=1))
    configs = tmp_path / "configs"
    configs.mkdir()
    # JSON's lists, numbers and texts are TOML's: one line a setting will do.
    plain = as_plain(stage_settings("sid", world, tmp_path / "unused", run__steps=2, run__batch=2))
    (configs / "embedded_sid.toml").write_text("\n".join(toml_lines(plain)))
    document = tmp_path / "training.md"
    document.write_text(f"{compare.BEGIN}\n{compare.END}\n")
    arguments = ["--start", str(start), "--teacher", str(world), "--data", str(world)]
    arguments += ["--out", str(tmp_path / "out"), "--configs", str(configs)]
    arguments += ["--document", str(document), "--methods", "sid", "--seeds", "3", "--processes", "1"]
    assert compare.main([*arguments, "--prompts", "2", "--steps", "2"]) == 0
    assert "| SiD, seed 3 |" in document.read_text() and "| ODE start |" in document.read_text()
    made = (tmp_path / "out" / "sid-3-2.json").stat().st_mtime_ns
    assert compare.main([*arguments, "--prompts", "2", "--steps", "2"]) == 0  # nothing is done again
    assert (tmp_path / "out" / "sid-3-2.json").stat().st_mtime_ns == made
    assert compare.main([*arguments, "--prompts", "2", "--steps", "3"]) == 2
    assert "run.steps was 2 and is now 3" in capsys.readouterr().err
    settings = json.loads((tmp_path / "out" / "sid-3" / "settings.json").read_text())["settings"]
    assert settings["run"]["seed"] == 3 and settings["network"]["init"] == str(start)


def toml_lines(values: dict, prefix: str = "") -> list[str]:
    lines = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines += toml_lines(value, f"{prefix}{name}.")
        elif value is not None:
            lines.append(f"{prefix}{name} = {json.dumps(value)}")
    return lines


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
