"""The ablation, at sizes of a test."""

from __future__ import annotations

import json
import math
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import SelfForcingPipeline
from tests.training_world import SIZES, make_world, stage_settings, toml_lines
from training import ablation, ablation_budget
from training.ablation_methods import METHODS, changes, described
from training.ablation_report import BEGIN, END, as_table, verdicts, write_report
from training.ablation_scores import Seen, make_template, model_folder, summary, windows_at
from training.asked import plan_prompts
from training.curves import COLOURS, Panel, draw
from training.filming import film_together, make_videos
from training.judge import save_judge
from training.pca import PatchPCA
from training.probe import READ, AttributeProbe
from training.settings_file import as_plain
from training.stages import run_stage
from training.world import ATTRIBUTES


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, ODE pairs, an ODE start and the settings files, all tiny."""
    place = tmp_path_factory.mktemp("ablation")
    world = make_world(place / "world")
    run_stage("ode_pairs", stage_settings("ode_pairs", world, world / "ode_pairs", run__steps=1))
    start = {"network__init": str(world), "pairs": str(world / "ode_pairs")}
    run_stage("ode", stage_settings("ode", world, world / "ode", run__steps=1, run__batch=2, **start))
    torch.manual_seed(0)
    save_judge(world / "judge", AttributeProbe(), PatchPCA.load(world / "pca.npz"), {})
    configs = place / "configs"
    configs.mkdir()
    for name in ("causal", "ode", "dmd", "sid", "gan"):
        changes = {"pairs": str(world / "ode_pairs")} if name == "ode" else {}
        plain = as_plain(stage_settings(name, world, place / "unused", run__batch=2, **changes))
        if name == "causal":  # as the real one, which describes a fresh network
            plain["network"] = {"sizes": SIZES}
        (configs / f"embedded_{name}.toml").write_text("\n".join(toml_lines(plain)))
    return world


def arguments(world: Path, out: Path, *more: str) -> list[str]:
    folders = {"start": world, "ode": world / "ode", "pairs": world / "ode_pairs", "teacher": world, "data": world}
    folders |= {
        "probe": world / "judge",
        "configs": world.parent / "configs",
        "out": out,
        "document": out / "ablation.md",
    }
    given = [part for name, folder in folders.items() for part in (f"--{name}", str(folder))]
    return [*given, "--seconds", "2.5", "5", "--prompts", "1", "--processes", "1", "--seeds", "3", *more]


def test_settings_of_every_method_are_accepted_by_the_real_files() -> None:
    options = ablation.parse(["--configs", "training/configs"])
    found = {}
    for name, method in METHODS.items():
        found[name] = described(options, name, changes(options, name, 1, 7, Path("runs/x")))["settings"]
        assert found[name]["run"]["steps"] == 7 and found[name]["network"]["sizes"] is None
        assert found[name]["network"]["init"].endswith("ode" if method.from_ode else "base")
    assert found["teacher"]["forcing"] == "teacher" and found["teacher"]["clips"]["later_windows"] == 0
    assert found["gan"]["critic_warmup"] == found["dmd"]["critic_warmup"] == found["sid"]["critic_warmup"]


def test_trains_judges_writes_and_goes_on(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "ablation"
    given = arguments(world, out, "--steps", "2", "--methods", "teacher", "sid")
    assert ablation.main(given) == 0
    text = (out / "ablation.md").read_text()
    for row in (
        "Teacher forcing, seed 3",
        "Teacher forcing, 16 steps, seed 3",
        "Self-Forcing, SiD, seed 3",
        "The start itself",
        "The start itself, 16 steps",
        "Real clips",
    ):
        assert f"| {row} |" in text
    assert "Self-Forcing, SiD, distance at 5 s:" in text
    ElementTree.fromstring((out / "images" / "ablation.svg").read_text())
    assert json.loads((out / "sid-3" / "settings.json").read_text())["settings"]["network"]["init"] == str(
        world / "ode"
    )
    assert json.loads((out / "sid-3-minutes.json").read_text()) > 0
    monkeypatch.setattr(ablation, "launch", lambda *_: pytest.fail("what is finished is not trained again"))
    monkeypatch.setattr(ablation, "score_run", lambda *_: pytest.fail("nor judged"))
    assert ablation.main(given) == 0 and (out / "ablation.md").read_text() == text


def test_parts_are_made_side_by_side_and_put_together(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ode = json.loads((world / "ode" / "settings.json").read_text())
    ode["settings"]["run"] |= {"minutes": 0.01, "schedule": "minutes"}
    shutil.copytree(world / "ode", tmp_path / "ode")
    (tmp_path / "ode" / "settings.json").write_text(json.dumps(ode))
    out = tmp_path / "ablation"
    given = arguments(world, out, "--ode", str(tmp_path / "ode"), "--clock", "0.03")
    assert ablation.main([*given, "--part", "--methods"]) == 0  # real clips and the start alone
    assert list(out.glob("real-*.npz")) and not (out / "ablation.md").is_file()
    assert len(list((out / "start").glob("scores*.json"))) == 2
    monkeypatch.setattr(ablation, "see_real", lambda *_: pytest.fail("real clips are looked at once"))
    assert ablation.main([*given, "--part", "--methods", "dmd"]) == 0
    assert ablation.main([*given, "--part", "--methods", "teacher", "--sampling", "few"]) == 0
    assert ablation.main([*given, "--part", "--methods", "teacher", "--sampling", "many"]) == 0
    run = json.loads((out / "dmd-3" / "settings.json").read_text())["settings"]["run"]
    assert run["minutes"] == pytest.approx(0.02) and run["schedule"] == "minutes"
    for name in ("dmd-3", "teacher-3"):  # as from another machine: weights stay there
        for part in ("transformer", "checkpoints"):
            shutil.rmtree(out / name / part)
    monkeypatch.undo()
    assert ablation.main([*given, "--clock", "0.05", "--methods", "teacher"]) == 2  # it was begun with less
    monkeypatch.setattr(ablation, "launch", lambda *_: pytest.fail("what is finished is not trained again"))
    assert ablation.main([*given, "--methods", "teacher", "dmd"]) == 0
    text = (out / "ablation.md").read_text()
    assert "0.03 minutes by the clock a run" in text and "| Teacher forcing, 16 steps, seed 3 |" in text
    steps = json.loads((out / "dmd-3-steps.json").read_text())
    row = next(line for line in text.splitlines() if line.startswith("| Self-Forcing, DMD, seed 3 |"))
    assert steps >= 1 and row.endswith(f" | 0.0 | {steps} |")


def test_videos_rolled_out_together_are_those_of_the_pipeline(world: Path, tmp_path: Path) -> None:
    folder = make_template(world / "ode", world, tmp_path / "model")
    prompts = plan_prompts(2, 5)
    together = list(film_together(folder, "cpu")(prompts, 3.0))
    alone = make_videos(SelfForcingPipeline.from_pretrained(folder, device="cpu"), prompts, 3.0)
    for one, other in zip(together, alone, strict=True):
        assert one.shape == other.shape and np.abs(one.astype(int) - other).max() <= 1
    assert np.abs(together[0].astype(int) - together[1]).mean() > 1


def test_steps_follow_from_what_they_cost(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {"ode": 0.125, "teacher": 0.25, "dmd": 0.5}

    def launch(stage: str, settings: Path, changes: list[str], processes: int) -> float:
        name = {"causal": "teacher"}.get(stage, stage)
        steps = next(int(change[10:]) for change in changes if change.startswith("run.steps="))
        return 7.0 + steps * costs[name]  # starting a program costs, too, and is no step's

    monkeypatch.setattr(ablation_budget, "launch", launch)
    given = arguments(world, tmp_path / "out", "--minutes", "10", "--methods", "teacher", "ode", "dmd")
    plan = ablation.Ablation(ablation.parse(given)).budget.plan()
    assert plan["ode_minutes"] == 0.125  # the start took one step
    assert plan["steps"] == {"teacher": 40, "ode": 80, "dmd": 19}
    monkeypatch.setattr(ablation_budget, "launch", lambda *_: pytest.fail("it is measured once"))
    assert ablation.Ablation(ablation.parse(given)).budget.plan() == plan
    with pytest.raises(ablation.TrainingError, match="another budget: minutes was 10"):
        ablation.Ablation(ablation.parse([*given, "--minutes", "20"])).budget.plan()
    with pytest.raises(ablation.TrainingError, match="another budget: teacher was"):
        ablation.Ablation(ablation.parse([*given, "--teacher", str(world / "ode")])).budget.plan()
    for other, said in ((["--set", "run.batch=3"], r"run\.batch was 2"), (["--start", str(world / "ode")], "init was")):
        with pytest.raises(ablation.TrainingError, match=f"not one for these runs: .*{said}"):
            ablation.Ablation(ablation.parse([*given, *other])).budget.plan()


def test_a_finished_run_with_other_settings_is_not_taken(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(world, tmp_path / "out", "--steps", "2", "--methods", "teacher")
    study = ablation.Ablation(ablation.parse(given))
    run = tmp_path / "out" / "teacher-3"
    run.mkdir()
    settings = described(study.options, "teacher", changes(study.options, "teacher", 3, 2, run))
    (run / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(ablation.WeightsError, match="minutes.json is missing"):
        study.train("teacher", 3, 2)
    (tmp_path / "out" / "teacher-3-minutes.json").write_text("12.5")
    assert study.train("teacher", 3, 2) == (run, 12.5)
    settings["settings"]["optimizer"]["rate"] = 0.5
    (run / "settings.json").write_text(json.dumps(settings))
    assert ablation.main(given) == 2
    assert "trained with other settings: optimizer.rate was 0.5" in capsys.readouterr().err


def test_the_time_of_a_run_that_was_broken_off_counts(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter((10.0, 13.0, 20.0, 21.5))
    monkeypatch.setattr(ablation, "children_minutes", lambda: next(clock))

    def fails(*_: object) -> float:
        raise ablation.TrainingError("it was broken off")

    monkeypatch.setattr(ablation, "launch", fails)
    study = ablation.Ablation(ablation.parse(arguments(world, tmp_path / "out", "--steps", "2")))
    for taken in (3.0, 4.5):
        with pytest.raises(ablation.TrainingError, match="broken off"):
            study.train("teacher", 3, 2)
        assert json.loads((tmp_path / "out" / "teacher-3-minutes.json").read_text()) == taken


def test_teacher_forcing_is_judged_on_the_context_it_learnt_from(world: Path, tmp_path: Path) -> None:
    template = make_template(world / "ode", world, tmp_path / "model")
    index = json.loads((template / "model_index.json").read_text())
    index["settings"]["context_noise"] = 100.0
    (template / "model_index.json").write_text(json.dumps(index))
    for clean, noise in ((False, 100.0), (True, 0.0)):
        folder = model_folder(world / "ode", template, tmp_path / "copy", 16, clean)
        settings = json.loads((folder / "model_index.json").read_text())["settings"]
        assert settings["context_noise"] == noise and len(settings["denoising_steps"]) == 16


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--ode", "settings.json is missing: run python -m training ode first"),
        ("--pairs", "is missing: run python -m training ode_pairs first"),
        ("--data", "text is missing: run python -m training.text first"),
        ("--start", "holds no transformer: there is no such folder"),
        ("--teacher", "holds no transformer: there is no such folder"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_trained(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, said: str
) -> None:
    assert ablation.main([*arguments(world, tmp_path / "out"), option, str(tmp_path / "nothing")]) == 2
    assert said in capsys.readouterr().err


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(SystemExit):
        ablation.main(["--seconds", "20", "5"])
    for wrong in (["--clock", "3", "--quick"], ["--clock", "3", "--steps", "2"], ["--part"], ["--methods"]):
        with pytest.raises(SystemExit):
            ablation.main(wrong)
    quick = ablation.parse(["--quick"])
    assert quick.steps == 4 and quick.document.parent == quick.out != Path("runs/ablation")


def test_marks_lie_in_the_video() -> None:
    assert windows_at(60, 29) == range(27, 29) and windows_at(5, 29) == range(0, 2)
    assert windows_at(2.5, 1) == range(0, 1)


def test_the_same_videos_are_no_distance_apart() -> None:
    rng = np.random.default_rng(0)
    names = (*ATTRIBUTES, *(f"{name} kept" for name in READ), "visible", "contrast", "sharpness", "speed")
    seen = Seen([dict.fromkeys(names, 0.5)] * 4, {5.0: rng.standard_normal((50, 3))})
    scores = summary(seen, seen)
    assert scores["at"]["5"]["motion"] == 1 and scores["at"]["5"]["distance"] == pytest.approx(0, abs=1e-6)
    moved = Seen(seen.rows, {5.0: seen.features[5.0] + [2, 0, 0]})
    assert summary(moved, seen)["at"]["5"]["distance"] == pytest.approx(4)


def scores(quality: float, distance: float = 1.0, motion: float = 1.0) -> dict:
    at = {"5": {"following": 0.9, "quality": quality, "motion": motion, "distance": distance}}
    curves = {"quality": [1.0, quality], "following": [0.9, None], "motion": [1.0, 0.5]}
    return {"fps": 30.0, "minutes": 29.5, "steps": 70, "at": at, "curves": curves, "seconds": [1.0, 3.0]}


def test_report_says_what_held(tmp_path: Path) -> None:
    results = {
        "Teacher forcing": {0: scores(0.5), 1: scores(0.6)},
        "ODE regression": {0: scores(0.75), 1: scores(0.8)},
        "Diffusion forcing": {0: scores(0.7, 2.0, 1.4), 1: scores(0.7, 2.0, 0.6)},
        "Self-Forcing, DMD": {0: scores(0.7, 2.0, 1.2), 1: scores(0.9, 2.0, 0.9)},
        "Real clips": {0: scores(1.0, 0.1)},
    }
    with_start = verdicts({**results, "The start itself": {0: scores(0.6)}})[1]
    assert "better than Teacher forcing, The start itself;" in with_start
    lines = verdicts(results)
    said = {line.split(",")[2].split(" at ")[0].strip(): line.split(": ")[1] for line in lines}
    assert said["quality"] == "better than Teacher forcing; undecided against ODE regression, Diffusion forcing."
    assert said["distance"] == "worse than Teacher forcing, ODE regression; undecided against Diffusion forcing."
    assert said["motion"] == "better than Diffusion forcing; worse than Teacher forcing, ODE regression."
    for order in ((0, 1), (1, 0)):  # what could not be measured says nothing, whichever seed it is
        unknown = dict(zip(order, (scores(math.nan), scores(0.1)), strict=True))
        assert "undecided against Teacher forcing" in verdicts({**results, "Teacher forcing": unknown})[1]
    row = as_table(results).splitlines()[2]
    assert "| The start itself, 16 steps | 0.90 |" in as_table({"The start itself, 16 steps": {0: scores(0.6)}})
    assert row == "| Teacher forcing, seed 0 | 0.90 | 0.50 | 1.00 | 1.00 | 30.0 | 29.5 | 70 |"
    document = tmp_path / "ablation.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_report(document, results, ablation.parse(["--set", "run.batch=3"]), "a machine")
    assert "old" not in document.read_text() and "30 processor minutes a run" in document.read_text()
    assert "Made with `--set run.batch=3` on a machine." in document.read_text()
    document.write_text("no place")
    with pytest.raises(ablation.TrainingError, match="has no place"):
        write_report(document, results, ablation.parse(["--set", "run.batch=3"]), "a machine")


def test_all_curves_of_a_whole_ablation_have_colours_of_their_own() -> None:
    names = [
        method.label + more for method in METHODS.values() for more in ("", ", 16 steps")[: 1 + bool(method.many_steps)]
    ]
    names += ["The start itself", "The start itself, 16 steps", "Real clips"]
    assert len(set(COLOURS)) == len(COLOURS) >= len(names)


def test_curves_have_gaps_where_nothing_was_measured() -> None:
    panel = Panel("a & b", {"one": [[0.0, math.nan, 1.0, 0.5]], "two": [[1.0] * 4, [0.0] * 4]})
    picture = draw([panel], [1, 2, 3, 4], "seconds")
    root = ElementTree.fromstring(picture)
    paths = [p.get("d") for p in root.iter("{http://www.w3.org/2000/svg}path") if p.get("fill") == "none"]
    assert len(paths) == 4  # the mean of one; two thin ones and their mean
    assert paths[0].count("M") == 2 and "nan" not in picture
