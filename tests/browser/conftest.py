"""A real browser in front of a real server; only the model is scripted."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import app
from tests.browser.visitor import TooSlow, wait_until
from tests.scripted import ScriptedPipeline

RECORDER = Path(__file__).parent / "recorder.js"


class Site:
    """The page on a port of its own."""

    def __init__(self, pipeline) -> None:
        self.pipeline = pipeline
        self.demo = app.build_app(pipeline)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        _, self.url, _ = self.demo.launch(prevent_thread_lock=True, quiet=True, server_port=port)

    def reset(self) -> None:
        """Forget what earlier tests asked of a scripted model."""
        pipeline = self.pipeline
        if not isinstance(pipeline, ScriptedPipeline):
            return
        wait_until(None, lambda: len(pipeline.intervals) == len(pipeline.requests))  # a run whose tab was closed
        pipeline.step_seconds, pipeline.on_step = 0.02, None
        for record in (pipeline.faults, pipeline.requests, pipeline.made, pipeline.intervals, pipeline.stamps):
            record.clear()

    def close(self) -> None:
        self.demo.close(verbose=False)


@pytest.fixture(scope="module")
def pipeline():
    """The model behind the page. A module may have another one."""
    return ScriptedPipeline()


@pytest.fixture(scope="module")
def shared_site(browser, pipeline, tmp_path_factory) -> Iterator[Site]:
    # The server runs without ffmpeg and ffprobe on PATH, and so does everything below. (The browser is up already.)
    path = os.environ["PATH"]
    os.environ["PATH"] = str(tmp_path_factory.mktemp("empty"))
    site = Site(pipeline)
    yield site
    site.close()
    os.environ["PATH"] = path


@pytest.fixture
def site(shared_site: Site) -> Site:
    shared_site.reset()
    return shared_site


@pytest.fixture
def open_page(browser, site: Site) -> Iterator[Callable]:
    """Open the page in a fresh browser profile. At the end: no script error, and not a byte from another host."""
    contexts, errors, foreign = [], [], []

    def open_page(width: int = 1280, height: int = 800):
        context = browser.new_context(viewport={"width": width, "height": height})
        contexts.append(context)
        context.add_init_script(path=RECORDER)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: request.url.startswith(("http", "ws")) and foreign.append(request.url))
        page.goto(site.url)
        page.wait_for_selector("#generate")
        return page

    def close_all() -> None:
        while contexts:
            contexts.pop().close()

    open_page.reset = close_all
    yield open_page
    close_all()
    assert errors == []
    assert [url for url in foreign if not url.startswith(site.url)] == []


BUSY = 0.4
"""Share of one processor that other programs may use before a time says nothing."""


def busy_elsewhere(seconds: float = 1.0) -> float:
    """How much of one processor is used by programs that this process did not start."""

    def used() -> tuple[float, float]:
        total = psutil.cpu_times()
        own = psutil.Process()
        mine = 0.0
        for process in (own, *own.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                mine += sum(process.cpu_times()[:2])
        return total.user + total.system + getattr(total, "steal", 0.0), mine

    before = used()
    time.sleep(seconds)
    after = used()
    return max(0.0, (after[0] - before[0]) - (after[1] - before[1])) / seconds


def retried(test: Callable) -> Callable:
    """A test that was too slow gets a second try, on a machine that may have been busy. What is wrong fails at once.

    Too slow twice while other programs, such as the other half of the tests, use the processors says nothing of the
    page: such a test is skipped, and fails only where it has the machine to itself (`-n 0`).
    """

    @functools.wraps(test)
    def twice(**fixtures):
        from playwright.sync_api import TimeoutError  # here, for whoever has no browser: see `browser`

        try:
            test(**fixtures)
        except (TooSlow, TimeoutError):
            for fixture in fixtures.values():
                if hasattr(fixture, "reset"):
                    fixture.reset()
            try:
                test(**fixtures)
            except TooSlow as error:
                if (busy := busy_elsewhere()) > BUSY:
                    pytest.skip(f"{error}, but other programs use {busy:.0%} of a processor: run it with -n 0")
                raise

    return twice
