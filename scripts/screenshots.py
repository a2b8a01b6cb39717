"""Pictures of the page for README and for eyes: `python scripts/screenshots.py` writes them to docs/images.

Needs Chromium and the packages playwright and pillow. `--scripted` takes the painted stand-in of the tests instead of a
model, for work on the page itself.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import sys
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from playwright.sync_api import Browser, Page, sync_playwright  # noqa: E402

import app  # noqa: E402
from pipeline.cli import EMBEDDED_MODEL, load_pipeline  # noqa: E402
from pipeline.config import GenerationRequest  # noqa: E402
from pipeline.loading import report_loading  # noqa: E402
from pipeline.worker import ModelWorker  # noqa: E402
from web.models import ModelChoices  # noqa: E402

SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
PROMPT = "a red balloon rises over the mountains at sunset"
SEED = "7"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=EMBEDDED_MODEL)
    parser.add_argument("--scripted", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--only", default="", help="part of a visit's name, e.g. desktop, phone-dark")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for size in SIZES:
            for theme in ("light", "dark"):
                if options.only in f"{size}-{theme}":
                    visit(browser, options, size, theme)
        browser.close()


def visit(browser: Browser, options: argparse.Namespace, size: str, theme: str) -> None:
    """Every state of the page, from loading to finished: one visit of a page that has just started."""
    may_load = threading.Event()

    def load() -> Any:
        report_loading("Loading the transformer", 0.4)
        may_load.wait()
        return make_pipeline(options)

    with ModelWorker(load) as worker:
        choices = ModelChoices(options.model, lambda folder: make_pipeline(options))
        demo = app.build_app(worker, models=choices)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, server_port=port)
        width, height = SIZES[size]
        page = browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=1)
        try:
            page.goto(f"{url}?__theme={theme}")
            take_pictures(page, options.out / f"{size}-{theme}", may_load, worker)
        finally:
            may_load.set()
            page.close()
            demo.close(verbose=False)


def take_pictures(page: Page, start: Path, may_load: threading.Event, worker: ModelWorker) -> None:
    def picture(name: str, wait: int = 600) -> None:
        page.wait_for_timeout(wait)
        shoot(page, start.with_name(f"{start.name}-{name}.png"))

    page.wait_for_selector("#generate:visible")
    picture("loading")
    may_load.set()
    page.wait_for_selector("#generate:enabled", timeout=120_000)
    picture("idle")

    page.get_by_role("button", name="Generate").click()
    page.get_by_text("The prompt is empty.").wait_for()
    picture("error")
    page.locator(".toast-close").click()

    page.get_by_label("Prompt").fill("a red volcano rises over the mountains at sunset")
    page.get_by_role("button", name="Advanced").click()
    page.get_by_label("Seed", exact=True).fill("7.5")
    page.get_by_text("Not known to this model").wait_for()
    picture("settings")

    page.get_by_role("button", name="Advanced").click()
    page.locator("#models > button").click()
    page.get_by_label("Model", exact=True).click()
    page.get_by_role("option", name="Self-Forcing DMD").click()
    page.get_by_text("to download").wait_for()
    page.locator("#models").scroll_into_view_if_needed()
    picture("models")
    page.locator("#models > button").click()
    page.get_by_role("button", name="Advanced").click()

    if page.locator("#enhance").is_visible():  # a scripted model has no templates
        page.get_by_label("Prompt").fill("a balloon at sunset")
        page.locator("#enhance").click()
        page.locator("#suggestion textarea").wait_for()
        picture("suggestion")
        page.locator("#suggestion-dismiss").click()

    page.get_by_label("Prompt").fill(PROMPT)
    page.get_by_label("Seed", exact=True).fill(SEED)
    page.get_by_role("button", name="Advanced").click()
    somebody = worker.submit(GenerationRequest(prompt="a blue ball", seconds=1))
    page.get_by_role("button", name="Generate").click()
    page.evaluate("scrollTo(0, 0)")  # the menu's picture has moved the page
    list(somebody)
    page.wait_for_function("document.querySelector('video')?.currentTime > 1.2", timeout=120_000)
    picture("streaming", 0)
    page.wait_for_selector(".sf-done", timeout=120_000)
    page.wait_for_function("document.querySelector('video').ended", timeout=120_000)
    page.evaluate("document.querySelector('video').currentTime = 3")
    page.locator(".sf-recipe summary").click()
    picture("finished", 800)


def make_pipeline(options: argparse.Namespace) -> Any:
    if options.scripted:
        from tests.scripted import ScriptedPipeline

        return ScriptedPipeline(step_seconds=0.08)
    return load_pipeline(options.model, None)


def shoot(page: Page, path: Path) -> None:
    """A picture small enough for a repository: 256 colours are plenty for a page."""
    from PIL import Image

    page.screenshot(path=path)
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    main()
