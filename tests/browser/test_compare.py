"""The Compare panel in Chromium: two videos, one line between them, hands on a keyboard and on a phone."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest

from tests.browser.conftest import retried
from tests.browser.visitor import PROMPT, in_time, wait_until
from tests.media import read_media
from tests.scripted import SwitchedPipeline, read_code

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def pipeline() -> SwitchedPipeline:
    return SwitchedPipeline(unavailable={"compile": "There is no compiler here."})


SECONDS, FRAMES = 2, 33


def make_both(page) -> None:
    page.get_by_label("Prompt").fill(PROMPT)
    page.get_by_role("button", name="Advanced").click()
    length = page.get_by_label("Length (s)")
    wait_until(page, lambda: length.input_value() == "5")
    length.fill(f"{SECONDS}")
    length.press("Tab")
    page.get_by_role("button", name="Advanced").click()
    page.locator("#compare > button").click()
    page.get_by_label("TAEHV VAE").nth(-1).wait_for()
    page.locator("#compare-make").click()


def times(page) -> list[float]:
    return page.evaluate("['compared-a', 'compared-b'].map((id) => document.getElementById(id).currentTime)")


@retried
def test_two_videos_play_as_one_and_the_line_between_them_moves(open_page, site, tmp_path: Path) -> None:
    site.pipeline.step_seconds = 0.01
    page = open_page()
    assert not page.locator("#compared").is_visible()
    make_both(page)
    page.wait_for_selector("#compare-stop:visible")
    assert page.is_visible("#stop") and not page.is_visible("#generate")
    page.wait_for_selector("#compared:visible")
    page.wait_for_selector("#compare-make:visible")
    said = page.inner_text("#compare-status")
    for words in ("PSNR 34.15 dB", "A: taehv on", "B: taehv off", "FPS", "Only the decoder"):
        assert words in said
    assert not page.get_by_label("torch.compile").is_visible()

    wait_until(page, lambda: min(times(page)) > 0.5)
    apart = []
    for _ in range(10):
        a, b = times(page)
        apart.append(abs(a - b))
        page.wait_for_timeout(60)
    in_time(sorted(apart)[5] < 0.06, f"the videos are apart by {apart}")

    page.locator("#compared-play").click()
    page.wait_for_timeout(100)
    page.get_by_label("Place in both videos").fill("500")
    wait_until(page, lambda: times(page)[0] == times(page)[1] == pytest.approx(FRAMES / 16 / 2, abs=0.02))
    assert page.inner_text("#compared-play") == "Play"
    told = page.get_by_label("Place in both videos")
    assert told.get_attribute("aria-valuetext") == "1.0 of 2.1 seconds"
    page.locator("#compared-play").click()
    wait_until(page, lambda: page.inner_text("#compared-play") == "Pause")
    page.locator("#compare > button").click()
    wait_until(page, lambda: page.evaluate("document.getElementById('compared-a').paused"))
    page.locator("#compare > button").click()
    assert page.inner_text("#compared-play") == "Play", "nobody watches a closed panel"

    line = page.get_by_label("Line between A and B")
    shape = "getComputedStyle(document.getElementById('compared-a')).clipPath"
    assert line.get_attribute("aria-valuetext") == "A 50 %, B 50 %"
    line.focus()
    before = page.evaluate(shape)
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    assert line.input_value() == "60" and line.get_attribute("aria-valuetext") == "A 60 %, B 40 %"
    assert page.evaluate(shape) != before and "40%" in page.evaluate(shape)
    box = page.locator(".sf-wipe").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.25, box["y"] + box["height"] / 2)
    assert 22 <= int(line.input_value()) <= 28, "the picture itself can be taken hold of"

    with page.expect_download() as download:
        page.locator("#compare-both").click()
    assert re.fullmatch(r"self-forcing-compare-seed\d+-[0-9a-f]{8}\.mp4", download.value.suggested_filename)
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    frames = read_media(path).frames
    assert [read_code(frame[:, : frame.shape[1] // 2 - 14]) for frame in frames] == list(range(FRAMES))


@retried
def test_escape_stops_both_and_nothing_is_shown(open_page, site) -> None:
    site.pipeline.step_seconds = 0.05
    page = open_page(390, 844)
    make_both(page)
    wait_until(page, lambda: len(site.pipeline.requests) == 2)
    page.keyboard.press("Escape")
    page.get_by_text("nothing was kept").wait_for()
    page.wait_for_selector("#compare-make:visible")
    page.wait_for_selector("#generate:visible")
    assert not page.is_visible("#compared") and not page.is_visible("#compare-both")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@retried
def test_after_stop_both_comes_when_asked_for_again(open_page, site) -> None:
    site.pipeline.step_seconds = 0.05
    page = open_page()
    make_both(page)
    wait_until(page, lambda: len(site.pipeline.requests) == 2)
    held = threading.Event()  # so that the stopped run has not ended when the next one is asked for
    site.pipeline.on_step = lambda block, step: held.wait(20)
    page.locator("#compare-stop").click()
    page.wait_for_selector("#compare-make:visible")
    page.wait_for_timeout(900)  # a second click at once would be a double click
    page.locator("#compare-make").dblclick()
    page.wait_for_selector("#compare-stop:visible")
    held.set()
    site.pipeline.on_step, site.pipeline.step_seconds = None, 0.0
    page.wait_for_selector("#compared:visible")
    page.wait_for_selector("#compare-make:visible")
    assert "PSNR" in page.inner_text("#compare-status")
    assert len(site.pipeline.requests) == 2 + 4, "a double click is one click"


@retried
def test_on_a_phone_the_result_fits(open_page, site) -> None:
    site.pipeline.step_seconds = 0.0
    page = open_page(390, 844)
    make_both(page)
    page.wait_for_selector("#compare-both:visible")
    page.wait_for_selector("#compared:visible")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for place in (".sf-wipe", ".sf-sides", "#compare-files"):
        box = page.locator(place).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390, place
