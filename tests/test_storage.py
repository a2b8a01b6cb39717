"""What is kept of finished videos and ended streams, and for how long."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from gradio.route_utils import MediaStream

import app
from pipeline.errors import SelfForcingError
from web.storage import KEPT_PER_VISITOR, TemporaryHome, VideoStore, sweep_uploads
from web.streams import StreamMemory


@pytest.fixture
def store(tmp_path: Path) -> VideoStore:
    return VideoStore(tmp_path / "videos", max_age=1000, max_bytes=10_000, grace=100)


def add_video(store: VideoStore, session: str, age: float = 0, size: int = 100, *, on_page: bool = False) -> Path:
    folder = store.new_folder(session, on_page=on_page)
    (folder / "video.mp4").write_bytes(bytes(size))
    make_old(folder, age)
    return folder


def make_old(path: Path, age: float) -> None:
    os.utime(path, (time.time() - age,) * 2)


# ---- videos


def test_a_visitors_newest_videos_are_kept(store: VideoStore) -> None:
    folders = [add_video(store, "a", on_page=True) for _ in range(KEPT_PER_VISITOR + 2)]
    other = add_video(store, "b", on_page=True)
    assert [folder.exists() for folder in folders] == [False, False] + [True] * KEPT_PER_VISITOR
    assert other.exists()


def test_programs_take_no_room_from_each_other(store: VideoStore) -> None:
    """All MCP clients are one session."""
    folders = [add_video(store, "mcp") for _ in range(2 * KEPT_PER_VISITOR)]
    store.sweep()
    assert all(folder.exists() for folder in folders)


def test_videos_take_no_room_from_comparisons(store: VideoStore) -> None:
    comparison = store.new_folder("a", "comparison", on_page=True)
    videos = [add_video(store, "a", on_page=True) for _ in range(KEPT_PER_VISITOR + 1)]
    assert comparison.exists() and not videos[0].exists()
    for _ in range(KEPT_PER_VISITOR):
        store.new_folder("a", "comparison", on_page=True)
    assert not comparison.exists() and videos[1].exists()


def test_what_an_open_page_offers_does_not_age(store: VideoStore) -> None:
    offered, other = add_video(store, "a", age=5000, on_page=True), add_video(store, "a", age=5000)
    file = offered / "video.mp4"
    before = file.stat()
    store.sweep()
    assert offered.exists() and not other.exists()
    after = file.stat()
    assert after.st_mtime_ns == before.st_mtime_ns and (after.st_ctime_ns > before.st_ctime_ns or os.name == "nt")
    store.leave("a")
    store.sweep()
    assert offered.exists(), "a phone that was locked comes back"
    make_old(offered, time.time() - offered.stat().st_mtime + 101)
    store.sweep()
    assert not offered.exists()


def test_for_want_of_room_an_open_pages_oldest_go_too(store: VideoStore) -> None:
    oldest, newer = (add_video(store, "a", age=age, size=6000, on_page=True) for age in (5000, 4000))
    store.sweep()
    assert not oldest.exists() and newer.exists()


def test_names_cannot_be_guessed(store: VideoStore) -> None:
    names = {store.new_folder("../a").name for _ in range(3)}
    assert len(names) == 3 and all(len(name) == 32 and int(name, 16) >= 0 for name in names)


def test_old_videos_go(store: VideoStore) -> None:
    old, young = add_video(store, "a", age=1001), add_video(store, "a", age=900)
    store.sweep()
    assert not old.exists() and young.exists()


def test_beyond_the_total_the_oldest_go_first(store: VideoStore) -> None:
    folders = [add_video(store, f"visitor {age}", age, size=4000) for age in (30, 10, 40, 20)]
    store.sweep()
    assert [folder.exists() for folder in folders] == [False, True, False, True]


def test_the_videos_of_who_has_left_go_after_a_while(store: VideoStore) -> None:
    left, stays = add_video(store, "a"), add_video(store, "b")
    store.leave("a")
    store.sweep()
    assert left.exists(), "a phone that was locked comes back"
    make_old(left, time.time() - left.stat().st_mtime + 101)
    store.sweep()
    assert not left.exists() and stays.exists()


def test_leaving_makes_no_video_younger(store: VideoStore) -> None:
    old = add_video(store, "a", age=950)
    store.leave("a")
    assert time.time() - old.stat().st_mtime > 940


def test_leaving_twice_or_without_a_video_is_nothing(store: VideoStore) -> None:
    store.leave("nobody")
    add_video(store, "a")
    store.leave("a")
    store.leave("a")
    store.sweep()


def test_a_folder_of_which_nothing_came_goes_at_once(store: VideoStore) -> None:
    folder, other = store.new_folder("a"), add_video(store, "a")
    store.discard(folder)
    store.discard(folder)
    assert not folder.exists() and other.exists()


def test_sweeping_before_the_first_video_is_nothing(store: VideoStore) -> None:
    store.sweep()
    assert not store.root.exists()


def test_videos_of_many_visitors_are_forgotten_with_their_files(store: VideoStore) -> None:
    for number in range(50):
        add_video(store, f"visitor {number}", age=2000)
    store.sweep()
    assert not any(store.root.iterdir()) and not store._folders


# ---- uploads


def test_uploads_go_by_age_and_by_size_and_nothing_else_does(tmp_path: Path) -> None:
    home = TemporaryHome(tmp_path)
    try:
        ages = {"oldest": 2000, "older": 30, "young": 10}
        for name, age in ages.items():
            (home.path / name).mkdir()
            (home.path / name / "video.mp4").write_bytes(bytes(400))
            make_old(home.path / name, age)
        (home.path / "broken-off").write_bytes(bytes(400))
        make_old(home.path / "broken-off", 2000)
        video = home.path / "videos" / "token" / "video.mp4"
        video.parent.mkdir(parents=True)
        video.write_bytes(bytes(5000))
        make_old(home.path / "videos", 5000)
        sweep_uploads(home.path, max_age=1000, max_bytes=10_000)
        left = {entry.name for entry in home.path.iterdir()}
        assert left == {"older", "young", "videos"}
        sweep_uploads(home.path, max_age=1000, max_bytes=500)
        left = {entry.name for entry in home.path.iterdir()}
        assert left == {"young", "videos"} and video.exists()
    finally:
        home.close()


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "somebody's").write_bytes(b"file")
    make_old(tmp_path / "somebody's", 1e6)
    sweep_uploads(tmp_path, max_age=1, max_bytes=1)
    assert (tmp_path / "somebody's").exists()


# ---- homes


def test_a_home_goes_with_its_program(tmp_path: Path) -> None:
    home = TemporaryHome(tmp_path)
    (home.path / "video.mp4").write_bytes(b"x")
    assert home.path.stat().st_mode & 0o777 == 0o700 or os.name == "nt", "nobody else may look inside"
    home.close()
    assert not home.path.exists()


def test_two_programs_have_homes_beside_each_other(tmp_path: Path) -> None:
    first, second = TemporaryHome(tmp_path), TemporaryHome(tmp_path)
    assert first.path.is_dir() and second.path.is_dir() and first.path != second.path
    first.close()
    assert second.path.is_dir()
    second.close()


def test_a_folder_that_others_use_as_well_keeps_what_is_theirs(tmp_path: Path) -> None:
    theirs = tmp_path / "holidays" / "film.mp4"
    theirs.parent.mkdir()
    theirs.write_bytes(bytes(1000))
    make_old(theirs.parent, 10_000)
    VideoStore(tmp_path, max_age=10, max_bytes=1).sweep()
    assert theirs.exists()


def test_a_home_that_somebody_else_has_prepared_is_refused(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"self-forcing-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError):
        TemporaryHome(tmp_path)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with pytest.raises(SelfForcingError, match="belongs to somebody else"):
        app.make_home()


def test_a_folder_without_a_lock_may_belong_to_somebody(tmp_path: Path) -> None:
    first = TemporaryHome(tmp_path)
    strange = first.path.parent / "being-made"
    strange.mkdir()
    TemporaryHome(tmp_path).close()
    assert strange.is_dir()
    first.close()


# ---- streams


class Streams:
    """Ended and running streams as Gradio keeps them, and a clock to be set by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pending: dict[str, dict[str, dict[int, MediaStream]]] = {}
        blocks = SimpleNamespace(pending_streams=self.pending)
        self.memory = StreamMemory(blocks, max_age=100, max_bytes=1000, clock=lambda: self.now)

    def add(self, session: str, run: str, size: int = 10, *, ended: bool = True) -> MediaStream:
        stream = MediaStream()
        stream.segments.append({"id": "s", "duration": 1.0, "extension": ".ts", "data": bytes(size)})
        if ended:
            stream.end_stream()
        self.pending.setdefault(session, {})[run] = {1: stream}
        return stream

    def left(self) -> set[str]:
        return {run for runs in self.pending.values() for run in runs}


@pytest.fixture
def streams() -> Streams:
    return Streams()


def test_a_visitors_ended_streams_are_forgotten_and_no_other(streams: Streams) -> None:
    ended = streams.add("a", "ended")
    streams.add("a", "running", ended=False)
    streams.add("b", "somebody else's")
    streams.memory.forget("a")
    assert streams.left() == {"running", "somebody else's"}
    assert ended.segments == [], "whoever still holds the stream does not hold its video"
    streams.memory.forget("nobody")


def test_old_streams_go_once_they_have_ended(streams: Streams) -> None:
    streams.add("a", "first")
    streams.add("a", "running", ended=False)
    streams.memory.sweep()
    streams.now = 60
    streams.add("b", "second")
    streams.memory.sweep()
    streams.now = 101
    streams.memory.sweep()
    assert streams.left() == {"running", "second"}
    streams.now = 161
    streams.memory.sweep()
    assert streams.left() == {"running"} and set(streams.pending) == {"a"}


def test_too_many_streams_make_the_oldest_go(streams: Streams) -> None:
    for number in range(5):
        streams.now = number
        streams.add(f"visitor {number}", str(number), size=300)
        streams.memory.sweep()
    assert streams.left() == {"2", "3", "4"}


@pytest.mark.parametrize("work", [StreamMemory.sweep, lambda memory: memory.forget("a")], ids=["sweep", "forget"])
def test_without_streams_there_is_nothing_to_do(streams: Streams, work: Callable[[StreamMemory], None]) -> None:
    streams.pending["a"] = {}
    work(streams.memory)
    assert streams.left() == set()
