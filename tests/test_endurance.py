"""What wears a server out: visitors who vanish, never listen, come in crowds or come back fifty times."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import itertools
import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from pipeline import SelfForcingPipeline
from pipeline.cli import load_pipeline
from pipeline.errors import InvalidRequest, NonFiniteOutput, SelfForcingError, WeightsError
from pipeline.worker import ModelWorker
from tests.resources import disk_bytes, open_files, resident_bytes
from tests.scripted import ScriptedPipeline
from tests.server import Refused, Server, free_port
from tests.small import write_model_folder
from tests.waiting import wait_until
from web import generation
from web.page import QUEUE_SIZE, Page
from web.storage import TemporaryHome

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def no_tail(monkeypatch) -> None:
    """Nobody plays these streams, so nobody needs the time that a player needs at their end."""
    monkeypatch.setattr(generation, "TAIL_SECONDS", 0)


@pytest.fixture
def home(tmp_path: Path, monkeypatch) -> Iterator[Path]:
    home = TemporaryHome(tmp_path)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(home.path))
    yield home.path
    home.close()


@contextmanager
def serving(pipeline: Any, **settings: Any) -> Iterator[Server]:
    server = Server(pipeline, **settings)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def server(home: Path) -> Iterator[Server]:
    with serving(ScriptedPipeline(), max_seconds=20) as server:
        yield server


def reading(server: Server, path: str) -> socket.socket:
    """A connection on which the server is answering, until it is closed."""
    address = httpx.URL(server.url)
    connection = socket.create_connection((address.host, address.port), timeout=10)
    connection.sendall(f"GET /gradio_api/{path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
    connection.recv(1)
    return connection


def tab(server: Server, session: str) -> socket.socket:
    """An open tab, to be closed: the page keeps such a connection, and the server hears of it when it is cut."""
    return reading(server, f"heartbeat/{session}")


ASK = ("a red ball", 7, 16, 20, False, False, False)
"""For a long video."""
BRIEF = ("a red ball", 7, 16, 0.5, False, False, False)
"""One block."""


# ---- G4: connections that are cut


class Vanishing:
    """A visitor on a connection of their own, who asks for a long video and is gone without a word."""

    def __init__(self, server: Server, *, browser: bool) -> None:
        self.session = uuid.uuid4().hex
        self._connections = [tab(server, self.session)] if browser else []
        assert server.join(*ASK, session=self.session).status_code == 200
        self._connections.append(reading(server, f"queue/data?session_hash={self.session}"))

    def vanish(self) -> None:
        for connection in self._connections:
            connection.close()


def test_twenty_visitors_who_vanish_free_the_model(server: Server) -> None:
    rng = random.Random(4)
    server.pipeline.step_seconds = 0.01
    for number in range(20):
        visitor = Vanishing(server, browser=number % 2 == 0)
        time.sleep(rng.uniform(0, 0.3))
        visitor.vanish()
        begun = time.monotonic()
        wait_until(lambda session=visitor.session: server.idle and not server.page.generator.sessions.busy(session))
        # One second is promised; a program without a tab may hold its connection up to the next thing it is sent.
        assert time.monotonic() - begun < 3, number
    assert all(len([block for run, block in server.pipeline.made if run == number]) < 15 for number in range(20))
    server.pipeline.step_seconds = 0
    assert "Finished" in server.generate()[-1][1]


# ---- G5: nobody listens


def test_runs_that_nobody_listens_to_end_at_their_deadline(server: Server) -> None:
    server.page.generator.deadline = 0.7
    server.pipeline.step_seconds = 0.05
    for number in range(4):
        assert server.join(*ASK, session=f"deaf{number}").status_code == 200
    wait_until(lambda: len(server.pipeline.intervals) == 4, 20)
    assert all(end - begin < 3 for begin, end in server.pipeline.intervals)
    server.pipeline.step_seconds = 0
    assert "Finished" in server.generate(seconds=0.5)[-1][1]


# ---- G6: a crowd


def test_a_crowd_fills_the_queue_and_nothing_else(server: Server) -> None:
    gate = threading.Event()
    server.pipeline.on_step = lambda block, step: gate.wait(30)

    def join(number: int) -> int:
        return server.join(*BRIEF, session=f"crowd{number % 50}").status_code

    with ThreadPoolExecutor(16) as crowd:
        answers = list(crowd.map(join, range(200)))
    accepted = answers.count(200)
    assert set(answers) == {200, 503} and QUEUE_SIZE <= accepted <= QUEUE_SIZE + 2, "the queue, and what has left it"
    assert len(server.demo._queue) <= QUEUE_SIZE
    # Who does not want the model has not to wait for those who do.
    assert server.join(session="another", name="options").status_code == 200
    waits = []
    for _ in range(5):
        begun = time.monotonic()
        assert httpx.get(f"{server.url}config").status_code == 200
        waits.append(time.monotonic() - begun)
    assert min(waits) < 0.5, "it still answers"
    gate.set()
    wait_until(lambda: len(server.pipeline.intervals) == accepted, 60)
    assert "Finished" in server.generate()[-1][1]


# ---- G7: one model, many visitors


@pytest.fixture(scope="module")
def small_model(tmp_path_factory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("small"))


def test_visitors_who_take_turns_get_what_they_would_get_alone(small_model: Path, home: Path) -> None:
    seeds = [1, 2, 3, 4, 5]
    prompts = {"first": "a red balloon", "second": "a blue car", "third": "the mountains"}

    def visit(server: Server, session: str) -> dict[tuple[str, int], tuple[str, str]]:
        made = {}
        with tab(server, session):
            for seed in seeds:
                values = server.generate(prompts[session], seed, 12, 1, session=session)
                (streams,) = server.demo.pending_streams[session].values()
                stream = b"".join(segment["data"] for stream in streams.values() for segment in stream.segments)
                digests = [
                    hashlib.sha256(data).hexdigest() for data in (Path(values[-1][2]["path"]).read_bytes(), stream)
                ]
                made[session, seed] = tuple(digests)
        return made

    with serving(SelfForcingPipeline.from_pretrained(small_model)) as server:
        alone = {key: value for session in prompts for key, value in visit(server, session).items()}
    with serving(SelfForcingPipeline.from_pretrained(small_model)) as server, ThreadPoolExecutor(3) as visitors:
        together: dict[tuple[str, int], tuple[str, str]] = {}
        for made in visitors.map(lambda session: visit(server, session), prompts):
            together |= made
    assert together == alone
    assert len(set(alone.values())) == len(prompts) * len(seeds) == 15, "no two of them are alike"


def test_runs_of_several_visitors_never_overlap(server: Server) -> None:
    with ThreadPoolExecutor(3) as visitors:
        results = list(visitors.map(lambda seed: (seed, server.generate(seed=seed)[-1]), [1, 2, 3]))
    for seed, (_, text, file) in results:
        assert f">{seed}<" in text and f"seed{seed}-" in file["path"]
    spans = sorted(server.pipeline.intervals)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


# ---- G10: the event loop


class SlowToStop(ScriptedPipeline):
    """Needs a while to clean up, and does not look up while it makes a step."""

    def stream(self, request: Any) -> Iterator[Any]:
        try:
            yield from super().stream(request)
        finally:
            time.sleep(0.4)


def test_nothing_holds_up_the_event_loop(home: Path, monkeypatch) -> None:
    lags: list[float] = []

    async def probe(page: Page) -> None:
        while True:
            due = time.perf_counter() + 0.01
            await asyncio.sleep(0.01)
            lags.append(time.perf_counter() - due)

    monkeypatch.setattr(Page, "_sweep", probe)
    with serving(SlowToStop(step_seconds=0.12), max_seconds=20) as server:
        rng = random.Random(10)
        for _ in range(4):  # a machine that is busy with something else is no fault; what blocks, blocks always
            server.generate(seconds=0.1)
            lags.clear()
            for number in range(4):
                visitor = Vanishing(server, browser=number % 2 == 0)
                time.sleep(rng.uniform(0, 0.6))
                if number % 2:
                    server.call("_stop", session=visitor.session)
                visitor.vanish()
                wait_until(lambda: server.idle)
            assert len(lags) > 20
            if max(lags) < 0.1:
                return
        raise AssertionError(f"the event loop was held up for {max(lags):.2f} s")


# ---- D1, D3: what remains of fifty runs


def finish(server: Server, session: str) -> None:
    assert "Finished" in server.click(*BRIEF, session=session)[-1][1]


def stop(server: Server, session: str) -> None:
    server.pipeline.on_step = lambda block, step: block and server.page.generator.sessions.stop(session)
    assert "Stopped" in server.click(*ASK, session=session)[-1][1]


def fail(server: Server, session: str) -> None:
    server.pipeline.faults[1, 2] = RuntimeError("broken")
    with pytest.raises(Refused):
        server.click(*ASK, session=session)


def vanish(server: Server, session: str) -> None:
    server.pipeline.step_seconds = 0.01
    Vanishing(server, browser=True).vanish()
    wait_until(lambda: server.idle)


def exceed(server: Server, session: str) -> None:
    server.page.generator.deadline = 0.05
    server.pipeline.step_seconds = 0.01
    with pytest.raises(Refused, match="longer than"):
        server.click(*ASK, session=session)


def call(server: Server, session: str) -> None:
    values = server.run(*BRIEF, name="generate", session=session)
    assert values[-1][2]["state"] == "finished"


def call_and_stream(server: Server, session: str) -> None:
    server.run(*BRIEF[:3], name="video_generation_handler_streaming", session=session)


ENDS: list[Callable[[Server, str], None]] = [finish, stop, fail, vanish, exceed, call, call_and_stream]


def own_threads() -> set[str]:
    """Names of the threads, but for those that Gradio and asyncio keep in stock."""
    stock = ("AnyIO", "asyncio_")
    return {f"{thread.name}-{thread.ident}" for thread in threading.enumerate() if not thread.name.startswith(stock)}


def test_fifty_runs_with_all_kinds_of_ends_leave_nothing_behind(server: Server, home: Path) -> None:
    rng = random.Random(1)
    page = server.page

    def visit(end: Callable[[Server, str], None]) -> None:
        session = uuid.uuid4().hex
        deadline = page.generator.deadline
        with tab(server, session):
            end(server, session)
        server.reset()
        page.generator.deadline = deadline

    def leave_and_sweep() -> tuple[list[Path], int, set[str]]:
        wait_until(lambda: server.idle)
        page.generator.store.grace = 0
        wait_until(lambda: not page.generator.store._folders, 10)  # those who left have been noticed
        time.sleep(0.01)
        page.generator.store.sweep()
        page.streams.sweep()
        gc.collect()
        return list(home.rglob("*")), open_files(), own_threads()

    page.generator.store.grace = 0
    for end in ENDS:
        visit(end)
    disk, files, threads = leave_and_sweep()
    for end in rng.choices(ENDS, k=50):
        visit(end)
    disk_after, files_after, threads_after = leave_and_sweep()
    assert disk_after == disk == [page.generator.store.root], "not even an empty folder"
    assert files_after <= files + 3, "sockets of connections that are just being closed"
    assert threads_after == threads
    assert page.blocks.pending_streams == {} and not page.generator.sessions._active
    assert not page.generator.sessions._waiting and not page.generator.sessions._unheard


def test_thirty_runs_in_one_tab_keep_one_stream_three_files_and_no_memory(server: Server) -> None:
    session = uuid.uuid4().hex
    sizes = []
    with tab(server, session):
        for number in range(40):
            server.click("a red ball", number, 16, 0.5, False, False, False, session=session)
            streams = server.demo.pending_streams[session]
            assert len(streams) == 1
            assert len([run for run in streams.values() if all(stream.ended for stream in run.values())]) <= 1
            sizes.append(resident_bytes())
        assert len(list(server.page.generator.store.root.iterdir())) == 3
    steady = sizes[10:]
    slope = np.polyfit(range(len(steady)), steady, 1)[0]
    assert slope < 1e6, f"{slope / 1e6:.2f} MB a run"


KILLED = """
import sys, time
from web.storage import TemporaryHome
home = TemporaryHome(sys.argv[1])
(home.path / "videos" / "a").mkdir(parents=True)
(home.path / "videos" / "a" / "video.mp4").write_bytes(bytes(100_000))
print(home.path, flush=True)
time.sleep(60)
"""


def test_what_three_killed_programs_left_is_removed_and_a_living_ones_is_not(tmp_path: Path) -> None:
    programs = [
        subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    try:
        folders = [Path(program.stdout.readline().strip()) for program in programs]
        assert all(folder.is_dir() for folder in folders)
        for program in programs[:3]:
            program.kill()
            program.wait()
        home = TemporaryHome(tmp_path)
        folders_left = [entry for entry in home.path.parent.iterdir() if entry.is_dir()]
        assert sorted(folders_left) == sorted([folders[3], home.path])
        assert len(list(home.path.parent.iterdir())) == 4, "each with its lock"
        assert disk_bytes(folders[3]) >= 100_000
        home.close()
    finally:
        for program in programs:
            program.kill()
            program.wait()
            program.stdout.close()
    TemporaryHome(tmp_path).close()
    assert list(home.path.parent.iterdir()) == []


# ---- R4: what a visitor reads when something goes wrong

SECRET = "hf_" + "x" * 34
BROKEN = f"cannot open /srv/secret/model.py with {SECRET} on {socket.gethostname()}"
PRIVATE = re.compile(
    rf"(/[\w.-]+){{2,}}|[A-Za-z]:\\|hf_\w{{5}}|Traceback|File \"|\.py\b|{re.escape(socket.gethostname())}"
)


def assert_one_sentence(said: str) -> None:
    """Or two: what is wrong and what to do. Nothing of the machine it happened on."""
    assert re.fullmatch(r"[^\n]{10,200}\.", said) and len(re.findall(r"[.;] ", said)) <= 2, said
    assert PRIVATE.search(said) is None, said


def unexpected(server: Server) -> None:
    server.pipeline.faults[0, 0] = RuntimeError(BROKEN)


def out_of_memory(server: Server) -> None:
    server.pipeline.faults[1, 0] = MemoryError(BROKEN)


def non_finite(server: Server) -> None:
    server.pipeline.faults[1, 0] = NonFiniteOutput("The model produced invalid numbers in block 2 (latents).")


def too_slow(server: Server) -> None:
    server.page.generator.deadline = 0.05
    server.pipeline.step_seconds = 0.02


def disk_trouble(server: Server) -> None:
    server.page.generator.store.root.parent.mkdir(exist_ok=True)
    server.page.generator.store.root.write_bytes(b"")  # a file where a folder has to be


def shut_down(server: Server) -> None:
    server.page.worker.close()


FAULTS: list[tuple[Callable[[Server], None], str, bool]] = [
    (unexpected, r"failed unexpectedly \(RuntimeError, run-\d+\)", True),
    (out_of_memory, "ran out of memory.*FP8", True),
    (non_finite, "invalid numbers in block 2", True),
    (too_slow, "longer than the 0.05 s.*shorter", True),
    (disk_trouble, "could not be written", True),
    (shut_down, "has been shut down.*Start", False),
]


@pytest.mark.parametrize(("fault", "words", "logged"), FAULTS, ids=lambda value: getattr(value, "__name__", None))
def test_a_run_that_fails_says_so_in_a_sentence_and_the_log_has_the_rest(
    server: Server, caplog, fault: Callable[[Server], None], words: str, logged: bool
) -> None:
    fault(server)
    with caplog.at_level(logging.WARNING), pytest.raises(Refused, match=words) as refused:
        server.run(*ASK[:3], 5, *ASK[4:], None)
    assert_one_sentence(str(refused.value))
    shown = " ".join(str(value[1]) for value in refused.value.values)
    text = re.sub(r"<[^>]*>", " ", shown)
    assert SECRET not in shown and "/srv" not in text and socket.gethostname() not in text
    records = [record for record in caplog.records if re.search(r"run-\d+", record.getMessage())]
    assert bool(records) == logged and all("Traceback" in logging.Formatter().format(record) for record in records)


def missing(folder: Path) -> None:
    (folder / "transformer" / "config.json").unlink()


def damaged(folder: Path) -> None:
    file = next((folder / "transformer").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("spoil", [missing, damaged])
def test_weights_that_do_not_load_are_a_sentence_on_the_page(tmp_path: Path, home: Path, spoil) -> None:
    folder = write_model_folder(tmp_path / "model")
    spoil(folder)
    with ModelWorker(lambda: load_pipeline(folder, "cpu")) as worker:
        with pytest.raises(WeightsError):
            worker.wait_ready()
        with serving(worker) as server:
            with pytest.raises(Refused) as refused:
                server.run(*BRIEF, name="generate")
            assert_one_sentence(str(refused.value))
            shown = server.call("_arrive")
            assert any(isinstance(value, str) and "Failed" in value for value in shown)
            assert str(tmp_path) not in str(shown)


@pytest.mark.parametrize(
    ("error", "ask"),
    [
        (InvalidRequest, {"seconds": 99}),
        (SelfForcingError, {"compile": True}),
    ],
)
def test_what_cannot_be_made_is_refused_in_a_sentence(home: Path, error, ask: dict[str, Any]) -> None:
    fields = dict(zip(("prompt", "seed", "fps", "seconds", "taehv", "fp8", "compile"), BRIEF, strict=True))
    with serving(ScriptedPipeline(unavailable={"compile": "There is no compiler here."}), max_seconds=20) as server:
        with pytest.raises(Refused) as refused:
            server.run(*(fields | ask).values(), None)
        assert_one_sentence(str(refused.value))
        with pytest.raises(error):
            server.page.generator.checked_request(**(fields | ask))


# ---- L1: secrets


def test_a_token_in_the_environment_is_seen_nowhere(tmp_path: Path) -> None:
    canary = "hf_canary" + uuid.uuid4().hex
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_FOR_TESTS")
    port = free_port()
    program = subprocess.Popen(
        [sys.executable, str(ROOT / "app.py"), "--port", str(port), "--device", "cpu"],
        env={**os.environ, "GRADIO_TEMP_DIR": str(tmp_path), **dict.fromkeys(names, canary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    base = f"http://127.0.0.1:{port}"
    try:
        said = b""
        while b"model is ready" not in said:
            line = program.stdout.readline()
            assert line, said.decode()
            said += line
        visitor = Visitor(base)
        seen = {
            "page": httpx.get(base).content,
            "config": httpx.get(f"{base}/config").content,
            "info": httpx.get(f"{base}/gradio_api/info").content,
            "answers": visitor.generate(b'{"data": ["a red balloon", 7, 16, 0.5, false, false, false]}'),
            "refusal": visitor.generate(b'{"data": ["a red balloon", "x", 16, 0.5, false, false, false]}'),
        }
        (file,) = tmp_path.rglob("*.mp4")
        seen["video"] = file.read_bytes()
        assert b"finished" in seen["answers"] and b"seed" in seen["refusal"]
        program.send_signal(signal.SIGTERM)
        rest, _ = program.communicate(timeout=20)
        assert program.returncode == 0
        seen["output"] = said + rest
        for place, data in seen.items():
            assert len(data) > 50, place
            assert canary.encode() not in data, place
        assert b"Traceback" not in seen["output"]
        assert not list(tmp_path.rglob("*.mp4")), "and its files went with it"
    finally:
        program.kill()
        program.wait()
        program.stdout.close()


class Visitor:
    """Calls `/generate` of a program somewhere, with nothing but HTTP."""

    def __init__(self, base: str) -> None:
        self._base = f"{base}/gradio_api/call/generate"

    def generate(self, body: bytes) -> bytes:
        event = httpx.post(self._base, content=body, headers={"content-type": "application/json"}).json()["event_id"]
        return httpx.get(f"{self._base}/{event}", timeout=60).content


TOKENS = re.compile(
    rb"hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|sk-[A-Za-z0-9_-]{30,}|AKIA[A-Z0-9]{16}|"
    rb"AIza[\w-]{35}|xox[abp]-[\w-]{20,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)


def test_no_token_is_in_the_repository() -> None:
    skipped = {".git", ".venv", "venv", "__pycache__", "cache", "outputs"}
    files = [
        Path(folder, name)
        for folder, folders, names in os.walk(ROOT)
        if not folders.__setitem__(slice(None), [name for name in folders if name not in skipped])
        for name in names
    ]
    assert len(files) > 80
    found = [str(file.relative_to(ROOT)) for file in files if TOKENS.search(file.read_bytes())]
    assert found == []


def test_the_search_for_tokens_finds_them() -> None:
    for example in (SECRET, "ghp_" + "a1" * 18, "AKIA" + "A1" * 8, "-----BEGIN RSA " + "PRIVATE KEY-----"):
        assert TOKENS.search(b"key = '" + example.encode() + b"'")
