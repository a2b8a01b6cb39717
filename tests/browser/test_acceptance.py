"""Streaming as a visitor sees it, in Chromium: fourteen checks that any way of showing the video has to pass.

Every frame carries its own number, so what was painted, in which order and when, is read off the pictures.
"""

from __future__ import annotations

import itertools
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pipeline.recipe import read_recipe
from tests.browser import conftest
from tests.browser.conftest import Site, retried
from tests.browser.visitor import (
    Sight,
    TooSlow,
    ask,
    downloaded,
    in_time,
    playlist_requests,
    seek,
    wait_for_end,
    wait_until,
)
from tests.media import Media, read_media
from tests.scripted import SPEC, read_code

pytestmark = pytest.mark.browser

QUIET_SECONDS = 4.0
"""A player that has seen the end of the stream asks for no playlist for this long. (Otherwise it asks every few s.)"""

SHOWN_AGAIN = 2
"""So many frames further back at most does Chromium begin again after a stall: seen once, where a test run took all of
the processor, and without a script having moved the playhead."""

# The patches of pure red, green and blue along the picture's upper edge: their middles, as shares of its size.
PATCHES = {
    (255, 0, 0): (4 / SPEC.width, 4 / SPEC.height),
    (0, 255, 0): (12 / SPEC.width, 4 / SPEC.height),
    (0, 0, 255): (20 / SPEC.width, 4 / SPEC.height),
}


@dataclass(frozen=True)
class Pace:
    """What is asked for, and how fast the model is."""

    fps: float
    seconds: float
    step_seconds: float

    @property
    def num_frames(self) -> int:
        return SPEC.frames_in(SPEC.blocks_for(self.seconds, self.fps))


# A block is four steps and, after the first, twelve frames.
FAST = Pace(fps=16, seconds=5, step_seconds=0.07)
CALM = Pace(fps=6, seconds=9.5, step_seconds=0.15)
BRISK = Pace(fps=24, seconds=4, step_seconds=0.125)  # about as fast as it is played: not without a pre-buffer
SLOW = Pace(fps=16, seconds=3.5, step_seconds=0.5625)  # a third of real time
LONG = Pace(fps=16, seconds=60, step_seconds=0.04)


@dataclass
class Showing:
    """One whole run, as seen in the page, and what was in the page and in the file afterwards."""

    pace: Pace
    stamps: list[float]
    """When each block was there, on the server."""
    sight: Sight
    late_requests: list[str]
    """Playlists asked for in the `QUIET_SECONDS` after everything had been played."""
    playlist: str
    media: Media
    seeks: dict[int, list[int]]
    """Frame -> frames painted when the playhead is moved there."""
    colours: list[list[int]]
    """Of the patches, as painted."""


def show(page, site: Site, pace: Pace, folder: Path) -> Showing:
    site.pipeline.step_seconds = pace.step_seconds
    ask(page, seconds=pace.seconds, fps=pace.fps)
    wait_for_end(page)
    page.wait_for_timeout(1500)  # the page itself asks once more when a run is over
    sight, asked = Sight.of(page), playlist_requests(page)
    quiet_until = time.monotonic() + QUIET_SECONDS
    media = read_media(downloaded(page, folder))
    page.wait_for_timeout(1000 * max(0.0, quiet_until - time.monotonic()))
    late = playlist_requests(page)[len(asked) :]
    playlist = page.evaluate("(address) => fetch(address).then((answer) => answer.text())", asked[-1])
    last = pace.num_frames - 1
    seeks = {frame: seek(page, frame, pace.fps) for frame in (0, (last + 1) // 2, last)}
    colours = page.evaluate(
        "(points) => readColours(document.querySelector('#video video'), points)", list(PATCHES.values())
    )
    return Showing(pace, site.pipeline.stamps[-1], sight, late, playlist, media, seeks, colours)


class Showings:
    """Whole runs that several checks look at, each played once, in a page of its own."""

    def __init__(self, open_page: Callable, site: Site, folder: Path, played: dict[Pace, Showing]) -> None:
        self._open_page, self._site, self._folder, self._played = open_page, site, folder, played
        self._last: Pace | None = None

    def __call__(self, pace: Pace) -> Showing:
        self._last = pace
        if pace not in self._played:
            self._played[pace] = show(self._open_page(), self._site, pace, self._folder)
        return self._played[pace]

    def reset(self) -> None:
        self._open_page.reset()
        self._site.reset()
        self._played.pop(self._last, None)


@pytest.fixture(scope="module")
def played() -> dict[Pace, Showing]:
    return {}


@pytest.fixture
def showing(open_page, site, tmp_path, played) -> Showings:
    return Showings(open_page, site, tmp_path, played)


# ---- what several checks ask


def assert_painted(sight: Sight, num_frames: int, share: float = 0.98) -> None:
    """Every frame once and in its order, up to the last one, save for the few that a browser may leave out.

    Where the player ran dry, the browser may begin again with the last frames that it had.
    """
    codes = sight.codes
    back = [before - after for before, after in itertools.pairwise(codes) if after < before]
    assert len(back) <= len(sight.waits) and max(back, default=0) <= SHOWN_AGAIN, f"frames in a wrong order: {codes}"
    assert codes[-1] == num_frames - 1
    missing = sorted(set(range(num_frames)) - set(codes))
    twice = sum(back) + len(back)
    in_time(sight.presented - twice >= share * num_frames, f"not seen: {missing}")


def assert_begins(sight: Sight) -> None:
    """With the first block, and unless the script heard too late of them, with the first frames."""
    first = sight.codes[0]
    assert first < SPEC.frames_in(1)
    in_time(first <= 2, f"the first frame that was seen is {first}")


def assert_no_stall(sight: Sight) -> None:
    in_time(sight.waits == [], f"stalls: {sight.waits}")


def assert_ended(showing: Showing) -> None:
    sight, duration = showing.sight, showing.pace.num_frames / showing.pace.fps
    (ended,) = sight.named("ended")
    took = ended["time"] - sight.frames[0]["time"]
    in_time(took <= duration + 3, f"a video of {duration} s took {took} s")
    assert abs(sight.duration - duration) <= 0.01
    assert showing.playlist.rstrip().endswith("#EXT-X-ENDLIST")
    assert showing.late_requests == [], "the player does not know that the stream has ended"


def assert_exact(media: Media, num_frames: int, fps: float) -> None:
    """The file holds every frame, in order, equally long, and says truly how its colours are meant."""
    assert [read_code(picture) for picture in media.frames] == list(range(num_frames))
    np.testing.assert_allclose(media.timestamps, np.arange(num_frames) / fps, atol=1e-4)
    assert re.match(r"h264 .*yuv420p\(tv, bt709, progressive\)", media.description)


# ---- the checks


@retried
def test_a_run_needs_neither_ffmpeg_nor_ffprobe_on_the_path(showing) -> None:
    """Check 1."""
    assert shutil.which("ffmpeg") is None and shutil.which("ffprobe") is None
    run = showing(FAST)
    assert run.sight.codes[-1] == len(run.media.frames) - 1 == FAST.num_frames - 1


@retried
def test_the_first_frame_is_painted_within_a_second_of_being_made(showing) -> None:
    """Check 2. (At 6 fps: a first block that lasts until the next one is there is shown without a pre-buffer.)"""
    run = showing(CALM)
    assert_begins(run.sight)
    first = run.sight.frames[0]["time"]
    in_time(first - run.stamps[0] <= 1.0, f"it was painted {first - run.stamps[0]} s after its block was made")
    in_time(first < run.stamps[3], "it does not play before most of it exists")


@retried
@pytest.mark.parametrize("pace", [FAST, CALM], ids=["16fps", "6fps"])
def test_frames_are_painted_in_order_and_to_the_last(showing, pace) -> None:
    """Check 3."""
    sight = showing(pace).sight
    assert_painted(sight, pace.num_frames)
    late = [frame["at"] - frame["code"] / pace.fps for frame in sight.frames]
    assert max(late) <= 0.02, "a frame is shown after its time"
    # A script that is called late reads the number of a later frame than the one that it was called for.
    in_time(min(late) >= -0.02, "a frame is shown before its time")


@retried
@pytest.mark.parametrize("pace", [FAST, CALM, BRISK], ids=["16fps", "6fps", "24fps"])
def test_a_fast_model_plays_without_a_stall(showing, pace) -> None:
    """Check 4."""
    assert_no_stall(showing(pace).sight)


@retried
def test_a_slow_model_stalls_only_until_its_next_block(open_page, site) -> None:
    """Check 5."""
    site.pipeline.step_seconds = SLOW.step_seconds
    page = open_page()
    ask(page, seconds=SLOW.seconds, fps=SLOW.fps)
    wait_for_end(page)
    sight, (stamps,) = Sight.of(page), site.pipeline.stamps
    starts = [SPEC.frames_in(block) if block else 0 for block in range(len(stamps))]
    assert sight.waits, "nothing to see: the model was as fast as its video"
    for wait in sight.waits:
        # A browser keeps back the last frames that it has until it gets more, so it may wait a little before a block.
        missing = next(block for block, start in enumerate(starts) if start / SLOW.fps >= wait["at"] - 0.02)
        resumed = next(frame for frame in sight.frames if frame["code"] >= starts[missing])
        late = resumed["time"] - stamps[missing]
        in_time(late <= 1.0, f"block {missing} was painted {late} s after it was made")
    assert [jump for jump in sight.jumps if abs(jump["to"] - jump["from"]) > 0.02] == []
    assert_painted(sight, SLOW.num_frames)


@retried
@pytest.mark.parametrize("pace", [FAST, CALM, BRISK], ids=["16fps", "6fps", "24fps"])
def test_the_player_learns_of_the_end(showing, pace) -> None:
    """Check 6."""
    assert_ended(showing(pace))


@retried
@pytest.mark.parametrize("pace", [FAST, CALM, BRISK], ids=["16fps", "6fps", "24fps"])
def test_seeking_paints_exactly_the_frame_sought(showing, pace) -> None:
    """Check 7."""
    seeks = showing(pace).seeks
    assert len(seeks) == 3 and seeks == {frame: [frame] for frame in seeks}


@retried
@pytest.mark.parametrize("pace", [FAST, CALM, BRISK], ids=["16fps", "6fps", "24fps"])
def test_the_file_is_exact(showing, pace) -> None:
    """Check 8."""
    assert_exact(showing(pace).media, pace.num_frames, pace.fps)


@retried
def test_stop_ends_the_run_within_a_step_and_keeps_what_exists(open_page, site, tmp_path) -> None:
    """Check 9."""
    site.pipeline.step_seconds = 0.1
    page = open_page()
    ask(page, seconds=60)
    wait_until(page, lambda: len(site.pipeline.made) >= 4)
    page.locator("#stop").click()
    wait_until(page, lambda: site.pipeline.intervals, 5)
    (click,) = [click for click in page.evaluate("clicks") if click["on"] == "stop"]
    ((_, end),) = site.pipeline.intervals
    took = on_the_wall_clock(end) - click["time"] / 1000
    in_time(took <= site.pipeline.step_seconds + 0.3, f"it ended {took} s after the click")
    wait_for_end(page)
    assert "Stopped" in page.inner_text("#status")
    path = downloaded(page, tmp_path)
    num_frames = SPEC.frames_in(len(site.pipeline.made))
    assert_exact(read_media(path), num_frames, 16)
    assert_painted(Sight.of(page), num_frames)
    recipe = read_recipe(path)
    assert recipe["frames"] == num_frames and recipe["complete"] is False

    ask(page, seconds=2)
    wait_for_end(page)
    sight = Sight.of(page)
    assert_begins(sight)
    assert_painted(sight, 33)
    assert_exact(read_media(downloaded(page, tmp_path)), 33, 16)


@retried
def test_closing_the_tab_frees_the_model(open_page, site) -> None:
    """Check 10."""
    site.pipeline.step_seconds = 0.4
    page = open_page()
    ask(page, seconds=60)
    wait_until(page, lambda: site.pipeline.made)
    closed = time.monotonic()
    page.close()
    wait_until(None, lambda: site.pipeline.intervals)
    ((_, end),) = site.pipeline.intervals
    in_time(end - closed <= 0.5 + site.pipeline.step_seconds, f"it went on for {end - closed} s")


@retried
def test_two_visitors_each_see_and_get_their_own_video(open_page, site, tmp_path) -> None:
    """Check 11."""
    site.pipeline.step_seconds = 0.08
    first, second = open_page(), open_page()
    ask(first, seconds=3)
    ask(second, seconds=2)
    for page, num_frames in ((first, 45), (second, 33)):
        wait_for_end(page)
        assert_painted(Sight.of(page), num_frames)
        assert_exact(read_media(downloaded(page, tmp_path)), num_frames, 16)

    ask(first, seconds=60)
    wait_until(first, lambda: len(site.pipeline.requests) == 3)
    ask(second, seconds=3)
    second.wait_for_selector("#stop:visible")
    assert len(site.pipeline.requests) == 3, "the second waits for its turn"
    first.locator("#stop").click()
    wait_for_end(second)
    assert_painted(Sight.of(second), 45)
    assert_exact(read_media(downloaded(second, tmp_path)), 45, 16)
    assert [request.seconds for request in site.pipeline.requests] == [3, 2, 60, 3]
    for (_, end), (begin, _) in zip(site.pipeline.intervals[:-1], site.pipeline.intervals[1:], strict=True):
        assert end <= begin, "two runs at once on one model"


@retried
@pytest.mark.parametrize("pace", [FAST, BRISK], ids=["16fps", "24fps"])
def test_nothing_lies_over_the_picture(showing, pace) -> None:
    """Check 12."""
    sight = showing(pace).sight
    in_time(sight.samples >= 5 * sight.duration, f"looked {sight.samples} times only")
    assert set(sight.covers) == set()


@retried
def test_colours_are_those_that_the_model_made(showing) -> None:
    """Check 13. (That the page raised no error, every test here asks: see `open_page`.)"""
    run = showing(FAST)
    height, width = run.media.frames.shape[1:3]
    for painted, (colour, (x, y)) in zip(run.colours, PATCHES.items(), strict=True):
        np.testing.assert_allclose(painted, colour, atol=16)
        in_the_file = run.media.frames[:, int(y * height), int(x * width)].astype(int)
        np.testing.assert_allclose(in_the_file, np.broadcast_to(colour, in_the_file.shape), atol=16)


@retried
def test_a_second_run_in_the_same_page_starts_afresh_and_a_minute_plays_to_its_end(open_page, site, tmp_path) -> None:
    """Check 14."""
    page = open_page()
    site.pipeline.step_seconds = 0.02
    ask(page, seconds=2)
    wait_for_end(page)
    assert_painted(Sight.of(page), 33)

    run = show(page, site, LONG, tmp_path)
    assert page.locator("video").count() == 1
    assert_begins(run.sight)
    assert_painted(run.sight, LONG.num_frames)
    assert_no_stall(run.sight)
    assert_ended(run)
    assert run.seeks == {frame: [frame] for frame in run.seeks}
    assert_exact(run.media, LONG.num_frames, LONG.fps)


def on_the_wall_clock(monotonic: float) -> float:
    return time.time() - (time.monotonic() - monotonic)


@pytest.mark.parametrize(
    ("failure", "tries"), [(AssertionError, 1), (ValueError, 1), (TooSlow, 2), ("playwright's TimeoutError", 2)]
)
def test_only_what_was_too_slow_is_tried_again(browser, failure, tries, monkeypatch) -> None:
    monkeypatch.setattr(conftest, "busy_elsewhere", lambda: 0.0)
    if isinstance(failure, str):
        from playwright.sync_api import TimeoutError as failure

    tried = []

    @retried
    def failing(**fixtures) -> None:
        tried.append(fixtures)
        raise failure("every time")

    with pytest.raises(failure):
        failing(page=browser)
    assert len(tried) == tries
    monkeypatch.setattr(conftest, "busy_elsewhere", lambda: 0.9)
    with pytest.raises(pytest.skip.Exception if failure is TooSlow else failure):
        failing(page=browser)
