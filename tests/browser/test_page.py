"""What a visitor sees and does around the video, in Chromium. (The video itself: `test_acceptance`.)"""

from __future__ import annotations

import re

import pytest

from tests.browser.visitor import PROMPT, ask, wait_until

pytestmark = pytest.mark.browser


def test_the_status_follows_the_run(open_page, site) -> None:
    site.pipeline.step_seconds = 0.06
    page = open_page()
    ask(page)
    page.wait_for_selector("#stop:visible")
    assert not page.is_visible("#generate")
    seen = set()
    while not page.is_visible(".sf-done"):
        seen.add(page.inner_text("#status"))
        page.wait_for_timeout(50)
    assert any(re.search(r"Block \d of 7", text) for text in seen)
    final = page.inner_text("#status")
    for words in ("Finished", "81 frames", "First frame", "Generation", "Playback", "16 FPS", "1234567", "float32"):
        assert words in final
    page.wait_for_selector("#generate:visible")


def test_what_is_wrong_is_said_and_nothing_is_made(open_page, site) -> None:
    page = open_page()
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("The prompt is empty.").wait_for()
    assert page.is_visible("#generate") and site.pipeline.requests == []
    page.get_by_label("Prompt").press_sequentially("a red volcano")
    page.get_by_text("Not known to this model, so it ignores: volcano").wait_for()
    page.get_by_label("Prompt").fill(PROMPT)
    page.get_by_text("Not known to this model").wait_for(state="hidden")


def test_keyboard_and_examples(open_page, site) -> None:
    site.pipeline.step_seconds = 0.05
    page = open_page()
    page.get_by_text("a green car drives to the right in the desert by day").click()
    wait_until(page, lambda: page.get_by_label("Prompt").input_value().startswith("a green car"))
    page.get_by_label("Prompt").press("Control+Enter")
    wait_until(page, lambda: len(site.pipeline.made) >= 1)
    page.keyboard.press("Escape")
    page.wait_for_selector(".sf-done")
    assert "Stopped" in page.inner_text("#status")
    assert site.pipeline.requests[0].prompt.startswith("a green car")


def test_on_a_phone_everything_is_in_one_column(open_page, site) -> None:
    page = open_page(390, 844)
    tops = [page.locator(place).bounding_box()["y"] for place in ("#prompt", "#generate", "#video", "#advanced")]
    assert tops == sorted(tops)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    video = page.locator("#video").bounding_box()
    assert video["y"] + video["height"] <= 844, "the video is above the fold"
