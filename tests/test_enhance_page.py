"""The Enhance button and the endpoint: what they show, that nothing is replaced unasked, that videos never wait."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

import app
from pipeline.cli import EMBEDDED_MODEL
from pipeline.errors import Cancelled, DeadlineExceeded, SelfForcingError
from prompting.enhancer import Suggestion
from prompting.templates import TemplateEnhancer
from tests.scripted import WORDS, ScriptedPipeline
from tests.server import Refused, Server, free_port
from tests.waiting import wait_until
from web.enhance import LANGUAGE, TEMPLATES


@dataclass
class SlowLanguage:
    """A language model that writes when it may, and notes whether anybody waited to the end."""

    may_answer: threading.Event = field(default_factory=threading.Event)
    asked: list[tuple[str, int]] = field(default_factory=list)
    dropped: int = 0
    error: SelfForcingError | None = None

    def enhance(self, prompt: str, variant: int = 0, cancel: threading.Event | None = None) -> Suggestion:
        self.asked.append((prompt, variant))
        while not self.may_answer.wait(0.02):
            if cancel is not None and cancel.is_set():
                self.dropped += 1
                raise Cancelled("The question was dropped.")
        if self.error is not None:
            raise self.error
        return Suggestion(f"{prompt} over the ocean, in cinematic light, take {variant}", ("Written by slow.",))


@pytest.fixture(scope="module")
def templates() -> TemplateEnhancer:
    found = TemplateEnhancer.from_folder(EMBEDDED_MODEL)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def running(templates: TemplateEnhancer) -> Iterator[tuple[Server, SlowLanguage]]:
    language = SlowLanguage()
    server = Server(ScriptedPipeline(vocabulary=sorted(WORDS), enhancer=templates), language=language)
    yield server, language
    language.may_answer.set()
    server.close()


@pytest.fixture
def both(running: tuple[Server, SlowLanguage]) -> tuple[Server, SlowLanguage]:
    """A page whose visitors may choose."""
    server, language = running
    server.reset()
    language.may_answer.clear()
    language.asked.clear()
    language.dropped, language.error = 0, None
    return running


def visible(server: Server) -> list[bool]:
    """Of the button and of the choice, on a page that comes now."""
    found = {part["props"].get("elem_id"): part["props"] for part in server.demo.config["components"]}
    return [found[name]["visible"] for name in ("enhance", "enhance-by")]


def enhance(server: Server, prompt: str, by: str, text: str = "", asked: str = "", session: str | None = None) -> list:
    """All values of (asked, box, text, notes, use, button)."""
    return server.run(prompt, by, text, asked, name="ask", session=session)


# ---- where there is one


@pytest.fixture
def bare(both: tuple[Server, SlowLanguage]) -> Iterator[Callable[[Any, Any], None]]:
    """Exchanges what makes suggestions: the model's templates and the language model; None is none of it."""
    server, language = both
    templates = server.page.generator.pipeline.enhancer

    def use(new_templates: Any, new_language: Any) -> None:
        server.page.generator.pipeline.enhancer, server.page.help._language = new_templates, new_language
        server.page.fit_to_model()

    yield use
    use(templates, language)


def test_without_an_enhancer_there_is_no_button(both: tuple[Server, SlowLanguage], bare, tmp_path: Path) -> None:
    server, _ = both
    assert visible(server) == [True, True]
    bare(None, None)
    assert visible(server) == [False, False]
    with pytest.raises(Refused, match="nothing here to make suggestions for the prompts of scripted"):
        enhance(server, "a ball", TEMPLATES)
    client = Client(server.url, download_files=tmp_path, verbose=False)
    assert client.predict(api_name="/options")["enhancers"] == []
    for by, missing in (("", "nothing"), ("templates", "no templates"), ("language", "no language model")):
        with pytest.raises(AppError, match=f"There is {missing} here") as refused:
            client.predict(prompt="a ball", by=by, api_name="/enhance")
        assert "--" not in str(refused.value), "a visitor cannot start the program with other options"


def test_a_model_for_long_prompts_says_so_where_nothing_writes_them(
    both: tuple[Server, SlowLanguage], bare, templates, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, language = both

    def hint() -> dict[str, Any]:
        server.page.fit_to_model()
        parts = server.demo.config["components"]
        return next(part["props"] for part in parts if part["props"].get("elem_id") == "prompt-hint")

    bare(None, None)
    assert not hint()["visible"], "a model with a list of words wants short sentences of those"
    monkeypatch.setattr(server.page.generator.pipeline, "known_words", lambda: [])
    shown = hint()
    assert shown["visible"] and "long, detailed prompts" in shown["value"] and "app.py --enhancer" in shown["value"]
    for makers in ((templates, None), (None, language)):
        bare(*makers)
        assert not hint()["visible"]
    assert server.page.ui.without_model()[server.page.ui.suggestion.hint] == {"visible": False}


def test_where_there_is_one_there_is_no_choice(both: tuple[Server, SlowLanguage], bare, templates) -> None:
    server, language = both
    bare(templates, None)
    assert visible(server) == [True, False]
    bare(None, language)
    assert visible(server) == [True, False]
    language.may_answer.set()
    # What the hidden choice says does not matter.
    assert "take 0" in enhance(server, "a ball", TEMPLATES)[-1][2]["value"]


# ---- the button


def test_a_suggestion_is_shown_and_the_prompt_left_alone(both: tuple[Server, SlowLanguage]) -> None:
    server, language = both
    (values,) = enhance(server, "a purple balloon", TEMPLATES)
    asked, box, text, notes, *_ = values
    assert box["visible"] and "balloon" in text["value"] and "purple" not in text["value"] and "purple" in notes
    (again,) = enhance(server, "a purple balloon", TEMPLATES, text["value"], asked)
    assert again[2]["value"] != text["value"] and again[0] != asked
    (other,) = enhance(server, "a purple balloon ", TEMPLATES, "", again[0])
    assert other[0].endswith(":0"), "another prompt begins anew"
    prompt, box, *_ = server.run("a balloon of mine", name="take")[-1]
    assert prompt == "a balloon of mine" and box["visible"] is False
    assert language.asked == []


@pytest.mark.parametrize("asked", ["", ":", "x:y", ":-1", "0:99999999999999999999", None, 7, {"a": 1}])
def test_what_a_page_remembers_may_be_anything(both: tuple[Server, SlowLanguage], asked: Any) -> None:
    (values,) = enhance(both[0], "a ball", TEMPLATES, "", asked)
    assert "ball" in values[2]["value"]


def test_what_cannot_be_used_is_refused(both: tuple[Server, SlowLanguage]) -> None:
    server, language = both
    with pytest.raises(Refused, match="The prompt is empty") as refused:
        enhance(server, " ", TEMPLATES)
    assert refused.value.values[-1][1]["visible"] is False
    with pytest.raises(Refused, match="suggestion is empty"):
        server.run("  ", name="take")
    with pytest.raises(Refused, match="not in the list of choices"):
        enhance(server, "a ball", "nobody")
    language.error = DeadlineExceeded("It took too long.")
    language.may_answer.set()
    with pytest.raises(Refused, match="It took too long") as refused:
        enhance(server, "a ball", LANGUAGE, "what stood there")
    _, box, _, _, use, button = refused.value.values[-1]
    assert box["visible"] and use["interactive"] and button["interactive"], "the older suggestion is still there"


def test_a_language_model_is_waited_for_and_what_the_video_model_ignores_is_told(
    both: tuple[Server, SlowLanguage],
) -> None:
    server, language = both
    threading.Timer(0.2, language.may_answer.set).start()
    waiting, done = enhance(server, "a red ball", LANGUAGE)
    assert waiting[1]["visible"] and "is writing" in waiting[3] and waiting[5]["interactive"] is False
    assert "over the ocean" in done[2]["value"] and done[5]["interactive"]
    assert "Written by slow." in done[3] and "ignores: in, cinematic, light," in done[3]


# ---- beside videos


def test_videos_are_made_while_a_language_model_writes(both: tuple[Server, SlowLanguage]) -> None:
    server, language = both
    sessions = [uuid.uuid4().hex for _ in range(18)]  # more than may wait for the video model
    for session in sessions:
        assert server.join("a ball", LANGUAGE, "", "", session=session, name="ask").status_code == 200
    wait_until(lambda: len(language.asked) == len(sessions))
    assert "Finished" in server.generate(seconds=2)[-1][1]
    assert language.dropped == 0
    server.call("dismiss", session=sessions[0])
    wait_until(lambda: language.dropped == 1)
    language.may_answer.set()
    last = [event for event in server.events(sessions[1]) if event["msg"] == "process_completed"]
    assert last[0]["success"]


def ask_and_ignore(server: Server, session: str) -> None:
    enhance(server, "a ball", LANGUAGE, session=session)


def test_suggestions_are_made_while_a_video_is(both: tuple[Server, SlowLanguage]) -> None:
    server, _ = both
    server.pipeline.step_seconds = 0.05
    run = threading.Thread(target=server.generate, kwargs={"seconds": 2})
    run.start()
    wait_until(lambda: server.pipeline.made)
    assert "ball" in enhance(server, "a ball", TEMPLATES)[-1][2]["value"]
    assert run.is_alive()
    run.join(20)


def test_the_next_question_and_leaving_end_the_one_before(both: tuple[Server, SlowLanguage]) -> None:
    server, language = both
    session = uuid.uuid4().hex
    first = threading.Thread(target=ask_and_ignore, args=(server, session))
    first.start()
    wait_until(lambda: language.asked)
    help = server.page.help
    errors: list[Exception] = []

    def ask_again() -> None:
        try:
            help.suggest(server.page.generator.pipeline, "b", 0, LANGUAGE, session)
        except Exception as error:
            errors.append(error)

    second = threading.Thread(target=ask_again)
    second.start()
    wait_until(lambda: language.dropped == 1)
    help.drop(session)  # as `unload` does
    wait_until(lambda: language.dropped == 2)
    second.join(5)
    first.join(5)
    assert len(errors) == 1 and isinstance(errors[0], Cancelled)
    assert help._asking == {}


def test_a_visitor_has_one_question_at_a_time(both: tuple[Server, SlowLanguage]) -> None:
    server, language = both
    help, session = server.page.help, uuid.uuid4().hex
    outcomes: list[Suggestion | Exception] = []

    def ask(number: int) -> None:
        try:
            outcomes.append(help.suggest(server.page.generator.pipeline, f"ball {number}", 0, LANGUAGE, session))
        except Exception as error:
            outcomes.append(error)

    askers = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for asker in askers:
        asker.start()
    wait_until(lambda: language.dropped == 11)
    language.may_answer.set()
    for asker in askers:
        asker.join(5)
    assert sum(isinstance(outcome, Suggestion) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, Cancelled) for outcome in outcomes) == 11


# ---- programs


def test_programs_get_text_and_notes(both: tuple[Server, SlowLanguage], tmp_path: Path) -> None:
    server, language = both
    client = Client(server.url, download_files=tmp_path, verbose=False)
    assert client.predict(api_name="/options")["enhancers"] == [TEMPLATES, LANGUAGE]
    text, notes = client.predict("a purple balloon", api_name="/enhance")
    assert "balloon" in text and notes[0].startswith("Added: ") and "purple" in notes[1]
    other, _ = client.predict(prompt="a purple balloon", variant=1, by="templates", api_name="/enhance")
    assert other != text
    language.may_answer.set()
    text, notes = client.predict(prompt="a ball", variant=2, by="language", api_name="/enhance")
    assert text.endswith("take 2") and "Written by slow." in notes
    for fields, words in (
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": "a ball", "variant": 100}, "variant is 100"),
        ({"prompt": "a ball", "by": "magic"}, "by must be"),
    ):
        with pytest.raises(AppError, match=words):
            client.predict(**fields, api_name="/enhance")
    assert server.pipeline.requests == [], "no video is made of it"


def test_a_programs_next_question_drops_its_older_one(both: tuple[Server, SlowLanguage], tmp_path: Path) -> None:
    server, language = both
    client = Client(server.url, download_files=tmp_path, verbose=False)
    older = client.submit(prompt="a ball", by="language", api_name="/enhance")
    wait_until(lambda: len(language.asked) == 1)
    newer = client.submit(prompt="a car", by="language", api_name="/enhance")
    wait_until(lambda: language.dropped == 1)
    with pytest.raises(AppError, match="The question was dropped"):
        older.result(10)
    language.may_answer.set()
    assert newer.result(10)[0].startswith("a car")


def test_the_notes_are_told_in_a_region_that_stays(both: tuple[Server, SlowLanguage]) -> None:
    server, _ = both
    parts = {part["props"].get("elem_id"): part["props"] for part in server.demo.config["components"]}
    assert 'role="status"' in parts["suggestion-live"]["value"] and parts["suggestion-live"]["visible"] is True
    notes = enhance(server, "a ball", TEMPLATES)[-1][3]
    assert notes.startswith("<ul><li>Added: ") and "role" not in notes


# ---- the program


def test_a_bad_enhancer_ends_the_program_before_anything_is_loaded(tmp_path: Path, capsys) -> None:
    before = dict(os.environ)
    code = app.main(["--enhancer", "org/name", "--port", str(free_port())], load=lambda *_: pytest.fail("loaded"))
    assert code == 2 and "40 digits of a revision" in capsys.readouterr().err
    assert dict(os.environ) == before


# ---- in a browser


@pytest.mark.browser
def test_a_visit_in_a_browser(both: tuple[Server, SlowLanguage], browser: Any) -> None:
    server, language = both
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(server.url)
    prompt, suggestion = page.locator("#prompt textarea"), page.locator("#suggestion textarea")
    button, generate = page.locator("#enhance"), page.locator("#generate")
    page.wait_for_selector("#generate:enabled")
    assert not suggestion.is_visible()
    prompt.fill("a balloon")
    button.click()
    suggestion.wait_for()
    first = suggestion.input_value()
    assert "balloon" in first and prompt.input_value() == "a balloon"
    live = "document.querySelector('#suggestion-live [role=status]').textContent"
    page.wait_for_function(f"{live}.startsWith('Added: ')")
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 390, "nothing stands out at the side of a phone"
    button.click()
    page.wait_for_function("text => document.querySelector('#suggestion textarea').value !== text", arg=first)
    suggestion.fill("a green balloon, edited")
    assert prompt.input_value() == "a balloon"
    page.locator("#suggestion-use").click()
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'a green balloon, edited'")
    page.wait_for_function("document.activeElement === document.querySelector('#prompt textarea')")
    assert not suggestion.is_visible()

    # A language model takes its time; everything else goes on, and Escape drops the question.
    page.get_by_label("Language model").check()
    button.click()
    page.locator("#suggestion-notes").get_by_text("is writing").wait_for()
    page.wait_for_function(f"{live}.includes('is writing')")
    assert button.is_disabled() and generate.is_enabled()
    generate.click()
    page.wait_for_selector(".sf-done", timeout=20_000)
    assert server.pipeline.requests[-1].prompt == "a green balloon, edited"
    page.locator("#suggestion-dismiss").focus()
    page.keyboard.press("Escape")
    page.wait_for_selector("#suggestion-box", state="hidden")
    wait_until(lambda: language.dropped == 1)
    language.may_answer.set()
    page.wait_for_selector("#enhance:enabled")
    button.click()
    page.wait_for_function("document.querySelector('#suggestion textarea')?.value.includes('cinematic')")
    suggestion.press("Control+Enter")
    page.wait_for_function("document.querySelector('#prompt textarea').value.includes('cinematic')")
    assert len(server.pipeline.requests) == 1, "taking a suggestion makes no video"
    page.close()
