"""The benchmark: what it makes of timings, when it keeps quiet, what it prints and writes. Nothing is timed here."""

from __future__ import annotations

import gc
import itertools
import json
import math
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from benchmarks import agreement, alone, cli, fresh, gpu, machine, report, results, side_by_side
from benchmarks.alone import clip_figures
from benchmarks.interleave import Variant, interleave
from benchmarks.random_model import RandomModel, small
from benchmarks.ratios import BEST_DISAGREES, CONTROL_MEDIAN, CONTROL_SPREAD, FEWEST_PAIRS, Ratio, noise, paired_ratio
from benchmarks.roofline import count_work
from benchmarks.session import QUICK, Session, default_dtype
from benchmarks.watch import Reading, WatchedPipeline, WatchedReference, clock_for
from pipeline import GenerationRequest, options, video
from pipeline import cli as cli_pipeline
from pipeline.attention_backends import BACKENDS, AttentionChoice
from pipeline.compiled_runs import CompiledRuns
from pipeline.config import ModelSpec
from pipeline.device import has_bfloat16
from pipeline.folder import ModelFolder
from pipeline.memory import builders_of as builders_in
from tests.small import write_model_folder
from weights.blueprints import builders_of
from weights.manifest import load_manifest

ROOT = Path(__file__).resolve().parent.parent


# ---- ratios


def test_a_ratio_is_the_median_of_its_pairs() -> None:
    fast = [[1.0, 2.0, 4.0], [2.0, 1.0, 1.0]]
    slow = [[2.0, 6.0, 8.0], [8.0, 2.0, 3.0]]  # 2, 3, 2, 4, 2, 3
    ratio = paired_ratio(slow, fast)
    assert ratio.value == 2.5
    assert (ratio.lower_quartile, ratio.upper_quartile) == (2.0, 3.0)
    assert ratio.low <= ratio.value <= ratio.high
    assert ratio.best == 2.0  # the fastest of each place are 2, 2, 3 and 1, 1, 1


def test_a_ratio_of_steady_times_is_exact_whatever_happens_to_both() -> None:
    disturbance = [[1.0, 7.0, 1.3], [5.0, 1.0, 2.0], [1.1, 1.0, 9.0]]
    slow = [[1.7 * value for value in values] for values in disturbance]
    ratio = paired_ratio(slow, disturbance)
    for value in (ratio.value, ratio.low, ratio.high, ratio.lower_quartile, ratio.upper_quartile, ratio.best):
        assert value == pytest.approx(1.7)
    assert ratio.pairs == 9


def test_the_interval_is_wider_for_scattered_pairs_and_always_the_same() -> None:
    draw = np.random.default_rng(0)
    fast = [[1.0] * 6] * 5
    scattered = (2 + draw.uniform(-0.5, 0.5, (5, 6))).tolist()
    steady = (2 + draw.uniform(-0.01, 0.01, (5, 6))).tolist()
    wide, narrow = paired_ratio(scattered, fast), paired_ratio(steady, fast)
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low) > 0
    assert paired_ratio(scattered, fast) == wide


@pytest.mark.parametrize("times", [([], []), ([[0.0]], [[1.0]]), ([[1.0]], [[0.0]])])
def test_no_ratio_is_made_of_nothing(times: tuple) -> None:
    with pytest.raises(ValueError, match="pairs"):
        paired_ratio(*times)


def ratio(value: float = 2.0, *, best: float | None = None, half: float = 0.01, pairs: int = 20) -> Ratio:
    low, high = value * (1 - half), value * (1 + half)
    return Ratio(value, low, high, low, high, value if best is None else best, pairs)


def test_a_quiet_machine_gives_its_ratio() -> None:
    assert noise(ratio(), ratio(1.0), 1.0, 2) == []
    edge = ratio(1 + 0.9 * CONTROL_MEDIAN, half=0.49 * CONTROL_SPREAD)
    assert noise(ratio(best=2 * (1 + 0.9 * BEST_DISAGREES), pairs=FEWEST_PAIRS), edge, 2.0, 2) == []


@pytest.mark.parametrize(
    ("found", "control", "load", "said"),
    [
        (ratio(pairs=FEWEST_PAIRS - 1), ratio(1.0), 1.0, "pairs"),
        (ratio(), ratio(1 + 1.2 * CONTROL_MEDIAN), 1.0, "copies"),
        (ratio(), ratio(1 / (1 + 1.2 * CONTROL_MEDIAN)), 1.0, "copies"),
        (ratio(), ratio(1.0, half=0.6 * CONTROL_SPREAD), 1.0, "spreads"),
        (ratio(best=2 * (1 + 1.1 * BEST_DISAGREES)), ratio(1.0), 1.0, "fastest"),
        (ratio(best=2 * (1 - 1.1 * BEST_DISAGREES)), ratio(1.0), 1.0, "fastest"),
        (ratio(), ratio(1.0), 2.1, "load"),
    ],
)
def test_a_noisy_machine_gives_its_reason(found: Ratio, control: Ratio, load: float, said: str) -> None:
    (reason,) = noise(found, control, load, 2)
    assert said in reason


# ---- clocks


def busy(seconds: float) -> str:
    return f"import time\nwhile time.process_time() < {seconds}: pass"


def test_processor_time_is_this_process_and_those_it_started() -> None:
    read = clock_for(torch.device("cpu"))
    before = read()
    time.sleep(0.3)
    slept = read() - before
    assert slept.wall >= 0.3 > slept.cpu
    until = time.process_time() + 0.2
    while time.process_time() < until:
        pass
    worked = read() - before
    assert worked.cpu - slept.cpu >= 0.2
    subprocess.run([sys.executable, "-c", busy(0.3)], check=True)
    assert (read() - before).cpu - worked.cpu >= 0.3


NO_RESOURCE = """
import sys
import psutil, torch  # psutil has a file of its own for each system
sys.modules["resource"] = None
import benchmarks.cli, benchmarks.fresh, benchmarks.gpu, scripts.prove_on_gpu
from benchmarks.watch import clock_for
assert clock_for(torch.device("cpu"))().cpu > 0
"""


def test_the_benchmarks_can_do_without_what_windows_lacks() -> None:
    done = subprocess.run([sys.executable, "-c", NO_RESOURCE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_peak_memory_is_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    held = psutil.Process().memory_info().rss
    assert 0.5 * held < machine.peak_memory() < psutil.virtual_memory().total
    told = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=123))
    monkeypatch.setattr(psutil, "Process", lambda: told)
    assert machine.peak_memory() == 123


# ---- side by side


class Scripted:
    """A watched pipeline whose blocks take what they are told to, on a clock of its own."""

    def __init__(self, name: str, log: list[tuple[str, int]], now: list[float], takes: float) -> None:
        self.name, self.log, self.now, self.takes = name, log, now, takes
        self.transformer, self.latents = Reading(0, 0), torch.zeros(1)

    def stream(self, request: GenerationRequest) -> Iterator[Any]:
        for index in range(3):
            self.log.append((self.name, index))
            self.now[0] += self.takes
            self.transformer = Reading(self.takes / 2, self.takes / 4)
            yield SimpleNamespace(index=index, frames=np.zeros((1, 2, 2, 3), np.uint8), taehv=request.taehv)


def scripted(rounds: int, **arguments: Any) -> tuple[dict, list[tuple[str, int]], list[tuple[str, int]]]:
    log: list[tuple[str, int]] = []
    told: list[tuple[str, int]] = []
    now = [0.0]
    variants = {
        name: Variant(Scripted(name, log, now, takes), {"taehv": name == "b"})
        for name, takes in (("a", 1.0), ("b", 3.0), ("c", 1.0))
    }
    timings = interleave(
        variants,
        lambda number: GenerationRequest(prompt=f"round {number}"),
        rounds,
        lambda: Reading(now[0], now[0] / 10),
        on_block=lambda name, block, latents: told.append((name, block.index, block.taehv)),
        **arguments,
    )
    return timings, log, told


def test_variants_take_turns_block_by_block_in_changing_order() -> None:
    timings, log, told = scripted(8)
    turns = [log[start : start + 3] for start in range(0, len(log), 3)]
    assert len(turns) == 9 * 3  # a round that does not count, and eight that do
    for turn in turns:
        assert sorted(name for name, _ in turn) == ["a", "b", "c"]
        assert len({index for _, index in turn}) == 1
    assert len({tuple(name for name, _ in turn) for turn in turns}) > 3
    for name, takes in (("a", 1.0), ("b", 3.0), ("c", 1.0)):
        assert timings[name].total == [[Reading(pytest.approx(takes), pytest.approx(takes / 10))] * 3] * 8
        assert timings[name].transformer == [[Reading(takes / 2, takes / 4)] * 3] * 8
    assert sorted(told) == sorted((name, block, name == "b") for name in "abc" for block in range(3))


def test_no_round_begins_when_time_is_over_but_one_is_made() -> None:
    timings, *_ = scripted(8, until=-math.inf)
    assert len(timings["a"].total) == 1


# ---- the limit


def test_the_work_of_the_published_model_is_as_counted_by_hand() -> None:
    model = load_manifest().model("self-forcing-dmd")
    builders, spec = builders_of(model), ModelSpec.from_config(dict(model.settings))
    work = count_work(builders, spec, torch.bfloat16)
    tera = 1e12
    # 4680 tokens a block; layers of 1536 and 8960, 30 of them; see any description of Wan2.1-T2V-1.3B.
    tokens, width, ffn, layers = 4680, 1536, 8960, 30
    assert work.linear == pytest.approx(2 * tokens * layers * (6 * width**2 + 2 * width * ffn), rel=1e-3)
    assert work.self_attention_frame * 21 == 4 * tokens * 21 * 1560 * width * layers
    assert work.cross_attention == 4 * tokens * 512 * width * layers
    assert [round(work.one_pass(frames) / tera, 1) for frames in (3, 12, 21)] == [16.2, 28.3, 40.4]
    clip = sum(work.block(block, None) for block in range(7))
    assert (clip + work.one_pass(21)) / tera == pytest.approx(990, rel=1e-3)  # with the clean pass that nobody needs
    assert [work.context(block) for block in (0, 6, 7, 500)] == [3, 21, 21, 21]
    assert work.decoding["vae"] / 3 / tera == pytest.approx(13.55, rel=1e-3)
    assert work.first_decoding["vae"] / tera == pytest.approx(4.35 + 2 * 13.55, rel=1e-3)
    # As published 0.544: here frames are split before they are doubled.
    assert work.decoding["taehv"] / 3 / tera == pytest.approx(0.527, rel=1e-3)
    assert work.block(0, "vae") - work.block(0, None) == pytest.approx(work.first_decoding["vae"], rel=1e-9)
    assert work.block(3, "vae") - work.block(3, None) == pytest.approx(work.decoding["vae"], rel=1e-9)
    in_float32 = count_work(builders, spec)
    assert in_float32.decoding["taehv"] < 0.85 * work.decoding["taehv"]  # no doubled picture is convolved
    assert 0.8 * work.decoding["vae"] < in_float32.decoding["vae"] < 0.97 * work.decoding["vae"]


def figures(clips: list[list[float]], limit: list[float]) -> dict[str, Any]:
    spec = SimpleNamespace(
        frames_in=lambda blocks: 12 * blocks - 3, temporal_stride=4, frames_per_block=3, native_fps=16
    )
    return clip_figures(SimpleNamespace(spec=spec), clips, limit)


def test_frames_per_second_count_everything_from_the_first_pass_on() -> None:
    found = figures([[0.5, 0.4, 0.6], [1.0, 1.0, 1.0], [0.5, 0.5, 0.5]], [0.1, 0.1, 0.1])
    assert found["fps"] == pytest.approx(33 / 1.5)
    assert found["fps_of_each"] == pytest.approx([22.0, 11.0, 22.0])
    assert found["last_block_fps"] == pytest.approx(12 / 0.6)
    assert found["limit_fps"] == pytest.approx(110)
    assert found["of_limit"] == pytest.approx(0.2) and not found["measurement_wrong"]
    assert found["last_block_of_limit"] == pytest.approx(1 / 6)
    assert found["times_playback"] == pytest.approx(22 / 16)
    assert found["block_seconds_worst"] == 1.0 and found["jitter_p95"] >= 1


def test_more_than_the_limit_is_called_wrong() -> None:
    assert figures([[0.1, 0.1]], [0.2, 0.2])["measurement_wrong"]
    assert figures([[0.1]], [0.05])["last_block_fps"] is None


# ---- the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def quickly_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames of a few pixels stay as small as they are."""
    monkeypatch.setattr(video, "MIN_SHORT_SIDE", 16)


@pytest.fixture
def collected_by_hand() -> Iterator[None]:
    """What lies in a circle goes only when somebody asks for it."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "missing_for_compile", lambda device: "patience")


WITHIN = "reference,switches,speed,first_frame,rollout,length,encoding"
"""The parts that need no process of their own."""


def test_it_measures_a_model_and_prints_one_object_last(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_compiler: None
) -> None:
    arguments = ["--model", str(folder), "--device", "cpu", "--quick", "--json", "--threads", "1"]
    assert cli.main([*arguments, "--only", WITHIN, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert result["agreement"]["holds"]
    assert set(result["speedup_vs_reference"]) == {"block_fp32", "block_bf16", "stream"}
    for name, value in result["speedup_vs_reference"].items():
        assert (value is None) == (name in result["why_null"])
        assert value is None or value > 0
    assert set(result["parts"]) == set(WITHIN.split(","))
    assert set(result["not_measured"]) == {"cold", "compile"}
    rows = result["parts"]["switches"]["rows"]
    assert result["parts"]["switches"]["missing"]["compile"]
    assert rows["separate clean pass"]["exact"] and rows["separate clean pass"]["latents_differ_by"] < 1e-5
    assert not rows["taehv"]["exact"] and rows["taehv"]["psnr"] > 0
    assert rows["fp8"]["latents_differ_by"] > 1e-4
    for row in result["parts"]["speed"]["rows"].values():
        assert 0 < row["of_limit"] <= 1 and row["limit_fps"] > row["fps"]
    assert result["parts"]["rollout"]["seconds"] == pytest.approx(5, abs=0.8)
    assert len(result["parts"]["length"]["transformer_seconds"]["everything"]) == 4
    assert result["machine"]["packages"]["torch"] == torch.__version__
    (written,) = (tmp_path / "out").glob("*.json")
    assert json.loads(written.read_text()) == result
    assert "Against the reference mode" in results.as_text(result)
    # A quick result is not for README.
    assert results.read_all(tmp_path / "out") == []


def test_a_process_of_its_own_tells_first_frame_and_memory(folder: Path) -> None:
    arguments = ["--model", str(folder), "--device", "cpu", "--quick", "--threads", "1", "--only", "cold"]
    found = cli.run(folder, "cpu", cli.parse(arguments))["parts"]["cold"]
    assert found["first_frame"] > 0
    assert found["peak_memory"] > 100 * 2**20
    assert found["peak_gpu_memory"] is None


def talking(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Another program in place of the process that makes videos."""
    monkeypatch.setattr(fresh, "_COMMAND", (sys.executable, "-c", program))


def test_a_process_of_its_own_may_say_whatever_it_likes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talking(
        monkeypatch,
        "import sys; sys.stderr.write('x' * 2**20); print('Loading...'); print('[1]'); print('7');"
        "[print('{\"event\": \"' + name + '\"}') for name in ('first', 'video')]",
    )
    events = fresh.measure(session_of(folder), {"blocks": 1}, timeout=60)
    assert events.keys() == {"first", "video"} and 0 < events["first"]["at"] <= events["video"]["at"]
    with pytest.raises(fresh.SelfForcingError, match="failed with code 0"):  # nothing was compiled
        fresh.measure(session_of(folder), {"blocks": 1, "compile": True}, timeout=60)


def test_a_process_of_its_own_that_fails_or_hangs_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talking(monkeypatch, "import sys; sys.exit('No such thing.')")
    with pytest.raises(fresh.SelfForcingError, match=r"code 1: No such thing\."):
        fresh.measure(session_of(folder), {"blocks": 1}, timeout=60)
    talking(monkeypatch, "import time; time.sleep(600)")
    with pytest.raises(fresh.SelfForcingError, match="not done after 0.5 s"):
        fresh.measure(session_of(folder), {"blocks": 1}, timeout=0.5)


def test_what_compiling_costs_begins_after_a_video_without_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    stream = WatchedPipeline.stream
    monkeypatch.setattr(cli_pipeline, "load_pipeline", lambda *_: session_of(folder).pipeline())
    monkeypatch.setattr(
        WatchedPipeline,
        "stream",
        lambda self, request: done.append(f"video {request.compile}") or stream(self, request),
    )
    monkeypatch.setattr(
        CompiledRuns, "complete", lambda self, request, stream: done.append(f"compile {request.compile}")
    )
    events = [
        event["event"] for event in fresh.events_of({"folder": folder, "device": "cpu", "blocks": 1, "compile": True})
    ]
    assert events == ["first", "video", "compiled"]
    assert done == ["video False", "compile True"]


@pytest.mark.parametrize("fault", ["load", "weights", "bfloat16"])
def test_it_keeps_quiet_where_a_ratio_would_mislead(folder: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    if fault == "load":
        monkeypatch.setattr(machine, "load", lambda: 1e6)
    if fault == "weights":
        monkeypatch.setattr(agreement, "TOLERANCE", 0.0)  # two ways of summing up never agree to the last bit
    if fault == "bfloat16":
        monkeypatch.setattr(side_by_side, "has_bfloat16", lambda device: False)
    arguments = ["--model", str(folder), "--device", "cpu", "--quick", "--threads", "1", "--only", "reference"]
    result = cli.run(folder, "cpu", cli.parse(arguments))
    hidden = ("block_bf16",) if fault == "bfloat16" else ("block_fp32", "stream", "block_bf16")
    said = {"load": "load", "weights": "same video", "bfloat16": "no bfloat16"}[fault]
    for name in hidden:
        assert result["speedup_vs_reference"][name] is None
        if not (fault == "load" and not has_bfloat16(torch.device("cpu"))):
            assert said in " ".join(result["why_null"][name])
    text = results.as_text(result)
    assert said in text
    if fault == "load":
        assert "too noisy" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "nowhere"], "no model folder"),
        (["--only", "speed,beauty"], "'beauty' is no part"),
        (["--threads", "0"], "'0' is no whole number"),
        (["--device", "abacus"], "abacus"),
        (["--loud"], "--help"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert said in captured.err and len(captured.err.splitlines()) == 1
    assert captured.out == ""


def test_only_whole_results_are_written_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    made = result_of()
    assert cli.publish(made, cli.parse(["--quick"])) is None
    assert cli.publish(made, cli.parse(["--only", "speed"])) is None
    assert cli.publish(made, cli.parse([])).parent == tmp_path
    (tmp_path / "file").touch()
    with pytest.raises(results.InvalidRequest, match="cannot be written"):
        cli.publish(made, cli.parse(["--out", str(tmp_path / "file")]))


# ---- the report


def result_of(made: str = "2026-01-02T03:04:05+00:00", **changes: Any) -> dict[str, Any]:
    """A result whose numbers nobody has measured."""
    found = {"value": 1.61, "low": 1.55, "high": 1.7, "lower_quartile": 1.5, "upper_quartile": 1.75, "best": 1.6}
    row = {"ratio": 1.61, "too_noisy": [], "measured": found | {"pairs": 21}, "control": found | {"value": 1.01}}
    return {
        "schema": results.SCHEMA,
        "made": made,
        "quick": False,
        "model": {"name": "Tiny", "height": 16, "width": 32},
        "machine": {
            "processor": "Abacus",
            "usable_processors": 2,
            "cpu_capability": "BEADS",
            "gpu": None,
            "packages": {"torch": "2.9.0"},
        },
        "agreement": {"holds": True, "latents": 1e-6, "frames": {"vae": 1e-6}},
        "speedup_vs_reference": {"block_fp32": 1.61, "block_bf16": None, "stream": 1.61},
        "why_null": {"block_bf16": ["No such arithmetic."]},
        "parts": {
            "reference": {
                "rows": {"block_fp32": row, "stream": row},
                "why_null": {"block_bf16": ["No such arithmetic."]},
            },
            "length": {
                "latent_frames": [3, 6],
                "transformer_seconds": {"window": [0.1, 0.2], "everything": [0.1, 0.4]},
            },
        },
        "not_measured": {},
        **changes,
    }


MARKED = f"# Title\n\n{report.MARKS[0]}\nold\n{report.MARKS[1]}\n\nThe end.\n"


def test_the_report_shows_the_newest_result_of_each_machine(tmp_path: Path) -> None:
    folder, document = tmp_path / "results", tmp_path / "README.md"
    document.write_text(MARKED)
    results.write(result_of(), folder)
    results.write(result_of("2025-01-01T00:00:00+00:00", model={"name": "Tiny", "height": 1, "width": 1}), folder)
    results.write(result_of("2026-03-03T00:00:00+00:00", quick=True), folder)
    assert report.main(["--results", str(folder), "--document", str(document)]) == 0
    text = document.read_text()
    assert text.startswith("# Title") and text.endswith("The end.\n") and "\nold\n" not in text
    assert text.count("**Tiny** on Abacus, 2 processors, BEADS") == 1 and "2026-01-02" in text
    assert "| transformer, a block, float32 | 1.61 | 1.55 to 1.70 |" in text
    assert "No such arithmetic." in text
    assert "every block sees all before it" in (tmp_path / report.PICTURE).read_text()


def test_the_report_says_that_nothing_was_measured(tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text(MARKED)
    assert report.main(["--results", str(tmp_path / "none"), "--document", str(document)]) == 0
    assert report.NOTHING in document.read_text()
    assert not (tmp_path / report.PICTURE).exists()


@pytest.mark.parametrize("fault", ["no marks", "no document", "bad result", "old result"])
def test_the_report_refuses_what_it_cannot_use(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, document = tmp_path / "results", tmp_path / "README.md"
    folder.mkdir()
    if fault != "no document":
        document.write_text("# Title\n" if fault == "no marks" else MARKED)
    if fault == "bad result":
        (folder / "a.json").write_text("{")
    if fault == "old result":
        (folder / "a.json").write_text(json.dumps({"schema": 0}))
    before = document.read_text() if document.exists() else None
    assert report.main(["--results", str(folder), "--document", str(document)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert (document.read_text() if document.exists() else None) == before


def test_readme_holds_what_was_measured_and_nothing_else() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    between = readme.partition(report.MARKS[0])[2].partition(report.MARKS[1])[0]
    text = between.strip().partition("\n\n![")[0]
    assert text == report.as_markdown(report.newest(results.read_all(results.FOLDER))).strip()


def test_numbers_stay_valid_json() -> None:
    found = results.plain({"a": math.inf, "b": [math.nan, 1.23456789], "c": None, "d": "x", "e": 0.0, "f": True})
    assert found == {"a": None, "b": [None, 1.2346], "c": None, "d": "x", "e": 0.0, "f": True}


# ---- what a GPU is needed for


def test_the_gpu_command_runs_through_in_small(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_compiler: None
) -> None:
    written = tmp_path / "result.json"
    assert gpu.main(["--small", "--device", "cpu", "--out", str(written)]) == 0
    result = json.loads(written.read_text())
    assert result["not_measured"] == {}
    assert result["parts"]["agreement"]["holds"]
    assert list(result["parts"]["reference"]) == ["reference", "reference, flash"]
    assert set(result["parts"]["switches"]) == {"taehv", "fp8"}
    assert "compile" in result["parts"]["optimised"]["unavailable"]
    lines = capsys.readouterr().out.splitlines()
    table = list(itertools.dropwhile(lambda line: not line.startswith("what "), lines))
    assert any(line.startswith("sustained, taehv") for line in table)
    assert any(line.startswith("times the reference, block") for line in table)
    assert "the same video" in lines[lines.index(table[0]) - 1]


def test_what_the_targets_are_about_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    completed: list[GenerationRequest] = []
    monkeypatch.setattr(gpu, "forced", lambda pipeline, name: AttentionChoice("math", BACKENDS["math"].make(None)))
    monkeypatch.setattr(CompiledRuns, "complete", lambda self, request, stream: completed.append(request))
    monkeypatch.setattr(CompiledRuns, "prepare", lambda self, request, stream: self.state(request))
    monkeypatch.setattr(WatchedPipeline, "unavailable_options", lambda self: {})
    monkeypatch.setattr(gpu, "PARTS", {"optimised": gpu.optimised})
    result = gpu.run(torch.device("cpu"), gpu.parse(["--small"]))
    found = result["parts"]["optimised"]
    assert (
        list(found["rows"]) == list(found["compiling_seconds"]) == ["compile", "compile + fp8", "compile + fp8 + sage"]
    )
    assert all(request.compile and request.taehv for request in completed)
    assert [request.fp8 for request in completed] == [False, True, True]
    limits = [row["limit_fps"] for row in found["rows"].values()]
    assert limits[0] > 0 and limits[1:] == [None, None]
    text = gpu.as_text(result)
    assert "sustained, compile + fp8 + sage" in text and "compiling, compile" in text


def test_the_gpu_command_tells_what_it_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(session: Any, until: float) -> dict:
        raise RuntimeError("No available kernel. Aborting execution.\nmore")

    monkeypatch.setattr(gpu, "PARTS", {"agreement": fails, "encoding": lambda session, until: {}})
    result = gpu.run(torch.device("cpu"), gpu.parse(["--small"]))
    assert result["not_measured"] == {"agreement": "RuntimeError: No available kernel. Aborting execution."}
    assert "agreement: not measured" in gpu.as_text(result)
    monkeypatch.setattr(gpu, "LEAST_SECONDS", math.inf)
    monkeypatch.setattr(gpu, "published", gpu.small)
    late = gpu.run(torch.device("cpu"), gpu.parse(["--minutes", "1"]))
    assert set(late["not_measured"].values()) == {"There was no time left."}


def test_the_gpu_command_survives_any_error_and_leaves_behind_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, found = tmp_path / "result.json", []

    def fails(session: Any, until: float) -> dict:
        found.append(json.loads(written.read_text()))  # the part before is there already
        raise KeyError("triton")

    def late(session: Any, until: float) -> dict:
        for _ in session.pipeline().stream(session.request(3)):
            pass
        return {"never": "reached"}

    monkeypatch.setattr(gpu, "GRACE_SECONDS", -1e6)
    parts = {"encoding": lambda session, until: {"cpu_milliseconds_a_frame": 1.0}, "speed": fails, "rollout": late}
    monkeypatch.setattr(gpu, "PARTS", parts)
    result = gpu.run(torch.device("cpu"), gpu.parse(["--small", "--out", str(written)]))
    assert found[0]["parts"].keys() == {"encoding"} and found[0]["not_measured"].keys() == {"speed", "rollout"}
    assert result["not_measured"] == {"speed": "KeyError: 'triton'", "rollout": "There was no time left."}
    assert json.loads(written.read_text())["not_measured"] == result["not_measured"]


def test_random_models_share_one_text_encoder_in_the_devices_dtype() -> None:
    model = RandomModel(*small("self-forcing-dmd"))
    half, full = (model.load(torch.device("cpu"), dtype) for dtype in (torch.bfloat16, torch.float32))
    assert half.text.model is full.text.model
    assert half.text.model.dtype == torch.float32 == default_dtype(torch.device("cpu"))
    assert default_dtype(torch.device("cuda")) == torch.bfloat16
    assert (half._transformer.dtype, full._transformer.dtype) == (torch.bfloat16, torch.float32)


def test_time_that_is_over_shortens_what_is_measured_alone(folder: Path) -> None:
    session = session_of(folder)
    speed = alone.speed(session, -math.inf)
    assert speed["clips"] == 1 and all(len(row["fps_of_each"]) == 1 for row in speed["rows"].values())
    long = alone.rollout(session, -math.inf)
    assert long["blocks"] == 1 and long["cut_short"] and long["seconds"] < 1
    assert not alone.rollout(session)["cut_short"]


def test_caches_are_let_go_of_and_made_anew(folder: Path) -> None:
    session = session_of(folder)
    pipeline = session.pipeline()
    before = pipeline.generate(session.request(2)).frames
    assert pipeline._cache is not None
    session.release_caches()
    assert pipeline._cache is None and "latents" not in vars(pipeline)
    assert np.array_equal(pipeline.generate(session.request(2)).frames, before)


def test_caches_that_are_let_go_of_are_gone(folder: Path, collected_by_hand: None) -> None:
    session = session_of(folder)
    pipeline = session.pipeline()
    pipeline.generate(session.request(2))
    cache = weakref.ref(pipeline._cache)
    session.release_caches()
    assert cache() is None, "before the memory of what is gone is given back to the device"


def test_the_agreement_leaves_no_weights_behind(
    folder: Path, monkeypatch: pytest.MonkeyPatch, collected_by_hand: None
) -> None:
    session, made, left = session_of(folder), [], []
    load, forget = session.load, Session.forget

    def noted(device: torch.device, dtype: torch.dtype) -> WatchedPipeline:
        pipeline = load(device, dtype)
        made.append(weakref.ref(pipeline))
        made.append(weakref.ref(pipeline._transformer._transformer))
        return pipeline

    def looked_at(self: Session, dtype: torch.dtype) -> None:
        forget(self, dtype)
        left.extend(one for one in made if one() is not None)

    monkeypatch.setattr(session, "load", noted)
    monkeypatch.setattr(Session, "forget", looked_at)
    assert gpu.agreement(session, math.inf)["holds"] and len(made) == 2
    assert left == [], "before the memory of what is gone is given back to the device"


def test_a_text_encoder_that_visits_a_device_does_so_in_every_pipeline(folder: Path) -> None:
    pipeline = session_of(folder).pipeline()
    pipeline.text._visits = torch.device("cpu")
    for kind in (WatchedPipeline, WatchedReference):
        assert kind.beside(pipeline).text._visits == torch.device("cpu")


def session_of(folder: Path) -> Session:
    return Session(
        load=lambda device, dtype: WatchedPipeline.from_pretrained(folder, device, dtype),
        builders=builders_in(folder),
        spec=ModelFolder(folder).spec,
        device=torch.device("cpu"),
        folder=str(folder),
        scale=replace(QUICK, clips=3),
    )


@pytest.mark.parametrize("arguments", [["--minutes", "nan"], ["--minutes", "soon"], ["--model", "nothing", "--small"]])
def test_the_gpu_command_refuses_bad_input(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(arguments) == 2
    assert capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_gpu_command_wants_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert "--small" in capsys.readouterr().err
