"""What all tests share: one thread for each of the programs that run side by side, and a page with a scripted model."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.server import Server

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch
# What tests compile, not among the user's own; it stays, so the next time is faster.
os.environ.setdefault("SELF_FORCING_CACHE", os.path.join(tempfile.gettempdir(), "self-forcing-tests"))


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> None:
    """Much here collects garbage; let it look at what a file's tests make and not at all that was ever imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Server]:
    # Imported here: tests that need no page do not wait for Gradio.
    from tests.scripted import ScriptedPipeline
    from tests.server import Server

    server = Server(ScriptedPipeline(unavailable={"compile": "There is no compiler here."}), max_seconds=20)
    yield server
    server.close()


@pytest.fixture
def server(shared_server: Server) -> Server:
    shared_server.reset()
    return shared_server


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the programs that a test starts have it: sums of another order would be other numbers."""
    import torch  # here: most tests of the page do without

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def no_browser(reason: str) -> None:
    """Without a browser these tests are skipped on a developer's machine, and fail where they are the gate."""
    message = f"no browser to test with: {reason}"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        no_browser("the package playwright is not installed (pip install playwright)")
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        except Error as error:
            no_browser(f"{str(error).splitlines()[0]} (Debian: apt-get install chromium)")
        yield browser
        browser.close()
