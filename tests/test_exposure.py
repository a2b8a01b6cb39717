"""What a stranger gets out of the server, or into it: nothing but the page, its own files and plain refusals."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from gradio import processing_utils

import app
from pipeline.config import clean_prompt
from pipeline.recipe import read_recipe
from tests.resources import disk_bytes, peak_resident_bytes, resident_bytes
from tests.scripted import ScriptedPipeline
from tests.server import Refused, Server
from tests.waiting import wait_until
from web import generation, page, pieces
from web.adapter import adapted
from web.body_limit import MAX_BODY_BYTES
from web.storage import TemporaryHome, sweep_uploads

ROOT = Path(__file__).resolve().parent.parent
"""The events that take a file from the visitor."""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Iterator[TemporaryHome]:
    home = TemporaryHome(tmp_path_factory.mktemp("home"))
    yield home
    home.close()


@pytest.fixture(scope="module")
def server(home: TemporaryHome) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(home.path))
        server = Server(ScriptedPipeline(unavailable={"compile": "There is no compiler here."}), max_seconds=20)
        yield server
        server.close()


@pytest.fixture
def asked(server: Server) -> list:
    """What the model is asked for from now on."""
    server.reset()
    return server.pipeline.requests


def assert_tells_nothing(said: str) -> None:
    for secret in (str(ROOT), str(Path.home()), "/tmp", "/etc", "Traceback", socket.gethostname()):
        assert secret not in said


# ---- F1: reading files of the machine

PROBES = [
    "/etc/passwd",
    "%2fetc%2fpasswd",
    "..%2f..%2f..%2f..%2fetc%2fpasswd",
    "/etc/passwd%00.mp4",
    "/proc/self/environ",
    "/proc/self/cmdline",
    "file:///etc/passwd",
    "http://127.0.0.1:7860/config",
    "http://[::1]:7860/config",
    "http://0x7f000001/",
    "http://169.254.169.254/latest/meta-data/",
    "https://example.org/",
    "HTTPS://example.org/",
    quote(str(ROOT / "web" / ".." / "app.py")),
]
OWN_FILES = [
    *sorted(file for file in ROOT.iterdir() if file.is_file()),
    *sorted(file for file in (ROOT / "weights").rglob("*") if file.is_file()),
]


@pytest.mark.parametrize("route", ["/file=", "/file/"])
def test_no_file_of_the_machine_is_read(server: Server, route: str) -> None:
    assert len(PROBES) == 14
    for probe in PROBES:
        answer = server.http.get(f"{route}{probe}")
        assert answer.status_code == 403, probe
        assert "root:" not in answer.text and "PATH=" not in answer.text and "sf-status" not in answer.text


def test_no_file_of_this_repository_is_served(server: Server) -> None:
    assert len(OWN_FILES) > 15
    for file in OWN_FILES:
        for name in {str(file), str(file.relative_to(ROOT)), str(file).upper()}:
            answer = server.http.get(f"/file={quote(name)}")
            assert answer.status_code == 403 and len(answer.content) < 300, name


# ---- F2: values that point to files

DATA = {"meta": {"_type": "gradio.FileData"}}
PAYLOADS: list[Any] = [
    {"path": "/etc/passwd", **DATA},
    {"path": str(ROOT / "weights" / "embedded" / "model_index.json"), **DATA},
    {"path": "../../../../etc/passwd", "orig_name": "video.mp4", **DATA},
    {"path": "http://127.0.0.1:1/video.mp4", **DATA},
    {"path": "http://169.254.169.254/video.mp4", "url": "http://169.254.169.254/video.mp4", **DATA},
    {"path": "https://example.com/video.mp4", **DATA},
    {"path": "http://a/../../../../../etc/video.mp4", "is_stream": True, **DATA},
    {"path": "data:video/mp4;base64,AAAA", "url": "data:video/mp4;base64,AAAA", **DATA},
    [{"path": "/etc/passwd", **DATA}],
    "/etc/passwd",
]


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda payload: str(payload)[:50])
def test_a_value_that_points_to_a_file_of_the_server_goes_nowhere(server: Server, monkeypatch, payload: Any) -> None:
    reached = []
    monkeypatch.setattr(page, "read_recipe", lambda path: reached.append(path))
    monkeypatch.setattr(processing_utils, "async_ssrf_protected_download", lambda url, **_: reached.append(url))
    with pytest.raises(Refused) as refused:
        server.run(payload, name="_restore")
    assert_tells_nothing(f"{refused.value} {refused.value.values}")
    assert reached == []


def test_a_folder_in_place_of_a_file_is_refused_and_stays(server: Server, home: TemporaryHome) -> None:
    payload = {"path": str(home.path), **DATA}
    for index, event in server.demo.fns.items():
        data = [payload if hasattr(component, "temp_files") else None for component in event.inputs]
        body = {"data": data, "fn_index": index, "session_hash": "s"}
        server.http.post("/queue/join" if event.queue else "/run/predict", json=body)
    wait_until(lambda: len(server.demo._queue) == 0 and server.idle)
    noted = set().union(*(component.temp_files for component in server.demo.blocks.values()))
    assert str(home.path) not in noted, "or nothing would ever be removed again"
    assert home.path.is_dir()


# ---- F3: uploads


def upload(server: Server, name: str, data: bytes, kind: str = "video/mp4") -> httpx.Response:
    return server.http.post("/upload", files={"files": (name, data, kind)})


@pytest.mark.parametrize(("size", "status"), [(9_900_000, 200), (10_600_000, 413), (30_000_000, 413)])
def test_an_upload_may_have_ten_megabytes(server: Server, home: TemporaryHome, size: int, status: int) -> None:
    before = disk_bytes(home.path)
    answer = upload(server, "a.mp4", bytes(size))
    assert answer.status_code == status
    if status != 200:
        assert_tells_nothing(answer.text)
        assert disk_bytes(home.path) == before, "nothing of it was kept"


def test_many_files_in_one_upload_have_no_more_than_one(server: Server, home: TemporaryHome) -> None:
    before = disk_bytes(home.path)
    files = [("files", (f"{number}.mp4", bytes(1_000_000), "video/mp4")) for number in range(12)]
    assert server.http.post("/upload", files=files).status_code == 413
    assert disk_bytes(home.path) - before < 1_000_000


@pytest.mark.parametrize(
    "name",
    [
        "../../evil.mp4",
        "/etc/cron.d/evil.mp4",
        "a\x00b.mp4",
        "..",
        "x" * 300 + ".mp4",
        "CON.mp4",
        "\\\\server\\share\\evil.mp4",
        "<script>alert(1)</script>.mp4",
    ],
)
def test_an_odd_file_name_leads_nowhere(server: Server, home: TemporaryHome, name: str) -> None:
    answer = upload(server, name, b"not a video: " + name.encode())
    if answer.status_code == 400:
        assert name == ".."
        return
    (path,) = (Path(path) for path in answer.json())
    assert path.is_file() and path.parent.parent == home.path, "in a folder of its own, named by its content"
    assert not re.search(r"[<>\x00\\/]", path.name) and path.stem.upper() != "CON" and len(path.name) < 256
    with pytest.raises(Refused, match="not an MP4"):
        server.run({"path": str(path), "orig_name": name, **DATA}, name="_restore")
    assert not path.exists(), "what was dropped is not kept"


@pytest.mark.parametrize(
    ("name", "kind", "data"),
    [
        ("page.html", "text/html", b"<script>alert(1)</script>"),
        ("drawing.svg", "image/svg+xml", b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'),
        ("picture.png", "image/png", b"\x89PNG\r\n\x1a\n" + bytes(50)),
        ("program.exe", "application/octet-stream", b"MZ" + bytes(50)),
        ("picture.mp4", "video/mp4", b"\x89PNG\r\n\x1a\n" + bytes(50)),
        ("empty.mp4", "video/mp4", b""),
    ],
)
def test_a_file_of_the_wrong_type_is_refused_in_a_sentence(server: Server, name: str, kind: str, data: bytes) -> None:
    (path,) = upload(server, name, data, kind).json()
    with pytest.raises(Refused, match=r"\.mp4|MP4") as refused:
        server.run({"path": path, "orig_name": name, **DATA}, name="_restore")
    assert_tells_nothing(str(refused.value))
    answer = server.http.get(f"/file={path}")
    assert answer.status_code != 200 or "html" not in answer.headers["content-type"], "no browser runs a script in it"
    assert answer.status_code != 200 or "svg" not in answer.headers["content-type"]


def test_broken_off_uploads_go_by_age_and_by_size(server: Server, home: TemporaryHome) -> None:
    address = httpx.URL(server.url)
    head = "POST /gradio_api/upload HTTP/1.1\r\nHost: a\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    part = '--b\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n'
    before = disk_bytes(home.path)
    with socket.create_connection((address.host, address.port)) as sender:
        sender.sendall(f"{head}Content-Length: 9000000\r\n\r\n{part}".encode() + bytes(3_000_000))
        deadline = time.monotonic() + 10
        while disk_bytes(home.path) - before < 2_900_000 and time.monotonic() < deadline:
            time.sleep(0.05)
    (path,) = upload(server, "young.mp4", b"young").json()
    sweep_uploads(home.path, max_bytes=1000)
    assert Path(path).exists() and disk_bytes(home.path) < 1000
    sweep_uploads(home.path, max_age=-1)
    assert list(home.path.iterdir()) == []


# ---- F4: who can reach the page

PUBLIC = r"(0\.0\.0\.0|share link)"


@pytest.mark.parametrize(
    ("arguments", "space", "code", "host", "said"),
    [
        ([], False, 0, "127.0.0.1", None),
        (["--host", "0.0.0.0"], False, 2, None, rf"{PUBLIC}.*--auth.*--allow-public"),
        (["--share"], False, 2, None, rf"{PUBLIC}.*--auth.*--allow-public"),
        (["--host", "0.0.0.0", "--auth", "me:se:cret"], False, 0, "0.0.0.0", rf"{PUBLIC}.*know the password"),
        (["--mcp", "--auth", "me:se:cret"], False, 2, None, "No password.*--mcp"),
        (["--share", "--allow-public"], False, 0, "127.0.0.1", rf"{PUBLIC}.*lets other people"),
        ([], True, 0, "0.0.0.0", None),
    ],
    ids=lambda value: " ".join(value) or "default" if isinstance(value, list) else None,
)
def test_the_page_is_public_only_on_purpose(
    tmp_path: Path, monkeypatch, capsys, arguments, space, code, host, said
) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setenv("SPACE_ID", "me/mine") if space else monkeypatch.delenv("SPACE_ID", raising=False)
    served = []
    monkeypatch.setattr(
        app, "serve", lambda worker, options, auth, stop, models, *_: served.append((options, auth, models))
    )
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        assert app.main([*arguments, "--model", str(tmp_path)], load=lambda *_: ScriptedPipeline()) == code
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)
    lines = [line for line in capsys.readouterr().err.splitlines() if "Loading the model" not in line]
    if host is None:
        assert served == [] and len(lines) == 1
    else:
        ((options, auth, models),) = served
        # Strangers must not fill the disk or exchange everybody's model.
        assert (models is None) == (space or bool(arguments))
        assert (options.host, options.share) == (host, "--share" in arguments)
        assert auth == (("me", "se:cret") if "--auth" in arguments else None)
    assert lines == [] if said is None else re.search(said, lines[0], re.IGNORECASE)
    assert "se:cret" not in "".join(lines)


@pytest.mark.parametrize("host", ["192.168.0.7", "example.com", "::"])
def test_any_other_address_is_public_too(host: str) -> None:
    with pytest.raises(app.InvalidRequest, match="--auth"):
        app.check_exposure(app.parse(["--host", host]), None)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.2", "::1"])
def test_this_machine_is_not_public(host: str, capsys) -> None:
    app.check_exposure(app.parse(["--host", host]), None)
    assert capsys.readouterr().err == ""


# ---- F5: with a password

OPEN = {
    "/": "the form that asks for the password",
    "/login": "where it is sent to",
    "/logout": "forgets it",
    "/openapi.json": "the names of Gradio's own routes",
    "/theme.css": "looks",
    "/favicon.ico": "looks",
    "/robots.txt": "for search engines",
    "/manifest.json": "title and icon",
    "/pwa_icon": "icon",
    "/pwa_icon/{size}": "icon",
    "/static/{path:path}": "the form's scripts",
    "/assets/{path:path}": "the form's scripts",
    "/svelte/{path:path}": "the form's scripts",
    "/monitoring/{key}": "is off: 403",
    "/gradio_api/custom_component/{id}/{environment}/{type}/{file_name}": "there are none",
    "/gradio_api/startup-events": "that the server runs",
    "/gradio_api/token": "of the login that there is not",
    "/gradio_api/app_id": "changes when the server starts again",
    "/gradio_api/heartbeat/{session_hash}": "keeps a session; its name cannot be guessed",
    "/gradio_api/cancel": "needs an event's id, which cannot be guessed",
    "/gradio_api/reset": "does nothing",
    "/gradio_api/stream/{event_id}": "needs an event's id",
    "/gradio_api/stream/{event_id}/close": "needs an event's id",
    "/gradio_api/stream/{session_hash}/{run}/{component_id}/playlist.m3u8": "needs a session's name",
    "/gradio_api/stream/{session_hash}/{run}/{component_id}/{segment_id}.{ext}": "needs a session's name",
    "/gradio_api/stream/{session_hash}/{run}/{component_id}/playlist-file": "needs a session's name",
    "/gradio_api/theme.css": "looks",
    "/gradio_api/runs": "is off",
    "/gradio_api/user": "who has logged in: nobody",
    "/gradio_api/vibe-edit": "is off: 403",
    "/gradio_api/undo-vibe-edit": "is off: 403",
    "/gradio_api/vibe-code": "is off: 403",
    "/gradio_api/vibe-starter-queries": "is off: 403",
}
"""What answers without the password, and why that may be."""


def routes_of(router: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(method, path) of every route, wherever FastAPI's version keeps it."""
    for route in router.routes:
        if hasattr(route, "methods"):
            yield from ((method, prefix + route.path) for method in route.methods)
        else:
            yield from routes_of(route.original_router, prefix + (route.include_context.prefix or ""))


def test_with_a_password_every_route_but_a_few_harmless_ones_asks_for_it() -> None:
    server = Server(ScriptedPipeline(), launch={"auth": ("me", "secret")})
    try:
        routes = sorted(set(routes_of(server.demo.app)))
        assert len(routes) > 60
        address = server.url.rstrip("/")
        answered = set()
        for method, path in routes:
            if path.endswith("/heartbeat/{session_hash}"):
                continue  # never ends
            filled = re.sub(r"\{[^}]*\}", "1", path)
            body = {"json": {"data": [], "fn_index": 0, "session_hash": "s"}} if method == "POST" else {}
            answer = httpx.request(method, address + filled, **body)
            if answer.status_code != 401:
                answered.add(path.rstrip("/") or "/")
            assert "sf-status" not in answer.text and "Describe the video" not in answer.text, path
        assert answered - OPEN.keys() == set()
        assert not server.demo.vibe_mode
        login = httpx.post(f"{address}/login", data={"username": "me", "password": "wrong"})
        assert login.status_code == 400
        login = httpx.post(f"{address}/login", data={"username": "me", "password": "secret"})
        assert "sf-status" in httpx.get(f"{address}/config", cookies=login.cookies).text
    finally:
        server.close()


# ---- V2, V6: over HTTP

GOOD = {"prompt": "a ball", "seed": 7, "fps": 16, "seconds": 1, "taehv": False, "fp8": False, "compile": False}


@pytest.mark.parametrize("event", ["_begin", "_generate", "generate"])
@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("seed", float("nan"), ["seed", "nan", "4294967295"]),
        ("seed", 2.5, ["seed", "2.5", "whole"]),
        ("seed", True, ["seed", "True"]),
        ("seed", 2**63, ["seed", str(2**63)]),
        ("seed", [1], ["seed", "[1]"]),
        ("fps", float("inf"), ["fps", "inf", "60"]),
        ("fps", "x", ["fps", "'x'", "60"]),
        ("seconds", 21, ["seconds", "21", "20 here"]),
        ("seconds", None, ["seconds", "None"]),
        ("taehv", "yes", ["taehv", "'yes'"]),
        ("compile", True, ["no compiler"]),
        ("prompt", "\u0000 \n", ["prompt is empty"]),
        ("prompt", "x" * 2001, ["2,001", "2,000"]),
        ("prompt", "x" * 900_000, ["900,000", "2,000"]),
        ("prompt", None, ["prompt", "None"]),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_input_is_refused_in_words_before_the_model_sees_it(
    server: Server, asked: list, event: str, field: str, value: Any, words: list[str]
) -> None:
    with pytest.raises(Refused) as refused:
        server.run(*{**GOOD, field: value}.values(), name=event)
    for word in words:
        assert word in str(refused.value)
    assert_tells_nothing(str(refused.value))
    assert asked == []


HOSTILE_PROMPTS = [
    "../../../etc/passwd",
    "..\\..\\windows\\system32",
    "a\x00b.mp4",
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onclick='alert(1)",
    "</code></div></details><h1>gone</h1>",
    "x" * 300,
    "CON",
    "$(rm -rf ~); `id` | tee & %PATH%",
    "{{7*7}} ${7*7} %s {0.__class__}",
    "&lt;b&gt; &#60;script&#62;",
]


class Skeleton(HTMLParser):
    """The elements of a piece of HTML and the names of their attributes, without any text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[Any] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, [name for name, _ in attributes]))

    def handle_endtag(self, tag: str) -> None:
        self.elements.append(tag)


@pytest.fixture(scope="module")
def harmless(server: Server) -> str:
    """What is shown of a run with a prompt without tricks."""
    return server.generate("a ball", seconds=0.1)[-1][1]


@pytest.mark.parametrize("prompt", HOSTILE_PROMPTS, ids=lambda prompt: repr(prompt)[:30])
def test_a_prompt_is_text_and_nothing_else(server: Server, harmless: str, monkeypatch, prompt: str) -> None:
    monkeypatch.setattr(generation, "TAIL_SECONDS", 0)
    _, shown, file = server.generate(prompt, seconds=0.1)[-1]
    file = Path(file["path"])
    assert re.fullmatch(r"self-forcing-seed7-[0-9a-f]{8}\.mp4", file.name)
    assert file.parent.parent == server.page.generator.store.root
    assert read_recipe(file)["prompt"] == clean_prompt(prompt)
    assert Skeleton(shown).elements == Skeleton(harmless).elements
    notice = pieces.prompt_notice(prompt, adapted(server.pipeline))
    assert {element for element in Skeleton(notice).elements if isinstance(element, str)} <= {"p", "b"}


# ---- V4: large bodies


def answer_to(server: Server, path: str, size: int, *, chunked: bool) -> tuple[bytes, float]:
    """Send `size` bytes of JSON as far as the server takes them; its answer, and the time until then."""
    address = httpx.URL(server.url)
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n{length}\r\n\r\n"
    begun = time.monotonic()
    piece = b'{"data": ["' + b"x" * 65525
    with socket.create_connection((address.host, address.port), timeout=10) as sender:
        try:
            sender.sendall(head.encode())
            for _ in range(size // len(piece)):
                sender.sendall(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
        except OSError:
            pass  # it has answered and will not read any more
        answer = b""
        try:
            while b"\r\n\r\n" not in answer and (more := sender.recv(4096)):
                answer += more
        except ConnectionResetError:
            pass
    return answer, time.monotonic() - begun


@pytest.mark.parametrize("path", ["queue/join", "run/upload", "component_server/"])
@pytest.mark.parametrize(
    ("size", "chunked"),
    [(2_000_000, False), (100_000_000, False), (100_000_000, True)],
    ids=["2 MB", "100 MB", "chunked"],
)
def test_a_large_body_is_refused_at_once_and_not_kept(server: Server, path: str, size: int, chunked: bool) -> None:
    before = resident_bytes()
    peak_resident_bytes(since_now=True)
    answer, seconds = answer_to(server, f"/gradio_api/{path}", size, chunked=chunked)
    assert answer.startswith(b"HTTP/1.1 413"), answer[:80]
    assert seconds < 3
    assert peak_resident_bytes() - before < 50e6


def test_the_largest_honest_request_is_far_from_the_limit() -> None:
    assert len(json.dumps({**GOOD, "prompt": "\U0001f600" * 2000})) < MAX_BODY_BYTES / 10


# ---- section 2: what the page is started with, whoever starts it


def test_only_this_machine_is_listened_to(server: Server) -> None:
    port = httpx.URL(server.url).port
    with socket.create_connection(("127.0.0.1", port), timeout=5), pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", port), timeout=5)
    assert server.demo.share is False and server.demo.share_url is None


def test_an_unexpected_error_is_not_shown(server: Server, monkeypatch) -> None:
    monkeypatch.setattr(pieces, "settings_notice", lambda *_: 1 / 0)
    body = {"data": [7, 16, 1], "fn_index": server.fn_index("_checked_settings"), "session_hash": "s"}
    answer = server.http.post("/run/predict", json=body)
    assert answer.status_code == 500 and answer.json()["error"] is None


def test_weights_are_not_served_even_if_their_folder_is_allowed() -> None:
    server = Server(ScriptedPipeline(), launch={"allowed_paths": [str(ROOT)]})
    try:
        assert server.http.get(f"/file={ROOT / 'README.md'}").status_code == 200
        assert server.http.get(f"/file={ROOT / 'weights' / 'embedded' / 'model_index.json'}").status_code == 403
    finally:
        server.close()


def test_nothing_is_allowed_beyond_what_gradio_needs(server: Server) -> None:
    assert server.demo.allowed_paths == []


@pytest.mark.parametrize("origin", ["https://example.com", "null", "http://127.0.0.1.example.com"])
def test_other_sites_may_not_read_the_answers(server: Server, origin: str) -> None:
    answer = httpx.get(f"{server.url}config", headers={"origin": origin})
    assert "access-control-allow-origin" not in answer.headers
    # And what a site may send without being asked first is not understood: JSON in the clothes of a form.
    body = json.dumps({"data": list(GOOD.values()), "fn_index": 0, "session_hash": "s"})
    posted = server.http.post("/queue/join", content=body, headers={"origin": origin, "content-type": "text/plain"})
    assert posted.status_code == 422


def test_nobody_is_told_of_the_visitors(server: Server) -> None:
    assert server.demo.analytics_enabled is False
    assert httpx.get(f"{server.url}monitoring/summary").status_code in (401, 403, 404)


def test_files_go_after_half_an_hour(server: Server) -> None:
    assert server.demo.delete_cache == (600, 1800)


def test_one_run_at_a_time_whatever_started_it(server: Server) -> None:
    events = [event for event in server.demo.fns.values() if event.name in RUNS]
    assert {event.name for event in events} == RUNS
    assert {(event.concurrency_id, event.concurrency_limit) for event in events} == {("model", 1)}


RUNS = {"_generate", "generate", "video_generation_handler_streaming"}
