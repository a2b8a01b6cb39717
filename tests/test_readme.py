"""Promises of README and of the pages in docs that can be checked by reading them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image

from pipeline.config import ATTENTION_NAMES
from pipeline.float8 import INSTALL_TORCHAO, Float8Form

ROOT = Path(__file__).resolve().parent.parent
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "weights" / "embedded" / "README.md"]
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in FILES}
README = PAGES["README.md"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def section(page: str, heading: str) -> str:
    """What stands under a heading of the second level."""
    pattern = rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)"
    (text,) = re.findall(pattern, PAGES[page], flags=re.DOTALL | re.MULTILINE)
    return text


def anchors(page: str) -> set[str]:
    """Names by which GitHub links to a page's headings."""
    prose = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def test_python_snippets_run(tmp_path: Path) -> None:
    snippet, goes_on = [block for block in blocks("python") if "pipeline" in block]
    (tmp_path / "weights").symlink_to(ROOT / "weights")  # as in the repository's folder, but the video goes elsewhere
    Image.new("RGB", (320, 180), "orange").save(tmp_path / "a.png")
    result = run("-c", snippet + goes_on, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    lines = result.stdout.splitlines()
    assert lines[0] == "0 (9, 128, 224, 3)" and lines[-2] == "(81, 128, 224, 3) 16.0 7"
    assert lines[-1] == "(69, 128, 224, 3)"  # 33 to start from, and two seconds in whole blocks of 12
    assert (tmp_path / "balloon.mp4").stat().st_size > 5000


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
CONVERT, DOWNLOAD, LIST = (("-m", "weights", command) for command in ("convert", "download", "list"))
EVALUATE, VIDEOS = ("-m", "training.evaluate"), ("-m", "training.videos")
TRAINING = [("-m", f"training.{module}") for module in ("data", "text", "decoders", "probe", "export")]
OPTION = r"--[a-z][a-z0-9-]+"
OTHERS = {"--index-url", "--nproc-per-node", "--logdir"}
"""Options of pip, torchrun and tensorboard."""


@cache
def offered(program: tuple[str, ...]) -> set[str]:
    """Options that a program's help names."""
    return set(re.findall(OPTION, run(*program, "--help").stdout))


@pytest.mark.parametrize(
    ("page", "heading", "programs"),
    [
        ("README.md", "The page", [APP]),
        ("README.md", "Starting from a picture or a video", [CLI]),
        ("README.md", "The command line", [CLI, COMPARE, ENHANCE]),
        ("README.md", "From other programs", [APP]),
        ("README.md", "Published models", [APP, LIST]),
        ("README.md", "On a GPU", [CLI, DOCTOR]),
        ("README.md", "Letting others in", [APP]),
        ("README.md", "Speed", [("-m", "benchmarks"), ("-m", "benchmarks.gpu")]),
        ("docs/gpu.md", "Memory", [CLI, DOCTOR]),
        ("docs/gpu.md", "FP8 and attention", [CLI]),
        ("docs/gpu.md", "torch.compile", [APP]),
        ("docs/gpu.md", "Prove it on yours", [("scripts/prove_on_gpu.py",)]),
        ("docs/models.md", "Published models", [DOWNLOAD]),
        ("docs/models.md", "Your own checkpoint", [CONVERT]),
        ("docs/models.md", "A language model for prompts", [APP, ENHANCE]),
        ("docs/serving.md", "Who may reach it", [APP]),
        ("docs/serving.md", "What a visitor may ask", [APP]),
        ("docs/training.md", "The embedded model, from nothing", [APP, EVALUATE, *TRAINING]),
        ("docs/training.md", "Scoring a model", [EVALUATE]),
        ("docs/training.md", "Your own videos", [VIDEOS]),
    ],
)
def test_documented_options_exist(page: str, heading: str, programs: list[tuple[str, ...]]) -> None:
    options = set(re.findall(OPTION, section(page, heading))) - OTHERS
    assert options and options <= set[str]().union(*map(offered, programs))


@pytest.mark.parametrize(("heading", "program"), [("The page", APP), ("The command line", CLI)])
def test_tables_name_every_option(heading: str, program: tuple[str, ...]) -> None:
    rows = [line.split("|")[1] for line in section("README.md", heading).splitlines() if line.startswith("| `--")]
    assert set(re.findall(OPTION, "".join(rows))) == offered(program) - {"--help"}


def test_every_attention_backend_is_listed() -> None:
    text = section("docs/gpu.md", "FP8 and attention")
    table = "".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))
    assert [name for name in ATTENTION_NAMES if f"`{name}`" not in table] == []
    assert Float8Form(True).precision(torch.bfloat16) in table and Float8Form(False).precision(torch.bfloat16) in table
    assert INSTALL_TORCHAO in text


LINKS = {(page, target) for page, text in PAGES.items() for target in re.findall(r"\]\((?!http)([^)]+)\)", text)}


@pytest.mark.parametrize(("page", "target"), sorted(LINKS))
def test_links_lead_somewhere(page: str, target: str) -> None:
    path, _, anchor = target.partition("#")
    found = (ROOT / page).parent / path if path else ROOT / page
    assert found.exists()
    assert not anchor or anchor in anchors(str(found.resolve().relative_to(ROOT)))


@pytest.mark.parametrize("page", PAGES)
def test_documented_modules_exist(page: str) -> None:
    for module in set(re.findall(r"python -m ([a-z_.]+)", PAGES[page])) - {"pytest", "venv"}:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
