"""Suggestions for prompts: what templates keep, add and never say, what a language model may do, and the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from pipeline import SelfForcingPipeline
from pipeline.cli import EMBEDDED_MODEL
from pipeline.config import MAX_VARIANT
from pipeline.errors import (
    Cancelled,
    DeadlineExceeded,
    DownloadError,
    InvalidRequest,
    OutOfMemory,
    SelfForcingError,
    WeightsError,
)
from pipeline.folder import ModelFolder
from pipeline.load_lock import LOAD_LOCK
from prompting import cli as prompting_cli
from prompting.language import MAX_WAITING, LanguageEnhancer, cleaned
from prompting.templates import TEMPLATES_FILE, TemplateEnhancer
from tests.small import write_language_model, write_model_folder
from tests.waiting import wait_until
from training.asked import stated_in
from training.captions import MAX_TOKENS, make_caption, vocabulary, words
from training.enhancing import templates, write
from training.world import ATTRIBUTES, IN_SPACE, ClipParams, sample_params

ROOT = Path(__file__).resolve().parent.parent
FULL = "a red balloon rises over the mountains at sunset in clear weather"


@pytest.fixture(scope="module")
def enhancer() -> TemplateEnhancer:
    found = TemplateEnhancer.from_folder(EMBEDDED_MODEL)
    assert found is not None
    return found


def prompts(count: int, seed: int) -> list[tuple[str, dict[str, str]]]:
    """Captions that leave something out, cut short or with words that the model does not know, and what they state."""
    rng = np.random.default_rng(seed)
    strange = ("", " beautiful", " 8k", " dragons", ", cinematic", " Ω")
    drawn = [make_caption(sample_params(rng), rng) for _ in range(count)]
    return [(caption + strange[number % len(strange)], stated) for number, (caption, stated) in enumerate(drawn)]


def assert_showable(text: str) -> dict[str, str]:
    """What the text states, which must be all that a clip of the world shows, in words of the world."""
    assert set(words(text)) <= {*vocabulary(), ","} and len(words(text)) < MAX_TOKENS, text
    read = stated_in(text)
    in_space = IN_SPACE if read.get("scene") == "space" else {}
    assert not in_space.keys() & read.keys(), f"space has no time and no weather: {text}"
    ClipParams(**(read | in_space))  # raises if the world cannot show it, or if anything is left open
    return read


# ---- templates


def test_what_a_caption_states_is_kept_and_the_rest_filled_in(enhancer: TemplateEnhancer) -> None:
    added = {name: set() for name in ATTRIBUTES}
    for prompt, stated in prompts(400, seed=3):
        suggestion = enhancer.enhance(prompt)
        read = assert_showable(suggestion.text)
        assert read | stated == read, f"{prompt} -> {suggestion.text}"
        for name in read.keys() - stated.keys():
            added[name].add(read[name])
    # The tables' values turn up; none is always the same.
    assert all(len(added[name]) >= 3 for name in ATTRIBUTES if name != "subject"), added


def test_half_sentences_and_single_words(enhancer: TemplateEnhancer) -> None:
    for number, (caption, _) in enumerate(prompts(150, seed=4)):
        pieces = caption.split()
        prompt = " ".join(pieces[: 1 + number % len(pieces)])
        suggestion = enhancer.enhance(prompt, number % 3)
        read = assert_showable(suggestion.text)
        stated = stated_in(prompt)
        dropped = set(IN_SPACE) if stated.get("scene") == "space" else set()
        assert all(read[name] == value for name, value in stated.items() if name not in dropped), (prompt, suggestion)


def test_the_model_reads_every_word(enhancer: TemplateEnhancer) -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL / "tokenizer")
    for prompt, _ in prompts(40, seed=5):
        tokens = tokenizer(enhancer.enhance(prompt).text, truncation=False, padding=False).input_ids
        assert tokenizer.unk_token_id not in tokens and len(tokens) <= MAX_TOKENS


@pytest.mark.parametrize(
    ("prompt", "stated", "noted"),
    [
        ("a boat sails", {"subject": "boat", "scene": "ocean"}, "Added"),
        ("THE crimson hot air balloon!", {"subject": "balloon", "colour": "red"}, "Added"),
        ("a seagull in a town at midnight", {"subject": "bird", "scene": "city", "time": "night"}, "seagull (bird)"),
        ("two balloons", {"subject": "balloon"}, "no place for it: two"),
        ("a green balloon and a red car", {"subject": "balloon", "colour": "green"}, "no place for it: red, car"),
        ("the ball is blue", {"subject": "ball", "colour": "blue"}, "Added"),
        ("a red and shiny car", {"subject": "car", "colour": "red"}, "shiny"),
        ("a purple dragon", {}, "no place for it: purple, dragon"),
        ("a star in space at sunset in the rain", {"subject": "star", "scene": "space"}, "at sunset"),
        ("a car by day, under a bright sky", {"weather": "clear", "time": "day"}, "Added"),
        ("风景", {}, "风景"),
    ],
)
def test_free_prompts(enhancer: TemplateEnhancer, prompt: str, stated: dict[str, str], noted: str) -> None:
    for variant in range(4):
        suggestion = enhancer.enhance(prompt, variant)
        read = assert_showable(suggestion.text)
        assert read | stated == read, suggestion
        assert noted in " ".join(suggestion.notes), suggestion


def test_the_prompts_own_words_are_kept(enhancer: TemplateEnhancer) -> None:
    text = enhancer.enhance("the scarlet rocket ship drifts downtown in a blizzard").text
    assert all(word in text for word in ("the scarlet rocket ship", "drifts", "downtown", "in a blizzard"))


def test_what_is_denied_is_not_shown(enhancer: TemplateEnhancer) -> None:
    for variant in range(12):
        assert stated_in(enhancer.enhance("a car in the city without rain", variant).text)["weather"] != "rain"
        read = stated_in(enhancer.enhance("a balloon, no snow, no fog, not in the rain, not at night", variant).text)
        assert read["weather"] == "clear" and read["time"] != "night"


@pytest.mark.parametrize(
    ("prompt", "away"),
    [
        ("a balloon not red", {"colour": "red"}),
        ("a balloon that is not red", {"colour": "red"}),
        ("a balloon that isn't red", {"colour": "red"}),
        ("not a red balloon", {"colour": "red"}),
    ],
)
def test_denied_colours_are_not_shown(enhancer: TemplateEnhancer, prompt: str, away: dict[str, str]) -> None:
    for variant in range(40):
        suggestion = enhancer.enhance(prompt, variant)
        read = stated_in(suggestion.text)
        assert read["subject"] == "balloon" and not away.items() & read.items(), suggestion
        assert "Kept away: red." in suggestion.notes


@pytest.mark.parametrize(
    ("prompt", "away"),
    [
        ("a red ball never moving", "moving"),
        ("a bird that does not fly", "fly"),
        ("a bird that doesn’t fly over the ocean", "fly"),
        ("a boat not sailing", "sailing"),
    ],
)
def test_what_does_not_move_rests(enhancer: TemplateEnhancer, prompt: str, away: str) -> None:
    for variant in range(12):
        suggestion = enhancer.enhance(prompt, variant)
        assert stated_in(suggestion.text)["motion"] == "still", suggestion
        assert f"Kept away: {away}." in suggestion.notes


def test_a_denied_verb_is_not_drawn_for_a_stated_motion(enhancer: TemplateEnhancer) -> None:
    for variant in range(20):
        words_of_it = enhancer.enhance("a bird to the right, not flying, moves to the right", variant).text.split()
        assert not {"flies", "flying"} & set(words_of_it)


def test_what_is_kept_away_is_told(enhancer: TemplateEnhancer) -> None:
    notes = enhancer.enhance("a car in the city without rain").notes
    assert "Kept away: rain." in notes and not any("rain" in note for note in notes if "Kept away" not in note)


def test_where_everything_is_denied_that_is_said(enhancer: TemplateEnhancer) -> None:
    prompt = ", ".join(f"no {subject}" for subject in ATTRIBUTES["subject"])
    with pytest.raises(SelfForcingError, match="no other sentence for this prompt"):
        enhancer.enhance(prompt)


def test_what_moves_does_not_rest(enhancer: TemplateEnhancer) -> None:
    for variant in range(12):
        text = enhancer.enhance("a bird flaps over the city", variant).text
        assert stated_in(text)["motion"] != "still" and "flaps" in text


def test_the_same_question_has_the_same_answer_and_the_next_another_one(enhancer: TemplateEnhancer) -> None:
    for prompt in ("a balloon", "in space", FULL):
        texts = [enhancer.enhance(prompt, variant).text for variant in range(4)]
        assert texts == [enhancer.enhance(prompt, variant).text for variant in range(4)]
        assert len(set(texts)) == 4 and prompt not in texts


def test_the_answer_does_not_depend_on_the_process() -> None:
    def ask(seed: str) -> str:
        environment = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-m", "pipeline", "enhance", "a bird without rain", "--json"]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout

    assert ask("1") == ask("2")


def test_a_prompt_that_says_everything_stays_as_it_is_and_that_is_said(enhancer: TemplateEnhancer) -> None:
    for variant in range(6):
        suggestion = enhancer.enhance(FULL, variant)
        assert stated_in(suggestion.text) == stated_in(FULL)
        assert suggestion.notes == (
            "Your prompt says everything that this model reads. This is the same in another way.",
        )


@pytest.mark.parametrize("prompt", ["", "  ", "\u0000", "a" * 2001, None, 7])
def test_bad_prompts_are_refused(enhancer: TemplateEnhancer, prompt: Any) -> None:
    with pytest.raises(InvalidRequest):
        enhancer.enhance(prompt)


@pytest.mark.parametrize("variant", [-1, 1.5, True, "1", MAX_VARIANT + 1, None])
def test_bad_variants_are_refused(enhancer: TemplateEnhancer, variant: Any) -> None:
    with pytest.raises(InvalidRequest, match="variant is"):
        enhancer.enhance("a ball", variant)


@pytest.mark.parametrize("word", ["dragon ", "without ", "red ", "a ball ", ", ", "{verb} ", "{subject} %s "])
def test_hostile_prompts_get_an_answer_soon(enhancer: TemplateEnhancer, word: str) -> None:
    prompt = (word * 2000)[:2000]
    began = time.perf_counter()
    assert_showable(enhancer.enhance(prompt, MAX_VARIANT).text)
    assert time.perf_counter() - began < 20


# ---- the file


def test_the_shipped_file_is_that_of_the_world() -> None:
    assert json.loads((EMBEDDED_MODEL / TEMPLATES_FILE).read_text()) == json.loads(json.dumps(templates()))


def test_a_folder_without_the_file_has_no_templates(tmp_path: Path) -> None:
    assert TemplateEnhancer.from_folder(tmp_path) is None
    assert SelfForcingPipeline.from_pretrained(write_model_folder(tmp_path)).enhancer is None


def test_templates_of_another_model_are_refused(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path)
    write(folder)
    with pytest.raises(WeightsError, match="belongs to another model"):
        SelfForcingPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("sentences"),
        lambda data: data.update(format=2),
        lambda data: data["attributes"].pop("motion"),
        lambda data: data["attributes"]["scene"].update(moon=[]),
        lambda data: data["attributes"].update(colour=["red"]),
        lambda data: data.update(sentences=["{nothing}"]),
        lambda data: data["verbs"].pop("car"),
        lambda data: data.update(only_with={"at noon": {"weather": "hail"}}),
        lambda data: data["attributes"]["scene"].update(moon=[7]),
        lambda data: data["attributes"]["scene"].update(moon=["!"]),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, damage: Callable[[dict], object]) -> None:
    data = json.loads(json.dumps(templates()))
    damage(data)
    (tmp_path / TEMPLATES_FILE).write_text(json.dumps(data))
    with pytest.raises(WeightsError, match="damaged or of another version"):
        TemplateEnhancer.from_folder(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "7", "\x00", "[" * 100_000])
def test_what_is_no_such_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / TEMPLATES_FILE).write_text(content)
    with pytest.raises(WeightsError):
        TemplateEnhancer.from_folder(tmp_path)


# ---- a language model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_language_model(tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> Path:
    """A model that never comes to an end by itself."""
    return write_language_model(tmp_path_factory.mktemp("endless"), ends=False, room=100_000)


def test_it_writes_loaded_at_the_first_use_on_its_own_thread(folder: Path) -> None:
    language = LanguageEnhancer(str(folder))
    assert not language.loaded and not threads()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = language.enhance("a red balloon")
    assert torch.equal(torch.rand(1), expected), "torch's generator belongs to everybody"
    assert language.loaded and first.notes == (f"Written by {folder.name}.",)
    assert 3 < len(first.text.split()) <= 160 and "<" not in first.text
    assert language.enhance("a red balloon") == first
    assert len({language.enhance("a red balloon", variant).text for variant in range(4)}) > 1
    assert len(threads()) == 1 and language.close() and not threads()
    with pytest.raises(Cancelled):
        language.enhance("a red balloon")


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "language model"]


def test_the_length_is_limited(endless: Path) -> None:
    language = LanguageEnhancer(str(endless), max_new_tokens=12)
    assert 6 <= len(language.enhance("a red balloon").text.split()) <= 12
    assert language.close()


def test_a_question_can_be_dropped(endless: Path) -> None:
    language = LanguageEnhancer(str(endless), max_new_tokens=50_000)
    dropped = threading.Event()
    threading.Timer(0.5, dropped.set).start()
    began = time.monotonic()
    with pytest.raises(Cancelled):
        language.enhance("a red balloon", cancel=dropped)
    assert time.monotonic() - began < 30
    wait_until(lambda: language._current is None, 5)  # it stops writing, too, and not only its caller waiting
    assert language.close()


def test_the_time_limit_ends_the_writing(endless: Path) -> None:
    language = LanguageEnhancer(str(endless), max_new_tokens=50_000, max_seconds=30)
    language._model, language._tokenizer = language._place.load()
    language._max_seconds = 0.4
    with pytest.raises(DeadlineExceeded, match=r"longer than 0\.4 s. Ask again later, or write the prompt yourself"):
        language.enhance("a red balloon")
    wait_until(lambda: language._current is None, 5)
    assert language.close()


def test_a_model_that_is_loading_keeps_nobody_waiting(folder: Path, monkeypatch) -> None:
    language = LanguageEnhancer(str(folder), max_seconds=0.3)
    may_load, load = threading.Event(), language._place.load
    monkeypatch.setattr(language._place, "load", lambda: may_load.wait(10) and load())
    with pytest.raises(DeadlineExceeded, match="still being loaded. Ask again"):
        language.enhance("a ball")
    may_load.set()
    wait_until(lambda: language.loaded)
    language._max_seconds = 30
    assert language.enhance("a ball").text
    assert language.close()


def test_too_many_questions_are_refused_at_once(folder: Path, monkeypatch) -> None:
    language = LanguageEnhancer(str(folder))
    may_load = threading.Event()
    monkeypatch.setattr(language._place, "load", lambda: may_load.wait(10) and 1 / 0)
    askers = [Asker(language) for _ in range(1 + MAX_WAITING)]
    askers[0].start()
    wait_until(lambda: language._current is not None)
    for asker in askers[1:]:
        asker.start()
    wait_until(lambda: len(language._waiting) == MAX_WAITING)
    with pytest.raises(SelfForcingError, match="too many questions"):
        language.enhance("a ball")
    # One that nobody waits for any more gives its place back, while the model is busy all the time.
    askers[1].dropped.set()
    wait_until(lambda: len(language._waiting) == MAX_WAITING - 1)
    late = Asker(language)
    late.start()
    wait_until(lambda: len(language._waiting) == MAX_WAITING)
    for asker in (*askers, late):
        asker.dropped.set()
    for asker in (*askers, late):
        asker.join(5)
        assert isinstance(asker.error, Cancelled)
    assert language._waiting == deque()
    may_load.set()
    assert language.close()


def test_a_question_that_is_over_makes_room_for_the_next_at_once(folder: Path, monkeypatch) -> None:
    language = LanguageEnhancer(str(folder))
    may_load = threading.Event()
    monkeypatch.setattr(language._place, "load", lambda: may_load.wait(10) and 1 / 0)
    monkeypatch.setattr("prompting.language._POLL_SECONDS", 30)  # whoever asked does not notice by itself
    askers = [Asker(language) for _ in range(1 + MAX_WAITING)]
    askers[0].start()
    wait_until(lambda: language._current is not None)
    for asker in askers[1:]:
        asker.start()
    wait_until(lambda: len(language._waiting) == MAX_WAITING)
    for asker in askers[1:]:
        asker.dropped.set()
    late = Asker(language)
    late.start()
    wait_until(lambda: len(language._waiting) == 1)
    may_load.set()
    late.join(5)
    assert type(late.error) is SelfForcingError and "failed" in str(late.error)
    assert language.close()


class Asker(threading.Thread):
    """Asks, and keeps the error that comes of it."""

    def __init__(self, language: LanguageEnhancer) -> None:
        super().__init__(daemon=True)
        self.dropped = threading.Event()
        self.error: Exception | None = None
        self._language = language

    def run(self) -> None:
        try:
            self._language.enhance("a ball", 0, self.dropped)
        except Exception as error:
            self.error = error


class Panic(BaseException):
    """As tokenizers' own is: no `Exception`."""


@pytest.mark.parametrize("error", [Panic("of a tokenizer"), SystemExit(3), KeyboardInterrupt()])
def test_no_error_ends_the_thread(folder: Path, monkeypatch, error: BaseException) -> None:
    language = LanguageEnhancer(str(folder), max_seconds=20)
    load, failures = language._place.load, [error]
    monkeypatch.setattr(language._place, "load", lambda: load() if not failures else raise_(failures.pop()))
    with pytest.raises(SelfForcingError, match="^The language model failed"):
        language.enhance("a ball")
    thread = language._thread
    assert language.enhance("a ball").text and language._thread is thread
    assert language.close()


def test_it_leaves_a_core_to_others(folder: Path, monkeypatch) -> None:
    usual, found = torch.get_num_threads(), []
    language = LanguageEnhancer(str(folder), max_seconds=20)
    monkeypatch.setattr(language, "_ask", lambda *_: (found.append(torch.get_num_threads()), ("a ball", False))[1])
    try:
        torch.set_num_threads(3)
        for _ in range(2):
            language.enhance("a ball")
        other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert [*found, torch.get_num_threads()] == [2, 2, 3, 3]
    finally:
        torch.set_num_threads(usual)
        assert language.close()


def test_a_thread_that_died_is_replaced(folder: Path) -> None:
    language = LanguageEnhancer(str(folder), max_seconds=20)
    language._thread = dead = threading.Thread(target=print)
    dead.start()
    dead.join()
    assert language.enhance("a ball").text
    assert language.close()


def test_nothing_else_is_loaded_at_the_same_time(folder: Path, tmp_path: Path) -> None:
    model = ModelFolder(write_model_folder(tmp_path))
    language = LanguageEnhancer(str(folder))
    loaded: list[str] = []
    loaders = [
        threading.Thread(target=lambda: (model.load("transformer", torch.float32), loaded.append("video"))),
        threading.Thread(target=lambda: (language._place.load(), loaded.append("language"))),
    ]
    with LOAD_LOCK:
        for loader in loaders:
            loader.start()
        time.sleep(1.5)
        assert loaded == []
    for loader in loaders:
        loader.join(20)
    assert sorted(loaded) == ["language", "video"]


def test_a_model_larger_than_the_free_memory_is_not_loaded(folder: Path, monkeypatch) -> None:
    numbers = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=4 * numbers - 1))
    monkeypatch.setattr("prompting.source._gigabytes", lambda size: f"{size} B")
    language = LanguageEnhancer(str(folder))
    with pytest.raises(OutOfMemory, match=f"needs {4 * numbers} B of memory, but only {4 * numbers - 1} B are free"):
        language.enhance("a ball")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=4 * numbers))
    assert language.enhance("a ball").text
    assert language.close()


def test_a_name_with_a_revision_is_never_a_folder(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "model@" + "0" * 40
    for place in (tmp_path / name, tmp_path / "org" / "model"):
        place.mkdir(parents=True)
        copy_of(folder, place)
    with pytest.raises(InvalidRequest, match=r"enhancer is 'model@0.* is a folder here.*Write \./ before"):
        LanguageEnhancer(name)
    assert LanguageEnhancer(f"./{name}").enhance("a ball").text
    # Nor is the name alone, where a folder is called so.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DownloadError, match="org/model cannot be fetched"):
        LanguageEnhancer("org/model@" + "0" * 40).enhance("a ball")


def hub_with(folder: Path, size: int) -> Callable[..., Any]:
    """`snapshot_download` of a hub that has this folder."""

    def download(name: str, *, revision: str, dry_run: bool = False, **_: Any) -> Any:
        assert (name, revision) == ("org/model", "0" * 40)
        return [SimpleNamespace(file_size=size, will_download=True)] if dry_run else str(folder)

    return download


def test_what_does_not_fit_on_the_disk_is_not_downloaded(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub_with(folder, 2_000_000_000))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1_900_000_000))
    language = LanguageEnhancer("org/model@" + "0" * 40)
    with pytest.raises(DownloadError, match=r"is 2\.0 GB to download, but only 1\.9 GB are free"):
        language.enhance("a ball")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub_with(folder, 1_000_000_000))
    assert language.enhance("a ball").notes == ("Written by org/model.",)
    assert language.close()


def test_a_failure_is_told_without_its_cause_and_the_next_question_is_answered(folder: Path, monkeypatch) -> None:
    language = LanguageEnhancer(str(folder))
    load, failures = language._place.load, [RuntimeError(f"secret of {folder}"), MemoryError()]
    monkeypatch.setattr(language._place, "load", lambda: load() if not failures else raise_(failures.pop()))
    with pytest.raises(SelfForcingError, match="not enough memory"):
        language.enhance("a ball")
    with pytest.raises(SelfForcingError, match="^The language model failed. Ask again, or write the prompt yourself.$"):
        language.enhance("a ball")
    assert language.enhance("a ball").text
    assert language.close()


def raise_(error: BaseException) -> None:
    raise error


def test_a_prompt_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    language = LanguageEnhancer(str(write_language_model(tmp_path, room=250)))
    with pytest.raises(InvalidRequest, match="too long for .* 250 tokens"):
        language.enhance("ball " * 300)
    assert language.close()


def test_models_with_a_form_for_questions_are_asked_in_it(folder: Path) -> None:
    language = LanguageEnhancer(str(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = language._tokens(tokenizer, "a red balloon")
    form = "{% for m in messages %}the car {{ m.content }}{% endfor %}{% if add_generation_prompt %} slowly{% endif %}"
    tokenizer.chat_template = form
    text = tokenizer.decode(language._tokens(tokenizer, "a red balloon")[0])
    assert text.startswith("the car") and text.endswith("red balloon slowly")
    assert tokenizer.decode(plain[0]).rstrip().endswith("balloon <unk> <unk>")  # `Prompt:`, which it does not know


@pytest.mark.parametrize(
    "source",
    ["", "nowhere", "org/name", "org/name@main", "org/name@" + "A" * 40, "a/b/c@" + "0" * 40, "\0", "x" * 5000],
)
def test_sources_that_are_neither_folder_nor_pinned_are_refused(source: str) -> None:
    with pytest.raises((InvalidRequest, WeightsError), match="enhancer is .* but must be the folder|config.json"):
        LanguageEnhancer(source)


def copy_of(folder: Path, target: Path) -> Path:
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_only_whole_safetensors_without_code_are_loaded(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="no config.json"):
        LanguageEnhancer(str(tmp_path / "empty"))
    copy = copy_of(folder, tmp_path)
    weights = copy / "model.safetensors"
    tensors = load_file(weights)
    weights.rename(copy / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="safetensors files, the only ones"):
        LanguageEnhancer(str(copy))
    weights.write_bytes(b"not a tensor in sight")
    assert_not_loaded(copy, "cannot be loaded")
    save_file({name: tensor for name, tensor in tensors.items() if "mlp.up" not in name}, weights, {"format": "pt"})
    assert_not_loaded(copy, "1 tensors are missing, the first is model.layers.0.mlp.up_proj.weight")
    save_file(tensors, weights, {"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": code}))
    (copy / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    assert_not_loaded(copy, "needs code of its own")
    assert not (tmp_path / "executed").exists()


def assert_not_loaded(folder: Path, reason: str) -> None:
    language = LanguageEnhancer(str(folder))
    with pytest.raises(WeightsError, match=reason) as refused:
        language.enhance("a ball")
    assert str(folder.parent) not in str(refused.value)
    assert language.close()


def test_a_hub_that_cannot_be_reached_is_told(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    language = LanguageEnhancer("nobody/nothing@" + "0" * 40)
    with pytest.raises(DownloadError, match="nobody/nothing cannot be fetched"):
        language.enhance("a ball")
    assert language.close()


@pytest.mark.parametrize(
    ("written", "unfinished", "prompt"),
    [
        ("A red ball rolls. It glows", False, "A red ball rolls. It glows"),
        ("A red ball rolls. It glo", True, "A red ball rolls."),
        ("A ball of 3.5 m rolls", True, "A ball of 3.5 m rolls"),
        ('  "A red ball rolls."\n\nI hope this helps!', False, "A red ball rolls."),
        ("**Prompt:** A red ball\nrolls.", False, "A red ball rolls."),
        ("<think>Hm. A ball?</think>\n\nA ball.", False, "A ball."),
        ("still thinking</think> A ball", False, "A ball"),
        ("caf\u00c3\u00a9 &amp; ball", False, "café & ball"),
        ("A ball. " + "no end " * 2000, False, "A ball."),
    ],
)
def test_what_it_writes_is_cleaned(written: str, unfinished: bool, prompt: str) -> None:
    assert cleaned(written, unfinished) == prompt


def test_what_is_too_long_is_cut_between_words() -> None:
    assert 1900 < len(cleaned("no end " * 2000)) <= 2000 and cleaned("no end " * 2000).endswith((" no", " end"))


@pytest.mark.parametrize("written", ["", " \n", "<think>What", '""', "\u0000"])
def test_nothing_is_no_suggestion(written: str) -> None:
    with pytest.raises(SelfForcingError, match="nothing that can be used"):
        cleaned(written)


# ---- the command


def test_the_command_prints_text_and_notes(capsys) -> None:
    assert prompting_cli.main(["a purple balloon"]) == 0
    out, err = capsys.readouterr()
    assert stated_in(out)["subject"] == "balloon" and out.count("\n") == 1 and "purple" in err
    assert prompting_cli.main(["a purple balloon", "--json", "--variant", "1"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer.keys() == {"text", "notes"} and answer["text"] != out.strip() and "purple" in answer["notes"][1]


def test_the_command_asks_a_language_model(folder: Path, capsys) -> None:
    assert prompting_cli.main(["a red balloon", "--enhancer", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert len(out.split()) > 3 and "Written by" in err


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["", "--json"], 2, "The prompt is empty"),
        (["a ball", "--variant", "-1"], 2, "variant is -1"),
        (["a ball", "--variant", "x"], 2, "invalid int value"),
        (["a ball", "--enhancer", "org/name"], 2, "40 digits of a revision"),
        (["a ball", "--model", "nowhere"], 2, "no model folder"),
        (["a ball", "--model", "nowhere", "--enhancer", "{silent}"], 2, "cannot go together"),
        (["a ball", "--model", "{bare}"], 2, "no templates for prompts. Pick a language model with --enhancer"),
        (["a ball", "--enhancer", "{silent}"], 1, "nothing that can be used"),
    ],
)
def test_the_command_ends_with_a_sentence(
    arguments: list[str], code: int, reason: str, folder: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    monkeypatch.setattr(LanguageEnhancer, "_ask", lambda *_: (" ", False))
    places = {"bare": tmp_path, "silent": folder}
    assert prompting_cli.main([argument.format(**places) for argument in arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and reason in err and err.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_command(folder: Path, number: signal.Signals) -> None:
    program = (
        "import sys, time\nfrom pipeline import __main__\nfrom prompting import source\n"
        "def load(place):\n    print('loading', flush=True)\n    time.sleep(60)\n"
        "source.Place.load = load\nsys.exit(__main__.main(['enhance', 'a ball', '--enhancer', sys.argv[1]]))"
    )
    command = [sys.executable, "-c", program, str(folder)]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell lets what it starts in the background ignore Ctrl+C, and so would this, if the tests run there.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout.readline() == "loading\n"
        process.send_signal(number)
        assert process.stderr.readline() == "Stopped.\n"
        for again in (signal.SIGTERM, signal.SIGINT):  # while the thread is given its time to end
            process.send_signal(again)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and err == ""
