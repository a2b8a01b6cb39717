"""Starting from a picture or a video on the page and through the API."""

from __future__ import annotations

import base64
import gc
import io
import json
import os
import re
import time
import uuid
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from pipeline.config import GenerationRequest
from pipeline.mp4 import read_comment
from pipeline.recipe import read_recipe
from pipeline.start import Start
from pipeline.start_file import read_start
from tests.media import read_media
from tests.pictures import encoded, picture, write_video
from tests.scripted import SPEC, ScriptedPipeline, read_code
from tests.server import Refused, Server
from tests.waiting import wait_until
from web import start_panel
from web.adapter import adapted
from web.storage import TemporaryHome, sweep_uploads

DATA = {"meta": {"_type": "gradio.FileData"}}
GOOD = ("a red ball", 7, 16, 1, False, False, False)
FILE, PANEL, PREVIEW, REMOVE, NOTICE = range(5)
"""Outputs of `choose`."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TemporaryHome]:
    home = TemporaryHome(tmp_path_factory.mktemp("home"))
    yield home
    home.close()


@pytest.fixture(scope="module")
def page(home: TemporaryHome) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(home.path))
        server = Server(ScriptedPipeline(), max_seconds=20)
        yield server
        server.close()


@pytest.fixture
def server(page: Server) -> Server:
    page.reset()
    return page


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "a.png").write_bytes(encoded(picture(), "PNG"))
    (folder / "bad.png").write_bytes(encoded(picture(), "PNG")[:500])
    write_video(folder / "a.mp4", 40)
    write_video(folder / "short.mp4", 5)
    return folder


def sent(server: Server, path: Path) -> dict[str, Any]:
    (stored,) = server.http.post("/upload", files={"files": (path.name, path.read_bytes())}).json()
    return {"path": stored, "orig_name": path.name, **DATA}


def chosen(server: Server, value: Any) -> list:
    return server.run(value, 7, 16, 1, name="choose")[-1]


def test_a_picture_is_shown_as_the_model_sees_it(server: Server, files: Path) -> None:
    shown = chosen(server, sent(server, files / "a.png"))
    assert shown[PANEL]["label"] == "Starts from a picture"
    preview = shown[PREVIEW]["value"]
    assert preview.count("<img") == 1 and "112×64 pixels, from the middle 96×55 of 96×80" in preview
    assert shown[REMOVE]["visible"] is True
    assert "2 blocks" not in shown[NOTICE] and "1 block, 13 frames, 1 of them what it starts from" in shown[NOTICE]
    forgotten = server.call("forget", 7, 16, 1)
    assert forgotten[PANEL]["label"] == start_panel.TITLE and forgotten[PREVIEW]["value"] == ""
    assert forgotten[REMOVE]["visible"] is False and forgotten[FILE]["value"] is None
    assert "starts from" not in forgotten[NOTICE]


def test_what_is_in_the_field_counts_when_another_file_was_read_meanwhile(server: Server, files: Path) -> None:
    def settled(value: Any) -> list:
        return server.run(value, 7, 16, 1, name="settle", session=session)[-1]

    session = uuid.uuid4().hex
    bad, video = sent(server, files / "bad.png"), sent(server, files / "a.mp4")
    shown = server.run(bad, 7, 16, 1, name="choose", session=session)[-1]
    assert "damaged" in shown[PREVIEW]["value"] and Path(bad["path"]).exists()
    assert settled(video)[PREVIEW]["value"].count("<img") == 2, "chosen while the other one was read"
    assert settled(None)[PREVIEW]["value"] == "", "taken out meanwhile"
    server.run(bad, 7, 16, 1, name="choose", session=session)
    kept = settled(bad)
    assert kept[FILE]["value"] is None and "value" not in kept[PREVIEW] and not Path(bad["path"]).exists()


def test_the_preview_is_the_frame_itself(files: Path) -> None:
    start = read_start(files / "a.png", SPEC)
    (data,) = re.findall(r'base64,([^"]+)"', start_panel.preview(start, SPEC))
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert shown.shape == start.frames[0].shape
    assert np.abs(shown.astype(int) - start.frames[0]).mean() < 4


def test_of_a_video_the_first_and_the_last_frame_that_are_used_are_shown(server: Server, files: Path) -> None:
    shown = chosen(server, sent(server, files / "a.mp4"))
    assert shown[PANEL]["label"] == "Starts from the end of a video"
    assert shown[PREVIEW]["value"].count("<img") == 2
    assert "The last 2.06 s of 2.50 s (33 frames at 16 FPS) are used" in shown[PREVIEW]["value"]


def test_a_video_is_made_from_what_was_sent(server: Server, files: Path) -> None:
    value = sent(server, files / "a.mp4")
    session = uuid.uuid4().hex
    ticket = server.run(*GOOD, value, name="_begin", session=session)[-1][0]
    _, card, file = server.run(*GOOD, ticket, value, session=session)[-1]
    server.call("_end", ticket, session=session)
    (request,) = server.pipeline.requests
    expected = read_start(files / "a.mp4", SPEC)
    assert np.array_equal(request.start.frames, expected.frames)
    assert [read_code(frame) for frame in read_media(file["path"]).frames][33:] == list(range(33, 45))
    assert expected.matches(read_recipe(file["path"])["start"])
    assert "45 frames" in card and "Starts from" in card and "--video FILE" in card
    assert Path(value["path"]).exists(), "it may be used again"


@pytest.mark.parametrize(("name", "words"), [("bad.png", "damaged"), ("short.mp4", "at least 9")])
def test_a_bad_file_is_refused_before_the_queue_and_not_kept(
    server: Server, files: Path, name: str, words: str
) -> None:
    value, session = sent(server, files / name), uuid.uuid4().hex
    shown = server.run(value, 7, 16, 1, name="choose", session=session)[-1]
    assert words in shown[PREVIEW]["value"] and 'role="alert"' in shown[PREVIEW]["value"]
    assert shown[PANEL]["label"] == start_panel.TITLE
    assert server.run(value, 7, 16, 1, name="settle", session=session)[-1][FILE]["value"] is None
    assert not Path(value["path"]).exists()
    with pytest.raises(Refused, match=words):
        server.run(*GOOD, sent(server, files / name), name="_begin")
    with pytest.raises(Refused, match="A file is needed here"):
        server.run(*GOOD, value, name="_begin")
    assert server.pipeline.requests == []
    assert len(server.run(*GOOD)[-1]) == 3, "the next request works"


@pytest.mark.parametrize(
    "payload",
    [
        {"path": "/etc/passwd", **DATA},
        {"path": "http://169.254.169.254/a.png", "url": "http://169.254.169.254/a.png", **DATA},
        {"path": "http://a/../../../../../etc/a.png", "is_stream": True, **DATA},
        {"path": "data:image/png;base64,AAAA", "url": "data:image/png;base64,AAAA", **DATA},
        "/etc/passwd",
    ],
    ids=str,
)
def test_nothing_but_an_upload_is_read(server: Server, monkeypatch: pytest.MonkeyPatch, payload: Any) -> None:
    reached: list = []
    monkeypatch.setattr("web.starts.read_start", lambda *arguments: reached.append(arguments))
    for event in ("_begin", "_generate"):
        data = (*GOOD, payload) if event == "_begin" else (*GOOD, None, payload)
        with pytest.raises(Refused) as refused:
            server.run(*data, name=event)
        assert "/etc" not in str(refused.value)
    assert reached == [] and server.pipeline.requests == []


def test_a_file_is_read_once(server: Server, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    monkeypatch.setattr("web.starts.read_start", lambda path, spec: (reads.append(path), read_start(path, spec))[1])
    server.page.starts._kept.clear()
    value = sent(server, files / "a.png")
    chosen(server, value)
    server.run(*GOOD, value, name="_begin", session="reads")
    server.run(*GOOD, None, value, session="reads")
    assert len(reads) == 1


@pytest.mark.parametrize("event", ["_begin", "begin_both"])
def test_a_click_that_waits_keeps_no_frames(server: Server, files: Path, event: str) -> None:
    value = sent(server, files / "a.mp4")
    starts, session = server.page.starts, uuid.uuid4().hex
    switch = ("taehv",) if event == "begin_both" else ()
    server.run(*GOOD, *switch, value, name=event, session=session)
    frames = weakref.ref(starts.known(value["path"], server.page.model_or_none()).frames)
    starts._kept.clear()
    gc.collect()
    assert server.page.generator.sessions.awaited(session) and frames() is None
    server.call("_stop", session=session)


def test_what_a_run_will_take_is_told_from_numbers(server: Server, files: Path) -> None:
    generator = server.page.generator
    start = read_start(files / "a.mp4", SPEC)
    plain = GenerationRequest(prompt="a ball", seconds=1.5)
    expected = generator.expected(plain), generator.expected(replace(plain, start=start), plain)
    generator.forget_paces()
    assert [told() for told in expected] == [None, None]
    generator._paces[False, False, False] = 0.5
    assert [told() for told in expected] == [0.5 * 21, 0.5 * (24 + 21)]
    generator.forget_paces()


def test_a_file_is_not_read_for_the_settings(server: Server, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = sent(server, files / "a.png")
    server.page.starts._kept.clear()
    with monkeypatch.context() as patch:
        patch.setattr("web.starts.read_start", lambda path, spec: pytest.fail("that takes the cores"))
        assert server.call("_checked_settings", 7, 16, 1, value) == [""]
        assert "seconds is 99" in server.call("_checked_settings", 7, 16, 99, value)[0]
    chosen(server, value)
    assert "13 frames, 1 of them what it starts from" in server.call("_checked_settings", 7, 16, 1, value)[0]


def test_what_waits_in_the_queue_is_not_swept(server: Server, files: Path) -> None:
    server.pipeline.step_seconds = 0.1
    server.join(*GOOD, session="first")
    wait_until(lambda: server.pipeline.requests)
    value, other = sent(server, files / "a.png"), sent(server, files / "a.mp4")
    server.join(*GOOD, None, value, session="second")
    for path in (Path(value["path"]), Path(other["path"])):
        for entry in (path, path.parent):
            os.utime(entry, (time.time() - 1000,) * 2)
    server.page.sweep_uploads(max_age=500)
    assert Path(value["path"]).exists() and not Path(other["path"]).exists()
    server.pipeline.step_seconds = 0.0
    assert all(event["success"] for event in server.events("second") if event["msg"] == "process_completed")
    wait_until(lambda: server.idle)
    assert server.pipeline.requests[1].start.kind == "image"


def test_a_video_that_was_made_here_is_not_removed(server: Server, files: Path) -> None:
    video = server.run(*GOOD, session="owner")[-1][2]["path"]
    server.run({"path": video, **DATA}, None, name="_restore")
    assert Path(video).exists()


def test_a_comparison_starts_from_it_on_both_sides(server: Server, files: Path) -> None:
    value = sent(server, files / "a.png")
    card, _, both, *_ = server.run(*GOOD, "taehv", None, value, name="make_both")[-1]
    expected = read_start(files / "a.png", SPEC).describe()
    assert json.loads(read_comment(Path(both["path"])))["start"] == expected
    assert f"Both start from the picture with sha256 {expected['sha256'][:12]}." in card
    assert {request.start.kind for request in server.pipeline.requests} == {"image"}


# ---- settings of a video that began with something


def restored(server: Server, video: str, start: Any) -> list:
    return server.run(sent(server, Path(video)), start, name="_restore")[-1]


def test_a_video_that_began_with_a_file_asks_for_it_again(
    server: Server, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr("gradio.Warning", told.append)
    monkeypatch.setattr("gradio.Info", told.append)
    value = sent(server, files / "a.png")
    video = server.run(*GOOD, None, value)[-1][2]["path"]
    plain = server.run(*GOOD)[-1][2]["path"]
    settings = restored(server, video, None)
    assert settings[1:3] == ["a red ball", 7]
    assert "began with a picture" in told[-1] and "same file" in told[-1]
    same = restored(server, video, value)
    assert "makes it again" in told[-1] and same[9]["__type__"] == "update" and "value" not in same[9]
    assert same[10]["label"] == "Starts from a picture"
    other = restored(server, video, sent(server, files / "a.mp4"))
    assert "same file" in told[-1] and other[9]["value"] is None, "with that one it would be another video"
    assert restored(server, plain, value)[9]["value"] is None and "makes it again" in told[-1]


# ---- for programs


def test_programs_send_a_file(server: Server, files: Path, tmp_path: Path) -> None:
    client = Client(server.url, download_files=tmp_path, verbose=False)
    assert client.predict(api_name="/options")["start_frames"] == [9, 21, 33, 45, 57, 69, 81]
    job = client.submit(
        prompt="a red ball", start=handle_file(str(files / "a.png")), seed=7, seconds=1.5, api_name="/generate_from"
    )
    video, recipe, progress = job.result()
    assert progress["state"] == "finished" and progress["frames"] == progress["num_frames"] == 25
    assert recipe["start"]["kind"] == "image" and recipe == read_recipe(video)
    assert np.array_equal(server.pipeline.requests[0].start.frames, read_start(files / "a.png", SPEC).frames)
    with pytest.raises(AppError, match="damaged"):
        client.predict("a ball", handle_file(str(files / "bad.png")), api_name="/generate_from")
    with pytest.raises(AppError, match="start is empty"):
        client.predict("a ball", None, api_name="/generate_from")
    assert len(server.pipeline.requests) == 1


# ---- models that cannot


def test_a_pipeline_that_does_not_say_so_is_never_asked(files: Path, tmp_path: Path) -> None:
    silent = ScriptedPipeline(takes_start=False)
    other = Server(silent, max_seconds=20)
    try:
        assert not other.page.ui.start.panel.visible
        with pytest.raises(Refused, match="cannot start from a picture"):
            other.run(*GOOD, sent(other, files / "a.png"), name="_begin")
        assert silent.requests == [] and not adapted(object()).takes_start
    finally:
        other.close()


def test_another_model_asks_for_the_file_again(server: Server) -> None:
    panel = server.page.ui.start
    settings = panel.fitted_to(server.page.model_or_none())
    assert settings[panel.file] == {"value": None} and settings[panel.panel]["visible"] is True
    assert settings[panel.preview] == {"value": ""} and settings[panel.remove] == {"visible": False}


def test_plans_count_what_comes_before() -> None:
    start = Start(kind="video", frames=np.zeros((33, SPEC.height, SPEC.width, 3), np.uint8))
    model = adapted(ScriptedPipeline())
    plan = model.plan(GenerationRequest(prompt="a ball", seconds=1.5, start=start))
    assert (plan.num_blocks, plan.num_frames, plan.start_frames) == (2, 57, 33)
    assert replace(plan, request=replace(plan.request, start=None)).start_frames == 0


def test_uploads_are_swept_like_others(server: Server, home: TemporaryHome, files: Path) -> None:
    value = sent(server, files / "a.png")
    wait_until(lambda: server.idle)
    sweep_uploads(home.path, max_age=-1)
    assert not Path(value["path"]).exists()
    with pytest.raises(Refused, match="A file is needed here.* choose it again"):
        server.run(*GOOD, value, name="_begin")
