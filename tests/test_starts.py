"""How uploads are read beside each other, what of them is kept, and what is removed."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import InvalidRequest, SelfForcingError
from pipeline.start import Start
from tests.pictures import encoded, picture
from tests.scripted import SPEC, ScriptedPipeline
from tests.waiting import wait_until
from web import starts
from web.adapter import adapted
from web.starts import READERS, Starts
from web.storage import VIDEOS, TemporaryHome, sweep_uploads

MODEL = adapted(ScriptedPipeline())
FRAMES = np.zeros((1, SPEC.height, SPEC.width, 3), np.uint8)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    home = TemporaryHome(tmp_path)
    yield home.path
    home.close()


def sent(home: Path, name: str, data: bytes = b"picture") -> str:
    """A file as Gradio stores it: in a folder of its own."""
    file = home / name / "a.png"
    file.parent.mkdir(parents=True)
    file.write_bytes(data)
    return str(file)


class Reader:
    """Stands for the decoder: notes what it is asked, and takes its time."""

    def __init__(self, work: Callable[[str], None] = lambda path: None) -> None:
        self.reads: list[str] = []
        self.at_once = self.most_at_once = 0
        self._work, self._lock = work, threading.Lock()

    def __call__(self, path: str, spec: object) -> Start:
        with self._lock:
            self.reads.append(path)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            self._work(path)
        finally:
            with self._lock:
                self.at_once -= 1
        return Start(kind="image", frames=FRAMES.copy())


def test_few_are_read_at_once_and_none_twice(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(lambda path: time.sleep(0.1))
    monkeypatch.setattr(starts, "read_start", reader)
    files, ours = [sent(home, f"{number}") for number in range(4)], Starts(home)
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda path: ours.read(path, MODEL), files * 3))
    assert sorted(reader.reads) == sorted(files) and reader.most_at_once == READERS
    assert all(one is other for one, other in zip(found[:4], found[4:8], strict=True))


def test_all_who_wait_for_a_bad_file_are_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def refuse(path: str) -> None:
        released.wait(20)
        raise InvalidRequest("The picture is damaged.")

    reader = Reader(refuse)
    monkeypatch.setattr(starts, "read_start", reader)
    path, ours = sent(home, "bad"), Starts(home)
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(ours.read, path, MODEL) for _ in range(3)]
        wait_until(lambda: reader.reads)
        time.sleep(0.1)
        released.set()
        assert {str(one.exception()) for one in asked} == {"The picture is damaged."}
    assert len(reader.reads) == 1 and not Path(path).exists()
    with pytest.raises(InvalidRequest, match="gone"):
        ours.read(path, MODEL)


def test_a_file_that_has_to_wait_too_long_is_told_so_and_stays(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    reader = Reader(lambda path: released.wait(20))
    monkeypatch.setattr(starts, "read_start", reader)
    monkeypatch.setattr(starts, "WAIT_SECONDS", 0.05)
    ours, last = Starts(home), sent(home, "last")
    with ThreadPoolExecutor(READERS) as pool:
        for number in range(READERS):
            pool.submit(ours.read, sent(home, f"{number}"), MODEL)
        wait_until(lambda: reader.at_once == READERS)
        with pytest.raises(SelfForcingError, match="Too many files") as refused:
            ours.read(last, MODEL)
        released.set()
    assert not isinstance(refused.value, InvalidRequest) and Path(last).exists()
    assert ours.read(last, MODEL) is not None


def test_frames_are_kept_up_to_a_number_of_bytes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader()
    monkeypatch.setattr(starts, "read_start", reader)
    ours, files = Starts(home, max_bytes=3 * FRAMES.nbytes), [sent(home, f"{number}") for number in range(4)]
    for path in files[:3] * 2:
        ours.read(path, MODEL)
    assert reader.reads == files[:3]
    ours.read(files[0], MODEL)
    ours.read(files[3], MODEL)
    assert ours.known(files[1], MODEL) is None, "nobody asked for that one longest"
    assert all(ours.known(files[number], MODEL) for number in (0, 2, 3))
    one = Starts(home, max_bytes=1)
    assert one.read(files[0], MODEL) is one.known(files[0], MODEL)


def test_what_is_known_is_not_read(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader()
    monkeypatch.setattr(starts, "read_start", reader)
    ours, path = Starts(home), sent(home, "a")
    assert ours.known(path, MODEL) is None and ours.known(None, MODEL) is None and ours.known(path, None) is None
    assert reader.reads == []
    start = ours.read(path, MODEL)
    assert ours.known(path, MODEL) is start
    Path(path).unlink()
    ours.look_after([])
    assert ours.known(path, MODEL) is None


# ---- what is removed


def make_old(path: str, age: float = 1000) -> None:
    for entry in (Path(path), Path(path).parent):
        os.utime(entry, (time.time() - age,) * 2)


def test_what_is_used_is_not_swept(home: Path) -> None:
    data, ours = encoded(picture(), "PNG"), Starts(home)
    used, waiting, old = (sent(home, name, data) for name in ("used", "waiting", "old"))
    for path in (used, waiting, old):
        make_old(path)
    ours.read(used, MODEL)
    ours.look_after([waiting, "/etc/passwd", "zero\0byte", str(home / "never.png")])
    sweep_uploads(home, max_age=500)
    assert [Path(path).exists() for path in (used, waiting, old)] == [True, True, False]


def test_many_uploads_do_not_push_out_what_is_waited_for(home: Path) -> None:
    waiting, ours = sent(home, "waiting", bytes(1000)), Starts(home)
    make_old(waiting, 100)
    others = [sent(home, f"other {number}", bytes(1000)) for number in range(20)]
    for path in others:
        make_old(path, 1)
    ours.look_after([waiting])
    sweep_uploads(home, max_bytes=5000)
    assert Path(waiting).exists() and sum(Path(path).exists() for path in others) == 4


@pytest.mark.parametrize(("place", "stays"), [("upload", False), (f"{VIDEOS}/token", True)])
def test_only_uploads_are_removed_for_being_bad(home: Path, place: str, stays: bool) -> None:
    path = sent(home, place, b"neither picture nor video")
    with pytest.raises(InvalidRequest, match="neither a picture"):
        Starts(home).read(path, MODEL)
    assert Path(path).exists() == stays


def test_what_lies_elsewhere_is_neither_read_nor_removed(home: Path, tmp_path: Path) -> None:
    elsewhere = sent(tmp_path, "elsewhere")
    with pytest.raises(InvalidRequest, match="A file is needed"):
        Starts(home).read(elsewhere, MODEL)
    link = home / "link.png"
    link.symlink_to(elsewhere)
    with pytest.raises(InvalidRequest, match="A file is needed"):
        Starts(home).read(str(link), MODEL)
    assert Path(elsewhere).exists()
