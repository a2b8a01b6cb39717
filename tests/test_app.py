"""The page's server side: the run as an API client sees it, refusals, Stop, disconnects, and how the program starts."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import httpx
import numpy as np
import pytest

import app
from pipeline.__main__ import COMMANDS
from pipeline.blocks import FrameBlock, RunInfo
from pipeline.cli import EMBEDDED_MODEL, parse
from pipeline.config import GenerationRequest, clean_prompt
from pipeline.errors import NonFiniteOutput
from pipeline.recipe import build_recipe, read_recipe
from pipeline.worker import ModelWorker
from tests.media import read_media
from tests.scripted import SPEC, ScriptedPipeline, paint, read_code
from tests.server import SCRIPTED_PROGRAM, Refused, Server, free_port
from tests.waiting import wait_until
from web import status
from web.buffering import MAX_BUFFER_SECONDS, PlaybackBuffer
from web.generation import Generator
from web.layout import EXAMPLES_FILE
from web.sessions import MAX_EXPECTED, Sessions, sessions_ahead
from web.storage import VideoStore

ROOT = Path(__file__).resolve().parent.parent


# ---- a run


def segments_of(server: Server, playlist: str) -> list[tuple[float, bytes]]:
    base = playlist.rsplit("/", 1)[0]
    lines = httpx.get(playlist).text.splitlines()
    assert lines[0] == "#EXTM3U" and lines[-1] == "#EXT-X-ENDLIST"
    lengths = [float(line[8:].rstrip(",")) for line in lines if line.startswith("#EXTINF:")]
    names = [line for line in lines if not line.startswith("#")]
    return [(length, httpx.get(f"{base}/{name}").content) for length, name in zip(lengths, names, strict=True)]


def test_a_run_streams_segments_and_ends_with_a_file(server: Server, tmp_path: Path) -> None:
    session = uuid.uuid4().hex
    with server.http.stream("GET", f"/heartbeat/{session}"):  # as a browser does; it keeps the stream alive
        values = server.generate(seconds=3, session=session)
        playlist = next(value[0]["url"] for value in values if isinstance(value[0], dict) and "url" in value[0])
        segments = segments_of(server, playlist)
    assert sum(length for length, _ in segments) == pytest.approx(45 / 16)
    (tmp_path / "all.ts").write_bytes(b"".join(data for _, data in segments))
    assert [read_code(picture) for picture in read_media(tmp_path / "all.ts").frames] == list(range(45))
    assert "Finished" in values[-1][1] and "45 frames" in values[-1][1] and ">7<" in values[-1][1]
    file = values[-1][2]["path"]
    assert [read_code(picture) for picture in read_media(file).frames] == list(range(45))
    assert read_recipe(file)["prompt"] == "a red ball"
    assert server.http.get(values[-1][2]["url"].split("/gradio_api")[1]).content == Path(file).read_bytes()


def test_the_status_tells_the_run_as_it_goes(server: Server) -> None:
    server.pipeline.step_seconds = 0.01
    told = [value[1] for value in server.generate(seconds=3)]
    assert "Starting" in told[0]
    for number in range(1, 5):
        assert any(f"Block {number} of 4" in text for text in told)
    assert all(word in told[-2] for word in ("First frame", "Generation", "Playback", "16 FPS", "Seed", "float32"))


def test_the_request_arrives_as_it_was_made(server: Server) -> None:
    server.generate("  a RED\tball ", 5, 12, 1.5, True, True, False)
    assert server.pipeline.requests == [
        GenerationRequest(prompt="a RED ball", seed=5, fps=12, seconds=1.5, taehv=True, fp8=True)
    ]


def test_an_empty_fps_field_means_the_models_own(server: Server) -> None:
    server.generate(fps=None)
    assert server.pipeline.requests[0].fps == 16


def test_a_failing_run_keeps_what_was_made_and_says_why(server: Server) -> None:
    server.pipeline.faults[2, 1] = NonFiniteOutput("The model produced invalid numbers in block 3.")
    with pytest.raises(Refused, match="invalid numbers in block 3") as refused:
        server.generate(seconds=5)
    _, text, file = refused.value.values[-1]
    assert "Failed" in text and "invalid numbers in block 3" in text
    assert [read_code(picture) for picture in read_media(file["path"]).frames] == list(range(21))
    assert read_recipe(file["path"])["complete"] is False
    assert "Finished" in server.generate()[-1][1]


def test_a_mishap_that_nobody_foresaw_is_told(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("web.generation._pace_notes", lambda *_: 1 // 0)
    with pytest.raises(Refused, match="went wrong") as refused:
        server.generate()
    assert "Failed" in refused.value.values[-1][1] and "went wrong" in refused.value.values[-1][1]
    wait_until(lambda: server.idle)


def test_a_click_that_is_refused_when_its_turn_comes_is_over(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    session, asked = uuid.uuid4().hex, ("a red ball", 7, 16, 1, True, False, False)
    ticket, card, *_ = server.run(*asked, name="_begin", session=session)[-1]
    assert "Starting" in card
    with monkeypatch.context() as patch:
        patch.setitem(server.pipeline.unavailable, "taehv", "The other model has no TAEHV.")
        with pytest.raises(Refused, match="no TAEHV"):
            server.run(*asked, ticket, session=session)
    _, card, both, timer, generate, stop = server.call("_end", ticket, session=session)
    assert "Not made" in card and both["__type__"] == "update" and not timer["active"]
    assert generate["visible"] and not stop["visible"] and server.pipeline.requests == []


def test_what_was_stopped_while_it_waited_stays_so(server: Server) -> None:
    session, asked = uuid.uuid4().hex, ("a red ball", 7, 16, 1, False, False, False)
    ticket = server.run(*asked, name="_begin", session=session)[-1][0]
    server.call("_stop", session=session)
    assert "Stopped" in server.run(*asked, ticket, session=session)[-1][1]
    assert server.call("_end", ticket, session=session)[1]["__type__"] == "update"


def test_stop_ends_the_run_and_gives_the_file(server: Server) -> None:
    session = uuid.uuid4().hex
    server.pipeline.step_seconds = 0.05

    def stop() -> None:
        wait_until(lambda: len(server.pipeline.made) >= 2)
        server.call("_stop", session=session)

    thread = threading.Thread(target=stop)
    thread.start()
    values = server.generate(seconds=20, session=session)
    thread.join()
    assert "Stopped" in values[-1][1]
    codes = [read_code(picture) for picture in read_media(values[-1][2]["path"]).frames]
    assert 21 <= len(codes) <= 60 and codes == list(range(len(codes)))
    server.pipeline.step_seconds = 0
    assert "Finished" in server.generate()[-1][1]


def test_one_visitor_cannot_stop_another(server: Server) -> None:
    server.pipeline.step_seconds = 0.02
    stopper = threading.Thread(
        target=lambda: (
            wait_until(lambda: len(server.pipeline.made) >= 1),
            server.call("_stop", session="somebody"),
        )
    )
    stopper.start()
    values = server.generate(seconds=3)
    stopper.join()
    assert "Finished" in values[-1][1]


def test_the_page_brings_everything_itself(server: Server) -> None:
    page = httpx.get(server.url).text
    config = httpx.get(f"{server.url}config").text
    assert "fonts.googleapis" not in page + config and "cdnjs" not in page + config
    assert "sf-status" in config and "Ctrl + Enter" in config, "style sheet and first status"


def test_unknown_words_are_named(server: Server) -> None:
    def noticed(prompt: str) -> str:
        return server.call("_notice", prompt)[0]

    assert noticed("a red ball") == ""
    assert "<b>&lt;b&gt;volcano</b>" in noticed("a red <b>volcano over the city")


# ---- pipelines that tell less of themselves


class Minimal:
    """No more than the page cannot do without."""

    def stream(self, request: GenerationRequest) -> Iterator[SimpleNamespace]:
        for index in range(3):
            yield SimpleNamespace(frames=np.stack([paint(4 * index + n, 64, 112) for n in range(4)]))


def test_a_pipeline_with_nothing_but_stream_works() -> None:
    server = Server(Minimal())
    try:
        _, text, file = server.generate(seed=-1)[-1]
        assert "Finished" in text and "12 frames" in text
        assert [read_code(picture) for picture in read_media(file["path"]).frames] == list(range(12))
    finally:
        server.close()


def test_a_worker_with_a_loaded_pipeline_works_too() -> None:
    with ModelWorker(lambda: ScriptedPipeline()) as worker:
        assert isinstance(app.build_app(worker), gr.Blocks)


def test_what_cannot_work_is_disabled_and_says_why() -> None:
    demo = app.build_app(ScriptedPipeline(unavailable={"compile": "There is no compiler here."}))
    by_label = {block.label: block for block in demo.blocks.values() if hasattr(block, "label")}
    assert by_label["torch.compile"].interactive is False and "no compiler" in by_label["torch.compile"].info
    assert by_label["FP8 quantization"].interactive is not False
    for label in ("torch.compile", "FP8 quantization", "TAEHV VAE"):
        assert by_label[label].value is False
    assert (
        by_label["Seed"].value == -1 and by_label["Target FPS"].value == SPEC.fps and by_label["Length (s)"].value == 5
    )


@pytest.mark.parametrize("compiler", [True, False])
def test_switches_can_be_on_from_the_start(compiler: bool) -> None:
    missing = {} if compiler else {"compile": "There is no compiler here."}
    demo = app.build_app(ScriptedPipeline(unavailable=missing), ticked=["compile"])
    by_label = {block.label: block for block in demo.blocks.values() if hasattr(block, "label")}
    assert by_label["torch.compile"].value is compiler and by_label["TAEHV VAE"].value is False


def test_the_examples_are_good_prompts() -> None:
    prompts = json.loads(EXAMPLES_FILE.read_text(encoding="utf-8"))
    assert prompts[0] == "a red balloon rises over the mountains at sunset"
    assert len(prompts) == len(set(prompts)) == 10
    captions = pytest.importorskip("training.captions")
    known = set(captions.vocabulary())
    for prompt in prompts:
        assert clean_prompt(prompt) == prompt and set(captions.words(prompt)) <= known


# ---- parts


def block(index: int, elapsed: float, fps: float = 16, num_blocks: int = 7, work: float = 0.0) -> FrameBlock:
    run = RunInfo(
        request=GenerationRequest(prompt="a"),
        seed=1,
        fps=fps,
        num_blocks=num_blocks,
        num_frames=SPEC.frames_in(num_blocks),
    )
    frames = np.zeros((9 if index == 0 else 12, 1, 1, 3), np.uint8)
    return FrameBlock(index=index, frames=frames, start_frame=0, run=run, elapsed=elapsed, denoise_seconds=work)


def released_at(times: list[float], fps: float, pace: float | None = None) -> int:
    """Index of the block with which playback begins."""
    buffer = PlaybackBuffer(pace)
    for index, elapsed in enumerate(times):
        if buffer.may_play(block(index, elapsed, fps, len(times)), SPEC.frames_in(index + 1)):
            return index
    raise AssertionError("never")


def test_a_fast_model_plays_at_once() -> None:
    assert released_at([0.15 * (n + 1) for n in range(7)], fps=16) == 0


def test_a_model_just_fast_enough_gets_a_block_in_hand() -> None:
    assert released_at([0.5 * (n + 1) for n in range(7)], fps=16) == 1
    assert released_at([0.5 * (n + 1) for n in range(7)], fps=6) == 0


def test_a_slow_model_buffers_for_at_most_three_seconds() -> None:
    first = released_at([n + 1.0 for n in range(60)], fps=16)
    assert 1 <= first <= MAX_BUFFER_SECONDS
    assert released_at([10.0 * (n + 1) for n in range(5)], fps=16) == 0, "waiting would not help"


def test_the_last_block_is_never_held() -> None:
    assert released_at([0.8, 1.6], fps=60) <= 1
    assert released_at([5.0], fps=60) == 0


def test_what_an_earlier_run_measured_is_used() -> None:
    buffer = PlaybackBuffer(0.01)
    assert buffer.may_play(block(0, 9.0), 9), "the first run of all is slow to begin; its pace is known to be good"


def test_status_escapes_everything() -> None:
    run = replace(block(0, 1.0).run, applied={"<i>": "<script>"})
    meter = status.RunMeter(run)
    meter.count(replace(block(0, 1.0), run=run))
    for text in (status.failed("<script>", meter), status.generating(meter), status.idle("<script>")):
        assert "<script>" not in text and "<i>" not in text.replace("<i style", "")


def recipe(prompt: str = "a ball", weights: str = "0" * 64) -> dict[str, Any]:
    run = replace(block(0, 1.0).run, request=GenerationRequest(prompt=prompt, taehv=True), weights_sha256=weights)
    return build_recipe(run, 9)


@pytest.mark.parametrize("prompt", ["a red ball", '--fp8 \'s a "ball"', "enhance", "$HOME"])
def test_the_recipes_command_makes_the_video_again(prompt: str) -> None:
    *command, _ = unescape(status.finished(status.RunMeter(block(0, 1.0).run), recipe(prompt))).split("</code>")
    words = shlex.split(command[0].rpartition("<code>")[2])
    assert words[:3] == ["python", "-m", "pipeline"] and words[3] not in COMMANDS
    options = parse(words[3:])
    assert (options.prompt, options.seed, options.taehv, options.fp8) == (prompt, 1, True, False)
    assert str(options.model) == "FOLDER", "of another model it has to be told which"


def test_the_command_names_no_model_that_is_taken_by_itself() -> None:
    weights = EMBEDDED_MODEL / "transformer" / "diffusion_pytorch_model.safetensors"
    embedded = recipe(weights=hashlib.sha256(weights.read_bytes()).hexdigest())
    told = status.finished(status.RunMeter(block(0, 1.0).run), embedded)
    assert "--model" not in told and "python -m pipeline --seed 1" in told


def test_stopping_reaches_runs_that_wait_and_runs_that_go_on() -> None:
    sessions = Sessions()
    first, second = sessions.expect("a"), sessions.expect("b")
    assert sessions.begin("b", second.id) is second
    assert sessions.stop("a") == "waiting" and not second.stopped
    assert sessions.begin("a", first.id).stopped, "the run that waited"
    assert not sessions.begin("a").stopped, "a new one"
    assert sessions.stop("b") == "running" and second.stopped and sessions.stop("b") == "none"
    sessions.end("b", second)
    assert not sessions.busy("b") and sessions.busy("a")


def test_a_click_whose_run_never_comes_spoils_no_later_one() -> None:
    sessions = Sessions()
    lost = sessions.expect("a")  # the queue was full, or the connection gone
    assert sessions.stop("a") == "waiting" and not sessions.busy("a")
    following = sessions.expect("a")
    assert sessions.begin("a", following.id) is following and not following.stopped
    assert sessions.begin("a", lost.id).stopped, "it came after all"


def test_a_click_that_comes_to_nothing_is_dropped_and_a_later_one_is_not() -> None:
    sessions = Sessions()
    lost = sessions.expect("a")
    assert sessions.settle("a", lost.id) is lost and not sessions.busy("a")
    assert sessions.settle("a", lost.id) is None, "nobody knows it any more"
    first = sessions.expect("a")
    sessions.begin("a", first.id)
    sessions.stop("a")
    second = sessions.expect("a")
    sessions.end("a", first)
    # Of the first one's end; the page shows the second one's ticket by now.
    assert sessions.settle("a", second.id) is first
    assert sessions.busy("a") and sessions.begin("a", second.id) is second and not second.stopped


def test_who_comes_back_hears_that_their_run_was_given_up() -> None:
    """A connection that broke looks like a tab that was closed."""
    sessions = Sessions()
    lost = sessions.expect("a")
    sessions.begin("a", lost.id)
    sessions.stop("a", abandon=True)
    sessions.end("a", lost)
    assert sessions.settle("a", "another") is None
    assert sessions.settle("a", lost.id) is lost and lost.abandoned and not lost.wanted
    assert sessions.settle("a", lost.id) is None


def test_what_has_said_its_last_word_cannot_be_stopped() -> None:
    sessions = Sessions()
    ticket = sessions.begin("a")
    ticket.finished = True
    assert not sessions.busy("a") and sessions.stop("a") == "none"


def test_made_up_clicks_stop_nobody_and_leave_nothing_behind() -> None:
    sessions = Sessions()
    honest = sessions.expect("honest")
    for number in range(3 * MAX_EXPECTED):
        sessions.expect(f"stranger {number}")
    assert sessions.place("honest", []) is None and len(sessions._waiting) == MAX_EXPECTED
    assert not sessions.begin("honest", honest.id).stopped
    foreign = sessions.expect("b")
    assert sessions.begin("a", foreign.id) is not foreign, "another visitor's ticket"
    for number in range(100):
        sessions.end(f"c{number}", sessions.begin(f"c{number}", "made up"))
    assert not sessions._unheard


def test_a_place_counts_everybody_and_guesses_only_what_is_known() -> None:
    sessions = Sessions()
    sessions.begin("running", sessions.expect("running", lambda: 10.0).id).will_take(4)
    sessions.expect("waiting", lambda: 20.0)
    sessions.expect("me")
    place = sessions.place("me", ["running", "waiting"])
    assert place.ahead == 2 and place.seconds == pytest.approx(24, abs=0.5)
    assert sessions.place("me", ["running", "a program"]).seconds is None
    sessions.stop("waiting")
    assert sessions.place("me", ["running", "waiting"]).seconds == pytest.approx(4, abs=0.5), "it is gone in a moment"
    assert sessions.place("waiting", []) is None, "stopped"


@pytest.mark.parametrize(
    ("line", "queued", "ahead"),
    [
        (["other", "me", "third"], True, ["running", "other"]),
        (["me", "other", "me", "third"], True, ["running", "other"]),
        (["me", "other", "third"], False, ["running", "other", "third"]),
        (["other", "third"], True, ["running", "other", "third"]),
    ],
    ids=["one click", "a click after one that was stopped", "the same before it is queued", "not there yet"],
)
def test_a_place_is_that_of_the_newest_click(line: list[str], queued: bool, ahead: list[str]) -> None:
    def event(session: str) -> SimpleNamespace:
        return SimpleNamespace(session_hash=session, concurrency_id="model")

    waiting = SimpleNamespace(queue=[event(session) for session in line])
    queue = SimpleNamespace(active_jobs=[None, [event("running")]], event_queue_per_concurrency_id={"model": waiting})
    assert sessions_ahead(SimpleNamespace(_queue=queue), "model", "me", queued=queued) == ahead


def test_the_queue_cannot_be_walked_around(server: Server) -> None:
    queued = [index for index, fn in server.demo.fns.items() if fn.queue]
    assert len(queued) >= 4
    for index in queued:
        body = {"data": ["a ball", 7, 16, 1, False, False, False, None], "fn_index": index, "session_hash": "s"}
        assert server.http.post("/run/predict", json=body).status_code == 404
    assert server.http.post("/run/generate", json={"data": ["a ball"]}).status_code == 404
    assert server.pipeline.requests == []


def test_what_the_page_offers_stays_until_its_visitor_leaves(server: Server) -> None:
    session, asked = uuid.uuid4().hex, ("a red ball", 7, 16, 1, False, False, False)
    store = server.page.generator.store
    with server.http.stream("GET", f"/heartbeat/{session}"):
        offered = Path(server.click(*asked, session=session)[-1][2]["path"])
        programs = Path(server.run(*asked, name="generate", session=session)[-1][0]["path"])
        for folder in (offered.parent, programs.parent):
            os.utime(folder, (time.time() - store.max_age - 1,) * 2)
        store.sweep()
        assert offered.exists() and not programs.exists()
    wait_until(lambda: not any(shelf.session == session for shelf in store._folders))
    store.sweep()
    assert offered.exists(), "for a moment"


def test_stopping_in_the_last_moment_leaves_the_result(server: Server) -> None:
    session = uuid.uuid4().hex
    values = []
    server.join("a red ball", 7, 16, 1, False, False, False, session=session)
    for event in server.events(session):
        values.append(event)
        text = json.dumps(event.get("output", ""))
        if "Finished" in text and event["msg"] == "process_generating":
            status_html = server.call("_stop", session=session)[0]
            assert "Stop" not in json.dumps(status_html)
    assert any("Finished" in json.dumps(event.get("output", "")) for event in values)


def test_one_visitor_makes_one_video_at_a_time(server: Server) -> None:
    session = uuid.uuid4().hex
    server.pipeline.step_seconds = 0.05
    inputs = ("a red ball", 7, 16, 2, False, False, False)
    with server.http.stream("GET", f"/heartbeat/{session}"):
        assert server.join(*inputs, session=session, name="_begin").status_code == 200
        first = next(event for event in server.events(session) if event["msg"] == "process_completed")
        assert first["success"]
        server.join(*inputs, session=session, name="_begin")
        second = next(event for event in server.events(session) if event["msg"] == "process_completed")
        assert not second["success"] and "is being made" in second["output"]["error"]
        server.call("_stop", session=session)
        server.join(*inputs, session=session, name="_begin")
        third = next(event for event in server.events(session) if event["msg"] == "process_completed")
        assert third["success"]


# ---- the program


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model_index.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--auth", "nopassword"], ["user:password"]),
        (["--auth", ":x"], ["user:password"]),
        (["--port", "0"], ["port"]),
        (["--port", "x"], ["port", "x"]),
        (["--max-seconds", "nan"], ["max-seconds", "nan"]),
        (["--max-seconds", "0"], ["max-seconds"]),
        (["--device", "gpu"], ["device", "gpu"]),
        (["--model", "missing"], ["missing"]),
        (["--bogus"], ["--bogus"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_bad_start_is_refused_in_a_sentence(model: Path, capsys, arguments, words) -> None:
    if "--model" not in arguments:
        arguments = [*arguments, "--model", str(model)]
    assert app.main(arguments, load=lambda folder, device: pytest.fail("the model must not be loaded")) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    for word in words:
        assert word.lower() in said.err.lower()


def test_the_longest_video_is_a_minute_unless_told_otherwise(tmp_path: Path) -> None:
    assert app.parse([]).max_seconds == 60
    with ModelWorker(ScriptedPipeline()) as worker:
        assert Generator(worker, VideoStore(tmp_path)).deadline == 180, "slower than playback is no reason to end"


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_the_program_serves_and_ends_on_request(model: Path, address: str) -> None:
    port = free_port()
    shown = f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
    if address == "::1":
        try:
            socket.create_server((address, 0), family=socket.AF_INET6).close()
        except OSError:
            pytest.skip("this machine has no IPv6")
    program = [sys.executable, "-c", SCRIPTED_PROGRAM, "--model", str(model), "--port", str(port), "--host", address]
    proxy = {"http_proxy": "http://127.0.0.1:9", "NO_PROXY": "example.org"}  # behind which this machine is not
    process = subprocess.Popen(
        [*program, "--auth", "me:secret"],
        env={**os.environ, **proxy, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said = ""
        while "Open http" not in said:
            line = process.stderr.readline()
            assert line, f"it ended: {said}"
            said += line
        assert shown in said and "secret" not in said
        assert httpx.get(f"{shown}/config").status_code == 401

        taken = subprocess.run(
            program,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert taken.returncode == 2 and str(port) in taken.stderr and "Traceback" not in taken.stderr

        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()


def test_what_nobody_foresaw_is_shown_even_while_a_model_is_loading(model: Path) -> None:
    program = (
        "import sys, time, app\n"
        "def serve(*_): raise KeyError('nobody foresaw this')\n"
        "app.serve = serve\n"
        "sys.exit(app.main(load=lambda *_: time.sleep(60)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, "--model", str(model)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert result.returncode == 1 and "nobody foresaw this" in result.stderr
