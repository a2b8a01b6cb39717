"""The golden tensors kept with the tests, through the same command that checks any others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.parity import check_file
from tests.parity.__main__ import main

GOLDEN = sorted((Path(__file__).parent / "data" / "golden").glob("*.safetensors"))
CHUNKWISE = next(path for path in GOLDEN if path.stem.startswith("case3"))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_case(path: Path) -> None:
    rows = check_file(path)
    assert rows
    assert [row for row in rows if not row.ok] == []


def write_checkpoint(folder: Path, prefix: str, key: str) -> Path:
    """Case 3 and its weights as a checkpoint of the published kind, side by side."""
    with safe_open(CHUNKWISE, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        metadata = file.metadata()
    save_file(tensors, folder / CHUNKWISE.name, metadata=metadata)
    weights = {prefix + name[2:]: value for name, value in tensors.items() if name.startswith("w.")}
    decoy = {name: value + 0.1 for name, value in weights.items()}
    path = folder / "self_forcing_tiny.pt"
    torch.save({"generator": decoy, key: weights} if key != "generator" else {key: weights}, path)
    path.with_suffix(".json").write_text(json.dumps(json.loads(metadata["config"])["model"]))
    return path


@pytest.mark.parametrize(
    ("prefix", "key"),
    [
        ("model.", "generator_ema"),
        ("model._fsdp_wrapped_module.", "generator_ema"),
        ("model._checkpoint_wrapped_module._orig_mod.", "generator"),
    ],
)
def test_published_checkpoint(tmp_path: Path, prefix: str, key: str) -> None:
    rows = check_file(write_checkpoint(tmp_path, prefix, key))
    assert all(row.ok for row in rows)


def test_command_prints_a_line_a_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scheduler = next(path for path in GOLDEN if path.stem.startswith("case1_"))
    assert main([str(scheduler)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1
    assert "case1_scheduler" in printed[0] and printed[0].endswith("pass")


def test_command_fails_on_other_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with safe_open(CHUNKWISE, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        metadata = file.metadata()
    tensors["latents"] = tensors["latents"] + 2e-5
    spoiled = tmp_path / CHUNKWISE.name
    save_file(tensors, spoiled, metadata=metadata)
    assert main([str(spoiled), str(tmp_path / "case99_unknown.safetensors")]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == ["case3_kv_chunkwise", "case99_unknown"]
    assert all("FAIL" in line for line in printed)
