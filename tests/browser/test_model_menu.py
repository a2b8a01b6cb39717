"""The Model menu in Chromium: choose, download, stop, go on, use; and what another visitor sees of it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import app
from pipeline.worker import ModelWorker
from tests.browser.conftest import Site
from tests.browser.visitor import PROMPT, wait_until
from tests.hub import PROGRAM_WITH_SMALL_PIECES, Hub, published_files, write_published
from tests.scripted import SPEC, ScriptedPipeline
from tests.server import free_port
from web.models import ModelChoices
from weights.store import Store

pytestmark = pytest.mark.browser


def load(folder: Path) -> ScriptedPipeline:
    return ScriptedPipeline(spec=replace(SPEC, name=f"model of {folder.name}", fps=12), step_seconds=0.01)


class MenuSite(Site):
    """A page with a menu, and a hub from which its downloads come."""

    def __init__(self, folder: Path, hub: Hub, manifest: Path) -> None:
        self.hub = hub
        own = folder / "own"
        own.mkdir()
        (own / "model_index.json").write_text(json.dumps({"settings": {}}))
        self.pipeline = None
        self.worker = ModelWorker(lambda: load(own))
        self.worker.wait_ready(10)
        choices = ModelChoices(own, load, "download", Store(folder / "home"), manifest)
        self.demo = app.build_app(self.worker, models=choices)
        _, self.url, _ = self.demo.launch(prevent_thread_lock=True, quiet=True, server_port=free_port())
        index = next(index for index, fn in self.demo.fns.items() if fn.name == "look")
        self.downloads = self.demo.fns[index].fn.__self__._menu.downloads
        self.downloads.program = [sys.executable, "-c", PROGRAM_WITH_SMALL_PIECES]

    def close(self) -> None:
        self.downloads.close()
        super().close()
        self.worker.close()


@pytest.fixture
def site(browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MenuSite]:
    manifest = write_published(tmp_path / "published")
    with Hub(published_files(manifest)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("PATH", os.environ["PATH"])
        site = MenuSite(tmp_path, hub, manifest)
        yield site
        site.close()


def choose(page, title: str) -> None:
    page.get_by_label("Model", exact=True).click()
    page.get_by_role("option", name=title).click()


def test_a_model_is_downloaded_stopped_continued_and_used(open_page, site: MenuSite) -> None:
    page, other = open_page(), open_page()
    page.locator("#models > button").click()
    page.locator("#model-choice").wait_for()
    wait_until(page, lambda: "In use" in page.inner_text("#model-card"))
    choose(page, "Small")
    page.get_by_text("Not here:").wait_for()
    assert "Test-1.0" in page.inner_text("#model-card") and not page.is_visible("#model-use")

    site.hub.bytes_per_second = 100_000
    page.locator("#model-get").click()
    page.locator("#model-end").wait_for()
    wait_until(page, lambda: page.is_visible("#model-card .sf-bar") and site.hub.sent > 30_000, 60)
    page.locator("#model-end").click()
    page.get_by_text("Partly here").wait_for()
    assert page.inner_text("#model-get") == "Go on with the download"

    site.hub.bytes_per_second = None
    page.locator("#model-get").click()
    page.locator("#model-use").wait_for(timeout=120_000)
    assert any(wanted for _, _, wanted in site.hub.requests), "it went on where it was"

    page.locator("#model-use").click()
    page.get_by_text("In use.").wait_for()
    for visitor in (page, other):
        visitor.get_by_text("The model is now model of small.").first.wait_for()
        assert "model of small" in visitor.inner_text("#header")
    other.get_by_label("Prompt").fill(PROMPT)
    other.locator("#generate").click()
    other.wait_for_selector(".sf-done", timeout=60_000)
    assert "model of small" in other.locator(".sf-recipe").text_content()


def test_escape_closes_the_list_and_stops_no_video(open_page, site: MenuSite) -> None:
    page = open_page()
    page.locator("#models > button").click()
    page.get_by_label("Prompt").fill(PROMPT)
    page.locator("#generate").click()
    page.locator("#stop").wait_for()
    page.get_by_label("Model", exact=True).click()
    page.get_by_role("option", name="Small").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("option", name="Small").wait_for(state="hidden")
    page.wait_for_selector(".sf-done", timeout=60_000)
    assert "Finished" in page.inner_text("#status")


def test_on_a_phone_the_menu_fits(open_page, site: MenuSite) -> None:
    page = open_page(390, 844)
    page.locator("#models > button").click()
    choose(page, "Other")
    page.get_by_text("Not here:").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
