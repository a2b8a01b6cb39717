"""What a visitor does on the page, and what there is to see for them."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPT = "a red balloon rises over the mountains"


class TooSlow(AssertionError):
    """What a machine that is busy with something else can bring about: see `retried`."""


def in_time(condition: Any, what: str) -> None:
    """Ask for what a busy machine can spoil: a time, how many of the frames were seen, a playback without a stall.

    Never for what was shown or made: that is right or wrong whatever the machine does, and is asserted.
    """
    if not condition:
        raise TooSlow(what)


def ask(page, prompt: str = PROMPT, *, seconds: float = 5, fps: float = 16, seed: int | None = None) -> None:
    """Fill in the form and press Generate."""
    page.get_by_label("Prompt").fill(prompt)
    settings = {"Length (s)": f"{seconds:g}", "Target FPS": f"{fps:g}"}
    if seed is not None:
        settings["Seed"] = str(seed)
    if not page.get_by_label("Length (s)").is_visible():
        page.get_by_role("button", name="Advanced").click()
    # The fields get their first values a moment after they appear: too late for nobody but a script.
    wait_until(page, lambda: _filled_in(page, settings))
    page.evaluate("forget()")
    page.locator("#generate").click()


def _filled_in(page, settings: dict[str, str]) -> bool:
    """Type whatever is not there yet; whether everything was there already, some time after it was typed."""
    missing = {label: text for label, text in settings.items() if page.get_by_label(label).input_value() != text}
    for label, text in missing.items():
        page.get_by_label(label).fill(text)
        page.get_by_label(label).press("Tab")
    page.wait_for_timeout(400)
    return not missing


def wait_for_end(page) -> None:
    """Until everything has been played and the next run can be asked for."""
    page.wait_for_function("happened.some((event) => event.name === 'ended')", timeout=120_000)
    page.wait_for_selector("#generate:visible")
    page.wait_for_timeout(300)  # the script may hear of the last frame after the end


def wait_until(page, condition: Callable[[], Any], seconds: float = 20) -> None:
    """Until the condition holds. `page` is the one to look at, or None."""
    deadline = time.monotonic() + seconds
    while not condition():
        in_time(time.monotonic() < deadline, "it did not happen in time")
        if page is None:
            time.sleep(0.02)
        else:
            page.wait_for_timeout(20)  # and not time.sleep: the page's events are handled meanwhile


def downloaded(page, folder: Path) -> Path:
    with page.expect_download() as download:
        page.locator("#download").click()
    assert re.fullmatch(r"self-forcing-seed\d+-[0-9a-f]{8}\.mp4", download.value.suggested_filename)
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


@dataclass
class Sight:
    """What the recorder in the page saw of one run. Times are seconds since the epoch, as the server's are."""

    frames: list[dict[str, Any]]
    """Painted: code (the number in the picture), time, at (place in the video), presented (the browser's own count)."""
    events: list[dict[str, Any]]
    """Of the player: name, time, at."""
    jumps: list[dict[str, Any]]
    """Of the playhead, by a script: from, to, time."""
    duration: float
    samples: int
    """How often the recorder looked for things that cover the picture."""
    covers: list[str]

    @classmethod
    def of(cls, page) -> Sight:
        names = "painted", "happened", "jumps"
        found = page.evaluate("({painted, happened, jumps, samples, covers})")
        for entry in itertools.chain(*(found[name] for name in names)):
            entry["time"] /= 1000
        duration = page.evaluate("document.querySelector('#video video').duration")
        return cls(*(found[name] for name in names), duration, found["samples"], found["covers"])

    @property
    def codes(self) -> list[int]:
        """Numbers of the painted frames. The browser may paint a frame that stands still again; that is no news."""
        return [code for code, _ in itertools.groupby(frame["code"] for frame in self.frames)]

    @property
    def presented(self) -> int:
        """How many frames the browser painted by its own count: on a busy machine a script hears too late of some."""
        return self.frames[-1]["presented"] - self.frames[0]["presented"] + 1

    def named(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["name"] == name]

    @property
    def waits(self) -> list[dict[str, Any]]:
        """When the player ran dry in the middle of the video."""
        return [event for event in self.named("waiting") if event["at"] > 0.1]


def playlist_requests(page) -> list[str]:
    """Addresses of the playlists that the player asked for since the last `ask`, in order."""
    return page.evaluate(
        "performance.getEntriesByType('resource').map((entry) => entry.name).filter((name) => /playlist/.test(name))"
    )


def seek(page, frame: int, fps: float) -> list[int]:
    """Move the playhead into the middle of a frame's time; the numbers of the frames that this paints."""
    page.evaluate(
        """async (at) => {
            const video = document.querySelector("#video video");
            video.pause();
            forget();
            const arrived = new Promise((resolve) => video.addEventListener("seeked", resolve, { once: true }));
            video.currentTime = at;
            await arrived;
        }""",
        (frame + 0.5) / fps,
    )
    page.wait_for_function("painted.length > 0", timeout=5_000)
    page.wait_for_timeout(200)
    return Sight.of(page).codes
