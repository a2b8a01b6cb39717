"""Scores of models: what prompts state, drift, motion, sharpness and the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from pipeline import GenerationRequest
from pipeline.config import ModelSpec
from pipeline.errors import TrainingDataError, TrainingError, WeightsError
from tests.small import SMALL_SETTINGS, write_model_folder
from training import asked as asking
from training import evaluate as evaluation
from training.asked import Prompt, plan_long, plan_prompts, plan_scored, read_prompts, stated_in
from training.captions import make_caption
from training.drift import drift_report, flicker, jump, measure, motion_report, rows
from training.evaluate import follow_prompts, follow_time
from training.filming import Crew, film_with
from training.following import score, standard_error
from training.judge import SHIPPED, load_judge, save_judge
from training.pca import PatchPCA, read_pca, to_patches, write_pca
from training.probe import WINDOW, AttributeProbe, WindowReading, held_out_clips
from training.report import as_table, rounded
from training.sharpness import choose_encoder, decoder_psnr
from training.tracking import read_motion
from training.world import ATTRIBUTES, FPS, HEIGHT, WIDTH, ClipParams, all_params, held_out, render, sample_params

ROOT = Path(__file__).resolve().parent.parent
SPEC = ModelSpec.from_config(SMALL_SETTINGS)


class Oracle(AttributeProbe):
    """Reads rendered clips without a mistake: finds the parameters whose clip begins with this frame."""

    def __init__(self, known: dict[bytes, WindowReading]) -> None:
        super().__init__()
        self.known = known

    def read(self, frames: np.ndarray) -> WindowReading:
        return self.known[frames[0].tobytes()]


def shows(*values: str) -> ClipParams:
    """The world's first clip with these scene, time, subject, colour and motion; what else there is, is as usual."""
    named = dict(zip(("scene", "time", "subject", "colour", "motion"), values, strict=True))
    return next(params for params in all_params() if named.items() <= params.to_dict().items())


def clip(params: ClipParams, seed: int, frames: int = WINDOW) -> np.ndarray:
    return (render(params, seed, frames)[0] * 255 + 0.5).astype(np.uint8)


def played(shown: dict[str, Prompt]) -> evaluation.Film:
    """A model that answers each caption with the rendered clip of some prompt."""

    def film(prompts: Sequence[Prompt], seconds: float) -> Iterable[np.ndarray]:
        for prompt in prompts:
            other = shown.get(prompt.caption, prompt)
            yield clip(other.params, other.seed, round(seconds * FPS))

    return film


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return plan_prompts(8, seed=5)


def oracle_for(prompts: list[Prompt]) -> Oracle:
    known = {}
    for prompt in prompts:
        frames, _, track = render(prompt.params, prompt.seed, WINDOW)
        motion = read_motion(track.x, track.y)
        attributes = prompt.params.to_dict() | {"motion": motion.direction}
        reading = WindowReading(attributes, 1.0, track.x, track.y, motion.speed)
        known[(frames * 255 + 0.5).astype(np.uint8)[0].tobytes()] = reading
    return Oracle(known)


def different(prompts: list[Prompt]) -> dict[str, Prompt]:
    """For each caption, the clip of a prompt that differs from it in every attribute but the time."""
    mapping = {}
    for prompt in prompts:
        asked = prompt.params.to_dict()
        wrong = next(
            params
            for params in all_params()
            if all(value != asked[name] for name, value in params.to_dict().items() if name != "time")
        )
        mapping[prompt.caption] = Prompt(prompt.caption, wrong, prompt.seed)
    return mapping


# What prompts ask for


def test_prompts_are_full_held_out_and_repeatable(prompts: list[Prompt]) -> None:
    assert prompts == plan_prompts(8, seed=5) != plan_prompts(8, seed=6)
    assert all(held_out(prompt.params) for prompt in prompts)
    assert all(("time" in prompt.stated) == (prompt.params.scene != "space") for prompt in prompts)


def test_no_combination_is_scored_twice_and_every_second_phrasing_is_new() -> None:
    planned = plan_scored(64, seed=5)
    assert planned == plan_scored(64, seed=5) != plan_scored(64, seed=6)
    assert len({prompt.params for prompt in planned}) == 64 and all(held_out(prompt.params) for prompt in planned)
    assert [prompt.new_phrasing for prompt in planned] == [False, True] * 32
    assert all(stated_in(prompt.caption) == prompt.asked for prompt in planned)


def test_when_all_combinations_have_come_they_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    three = all_params()[:3]
    monkeypatch.setattr(asking, "all_params", lambda: three)
    monkeypatch.setattr(asking, "held_out", lambda params: True)
    monkeypatch.setattr(asking, "sample_params", lambda rng, split: three[int(rng.integers(3))])
    shown = [prompt.params for prompt in plan_scored(7)]
    assert {*shown[:3]} == {*shown[3:6]} == {*three} and shown[6] in three


@pytest.mark.parametrize(("count", "up", "down", "still"), [(0, 0, 0, 0), (1, 0, 0, 0), (8, 2, 1, 1), (17, 4, 4, 1)])
def test_long_videos_move_in_every_way(count: int, up: int, down: int, still: int) -> None:
    motions = [prompt.params.motion for prompt in plan_long(count, seed=5)]
    assert len(motions) == count
    assert [motions.count(motion) for motion in ("up", "down", "still")] == [up, down, still]


def test_captions_are_read_as_they_were_meant() -> None:
    rng = np.random.default_rng(3)
    for index in range(300):
        caption, stated = make_caption(sample_params(rng), rng, full=index % 2 == 0)
        assert stated_in(caption) == stated, caption


@pytest.mark.parametrize(
    ("caption", "stated"),
    [
        ("A crimson Rocket, above the mountains!", {"scene": "mountains", "subject": "rocket", "colour": "red"}),
        ("two dogs and a cat", {}),
        ("a ball and a car at sunset", {"time": "sunset"}),
        ("night and day in a city", {"scene": "city"}),
        ("a boat that is green in the yellow light", {"subject": "boat", "colour": "green"}),
        ("a ball that is pale white", {"subject": "ball", "colour": "white"}),
        (
            "rain falls on a red car in the city",
            {"scene": "city", "weather": "rain", "subject": "car", "colour": "red"},
        ),
        ("a red car in the falling snow", {"weather": "snow", "subject": "car", "colour": "red"}),
        ("snow falls over the mountains", {"scene": "mountains", "weather": "snow"}),
        ("a red balloon with heavy snow falling", {"weather": "snow", "subject": "balloon", "colour": "red"}),
        (
            "a red balloon rises as snow falls on a snowy field",
            {"scene": "snow", "weather": "snow", "subject": "balloon", "colour": "red", "motion": "up"},
        ),
        ("a yellow star among the stars", {"scene": "space", "subject": "star", "colour": "yellow"}),
    ],
)
def test_words_of_a_free_prompt(caption: str, stated: dict[str, str]) -> None:
    assert stated_in(caption) == stated


def test_a_prompt_file_is_scored_by_what_it_states(tmp_path: Path) -> None:
    tokenizer = lambda text: SimpleNamespace(input_ids=text.split())  # noqa: E731
    path = tmp_path / "prompts.txt"
    path.write_text("a red car\na star in space by day\n")
    first, second = read_prompts(path, tokenizer, 12)
    assert first.stated == ("subject", "colour")
    assert (first.params.subject, first.params.colour) == ("car", "red")
    assert second.stated == ("scene", "subject")  # space has no time of day
    shown = [WindowReading(first.params.to_dict() | {"colour": "blue"}, 1.0, np.zeros(1), np.zeros(1), 0.0)]
    scores = score(shown, [first])
    assert scores["subject"] == 1 and scores["colour"] == 0 and np.isnan(scores["scene"]) and np.isnan(scores["speed"])
    path.write_text("")
    with pytest.raises(TrainingDataError, match=r"prompts\.txt is empty"):
        read_prompts(path, tokenizer, 12)
    with pytest.raises(TrainingDataError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt", tokenizer, 12)


# Prompt following


def test_real_clips_score_as_the_ceiling(prompts: list[Prompt], tmp_path: Path) -> None:
    sheet = tmp_path / "sheets" / "scores.png"
    report = follow_prompts(played({}), oracle_for(prompts), prompts, sheet)
    assert all(report["prompt_following"][name] == report["ceiling"][name] for name in ATTRIBUTES)
    assert all(report["relative"][name] == pytest.approx(1) for name in ATTRIBUTES)
    assert list(report["prompt_following"]) == list(ATTRIBUTES)
    assert Image.open(sheet).height > 8 * 64


def test_clips_of_other_prompts_score_low(prompts: list[Prompt]) -> None:
    shown = different(prompts)
    following = follow_prompts(played(shown), oracle_for([*prompts, *shown.values()]), prompts, None)[
        "prompt_following"
    ]
    assert all(following[name] == 0 for name in ("scene", "subject", "colour")) and following["motion"] <= 0.25


def test_new_phrasings_are_also_scored_alone() -> None:
    planned = plan_scored(8, seed=5)
    new = [prompt for prompt in planned if prompt.new_phrasing]
    shown = different(new)
    report = follow_prompts(played(shown), oracle_for([*planned, *shown.values()]), planned, None)
    assert report["prompt_following"]["scene"] == 0.5 and report["combinations"] == 8
    alone = report["held_out_phrasings"]
    assert alone["prompts"] == 4 and alone["prompt_following"]["scene"] == 0 and alone["ceiling"]["scene"] == 1
    errors = report["standard_error"]
    assert errors["prompt_following"]["scene"] == pytest.approx(0.5 / 10**0.5)  # 5 of 10: one more of each
    assert 0 < errors["ceiling"]["scene"] < errors["prompt_following"]["scene"] < errors["relative"]["scene"]
    known = oracle_for(planned)
    assert follow_prompts(played({}), known, planned[::2], None)["held_out_phrasings"] is None


def test_a_share_is_the_surer_the_more_prompts_there_are() -> None:
    assert standard_error(0.5, 98) == pytest.approx(0.05)
    assert 0 < standard_error(1.0, 256) < 0.005 < standard_error(1.0, 16) < 0.06
    assert np.isnan(standard_error(float("nan"), 0))


# Long videos, judged by the probe that ships


@pytest.fixture(scope="module")
def probe() -> AttributeProbe:
    return load_judge(SHIPPED).probe


@pytest.fixture(scope="module")
def moving() -> Prompt:
    return Prompt("a ball", shows("city", "day", "ball", "red", "right"), 0)


def reports(probe: AttributeProbe, video: np.ndarray, prompt: Prompt) -> tuple[dict, dict]:
    real = rows([measure(probe, clip(prompt.params, prompt.seed, len(video)))], [prompt])
    shown = rows([measure(probe, video)], [prompt])
    return drift_report(shown, real), motion_report(shown, real)


def test_a_real_clip_neither_drifts_nor_rests(probe: AttributeProbe, moving: Prompt) -> None:
    # In the third window it leaves, and half a subject may be taken for another or seem slower.
    drift, motion = reports(probe, clip(moving.params, moving.seed, 2 * WINDOW), moving)
    assert len(drift["quality"]) == 2 and drift["relative"] == pytest.approx(1, abs=0.05)
    assert motion["frozen"] == motion["frozen_real"] == 0
    assert motion["speed"]["end"] == pytest.approx(1, abs=0.3)


def test_a_frozen_video_is_noticed(probe: AttributeProbe, moving: Prompt) -> None:
    frames = clip(moving.params, moving.seed, 4 * WINDOW)
    drift, motion = reports(probe, np.repeat(frames[:1], len(frames), axis=0), moving)
    assert motion["frozen"] == 1 and motion["speed"]["end"] < 0.05 and motion["change"]["start"] == 0
    assert drift["relative"] == pytest.approx(1, abs=0.01)  # a picture that stays is no drift


def test_what_decays_is_named(probe: AttributeProbe, moving: Prompt) -> None:
    frames = clip(moving.params, moving.seed, 4 * WINDOW)
    fading = frames.copy()
    fading[2 * WINDOW :] = (frames[2 * WINDOW :].astype(np.float32) * 0.15 + 110).astype(np.uint8)
    drift, _ = reports(probe, fading, moving)
    assert drift["relative"] < 0.8
    assert drift["parts"]["contrast"][-1] < 0.3 and drift["parts"]["sharpness"][-1] < 0.3
    other = clip(shows("desert", "day", "car", "blue", "right"), 4, 4 * WINDOW)
    drift, _ = reports(probe, np.concatenate([frames[: 2 * WINDOW], other[2 * WINDOW :]]), moving)
    assert drift["parts"]["scene"] == [1, 1, 0, 0] and drift["parts"]["subject"][-1] == 0


def flicker_of(videos: Sequence[np.ndarray]) -> dict[str, float] | None:
    return flicker(jump(video, SPEC) for video in videos)


def test_a_jump_where_the_first_frame_leaves_the_window_is_noticed() -> None:
    frames = np.repeat(np.arange(60, dtype=np.uint8)[:, None, None, None], 3, axis=3).repeat(8, axis=1)
    assert flicker_of([frames]) == dict.fromkeys(("mean", "worst", "elsewhere"), pytest.approx(1))
    leaves = SPEC.frames_in(SPEC.window_frames // SPEC.frames_per_block)
    assert leaves == 33
    jumping = frames.copy()
    jumping[leaves:] += 9
    seen = flicker_of([frames, jumping])
    assert seen["worst"] > 5 and seen["elsewhere"] == pytest.approx(1)
    elsewhere = frames.copy()
    elsewhere[leaves + 5 :] += 9
    assert flicker_of([elsewhere])["worst"] == pytest.approx(1)
    elsewhere[leaves + 12 :] += 9
    assert flicker_of([elsewhere])["worst"] == pytest.approx(1) and flicker_of([elsewhere])["elsewhere"] > 2
    assert flicker_of([frames[:leaves]]) is None
    still = np.zeros_like(frames)
    assert flicker_of([still])["worst"] == 1


def test_real_clips_are_reported_beside_the_videos(probe: AttributeProbe, moving: Prompt) -> None:
    resting = Prompt("a car", shows("city", "day", "car", "blue", "still"), 1)
    report = follow_time(played({}), SPEC, probe, [moving, resting], 2 * WINDOW / FPS, None)
    drift, real = report["drift"], report["drift"]["real"]
    assert len(real["quality"]) == 2 and real["quality"] == drift["quality"] and real["flicker"] == drift["flicker"]
    assert report["motion"]["videos"] == 1
    stopped = [np.repeat(clip(p.params, p.seed, 1), 2 * WINDOW, axis=0) for p in (moving, resting)]
    report = follow_time(lambda *_: stopped, SPEC, probe, [moving, resting], 2 * WINDOW / FPS, None)
    assert report["drift"]["real"] == real and report["drift"]["flicker"]["mean"] == 1 != real["flicker"]["mean"]


def test_no_long_prompts_no_drift(probe: AttributeProbe) -> None:
    assert follow_time(played({}), SPEC, probe, [], 5.0, None) == {"drift": None, "motion": None}


# Decoders


def test_decoder_psnr_prefers_the_true_decoder() -> None:
    frames = next(held_out_clips(1))[1]
    patches = to_patches(frames)
    patches = patches.reshape(-1, patches.shape[-1])
    pca = PatchPCA.fit(patches, np.ones(len(patches), np.float32), 16)
    scores = decoder_psnr(
        {"linear": pca.decode, "grey": lambda latents: np.full(frames.shape, 0.5, np.float32)}, pca.encode, [frames] * 2
    )
    assert scores["linear"] > scores["grey"] + 5


def test_clips_are_encoded_as_the_model_was_taught() -> None:
    judge = load_judge(SHIPPED)
    frames = next(held_out_clips(1))[1]
    vae, _ = evaluation.model_decoders(ROOT / "weights" / "embedded")
    assert choose_encoder(vae, judge.pca, frames)[1] == "principal components"
    other = PatchPCA(judge.pca.mean, judge.pca.components[::-1].copy(), judge.pca.scale)
    encode, name = choose_encoder(vae, other, frames)
    assert name == "the model's own encoder" and encode(frames).shape == judge.pca.encode(frames).shape


# The judge's folder


def test_a_fit_survives_saving_whatever_its_order_in_memory(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pca = PatchPCA.fit(rng.standard_normal((900, 768)).astype(np.float32), np.ones(900, np.float32), 4)
    turned = PatchPCA(pca.mean, np.asfortranarray(pca.components), pca.scale)
    write_pca(turned, tmp_path / "pca.safetensors")
    assert np.array_equal(read_pca(tmp_path / "pca.safetensors").components, pca.components)


def test_a_judge_of_another_world_is_refused(tmp_path: Path) -> None:
    shipped = load_judge(SHIPPED)
    assert all(value > 0.9 for value in shipped.held_out.values())
    folder = tmp_path / "probe"
    save_judge(folder, shipped.probe, shipped.pca, shipped.held_out)
    assert load_judge(folder).held_out == shipped.held_out
    report = json.loads((folder / "report.json").read_text())
    report["attributes"]["scene"] = ["moon"]
    (folder / "report.json").write_text(json.dumps(report))
    with pytest.raises(WeightsError, match="another world: its scene"):
        load_judge(folder)
    shutil.copy(SHIPPED / "report.json", folder / "report.json")
    (folder / "probe.safetensors").write_bytes(b"no tensors")
    with pytest.raises(WeightsError, match="damaged"):
        load_judge(folder)
    with pytest.raises(WeightsError, match=r"python -m training\.probe"):
        load_judge(tmp_path / "nowhere")


# The command line


def test_numbers_that_are_none_stay_valid_json() -> None:
    assert json.loads(json.dumps(rounded({"a": (float("nan"), 0.123456), "b": "c"}), allow_nan=False)) == {
        "a": [None, 0.1235],
        "b": "c",
    }


def test_embedded_model_by_the_real_command_line(tmp_path: Path) -> None:
    """Two processes, four prompts, videos long enough for a frame to leave the window."""
    arguments = ["--prompts", "4", "--long-prompts", "1", "--long-seconds", "4", "--processes", "2", "--json"]
    command = [sys.executable, "-m", "training.evaluate", "weights/embedded", *arguments]
    sheet = tmp_path / "evaluation.png"
    done = subprocess.run([*command, "--sheet", str(sheet)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    *table, last = done.stdout.splitlines()
    report = json.loads(last)
    assert table[0].startswith("Self-Forcing embedded") and any("wan decoder" in line for line in table)
    for key in ("prompt_following", "ceiling", "relative"):
        assert list(report[key]) == ["scene", "time", "weather", "subject", "colour", "motion"]
    # The model card's scores, with room for one or two of so few prompts and clips.
    following = report["prompt_following"]
    assert all(report["ceiling"][name] >= 0.75 for name in ATTRIBUTES) and min(following.values()) >= 0.5
    assert min(following[name] for name in ("scene", "colour", "motion")) >= 0.75
    assert np.mean(list(following.values())) >= 0.8
    assert report["combinations"] == 4 and report["held_out_phrasings"]["prompts"] == 2
    assert all(0 < error < 0.5 for error in report["standard_error"]["relative"].values())
    assert report["psnr"]["wan"] > 29.5 and report["psnr"]["taehv"] > 28.5
    drift, motion = report["drift"], report["motion"]
    assert 0.8 < drift["relative"] < 1.2 and 0.5 < drift["flicker"]["mean"] < 2 and report["fps"] > 0
    assert 0.95 < drift["real"]["relative"] < 1.05 and 0.8 < drift["real"]["flicker"]["mean"] < 1.2
    assert set(motion) == {"videos", "speed", "change", "frozen", "frozen_real"} and motion["videos"] == 1
    assert 0.65 < motion["speed"]["start"] < 1.35 and motion["frozen"] <= 0.5
    assert report["notes"] == [] and all(Image.open(path).width > 100 for path in report["sheets"])


def test_any_model_folder_and_prompt_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model_folder(tmp_path / "model", taehv=False)
    file = tmp_path / "prompts.txt"
    file.write_text("a red balloon\na car over the mountains\na ball\n")
    arguments = [str(folder), "--prompts-file", str(file), "--prompts", "2", "--processes", "1", "--long-prompts", "1"]
    arguments += ["--long-seconds", "4", "--sheet", str(tmp_path / "sheet.png"), "--json"]
    assert evaluation.main(arguments) == 0
    *table, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    assert report["model"] == "small" and report["prompts"] == 2 and report["prompt_following"]["time"] is None
    assert report["prompt_following"]["subject"] is not None and report["psnr"]["taehv"] is None
    assert report["combinations"] == 2 and report["held_out_phrasings"] is None
    assert report["psnr_encoder"] == "the model's own encoder" and any(report["psnr_encoder"] in line for line in table)
    assert "holds 3 prompts" in report["notes"][-1]
    assert "32x16 pixels, but the probe learnt" in report["notes"][0] and any("Note:" in line for line in table)


def test_words_the_model_does_not_know_are_said(tmp_path: Path) -> None:
    generator = SimpleNamespace(unknown_words=lambda text: ["fog"] if "fog" in text else [])
    asked = [Prompt("a car in the fog", shows("city", "day", "car", "red", "up"), 0, ())]
    told = evaluation.notes(generator, asked, (HEIGHT, WIDTH))
    assert "another world: it does not know 1 words of the prompts (fog)" in told[0] and "No prompt states" in told[1]


def test_a_file_that_is_scored_in_part_is_said() -> None:
    generator = SimpleNamespace(unknown_words=lambda text: [])
    asked = [Prompt("a car", shows("city", "day", "car", "red", "up"), 0, ("subject",))]
    assert evaluation.notes(generator, asked, (HEIGHT, WIDTH), in_file=1) == []
    (told,) = evaluation.notes(generator, asked, (HEIGHT, WIDTH), in_file=3)
    assert "holds 3 prompts, of which only the first 1 were scored: --prompts 3 scores them all" in told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{place}"], "is not a model folder"),
        (["{place}/nowhere"], "is not a model folder"),
        (["weights/embedded", "--prompts-file", "{place}/none.txt"], "cannot be read"),
        (["weights/embedded", "--prompts-file", "{place}/empty.txt"], "is empty"),
        (["weights/embedded", "--probe", "{place}"], "holds no probe"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_sentence(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "empty.txt").write_text("")
    assert evaluation.main([argument.format(place=tmp_path) for argument in arguments]) == 2
    told = capsys.readouterr()
    assert said in told.err and len(told.err.splitlines()) == 1 and told.out == ""


def test_impossible_numbers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--prompts", "0"], ["--long-seconds", "0"], ["--processes", "many"]):
        with pytest.raises(SystemExit) as stop:
            evaluation.main(["weights/embedded", *arguments])
        assert stop.value.code == 2
    assert "'0' is no whole number of at least 1" in capsys.readouterr().err


def test_a_process_that_ends_is_said(tmp_path: Path) -> None:
    with Crew(tmp_path / "no model", 1) as film, pytest.raises(TrainingError, match="try --processes 1"):
        list(film(plan_prompts(1), 1.0))


def test_videos_are_made_as_asked(prompts: list[Prompt]) -> None:
    requests: list[GenerationRequest] = []
    generator = SimpleNamespace(
        generate=lambda request: requests.append(request) or SimpleNamespace(frames=np.zeros((1, 8, 8, 3), np.uint8))
    )
    assert len(list(film_with(generator, taehv=True)(prompts[:2], 2.0))) == 2
    assert [request.seed for request in requests] == [prompt.seed for prompt in prompts[:2]]
    assert requests[0].seconds == 2.0 and requests[0].fps == FPS and requests[0].taehv


def test_table_of_a_report_without_long_videos() -> None:
    half = dict.fromkeys(ATTRIBUTES, 0.5) | {"weather": None}
    shares = {"prompt_following": half, "ceiling": half, "relative": half}
    shares["standard_error"] = {key: dict.fromkeys(ATTRIBUTES, 0.123) for key in shares}
    report = {"model": "m", "prompts": 4, "combinations": 3, **shares, "held_out_phrasings": {"prompts": 2, **shares}}
    report |= {"by_value": {"scene": {"city": "1/1"}}, "drift": None, "motion": None, "fps": 12.0, "notes": ["n"]}
    report |= {"psnr": {"wan": 30.0, "taehv": None}, "psnr_encoder": "something", "sheets": ["s.png"]}
    table = as_table(report)
    assert table.startswith("m, 4 prompts, 3 different combinations") and table.count("+/-") == 6
    assert "the 2 of them in phrasings that training never has" in table and "latents of something" in table
    assert "taehv decoder: none" in table and "scene: city 1/1" in table and "Sheet: s.png" in table
