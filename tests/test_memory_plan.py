"""Memory: the rehearsal against reality, the choice of a plan, and what a placement does."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import app
from pipeline import GenerationRequest, SelfForcingPipeline, cli, doctor, memory, placing, plan
from pipeline.__main__ import main
from pipeline.config import ModelSpec
from pipeline.errors import OptionUnavailable, WeightsError
from pipeline.float8 import store_in_8_bits
from pipeline.folder import ModelFolder
from pipeline.memory import META, LiveBytes, ModelNeeds, PartNeeds, builders_of, rehearse
from pipeline.placing import check_exchange, placement_for
from pipeline.plan import Placement, evaluated, placements, plan_for, usable
from tests.scripted import ScriptedPipeline
from weights import blueprints
from weights.manifest import Model, load_manifest

EMBEDDED = cli.EMBEDDED_MODEL
REQUEST = GenerationRequest(prompt="a red balloon rises over the mountains at sunset", seed=7, seconds=2)


def spec():
    return ModelFolder(EMBEDDED).spec


@pytest.fixture(scope="module")
def embedded() -> ModelNeeds:
    return rehearse(builders_of(EMBEDDED), spec(), torch.float32)


# ---- the rehearsal


def test_bytes_live_as_long_as_their_tensors() -> None:
    with LiveBytes() as counted:
        one = torch.zeros(1000, device=META)
        view, two = one.view(10, 100), torch.zeros(500, device=META)
        assert counted.live == 6000 and view.shape == (10, 100)
        del one
        assert counted.live == 6000  # the view holds it
        del view, two
        torch.zeros(10, device=META)
        torch.zeros(10**6)  # elsewhere
    assert counted.live == 0 and counted.peak == 6000


def test_the_rehearsal_counts_what_the_real_thing_takes(embedded: ModelNeeds) -> None:
    real = rehearse(builders_of(EMBEDDED), spec(), torch.float32, torch.device("cpu"))
    parts = {
        "transformer": (embedded.transformer, real.transformer),
        "text": (embedded.text_encoder, real.text_encoder),
    }
    parts |= {name: (embedded.decoders[name], real.decoders[name]) for name in ("vae", "taehv")}
    for name, (rehearsed, taken) in parts.items():
        assert rehearsed.weights == taken.weights and rehearsed.fp8_weights == taken.fp8_weights, name
        assert rehearsed.kept == pytest.approx(taken.kept, rel=0.01), name
        assert rehearsed.working == pytest.approx(taken.working, rel=0.05) and taken.working > 0, name
    for name in ("encoding_start", "encoding_start_tiled"):
        assert getattr(embedded, name) == pytest.approx(getattr(real, name), rel=0.05) and getattr(real, name) > 0


def test_weights_are_those_of_the_files(embedded: ModelNeeds) -> None:
    for part, needs in (("transformer", embedded.transformer), ("vae", embedded.decoders["vae"])):
        model = ModelFolder(EMBEDDED).load(part, torch.float32)
        assert needs.weights == sum(p.numel() * p.element_size() for p in (*model.parameters(), *model.buffers()))


def test_eight_bits_are_counted_as_they_are_stored(embedded: ModelNeeds) -> None:
    model = ModelFolder(EMBEDDED).load("text_encoder", torch.float32)
    store_in_8_bits(model, torch.float32)
    stored = sum(p.numel() * p.element_size() for p in model.parameters())
    assert embedded.text_encoder.fp8_weights == stored < 0.5 * embedded.text_encoder.weights


def test_a_smaller_window_takes_what_the_plan_says(embedded: ModelNeeds) -> None:
    smaller = Placement(window_frames=6, sink_frames=0)
    needs = rehearse(builders_of(EMBEDDED), smaller.fitted(spec()), torch.float32)
    assert evaluated(embedded, spec(), smaller).kv_cache == pytest.approx(needs.transformer.kept, rel=0.002)
    assert needs.transformer.kept < 0.7 * embedded.transformer.kept


@lru_cache
def published(name: str) -> tuple[ModelNeeds, ModelSpec]:
    model = load_manifest().model(name)
    return rehearse(blueprints.builders_of(model), model.spec, torch.bfloat16), model.spec


def test_published_models_are_rehearsed_without_their_files() -> None:
    """Figures that are known from elsewhere: 1,418,996,800 parameters, an encoder of 11.36 GB, 287.5 MB a frame."""
    needs, spec = published("self-forcing-dmd")
    assert needs.transformer.weights == pytest.approx(2 * 1_418_996_800, rel=1e-6)  # buffers besides
    assert needs.text_encoder.weights == pytest.approx(11.36e9, rel=0.001)
    frames = 2 * spec.window_frames + spec.sink_frames
    assert needs.kv_buffers == pytest.approx(287.5e6 * frames / 2, rel=0.002)
    assert 2e9 < needs.decoders["vae"].kept + needs.decoders["vae"].working < 5e9
    assert needs.decoders["taehv"].working < needs.decoders["vae"].working


def like_another(model: Model, others: Iterable[Model]) -> str:
    """The first published model that needs the same memory: of the same networks, sizes and window."""

    def needed(one: Model) -> tuple[Any, ...]:
        sizes = ("height", "width", "frames_per_block", "text_len", "window_frames", "sink_frames", "positions")
        networks = [(part.kind, part.config) for part in one.parts if part.config]
        return (networks, *(getattr(one.spec, name) for name in sizes))

    return next(other.id for other in others if needed(other) == needed(model))


@pytest.mark.parametrize("name", load_manifest().models)
def test_every_published_model_fits_every_card(name: str) -> None:
    models = load_manifest().models
    needs, spec = published(like_another(models[name], models.values()))
    costs = []
    for size in plan.CARDS:
        chosen = plan_for(needs, spec, usable(size * memory.GB))
        assert chosen.fits and chosen.start_fits, size
        costs.append(chosen.placement.cost)
        fitted = chosen.placement.fitted(models[name].spec)
        assert fitted.window_frames >= 12 and fitted.sink_frames >= 3
    assert costs == sorted(costs, reverse=True) and costs[-1] == 0 < costs[0]


@pytest.mark.parametrize(
    ("block", "windows"),
    [
        (1, [(12, 6), (12, 3)]),
        (2, [(12, 6), (12, 4)]),
        (3, [(12, 6), (12, 3)]),
        (4, [(16, 8), (12, 4)]),
        (5, [(20, 10), (15, 5)]),
        (6, [(18, 6)]),
    ],
)
def test_a_short_window_is_counted_in_frames(block: int, windows: list[tuple[int, int]]) -> None:
    assert plan.short_windows(block) == windows
    large = replace(spec(), frames_per_block=block, window_frames=block * 30, sink_frames=0)
    short = {placement.fitted(large) for placement in placements(SMALL, large) if placement.window_frames}
    assert {(one.window_frames, one.sink_frames) for one in short} == {*windows}


def test_a_small_sink_is_for_where_it_decides() -> None:
    needs, spec = published("self-forcing-dmd")
    sinks = {size: plan_for(needs, spec, usable(size * memory.GB)).placement.sink_frames for size in (8, 12)}
    assert sinks == {8: 3, 12: 6}


# ---- the choice

MB = 10**6
SMALL = ModelNeeds(
    PartNeeds(300 * MB, 150 * MB, 600 * MB, 50 * MB),
    PartNeeds(1000 * MB, 600 * MB, 0, 10 * MB),
    {"vae": PartNeeds(20 * MB, 10 * MB, 200 * MB, 200 * MB), "taehv": PartNeeds(5 * MB, 3 * MB, 10 * MB, 100 * MB)},
    kv_buffers=590 * MB,
    encoding_start=700 * MB,
    encoding_start_tiled=450 * MB,
)


def tall_spec():
    return replace(spec(), window_frames=21, sink_frames=3)


def needed(placement: Placement) -> int:
    return evaluated(SMALL, tall_spec(), placement).total


def test_a_plan_adds_up() -> None:
    everything = evaluated(SMALL, tall_spec(), Placement())
    assert everything.total == (300 + 25 + 600 + 1000 + 200 + 200) * MB
    visiting = evaluated(SMALL, tall_spec(), Placement("offload"))
    assert visiting.text_encoder == 0 and visiting.workspace == 210 * MB  # cache and decoder leave it 800 MB
    assert visiting.total == (300 + 25 + 1000 + 10) * MB
    small_text = replace(SMALL, text_encoder=PartNeeds(500 * MB, 300 * MB, 0, 10 * MB))
    visiting = evaluated(small_text, tall_spec(), Placement("offload"))
    assert visiting.total == evaluated(small_text, tall_spec(), Placement("cpu")).total  # it needs no more than they
    assert evaluated(SMALL, tall_spec(), Placement("cpu")).workspace == 200 * MB
    assert (
        evaluated(SMALL, tall_spec(), Placement(taehv=True, fp8=True)).total == (150 + 25 + 600 + 1000 + 10 + 100) * MB
    )


def test_a_plan_tells_when_there_is_no_room_to_start_from_a_picture() -> None:
    enough = (300 + 25 + 600 + 1000 + 700) * MB  # the decoder keeps nothing yet
    roomy = evaluated(SMALL, tall_spec(), Placement(), enough)
    tight = evaluated(SMALL, tall_spec(), Placement(), enough - 1)
    assert roomy.fits and roomy.start_fits and not any("start" in note for note in roomy.as_dict()["notes"])
    assert tight.fits and not tight.start_fits and not tight.as_dict()["start_fits"]
    assert any("start from a picture" in note for note in tight.as_dict()["notes"])
    assert evaluated(SMALL, tall_spec(), Placement()).start_fits  # without a limit


def test_a_start_is_encoded_in_tiles_only_where_that_makes_room() -> None:
    resident, everything = (300 + 25 + 600 + 1000) * MB, (300 + 25 + 600 + 1000 + 400) * MB
    assert needed(Placement()) == everything
    roomy, tight = (replace(SMALL, encoding_start=size * MB) for size in (400, 500))
    assert plan_for(roomy, tall_spec(), everything).placement == Placement()
    chosen = plan_for(replace(tight, encoding_start_tiled=400 * MB), tall_spec(), everything)
    assert chosen.placement == Placement(start_tiled=True) and chosen.start_fits and chosen.total == everything
    assert any("in tiles" in note for note in chosen.as_dict()["notes"]) and chosen.placement.cost == 0
    assert chosen.placement.applied() == {} and chosen.placement.applied(starts=True) == {"start": "encoded in tiles"}
    chosen = plan_for(tight, tall_spec(), resident + 440 * MB)
    assert chosen.placement == Placement() and not chosen.start_fits, "tiles, too, are too large"


def test_the_cheapest_plan_that_fits_is_taken() -> None:
    assert plan_for(SMALL, tall_spec(), None).placement == Placement()
    for wanted in (Placement(), Placement("offload"), Placement("cpu")):
        chosen = plan_for(SMALL, tall_spec(), needed(wanted))
        cheaper = [p for p in placements(SMALL, tall_spec()) if p.cost < chosen.placement.cost]
        assert chosen.fits and all(needed(p) > (chosen.budget or 0) for p in cheaper)
        assert chosen.placement.cost <= wanted.cost


def test_where_nothing_fits_the_smallest_is_named() -> None:
    chosen = plan_for(SMALL, tall_spec(), 10 * MB)
    assert not chosen.fits and chosen.total == min(map(needed, placements(SMALL, tall_spec())))


def test_a_model_without_taehv_is_given_none() -> None:
    bare = replace(SMALL, decoders={"vae": SMALL.decoders["vae"]})
    assert not any(placement.taehv for placement in placements(bare, tall_spec()))


def test_a_short_window_is_none_for_a_model_that_has_one() -> None:
    assert all(placement.window_frames is None for placement in placements(SMALL, spec()))
    short = [placement for placement in placements(SMALL, tall_spec()) if placement.window_frames]
    assert short and all(placement.fitted(tall_spec()).window_frames == 12 for placement in short)


@pytest.mark.parametrize("placement", list(placements(SMALL, tall_spec())), ids=str)
def test_every_measure_is_told(placement: Placement) -> None:
    told = " ".join(placement.sentences())
    changed = placement.text_encoder != "device" or placement.text_fp8
    assert ("text encoder" in told.lower()) == changed == ("text encoder" in placement.applied())
    assert ("TAEHV" in told) == placement.taehv == ("taehv" in placement.preset)
    assert ("transformer's weights" in told) == placement.fp8 == ("fp8" in placement.preset)
    assert ("KV cache" in told) == (placement.window_frames is not None) == ("KV cache" in placement.applied())


# ---- what a placement does


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return SelfForcingPipeline.from_pretrained(EMBEDDED, device="cpu").generate(REQUEST).frames


def test_a_text_encoder_that_comes_and_goes_gives_the_same_video(frames: np.ndarray) -> None:
    placed = SelfForcingPipeline.from_pretrained(EMBEDDED, device="cpu", placement=Placement("offload"))
    video = placed.generate(REQUEST)
    assert np.array_equal(video.frames, frames)
    assert video.run.applied["text encoder"] == "comes and goes"


def test_a_text_encoder_that_comes_finds_no_cache(frames: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    placed = SelfForcingPipeline.from_pretrained(EMBEDDED, device="cpu", placement=Placement("offload"))
    assert np.array_equal(placed.generate(REQUEST).frames, frames)
    cache, encode, found = weakref.ref(placed._cache), placed.text.encode, []
    monkeypatch.setattr(placed.text, "encode", lambda prompts: found.append(cache()) or encode(prompts))
    assert np.array_equal(placed.generate(REQUEST).frames, frames) and cache() is not None, "nobody had to come"
    placed.generate(replace(REQUEST, prompt="a blue car at night", seconds=1))
    assert found == [None]
    monkeypatch.setattr(placed, "placement", Placement())
    cache = weakref.ref(placed._cache)
    placed.generate(replace(REQUEST, prompt="a green car at night", seconds=1))
    assert len(found) == 2 and found[1] is not None, "one that stays needs no room"


def test_it_goes_home_also_when_there_was_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    text = SelfForcingPipeline.from_pretrained(EMBEDDED, device="cpu", placement=Placement("offload")).text
    text._visits = META  # somewhere else, where nothing can be computed with what is here
    moves = []

    def to(device: torch.device):
        moves.append(str(device))
        if str(device) == "meta":
            raise torch.OutOfMemoryError("no room")
        return text.model

    monkeypatch.setattr(text.model, "to", to)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            text("a red balloon")
    assert moves == ["meta", "cpu"] * 2
    text._visits = torch.device("cpu")
    assert text("a red balloon").shape[0] == 1 and len(moves) == 6
    text("a red balloon")
    assert len(moves) == 6  # remembered: it need not come


def test_a_warm_up_takes_the_options_that_should_be_on() -> None:
    placed = SelfForcingPipeline.from_pretrained(EMBEDDED, device="cpu", placement=Placement(taehv=True, fp8=True))
    placed.warm_up()
    assert placed._transformer.fp8


def test_eight_bits_change_the_text_a_little(frames: np.ndarray) -> None:
    placed = SelfForcingPipeline.from_pretrained(EMBEDDED, device="cpu", placement=Placement(text_fp8=True))
    video = placed.generate(REQUEST)
    difference = np.abs(video.frames.astype(int) - frames).mean()
    assert 0 < difference < 3 and video.run.applied["text encoder"] == "on the device, 8 bits"


def test_a_smaller_window_is_that_of_the_run() -> None:
    placed = SelfForcingPipeline.from_pretrained(
        EMBEDDED, device="cpu", placement=Placement(window_frames=6, sink_frames=0, taehv=True)
    )
    assert placed.spec.window_frames == 6 and placed.preset == {"taehv": True}
    assert placed.plan(REQUEST).applied["KV cache"] == "6 latent frames"


def test_memory_is_planned_from_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    assert placement_for(EMBEDDED, "cpu", "auto") == placement_for(EMBEDDED, "cpu", "off") == Placement()
    with pytest.raises(OptionUnavailable, match="the device is cpu, where there is nothing to plan"):
        placement_for(EMBEDDED, "cpu", "16")
    everything = plan_for(rehearse(builders_of(EMBEDDED), spec(), torch.bfloat16), spec(), None).total
    free = {"bytes": 80 * memory.GB}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["bytes"], 80 * memory.GB))
    assert placement_for(EMBEDDED, "cuda", "auto") == Placement()
    free["bytes"] = int((everything - MB) / (1 - plan.SPARE_SHARE))
    assert placement_for(EMBEDDED, "cuda", "auto").cost > 0
    assert placement_for(EMBEDDED, "cuda", "16") == placement_for(EMBEDDED, "cuda", "off") == Placement()
    free["bytes"] = 10 * MB
    with pytest.raises(OptionUnavailable, match=r"even with everything made small, and 0\.0 GB can be used"):
        placement_for(EMBEDDED, "cuda", "auto")


def free_memory(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=free, total=2 * free))
    monkeypatch.setattr("psutil.Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=50 * MB)))


def test_a_model_without_room_is_not_loaded_on_a_cpu(embedded: ModelNeeds, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = evaluated(embedded, spec(), Placement()).total
    free_memory(monkeypatch, needed)
    assert placement_for(EMBEDDED, "cpu", "auto") == Placement()
    free_memory(monkeypatch, needed - 1)
    numbers = rf"{needed / memory.GB:.1f} GB of main memory .* and {needed / memory.GB:.1f} GB are free.*--memory off"
    with pytest.raises(OptionUnavailable, match=numbers):
        cli.load_pipeline(EMBEDDED, "cpu")
    assert placement_for(EMBEDDED, "cpu", "off") == Placement()
    check_exchange(EMBEDDED, "cpu", "auto")  # the model before it frees some
    free_memory(monkeypatch, needed - 50 * MB - 1)
    with pytest.raises(OptionUnavailable, match="Close other programs"):
        check_exchange(EMBEDDED, "cpu", "auto")
    check_exchange(EMBEDDED, "cpu", "off")


def test_a_gpu_is_reached_through_the_main_memory(embedded: ModelNeeds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (8 * memory.GB, 8 * memory.GB))
    largest = embedded.largest_part // 2  # in bfloat16
    free_memory(monkeypatch, largest)
    assert placement_for(EMBEDDED, "cuda", "auto") == Placement()
    free_memory(monkeypatch, largest - 1)
    with pytest.raises(OptionUnavailable, match="through the main memory, a part at a time: .* are free"):
        placement_for(EMBEDDED, "cuda", "auto")
    check_exchange(EMBEDDED, "cuda", "auto")  # the model before it frees some
    assert placement_for(EMBEDDED, "cuda", "off") == Placement()


def test_a_model_too_large_for_the_card_does_not_drive_the_old_one_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (0, 0.5 * memory.GB))
    check_exchange(EMBEDDED, "cuda", "off")
    with pytest.raises(OptionUnavailable, match="of GPU memory even with everything made small"):
        check_exchange(EMBEDDED, "cuda", "auto")
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (0, 8 * memory.GB))
    check_exchange(EMBEDDED, "cuda", "auto")


def test_a_small_model_is_not_rehearsed_before_it_is_loaded_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    files = sum(file.stat().st_size for file in EMBEDDED.rglob("*.safetensors"))
    assert files / placing.SMALL_SHARE < 2 * memory.GB
    free_memory(monkeypatch, 2 * memory.GB)
    monkeypatch.setattr(placing, "rehearse", lambda *_: pytest.fail("that takes seconds"))
    placement_for(EMBEDDED, "cpu", "auto")


def test_what_is_no_amount_of_memory_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("x", "-1", "nan", "1e3", "", "0", "0.0"):
        assert cli.main(["a ball", f"--memory={wrong}"]) == 2
        assert "must be auto, off or a number of GB" in capsys.readouterr().err
        assert app.main([f"--memory={wrong}"]) == 2
        assert "must be auto, off or a number of GB" in capsys.readouterr().err


def test_options_that_save_memory_are_on_in_the_page() -> None:
    pipeline = ScriptedPipeline()
    pipeline.preset = {"taehv": True}
    boxes = {
        component["props"]["elem_id"]: component["props"]
        for component in app.build_app(pipeline).get_config_file()["components"]
        if str(component["props"].get("elem_id")).startswith("option-")
    }
    assert boxes["option-taehv"]["value"] is True and "lack the memory" in boxes["option-taehv"]["info"]
    assert not boxes["option-fp8"]["value"] and "lack the memory" not in boxes["option-fp8"]["info"]


# ---- the doctor


def test_the_doctor_tells_people_and_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("Python", "torch", "gradio", "Free disk", "Self-Forcing embedded on a CPU", "24 GB", "compile"):
        assert word in text
    assert main(["doctor", "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == "cpu" and found["memory"] is None and found["plan"]["fits"]
    assert found["packages"]["torch"] == torch.__version__ and set(found["cards"]) == {"8", "12", "16", "24", "80"}
    assert found["plan"]["total"] == sum(
        found["plan"][name] for name in ("weights", "kv_cache", "text_encoder", "decoder", "workspace")
    )


def test_the_doctor_refuses_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", "nothing"]) == 2
    assert "neither a model folder nor one of the published models: self-forcing-dmd" in capsys.readouterr().err
    assert main(["doctor", "--device", "tpu"]) == 2
    (tmp_path / "model_index.json").write_text((EMBEDDED / "model_index.json").read_text())
    assert main(["doctor", "--model", str(tmp_path)]) == 2
    assert "transformer/config.json" in capsys.readouterr().err
    with pytest.raises(WeightsError):
        builders_of(tmp_path)["vae"]()


def test_missing_packages_are_said_before_they_are_missed(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: None if package == "diffusers" else "1")
    monkeypatch.setattr(doctor, "examine", lambda *_: pytest.fail("it would be imported"))
    assert main(["doctor"]) == 1 and "Install diffusers" in capsys.readouterr().err


def test_the_doctor_says_what_to_change() -> None:
    report = doctor.examine(str(EMBEDDED), "cpu")
    assert doctor.advice(report) == []
    assert (
        "no compiler" in " ".join(doctor.advice(replace(report, options={"compile": "There is no compiler."}))).lower()
    )
    assert "Install torch: " in (doctor.missing_packages(report.packages | {"torch": None}) or "")
    assert doctor.missing_packages(report.packages | {"torchao": None}) is None
    assert "main memory" in doctor.advice(replace(report, free_main_memory=1))[0]
    assert "through the main memory" in doctor.advice(replace(report, kind="cuda", free_main_memory=1))[0]
    short = report.plan | {"fits": False, "budget": 0}
    assert "lacks" in doctor.advice(replace(report, kind="cuda", plan=short, memory=1, free_memory=1))[0]
