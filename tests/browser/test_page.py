"""What a visitor sees and does, in Chromium: the picture's own frame numbers say what was painted, and when."""

from __future__ import annotations

import itertools
import re
import time

import pytest

from pipeline.recipe import read_recipe
from tests.browser.conftest import retried
from tests.media import read_media
from tests.scripted import read_code

pytestmark = pytest.mark.browser

PROMPT = "a red balloon rises over the mountains"


def ask(page, prompt: str = PROMPT, *, seconds: float | None = None, fps: float | None = None) -> None:
    """Fill in the form and press Generate."""
    page.get_by_label("Prompt").fill(prompt)
    if seconds or fps:
        if not page.get_by_label("Length (s)").is_visible():
            page.get_by_role("button", name="Advanced").click()
        for label, value in (("Length (s)", seconds or 5), ("Target FPS", fps or 16)):
            page.get_by_label(label).fill(str(value))
            page.get_by_label(label).press("Tab")
        page.wait_for_timeout(500)  # nobody types a number and presses Generate in the same instant
    page.evaluate("window.painted = []; window.happened = []")
    page.get_by_role("button", name="Generate").click()


def wait_for_end(page) -> None:
    """Until the file is there and everything has been played."""
    page.wait_for_selector(".sf-done")
    page.wait_for_function("window.happened.some((event) => event.name === 'ended')")
    page.wait_for_selector("#generate:visible")


def painted(page) -> list[int]:
    """Numbers of the painted frames. The browser may paint one twice (at the end, say); that is no news."""
    return [code for code, _ in itertools.groupby(frame["code"] for frame in page.evaluate("window.painted"))]


def downloaded(page, folder) -> str:
    with page.expect_download() as download:
        page.locator("#download").click()
    assert re.fullmatch(r"self-forcing-seed\d+-[0-9a-f]{8}\.mp4", download.value.suggested_filename)
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def wait_until(page, condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        page.wait_for_timeout(20)  # and not time.sleep: the page's events are handled meanwhile


@retried
def test_video_streams_without_a_gap_while_it_is_made(open_page, site, tmp_path) -> None:
    site.pipeline.step_seconds = 0.08  # 12 frames in about 0.4 s: a bit faster than they are played
    page = open_page()
    playlists = []
    page.on("request", lambda request: "playlist.m3u8" in request.url and playlists.append(time.monotonic()))
    ask(page)
    wait_for_end(page)
    num_frames = 81
    codes = painted(page)
    assert codes == sorted(set(codes)), "in order, each once"
    # A busy machine's compositor leaves frames out; which ones are in the stream, the file shows below.
    assert codes[0] <= 2 and codes[-1] == num_frames - 1 and len(codes) >= 0.7 * num_frames
    (stamps,) = site.pipeline.stamps
    first = page.evaluate("window.painted[0].time") / 1000
    assert first < stamps[4], "it plays long before it is finished"
    duration = page.evaluate("document.querySelector('video').duration")
    waits = [event["at"] for event in page.evaluate("window.happened") if event["name"] == "waiting"]
    assert [at for at in waits if at > 0.1] == []
    assert abs(duration - num_frames / 16) < 0.01
    began, ended = page.evaluate("[window.painted[0].time, window.happened.at(-1).time]")
    assert (ended - began) / 1000 < duration + 1, "the player learns in time that the last frame is the last"
    asked = len(playlists)
    page.wait_for_timeout(2500)
    assert len(playlists) == asked, "the player knows that the stream has ended"
    path = downloaded(page, tmp_path)
    assert [read_code(picture) for picture in read_media(path).frames] == list(range(num_frames))


def test_the_status_follows_the_run_and_covers_nothing(open_page, site) -> None:
    site.pipeline.step_seconds = 0.06
    page = open_page()
    ask(page)
    page.wait_for_selector("#stop:visible")
    assert not page.is_visible("#generate")
    seen, layers = set(), set()
    while not page.is_visible(".sf-done"):
        seen.add(page.inner_text("#status"))
        layers.add(
            page.evaluate(
                """[...document.querySelectorAll("#video [data-testid=status-tracker]")].every((layer) => {
                    const style = getComputedStyle(layer);
                    return style.opacity === "0" || style.visibility === "hidden" || style.display === "none"
                        || style.backgroundColor === "rgba(0, 0, 0, 0)";
                })"""
            )
        )
        page.wait_for_timeout(50)
    assert layers == {True}, "no opaque layer over the video"
    assert any(re.search(r"Block \d of 7", text) for text in seen)
    final = page.inner_text("#status")
    for words in ("Finished", "81 frames", "First frame", "Generation", "Playback", "16 FPS", "1234567", "float32"):
        assert words in final
    page.wait_for_selector("#generate:visible")


def test_stop_gives_a_file_and_the_next_run_starts_afresh(open_page, site, tmp_path) -> None:
    site.pipeline.step_seconds = 0.04
    page = open_page()
    ask(page, seconds=60)
    wait_until(page, lambda: len(site.pipeline.made) >= 3)
    page.get_by_role("button", name="Stop").click()
    wait_until(page, lambda: len(site.pipeline.intervals) == 1, 3)
    wait_for_end(page)
    assert "Stopped" in page.inner_text("#status")
    path = downloaded(page, tmp_path)
    codes = [read_code(picture) for picture in read_media(path).frames]
    assert 33 <= len(codes) < 500 and codes == list(range(len(codes)))
    recipe = read_recipe(path)
    assert recipe["prompt"] == PROMPT and recipe["complete"] is False

    ask(page, seconds=2)
    wait_for_end(page)
    assert "Finished" in page.inner_text("#status")
    codes = painted(page)
    codes = codes[codes.index(0) if 0 in codes else 0 :]  # the old picture may be seen once more before the new one
    assert codes == sorted(set(codes)) and codes[0] <= 2 and codes[-1] == 32
    assert page.locator("video").count() == 1
    assert len(read_media(downloaded(page, tmp_path)).frames) == 33


def test_closing_the_tab_frees_the_model(open_page, site) -> None:
    site.pipeline.step_seconds = 0.05
    page = open_page()
    ask(page, seconds=60)
    wait_until(page, lambda: len(site.pipeline.made) >= 2)
    page.close()
    deadline = time.monotonic() + 3
    while not site.pipeline.intervals:
        assert time.monotonic() < deadline, "the model still works for nobody"
        time.sleep(0.02)


def test_two_visitors_each_get_a_whole_video(open_page, site) -> None:
    first, second = open_page(), open_page()
    ask(first, seconds=3)
    ask(second, seconds=2)
    for page, last in ((first, 44), (second, 32)):
        wait_for_end(page)
        assert painted(page)[-1] == last
    (_, end), (begin, _) = sorted(site.pipeline.intervals)
    assert end <= begin


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
    page.get_by_text("a yellow car drives to the left in the city at night").click()
    wait_until(page, lambda: page.get_by_label("Prompt").input_value().startswith("a yellow car"))
    page.get_by_label("Prompt").press("Control+Enter")
    wait_until(page, lambda: len(site.pipeline.made) >= 1)
    page.keyboard.press("Escape")
    page.wait_for_selector(".sf-done")
    assert "Stopped" in page.inner_text("#status")
    assert site.pipeline.requests[0].prompt.startswith("a yellow car")


def test_on_a_phone_everything_is_in_one_column(open_page, site) -> None:
    page = open_page(390, 844)
    tops = [page.locator(place).bounding_box()["y"] for place in ("#prompt", "#generate", "#video", "#advanced")]
    assert tops == sorted(tops)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    video = page.locator("#video").bounding_box()
    assert video["y"] + video["height"] <= 844, "the video is above the fold"
