"""The proof for a GPU, on the CPU: the steps run, what fails is told, and the exit code says so. No GPU has run it."""

from __future__ import annotations

import json
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline import float8
from pipeline.device import DeviceFacts
from pipeline.float8 import Float8Form
from pipeline.folder import CLASSES, ModelFolder
from pipeline.memory import builders_of
from scripts import prove_on_gpu
from scripts.prove_on_gpu import Proof, main, write_published, wrongly_applied
from tests.small import SMALL_SETTINGS, write_model_folder

BRIEF = ("--small", "--device", "cpu", "--blocks", "1")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes a minute, and `test_pipeline` does it."""
    monkeypatch.setattr(prove_on_gpu.SelfForcingPipeline, "unavailable_options", lambda self: {"compile": "Not now."})


def test_plans_and_growth_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], no_compiler: None) -> None:
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
    assert lines[-1].startswith("6 rows, 0 failed, 0 not here") and lines[-2].startswith("ok   growth")


def test_attention_and_switches_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], no_compiler: None) -> None:
    report = tmp_path / "proof.json"
    arguments = [*BRIEF, "--work", str(tmp_path / "work"), "--report", str(report)]
    assert main([*arguments, "--parts", "attention,switches"]) == 0
    found = json.loads(report.read_text())["rows"]
    rows = {row["case"]: row["facts"] for row in found}
    absent = {row["case"] for row in found if row["passed"] is None}
    assert {"cudnn", "compile", "fp8+compile"} <= absent and not absent & {"auto", "math", "fp8", "taehv", "none"}
    assert f" 0 failed, {len(absent)} not here" in capsys.readouterr().out.splitlines()[-1]
    assert rows["math"]["attention"] == "plain arithmetic" and "not a CPU" in rows["cudnn"]["not_here"]
    assert rows["none"]["attention"] == "PyTorch's choice"  # the switches begin with what `auto` took
    assert rows["fp8"]["comes_back"] and rows["fp8"]["precision"].startswith("float8") and rows["fp8"]["psnr"] > 0
    assert rows["taehv"]["decoder"] == "TAEHV" and rows["compile"]["not_here"] == "Not now."


def test_a_start_and_an_offloaded_text_encoder_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "proof.json"
    arguments = [*BRIEF, "--work", str(tmp_path / "work"), "--report", str(report)]
    assert main([*arguments, "--parts", "start,offload"]) == 0
    found = json.loads(report.read_text())
    rows = {f"{row['part']} {row['case']}": row["facts"] for row in found["rows"]}
    assert list(rows) == ["start picture", "start picture+taehv", "offload text", "offload text in 8 bits"]
    assert rows["start picture+taehv"]["decoder"] == "TAEHV" and rows["start picture"]["frames"] > 9
    assert rows["offload text"]["text encoder"] == "comes and goes"
    assert "8 bits" in rows["offload text in 8 bits"]["text encoder"]
    assert all(facts["planned_gb"] is not None and facts["peak_gb"] is None for facts in rows.values())
    assert "without a GPU" in found["remark"] and found["remark"] in capsys.readouterr().out


def test_more_memory_than_was_planned_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_compiler: None) -> None:
    proof = Proof(write_model_folder(tmp_path), torch.device("cpu"), 1, 9, None, 10)
    monkeypatch.setattr(prove_on_gpu, "CARDS", (8,))
    for peak, passed in ((100, True), (5 * prove_on_gpu.GB, False)):
        monkeypatch.setattr(proof, "peak", lambda peak=peak: peak)
        proof.rows.clear()
        for prove in (prove_on_gpu.prove_plans, prove_on_gpu.prove_start, prove_on_gpu.prove_offload):
            prove(proof)
        assert len(proof.rows) == 5 and {row.passed for row in proof.rows} == {passed}
        assert passed or all(row.error.startswith("5.0 GB were allocated, 0.0") for row in proof.rows)


def test_kernels_may_take_what_plans_spare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proof = Proof(write_model_folder(tmp_path), torch.device("cpu"), 1, 9, None, 10)
    planned = 20 * prove_on_gpu.GB
    for share, fault, above in ((0.9, False, -2.0), (1.05, False, 1.0), (1.06, True, 1.2)):
        monkeypatch.setattr(proof, "peak", lambda share=share: int(share * planned))
        facts, faults = proof.against_plan(planned)
        assert bool(faults) == fault and facts["peak_less_planned_gb"] == above
    monkeypatch.setattr(proof, "peak", lambda: None)
    assert proof.against_plan(planned)[1] == []


def test_a_gpu_without_a_number_gets_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses to limit the memory of one that has none."""
    devices: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)

    def noted(folder: Path, device: torch.device, *_: object) -> object:
        devices.append(device)
        return types.SimpleNamespace(rows=[], clean=lambda: None, count=lambda _: 0, as_dict=lambda: {"passed": True})

    monkeypatch.setattr(prove_on_gpu, "Proof", noted)
    monkeypatch.setattr(prove_on_gpu, "PARTS", {"nothing": lambda proof: None})
    for name in ("cuda", "cuda:1", "cpu"):
        assert main(["--small", "--device", name, "--work", str(tmp_path / name), "--parts", "nothing"]) == 0
    assert devices == [torch.device("cuda", 2), torch.device("cuda", 1), torch.device("cpu")]
    assert [torch.cuda._utils._get_device_index(device) for device in devices[:2]] == [2, 1]


def test_an_offloaded_text_encoder_that_changes_the_video_or_a_start_without_effect_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proof = Proof(write_model_folder(tmp_path), torch.device("cpu"), 1, 9, None, 10)
    make, load, offloaded = proof.make, proof.load, []
    monkeypatch.setattr(proof, "load", lambda **settings: offloaded.append(settings) or load(**settings))

    def other(pipe: object, start: object = None, **changes: object) -> tuple[object, dict[str, object]]:
        frames, facts = make(pipe, **changes)
        return (255 - frames if offloaded[-1] else frames), facts

    monkeypatch.setattr(proof, "make", other)
    prove_on_gpu.prove_start(proof)
    prove_on_gpu.prove_offload(proof)
    errors = [row.error for row in proof.rows]
    assert errors[0] == "the picture changes nothing"
    assert errors[2] == "the video is another one than with the text encoder on the device"


def test_what_fails_is_told_and_the_rest_goes_on(tmp_path: Path, monkeypatch, capsys) -> None:
    def broken() -> dict[str, object]:
        raise RuntimeError("no kernel image\nis available")

    def cases(proof: Proof) -> None:
        proof.case("one", "breaks", broken)
        proof.case("one", "disagrees", lambda: {"faults": ["It is another."], "psnr": 3})
        proof.case("one", "is elsewhere", lambda: {"not_here": "No such kernel."})
        proof.case("one", "works", lambda: {"psnr": 40})

    monkeypatch.setattr(prove_on_gpu, "PARTS", {"early": lambda proof: broken(), "one": cases})
    report = tmp_path / "proof.json"
    arguments = [*BRIEF, "--work", str(tmp_path / "work"), "--report", str(report), "--parts", "early,one"]
    assert main(arguments) == 1
    rows = json.loads(report.read_text())["rows"]
    assert [row["passed"] for row in rows] == [False, False, False, None, True]
    assert (
        rows[0]["error"].startswith("RuntimeError: no kernel") and rows[1]["error"] == "RuntimeError: no kernel image"
    )
    assert rows[2]["error"] == "It is another." and rows[2]["facts"] == {"psnr": 3}
    assert "5 rows, 3 failed, 1 not here" in capsys.readouterr().out
    monkeypatch.setattr(
        prove_on_gpu, "PARTS", {"one": lambda proof: proof.case("one", "is", lambda: {"not_here": "No."})}
    )
    assert main([*arguments[:-1], "one"]) == 1  # nothing failed, but nothing was proved
    monkeypatch.setattr(prove_on_gpu, "PARTS", {"early": lambda proof: broken(), "one": cases})
    assert main([*arguments, "--minutes", "0"]) == 1
    assert "left out" in json.loads(report.read_text())["rows"][-1]["error"]


def test_memory_that_grows_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_compiler: None) -> None:
    proof = Proof(write_model_folder(tmp_path), torch.device("cpu"), 1, 9, None, 10)
    held = iter([0, 0, 0, 5, 0, 0, 5, 10**9, 0])  # the second kind of run holds more at its third
    monkeypatch.setattr(proof, "held", lambda: next(held))
    prove_on_gpu.prove_growth(proof)
    assert not proof.rows[0].passed and proof.rows[0].facts["largest_growth_bytes"] == 10**9


def test_compiled_runs_are_among_those_whose_memory_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prove_on_gpu.SelfForcingPipeline, "unavailable_options", lambda self: {})
    proof = Proof(write_model_folder(tmp_path), torch.device("cpu"), 1, 9, None, 10)
    made: list[dict[str, object]] = []
    monkeypatch.setattr(proof, "make", lambda pipe, blocks, **changes: made.append(changes))
    prove_on_gpu.prove_growth(proof)
    assert sum(bool(changes.get("compile")) for changes in made) == 3


def test_a_switch_that_is_not_applied_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = DeviceFacts("cuda", (9, 0))
    monkeypatch.setattr(DeviceFacts, "of", lambda device: facts)
    monkeypatch.setattr(float8, "torchao_problem", lambda: None)
    pipe = types.SimpleNamespace(device=torch.device("cuda"), _transformer=types.SimpleNamespace(dtype=torch.bfloat16))
    row_wise = Float8Form(True).precision(torch.bfloat16)
    good = {"precision": row_wise, "decoder": "Wan VAE", "compile": "on"}
    assert wrongly_applied(pipe, ("fp8", "compile"), good) == []
    (fault,) = wrongly_applied(pipe, ("fp8", "compile"), good | {"compile": "the decoder only, because of FP8"})
    assert fault == "compile is 'the decoder only, because of FP8', not 'on'"
    assert len(wrongly_applied(pipe, ("fp8",), good | {"precision": "bfloat16"})) == 2
    stored = {"precision": Float8Form(False).precision(torch.bfloat16), "decoder": "Wan VAE"}
    stored["compile"] = "the decoder only, because of FP8"
    assert len(wrongly_applied(pipe, ("fp8", "compile"), stored)) == 2, "torchao is there and was not used"
    monkeypatch.setattr(float8, "torchao_problem", lambda: "torchao is not installed")
    assert wrongly_applied(pipe, ("fp8", "compile"), stored) == []
    monkeypatch.setattr(float8, "torchao_problem", lambda: None)
    facts = DeviceFacts("cuda", (8, 0))
    assert len(wrongly_applied(pipe, ("fp8", "compile"), good)) == 2


def test_an_attention_that_makes_another_video_or_is_not_called_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proof = Proof(write_model_folder(tmp_path), torch.device("cpu"), 1, 9, None, 10)
    choose = prove_on_gpu.choose_attention

    def wrong(name: str, *arguments: object) -> object:
        choice = choose(name, *arguments)
        if name == "math":
            return replace(choice, kernel=lambda query, key, value: torch.zeros_like(query))
        return choice

    monkeypatch.setattr(prove_on_gpu, "choose_attention", wrong)
    prove_on_gpu.prove_attention(proof)
    rows = {row.case: row for row in proof.rows}
    assert rows["math"].passed is False and "dB" in rows["math"].error
    assert rows["sdpa"].passed and rows["sdpa"].facts["psnr"] is None
    proof.rows.clear()
    # A kernel that is chosen and does not arrive in the model.
    monkeypatch.setattr(type(proof.pipe()._transformer), "use_attention", lambda self, kernel: None)
    prove_on_gpu.prove_attention(proof)
    assert {row.case: row.error for row in proof.rows}["flash"] == "its kernel was never called"


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
        (["--runs", "8", "--device", "cpu"], "at least 9"),
        (["--small"], "no GPU here"),
    ],
)
def test_what_cannot_run_is_refused(arguments: list[str], said: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2 and said in capsys.readouterr().err
