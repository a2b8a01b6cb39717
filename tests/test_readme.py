"""README's promises that can be checked by reading it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.config import ATTENTION_NAMES
from pipeline.float8 import INSTALL_TORCHAO, Float8Form

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def test_python_snippet_runs() -> None:
    (snippet,) = [block for block in blocks("python") if "SelfForcingPipeline" in block]
    result = run("-c", snippet)
    assert result.returncode == 0, result.stderr[-2000:]
    lines = result.stdout.splitlines()
    assert lines[0] == "0 (9, 128, 224, 3)" and lines[-1] == "(81, 128, 224, 3) 16.0 7"


def test_example_writes_a_video(tmp_path: Path) -> None:
    # As README's reader starts it: by its path, in whatever folder, without PYTHONPATH.
    example = [sys.executable, str(ROOT / "examples" / "stream.py")]
    result = subprocess.run(example, cwd=tmp_path, env=without_path(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "stream.mp4").stat().st_size > 5000


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.name)
def test_scripts_start_by_their_path(script: Path, tmp_path: Path) -> None:
    help_text = [sys.executable, str(script), "--help"]
    result = subprocess.run(help_text, cwd=tmp_path, env=without_path(), capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "usage" in result.stdout, result.stderr[-2000:]


def without_path() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_parity_command_passes() -> None:
    (command,) = [block for block in blocks("bash") if "tests.parity" in block]
    files = sorted(str(path) for path in ROOT.glob(command.split()[-1]))
    result = run("-m", "tests.parity", *files)
    assert result.returncode == 0, result.stdout
    assert len(result.stdout.splitlines()) == len(files) > 3


def test_ci_runs_exactly_the_test_command() -> None:
    (command,) = [block.strip() for block in blocks("bash") if "pytest" in block]
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == command
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


APP, CLI = ("app.py",), ("-m", "pipeline")
COMPARE, DOCTOR, ENHANCE = (("-m", "pipeline", command) for command in ("compare", "doctor", "enhance"))
WEIGHTS = [("-m", "weights", command) for command in ("download", "convert", "list")]


@pytest.mark.parametrize(
    ("heading", "programs"),
    [
        ("Run it", [APP]),
        ("The page", [APP]),
        ("Starting from a picture or a video", [CLI]),
        ("Published models", [APP, *WEIGHTS]),
        ("Letting others in", [APP]),
        ("The command line", [CLI, COMPARE, ENHANCE]),
        ("Memory", [CLI, DOCTOR]),
        ("FP8 and attention", [CLI, ("scripts/prove_on_gpu.py",)]),
        ("Speed", [("-m", "benchmarks"), ("-m", "benchmarks.gpu")]),
        (r"torch\.compile", [APP]),
    ],
)
def test_documented_options_exist(heading: str, programs: list[tuple[str, ...]]) -> None:
    (section,) = re.findall(rf"^## {heading}\n(.*?)^## ", README, flags=re.DOTALL | re.MULTILINE)
    options = set(re.findall(r"--[a-z][a-z0-9-]+", section)) - {"--index-url"}
    shown = "".join(run(*program, "--help").stdout for program in programs) if options else ""
    assert not [option for option in options if option not in shown]


def test_every_attention_backend_is_listed() -> None:
    (section,) = re.findall(r"^## FP8 and attention\n(.*?)^## ", README, flags=re.DOTALL | re.MULTILINE)
    table = "".join(line.split("|")[1] for line in section.splitlines() if line.startswith("| `"))
    assert [name for name in ATTENTION_NAMES if f"`{name}`" not in table] == []
    assert Float8Form(True).precision(torch.bfloat16) in table and Float8Form(False).precision(torch.bfloat16) in table
    assert INSTALL_TORCHAO in section


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


def test_documented_modules_exist() -> None:
    for module in set(re.findall(r"python -m ([a-z.]+)", README)) - {"pytest"}:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
