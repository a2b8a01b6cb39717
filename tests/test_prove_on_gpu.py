"""The proof for a GPU, on the CPU: the steps run, what fails is told, and the exit code says so. No GPU has run it."""

from __future__ import annotations

import json
import types
from pathlib import Path

import pytest
import torch

from pipeline.folder import CLASSES, ModelFolder
from pipeline.memory import builders_of
from scripts import prove_on_gpu
from scripts.prove_on_gpu import Proof, main, write_published
from tests.small import SMALL_SETTINGS, write_model_folder

BRIEF = ("--small", "--device", "cpu", "--blocks", "1")


def test_plans_and_growth_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "reports" / "proof.json"
    arguments = [*BRIEF, "--work", str(tmp_path / "work"), "--report", str(report), "--runs", "9"]
    assert main([*arguments, "--parts", "plans,growth"]) == 0
    found = json.loads(report.read_text())
    assert found["passed"] and [row["case"] for row in found["rows"]] == [
        *(f"{size} GB" for size in (8, 12, 16, 24, 80)),
        "9 runs",
    ]
    assert len(found["rows"][-1]["facts"]["held_mb"]) == 9
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("6 rows, 0 failed") and lines[-2].startswith("ok   growth")


def test_attention_and_switches_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Compiling takes a minute, and `test_pipeline` does it.
    monkeypatch.setattr(prove_on_gpu.SelfForcingPipeline, "unavailable_options", lambda self: {"compile": "Not now."})
    report = tmp_path / "proof.json"
    arguments = [*BRIEF, "--work", str(tmp_path / "work"), "--report", str(report)]
    assert main([*arguments, "--parts", "attention,switches"]) == 0
    rows = {row["case"]: row["facts"] for row in json.loads(report.read_text())["rows"]}
    assert rows["math"]["attention"] == "plain arithmetic" and "not a CPU" in rows["cudnn"]["not_here"]
    assert rows["none"]["attention"] == "PyTorch's choice"  # the switches begin with what `auto` took
    assert rows["fp8"]["comes_back"] and rows["fp8"]["precision"].startswith("float8") and rows["fp8"]["psnr"] > 0
    assert rows["taehv"]["decoder"] == "TAEHV" and rows["compile"]["not_here"] == "Not now."


def test_what_fails_is_told_and_the_rest_goes_on(tmp_path: Path, monkeypatch, capsys) -> None:
    def broken() -> dict[str, object]:
        raise RuntimeError("no kernel image\nis available")

    def cases(proof: Proof) -> None:
        proof.case("one", "breaks", broken)
        proof.case("one", "disagrees", lambda: {"passed": False, "psnr": 3})
        proof.case("one", "works", lambda: {"psnr": 40})

    monkeypatch.setattr(prove_on_gpu, "PARTS", {"early": lambda proof: broken(), "one": cases})
    report = tmp_path / "proof.json"
    arguments = [*BRIEF, "--work", str(tmp_path / "work"), "--report", str(report), "--parts", "early,one"]
    assert main(arguments) == 1
    rows = json.loads(report.read_text())["rows"]
    assert [row["passed"] for row in rows] == [False, False, False, True]
    assert (
        rows[0]["error"].startswith("RuntimeError: no kernel") and rows[1]["error"] == "RuntimeError: no kernel image"
    )
    assert "4 rows, 3 failed" in capsys.readouterr().out
    assert main([*arguments, "--minutes", "0"]) == 1
    assert "left out" in json.loads(report.read_text())["rows"][-1]["error"]


def test_memory_that_grows_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proof = Proof(write_model_folder(tmp_path), torch.device("cpu"), 1, 9, None, 10)
    held = iter([0, 0, 0, 5, 0, 0, 5, 10**9, 0])  # the second kind of run holds more at its third
    monkeypatch.setattr(proof, "held", lambda: next(held))
    prove_on_gpu.prove_growth(proof)
    assert not proof.rows[0].passed and proof.rows[0].facts["largest_growth_bytes"] == 10**9


def test_a_folder_of_random_weights_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In small: the same way from a manifest's networks to a folder, every part of which is complete."""
    builders = builders_of(write_model_folder(tmp_path / "small"))
    model = types.SimpleNamespace(settings=SMALL_SETTINGS)
    monkeypatch.setattr(prove_on_gpu, "load_manifest", lambda: types.SimpleNamespace(model=lambda name: model))
    monkeypatch.setattr(prove_on_gpu.blueprints, "builders_of", lambda model: builders)
    write_published(tmp_path / "random", "any")
    folder = ModelFolder(tmp_path / "random")
    for part in CLASSES:
        weights = list(folder.load(part, torch.bfloat16).parameters())
        assert weights and all(
            torch.isfinite(weight).all() and weight.std() > 0 for weight in weights if weight.ndim > 1
        )
    assert folder.load_tokenizer()("a red balloon")["input_ids"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--parts", "plans,speed", "--device", "cpu"], "no part 'speed'"),
        (["--runs", "5", "--device", "cpu"], "at least 6"),
        (["--small"], "no GPU here"),
    ],
)
def test_what_cannot_run_is_refused(arguments: list[str], said: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2 and said in capsys.readouterr().err
