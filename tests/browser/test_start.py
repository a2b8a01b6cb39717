"""Starting from a picture or a video in Chromium: choosing, dropping, seeing, removing, making."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pytest

from pipeline.start_file import read_start
from tests.browser.conftest import retried
from tests.browser.visitor import PROMPT, wait_until
from tests.pictures import encoded, picture, write_video
from tests.scripted import SPEC

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "a.png").write_bytes(encoded(picture(), "PNG"))
    (folder / "bad.png").write_bytes(b"nothing")
    write_video(folder / "a.mp4", 24)
    return folder


def choose(page, path: Path) -> None:
    page.locator("#start-file input[type=file]").set_input_files(path)


def make(page) -> None:
    page.get_by_label("Prompt").fill(PROMPT)
    page.locator("#generate").click()
    page.wait_for_selector(".sf-done")


@retried
def test_a_file_is_chosen_seen_used_and_removed(open_page, site, files: Path) -> None:
    page = open_page()
    page.locator("#start > button").click()
    choose(page, files / "bad.png")
    page.locator("#start-preview .sf-wrong").wait_for()
    assert not page.is_visible("#start-remove")

    choose(page, files / "a.mp4")
    page.locator(".sf-start img").nth(1).wait_for()
    assert not page.is_visible("#start-preview .sf-wrong")
    assert "The last 1.31 s of 1.50 s (21 frames" in page.inner_text("#start-preview")
    page.get_by_text("Starts from the end of a video").wait_for()
    make(page)
    expected = read_start(files / "a.mp4", SPEC)
    assert np.array_equal(site.pipeline.requests[-1].start.frames, expected.frames)
    page.wait_for_function("document.querySelector('video').currentTime > 0.5")

    page.locator("#start-remove").click()
    page.get_by_text("Start from a picture or video").wait_for()
    wait_until(page, lambda: not page.is_visible(".sf-start"))
    make_again = len(site.pipeline.requests)
    page.locator("#generate").click()
    wait_until(page, lambda: len(site.pipeline.requests) > make_again)
    assert site.pipeline.requests[-1].start is None


@pytest.mark.parametrize("panel", ["closed", "open"])
def test_a_picture_can_be_dropped_anywhere_and_fits_a_phone(open_page, site, files: Path, panel: str) -> None:
    page = open_page(width=390, height=844)
    page.wait_for_selector("#generate:enabled")
    if panel == "open":
        page.locator("#start > button").click()
        page.locator("#start-file").wait_for()
    data = base64.b64encode((files / "a.png").read_bytes()).decode()
    page.evaluate(
        """(data) => {
            const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
            const dropped = new DataTransfer();
            dropped.items.add(new File([bytes], "a.png", { type: "image/png" }));
            const event = new DragEvent("drop", { dataTransfer: dropped, bubbles: true, cancelable: true });
            document.querySelector("#prompt").dispatchEvent(event);
        }""",
        data,
    )
    page.locator(".sf-start img").wait_for()
    assert "the first frame of the video" in page.inner_text("#start-preview")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
    make(page)
    assert site.pipeline.requests[-1].start.kind == "image"
