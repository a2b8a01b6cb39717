"""The page as a companion: what it says while it loads, waits and works, and what it remembers."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.config import GenerationRequest
from pipeline.errors import WeightsError
from pipeline.loading import report_loading
from pipeline.recipe import build_recipe, read_recipe
from pipeline.video import SegmentEncoder
from pipeline.worker import ModelWorker
from tests.browser.conftest import Site
from tests.browser.visitor import PROMPT, ask, downloaded, wait_for_end, wait_until
from tests.scripted import ScriptedPipeline
from tests.server import free_port

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parents[2]


def finish(page) -> None:
    page.wait_for_selector(".sf-done", timeout=60_000)
    page.wait_for_selector("#generate:visible")


# ---- before the first click


@pytest.fixture
def loading_site(browser):
    """A site whose model loads when the test says so: `site.go_on(state)`."""
    states: list = []
    told = threading.Condition()

    def load() -> ScriptedPipeline:
        report_loading("Loading the transformer", 0.4)
        with told:
            told.wait_for(lambda: states)
        if states[0] == "broken":
            raise WeightsError("The transformer of scripted cannot be loaded. Get the model folder again.")
        return ScriptedPipeline()

    def go_on(state: str) -> None:
        with told:
            states.append(state)
            told.notify_all()

    with ModelWorker(load) as worker:
        site = Site(worker)
        site.go_on = go_on
        yield site
        go_on("end")
        site.close()


def test_a_visitor_sees_the_model_load_and_then_the_page_is_ready(browser, loading_site) -> None:
    page = browser.new_page()
    page.goto(loading_site.url)
    page.get_by_text("Loading the transformer …").wait_for()
    assert page.evaluate("document.querySelector('#status .sf-bar i').style.width") == "40%"
    assert page.locator("#generate").is_disabled()
    assert not page.is_visible("#words")
    loading_site.go_on("well")
    page.wait_for_selector("#generate:enabled")
    assert "Ready" in page.inner_text("#status") and "112×64" in page.inner_text("#status")
    assert page.locator("#words").is_visible() and page.locator(".sf-model").inner_text() == "scripted"
    page.get_by_role("button", name="Advanced").click()
    wait_until(page, lambda: page.get_by_label("Target FPS").input_value() == "16")
    later = browser.new_page()
    later.goto(loading_site.url)
    later.wait_for_selector("#generate")
    assert later.locator("#generate").is_enabled(), "who comes later sees nothing of it"
    page.close()
    later.close()


def test_a_model_that_cannot_be_loaded_is_said_so(browser, loading_site) -> None:
    page = browser.new_page()
    page.goto(loading_site.url)
    page.get_by_text("Loading the transformer …").wait_for()
    loading_site.go_on("broken")
    page.locator("#status", has_text="Get the model folder again.").wait_for()
    assert page.locator("#generate").is_disabled()
    page.close()


# ---- while others are served


def test_who_waits_sees_their_place_and_an_estimate(open_page, site) -> None:
    first, second, third = open_page(), open_page(), open_page()
    ask(first, seconds=1)
    finish(first)  # from this run it is known how fast the model is
    site.pipeline.step_seconds = 0.25
    ask(first, seconds=5)
    wait_until(first, lambda: len(site.pipeline.requests) == 2)
    ask(second, seconds=1)
    second.locator("#status b", has_text="Number 2 in the queue").wait_for()
    ask(third, seconds=1)
    third.locator("#status b", has_text="Number 3 in the queue").wait_for()
    assert "2 runs are ahead of yours. About" in third.inner_text("#status")
    first.locator("#stop").click()
    third.locator("#status b", has_text="Number 2 in the queue").wait_for()
    for page in (second, third):
        finish(page)
        assert "Finished" in page.inner_text("#status")


# ---- with a result


def test_the_seed_of_a_result_can_be_used_again(open_page, site) -> None:
    page = open_page()
    ask(page, seconds=1, seed=-1)
    finish(page)
    for _ in range(2):
        page.locator("[data-use-seed]").click()
    assert page.get_by_label("Seed", exact=True).input_value() == "1234567"
    page.wait_for_timeout(2000)
    assert page.inner_text("[data-use-seed]") == "use this seed", "and no longer what a click has made of it"
    page.wait_for_timeout(300)
    page.locator("#generate").click()
    wait_until(page, lambda: len(site.pipeline.requests) == 2)
    assert site.pipeline.requests[1].seed == 1234567
    finish(page)


def test_a_video_dropped_on_the_page_brings_every_setting_back(open_page, site, tmp_path) -> None:
    page = open_page()
    page.get_by_role("button", name="Advanced").click()
    for option in ("TAEHV VAE", "FP8 quantization", "torch.compile"):
        page.get_by_label(option).check()
    ask(page, "a blue ball over the city", seconds=1.5, fps=12, seed=99)
    finish(page)
    page.locator(".sf-recipe summary").click()
    shown = page.inner_text(".sf-recipe")
    for words in (
        "a blue ball over the city",
        "99",
        "1.5 s at 12 FPS",
        "taehv, fp8, compile",
        "--seed 99",
        "--compile",
    ):
        assert words in shown
    path = downloaded(page, tmp_path)
    assert read_recipe(path)["settings"]["fps"] == 12

    other = open_page()
    other.wait_for_timeout(1000)
    drop(other, path)
    wait_until(other, lambda: other.get_by_label("Prompt").input_value() == "a blue ball over the city")
    assert numbers(other) == ["99", "12", "1.5"]
    other.get_by_text("2 blocks, 21 frames, 1.75 s of video.").wait_for()
    for option in ("TAEHV VAE", "FP8 quantization", "torch.compile"):
        assert other.get_by_label(option).is_checked()
    other.get_by_text("All settings are those of that video.").wait_for()
    other.locator("#generate").click()
    wait_until(other, lambda: len(site.pipeline.requests) == 2)
    assert site.pipeline.requests[0] == site.pipeline.requests[1]
    finish(other)


def test_of_a_long_video_that_is_chosen_only_the_beginning_is_sent(open_page, tmp_path) -> None:
    (block,) = ScriptedPipeline().stream(GenerationRequest(prompt=PROMPT, seed=99, seconds=0.5, fps=12))
    encoder = SegmentEncoder(12)
    encoder.encode(block.frames)
    path = tmp_path / "long.mp4"
    encoder.write_mp4(path, build_recipe(block.run, encoder.num_frames))
    with path.open("ab") as file:
        file.write(struct.pack(">I4s", 2_000_008, b"free") + bytes(2_000_000))

    page = open_page()
    page.wait_for_timeout(1000)
    uploads = []
    page.on(
        "request",
        lambda request: request.method == "POST" and request.url.endswith("/upload") and uploads.append(request),
    )
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Take all settings from a video made here").click()
    chooser.value.set_files(path)
    wait_until(page, lambda: page.get_by_label("Prompt").input_value() == PROMPT)
    assert numbers(page) == ["99", "12", "0.5"]
    # The browser does not let a test see what it sends of a file, but says how much it is.
    sent = sum(int(request.all_headers()["content-length"]) for request in uploads)
    assert 0 < sent < 1_100_000, "of more than 2 MB"


def numbers(page) -> list[str]:
    """What the form says of seed, rate and length."""
    page.get_by_role("button", name="Advanced").click()
    return [page.get_by_label(label, exact=True).input_value() for label in ("Seed", "Target FPS", "Length (s)")]


def drop(page, path: Path) -> None:
    page.evaluate(
        """async ([bytes, name]) => {
            const files = new DataTransfer();
            files.items.add(new File([new Uint8Array(bytes)], name, { type: "video/mp4" }));
            for (const kind of ["dragenter", "dragover", "drop"]) {
                const target = document.querySelector("#prompt textarea");
                target.dispatchEvent(new DragEvent(kind, { dataTransfer: files, bubbles: true, cancelable: true }));
            }
        }""",
        [list(path.read_bytes()), path.name],
    )


def test_where_a_file_can_be_let_go_shows_only_while_one_is_there(open_page) -> None:
    page = open_page()
    page.wait_for_selector("#generate:enabled")
    shown = page.evaluate(  # in one go: it is hidden again soon
        """() => {
            const files = new DataTransfer();
            files.items.add(new File(["x"], "a.png", { type: "image/png" }));
            const drag = (kind, target) =>
                target.dispatchEvent(new DragEvent(kind, { dataTransfer: files, bubbles: true, cancelable: true }));
            const passing = document.querySelector("#status").appendChild(document.createElement("p"));
            for (const kind of ["dragenter", "dragover"]) drag(kind, passing);
            passing.remove(); // it never tells that the file has left
            drag("dragover", document);
            return document.body.classList.contains("sf-dropping");
        }"""
    )
    assert shown
    page.wait_for_function("!document.body.classList.contains('sf-dropping')")


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"not a video at all", "This is not an MP4 file."), (b"\0\0\0\x14ftypisom\0\0\0\0isom", "holds no recipe")],
)
def test_a_dropped_file_that_is_no_video_of_ours_changes_nothing(open_page, tmp_path, content, words) -> None:
    page = open_page()
    page.get_by_label("Prompt").fill(PROMPT)
    page.wait_for_timeout(1000)  # nobody has a file in hand while the page appears
    path = tmp_path / "other.mp4"
    path.write_bytes(content)
    drop(page, path)
    page.get_by_text(words).wait_for()
    assert page.get_by_label("Prompt").input_value() == PROMPT


def test_replay_and_loop(open_page, site) -> None:
    page = open_page()
    assert page.locator("[data-player=replay]").is_disabled()
    ask(page, seconds=1)
    wait_for_end(page)
    page.get_by_role("button", name="Replay", exact=True).click()
    page.wait_for_function("!document.querySelector('#video video').ended")
    page.wait_for_function("document.querySelector('#video video').ended")
    page.get_by_role("button", name="Loop").click()
    assert page.get_by_role("button", name="Loop").get_attribute("aria-pressed") == "true"
    page.wait_for_function("!document.querySelector('#video video').ended")
    page.evaluate("window.rounds = 0; document.querySelector('#video video').onseeked = () => window.rounds++")
    page.wait_for_function("window.rounds >= 2", timeout=20_000)
    page.get_by_role("button", name="Full screen", exact=True).click()
    page.wait_for_function("document.fullscreenElement === document.querySelector('#video video')")


# ---- what is wrong is said beside the control


def test_wrong_numbers_are_named_before_the_run(open_page) -> None:
    page = open_page()
    page.get_by_role("button", name="Advanced").click()
    page.get_by_text("7 blocks, 81 frames, 5.06 s of video.").wait_for()
    page.get_by_label("Target FPS").fill("8")
    page.get_by_text("this plays it at 0.5×").wait_for()
    page.get_by_label("Seed", exact=True).fill("7.5")
    page.get_by_text("seed is 7.5, but must be a whole number").wait_for()
    page.get_by_label("Length (s)").fill("99")
    page.get_by_text("seconds is 99, but must be a number from 0.1 to 60.").wait_for()
    page.get_by_label("Prompt").fill("ball " * 500)
    page.get_by_text("The prompt has 2,499 characters; at most 2,000 are allowed.").wait_for()


def test_the_tab_key_goes_through_the_page_in_order(open_page) -> None:
    page = open_page()
    page.wait_for_timeout(1000)  # until nothing moves any more
    page.get_by_label("Prompt").focus()
    visited = []
    for _ in range(6):
        page.keyboard.press("Tab")
        visited.append(page.evaluate("document.activeElement.closest('[id]').id + document.activeElement.innerText"))
    expected = ("Generate", "Loop", "Start from", "Advanced", "Compare", "balloon")
    assert all(name in place for name, place in zip(expected, visited, strict=True)), visited
    unlabelled = page.evaluate(
        """[...document.querySelectorAll("input:not([type=file]):not([type=hidden]), textarea, button")].filter(
            (one) => one.offsetParent !== null && !one.labels?.length && !one.ariaLabel && !one.innerText.trim()
                && !one.title && !one.closest("label")).map((one) => one.outerHTML)"""
    )
    assert unlabelled == []


def test_the_keyboard_stays_with_the_button_and_screen_readers_hear_of_the_run(open_page, site) -> None:
    site.pipeline.step_seconds = 0.1
    page = open_page()
    page.get_by_label("Prompt").fill(PROMPT)
    page.locator("#generate").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#stop:visible")
    page.wait_for_function("document.activeElement.id === 'stop'")
    page.wait_for_function("document.getElementById('live').textContent === 'Generating'")
    page.keyboard.press("Enter")
    page.wait_for_function("document.getElementById('live').textContent === 'Stopped'")
    page.wait_for_function("document.activeElement.id === 'generate'")
    page.locator("#generate").dblclick()
    finish(page)
    assert len(site.pipeline.requests) == 2, "a double click is one click"


def test_the_focus_stays_where_a_click_has_put_it(open_page, site) -> None:
    site.pipeline.step_seconds = 0.1
    page = open_page()
    ask(page, seconds=5)
    page.wait_for_function("document.activeElement.id === 'stop'")
    page.locator("#header h1").click()
    assert page.evaluate("document.activeElement === document.body")
    made = len(site.pipeline.made)
    wait_until(page, lambda: len(site.pipeline.made) >= made + 2)  # the page has changed by then
    assert page.evaluate("document.activeElement === document.body")
    page.keyboard.press("Escape")
    finish(page)


# ---- what goes wrong in the middle


def test_a_page_loaded_anew_says_what_became_of_its_run(open_page, site) -> None:
    site.pipeline.step_seconds = 0.05
    page = open_page()
    ask(page, seconds=60)
    wait_until(page, lambda: len(site.pipeline.made) >= 2)
    page.reload()
    page.get_by_text("That run was stopped").wait_for()
    wait_until(page, lambda: len(site.pipeline.intervals) == 1, 5)
    page.reload()
    page.wait_for_selector("#generate")
    page.wait_for_timeout(500)
    assert not page.get_by_text("That run was stopped").is_visible(), "once is enough"


@pytest.fixture
def simple_page(browser):
    """A page in a browser that can play whole files only."""
    context = browser.new_context()
    context.add_init_script(
        "delete window.MediaSource; delete window.ManagedMediaSource; delete window.WebKitMediaSource;"
        "HTMLMediaElement.prototype.canPlayType = () => '';"
    )
    yield context.new_page()
    context.close()


def cannot_stream(page):
    return page.get_by_text("This browser cannot play a video while it is being made.")


def test_a_browser_that_cannot_stream_gets_the_whole_video_at_the_end(simple_page, site) -> None:
    simple_page.goto(site.url)
    cannot_stream(simple_page).wait_for()
    ask_without_recorder(simple_page)
    finish(simple_page)
    simple_page.wait_for_function("document.getElementById('finished-video')?.duration > 1.9")


def test_a_browser_that_cannot_stream_is_still_told_so_when_the_model_has_loaded(simple_page, loading_site) -> None:
    simple_page.goto(loading_site.url)
    simple_page.get_by_text("Loading the transformer …").wait_for()
    cannot_stream(simple_page).wait_for()
    loading_site.go_on("well")
    simple_page.wait_for_selector("#generate:enabled")
    assert cannot_stream(simple_page).is_visible()
    simple_page.wait_for_timeout(1000)  # whatever else comes with the model comes at once or at the next question
    assert cannot_stream(simple_page).is_visible()


def ask_without_recorder(page) -> None:
    page.evaluate("window.forget = () => {}")
    ask(page, seconds=2)


SCRIPTED = """
import sys
import app
from tests.scripted import ScriptedPipeline
sys.exit(app.main(load=lambda folder, device: ScriptedPipeline(step_seconds=0.2)))
"""


def test_ctrl_c_in_the_middle_of_a_run_ends_everything_with_a_sentence(browser, tmp_path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({}))
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPTED, "--model", str(tmp_path), "--port", str(port)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "GRADIO_TEMP_DIR": str(tmp_path / "files")},
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts a program in the background has it ignore Ctrl-C; this one shall not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        while "ready" not in (line := process.stderr.readline()):
            assert line, "it ended"
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{port}")
        page.get_by_label("Prompt").fill(PROMPT)
        page.locator("#generate").click()
        page.get_by_text(re.compile(r"Block \d of 7")).wait_for(timeout=30_000)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(15) == 0
        assert time.monotonic() - began < 10
        said = process.stderr.read()
        assert "a video that is being made ends here" in said and "Traceback" not in said
        page.get_by_text("Connection to the server was lost.").wait_for(timeout=20_000)
        assert list((tmp_path / "files").glob("*/*")) == [], "its files are gone"
        page.close()
    finally:
        process.kill()


def test_requests_are_checked_where_they_are_made() -> None:
    # The page's notes and the request itself must agree on what is allowed.
    from web.pieces import settings_notice

    for seed, fps, seconds, allowed in [(7, 16, 5, True), (7.5, 16, 5, False), (1, 0, 5, False), (1, None, 700, False)]:
        assert ("sf-wrong" not in settings_notice(seed, fps, seconds, 600, None)) == allowed
        try:
            GenerationRequest(prompt="a", seed=seed, fps=fps, seconds=seconds)
            accepted = True
        except ValueError:
            accepted = False
        assert accepted == allowed
