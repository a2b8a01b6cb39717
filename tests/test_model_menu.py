"""The Model menu from the server's side: who may do what, what is told to whom, and downloads that end in any way."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gradio as gr
import huggingface_hub.constants as hub_constants
import pytest

import app
from pipeline.cli import EMBEDDED_MODEL
from pipeline.config import GenerationRequest
from pipeline.errors import OptionUnavailable, SelfForcingError
from pipeline.worker import ModelWorker
from tests.hub import PROGRAM_WITH_SMALL_PIECES, Hub, point_to, published_files, write_published
from tests.scripted import SPEC, ScriptedPipeline
from tests.server import Refused, Server
from tests.small import write_model_folder
from tests.waiting import wait_until
from web.downloads import Downloads, DownloadState
from web.models import OWN, ModelChoices, ModelMenu
from weights.install import download
from weights.manifest import load_manifest
from weights.progress import gigabytes
from weights.store import Store


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("published"))


@pytest.fixture
def hub(published: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub(published_files(published)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)  # for the process that downloads
        point_to(hub, monkeypatch)
        monkeypatch.setattr(hub_constants, "DOWNLOAD_CHUNK_SIZE", 4096)
        yield hub


def load(folder: Path) -> ScriptedPipeline:
    """A scripted model with the name of the folder; one folder cannot be loaded, nor one that says so itself."""
    if (folder / "wait").exists():
        wait_until(lambda: not (folder / "wait").exists(), 30)
    if folder.name == "other" or (folder / "broken").exists():
        raise RuntimeError("broken")
    return ScriptedPipeline(spec=replace(SPEC, name=f"from {folder.name}", fps=12))


@pytest.fixture
def site(published: Path, tmp_path: Path) -> Iterator[Server]:
    own = tmp_path / "own"
    own.mkdir()
    (own / "model_index.json").write_text(json.dumps({"settings": {}}))
    choices = ModelChoices(own, load, "download", Store(tmp_path / "home"), published)
    with ModelWorker(lambda: load(own)) as worker:
        worker.wait_ready(10)
        server = Server(worker, models=choices)
        server.choices = choices
        yield server
        server.close()


def settings(value: object) -> dict:
    """What an answer changes of a component."""
    if not isinstance(value, dict):
        return {"value": value}
    return {**value, **value.get("props", {})}


def card(values: list) -> str:
    """The card's HTML out of an answer of the menu."""
    return settings(values[-4]).get("value", "")


def visible(values: list) -> list[bool | None]:
    """Use, Download, Stop: whether they can be seen; None where nothing was said."""
    return [settings(value).get("visible") for value in values[-3:]]


def seen(values: list) -> str:
    """What a page keeps of an answer to `look`."""
    return settings(values[-5])["value"]


def get(site: Server, name: str) -> None:
    """Download a model, in this program: a second one would load torch for seconds."""
    model = load_manifest(site.choices.manifest_file).model(name)
    download(model, site.choices.store, lambda progress: None, lambda line: None)


def test_what_is_offered_and_what_it_costs(site: Server) -> None:
    assert "In use" in card(site.run("own", "0", name="show")[-1])
    values = site.run("small", "0", name="show")[-1]
    assert "Not here" in card(values) and "Test-1.0" in card(values) and "to download" in card(values)
    assert visible(values) == [False, True, False]


def test_a_model_that_came_can_be_used_and_everybody_is_told(site: Server, hub: Hub) -> None:
    first = seen(site.call("look", "small", "0"))
    again = site.call("look", "small", first)
    assert card(again) == "" and visible(again) == [None] * 3, "what is the same is not drawn again"
    get(site, "small")
    values = site.call("look", "small", first)
    assert "It is here" in card(values) and visible(values) == [True, False, False]
    values = site.run("small", name="switch")
    assert "Loading Small" in card(values[0]) and "In use" in card(values[-1])
    told = site.call("look", "own", first)
    assert seen(told).startswith("2:") and visible(told) == [True, False, False], "others may go back"
    assert any("from small" in str(settings(value).get("value")) for value in told), "and see what is there now"
    assert "Finished" in site.generate()[-1][1]
    assert site.page.generator.pipeline.name == "from small"
    site.run("own", name="switch")
    assert site.page.generator.pipeline.name == "from own"


def test_a_model_that_does_not_load_leaves_the_old_one(site: Server, hub: Hub) -> None:
    get(site, "other")
    with pytest.raises(Refused, match=r"could not be loaded \(RuntimeError\)"):
        site.run("other", name="switch")
    assert site.page.generator.pipeline.name == "from own"
    assert "In use" in card(site.run("own", "0", name="show")[-1])
    assert "Finished" in site.generate()[-1][1]


@pytest.mark.parametrize("error", [OptionUnavailable("It needs 49 GB."), ValueError("a strange config")], ids=str)
def test_a_model_without_room_is_refused_before_the_old_one_goes(published: Path, tmp_path: Path, error) -> None:
    def check(folder: Path) -> None:
        raise error

    choices = ModelChoices(EMBEDDED_MODEL, load, "switch", Store(tmp_path / "home"), published, check)
    with ModelWorker(lambda: ScriptedPipeline()) as worker:
        before = worker.wait_ready(10)
        with gr.Blocks():
            menu = ModelMenu(choices, worker)
        shown = []
        with pytest.raises(SelfForcingError, match="49 GB" if isinstance(error, OptionUnavailable) else "ValueError"):
            shown.extend(menu.switch(OWN))
        assert worker.wait_ready(0) is before and worker.changes == 0 and menu._current == OWN
        menu.downloads.close()


def test_when_no_model_is_left_everybody_is_told_and_can_choose_again(site: Server, hub: Hub) -> None:
    get(site, "small")
    get(site, "other")
    first = seen(site.call("look", "own", "0"))
    (site.choices.folder / "broken").touch()
    with pytest.raises(Refused, match=r"could not be loaded \(RuntimeError\)\. The model before it"):
        site.run("other", name="switch")
    told = site.call("look", "own", first)
    news = " ".join(str(settings(value).get("value")) for value in told)
    assert "There is no model now. The model could not be loaded" in news and "being loaded" not in news
    assert "In use" not in card(told) and visible(told) == [True, False, False], "it may be mended by now"
    assert visible(site.run("small", "0", name="show")[-1]) == [True, False, False]
    generate = next(c for c in site.demo.config["components"] if c["props"].get("elem_id") == "generate")
    assert generate["props"]["interactive"] is False, "a page that comes now"
    site.run("small", name="switch")
    assert "Finished" in site.generate()[-1][1]


def test_a_new_page_opens_with_the_model_that_is_in_use(site: Server, hub: Hub) -> None:
    get(site, "small")
    site.run("small", name="switch")
    props = {c["props"].get("elem_id"): c["props"] for c in site.demo.config["components"]}
    assert props["model-choice"]["value"] == "small" and "In use" in props["model-card"]["value"]


def test_who_waits_in_the_queue_is_served_though_the_chooser_has_gone(site: Server, hub: Hub) -> None:
    get(site, "small")
    wait = site.choices.store.home / "small" / "wait"
    wait.touch()
    for _ in site.page.ui.models.switch("small"):
        break  # the tab is closed while the model loads
    assert site.page.worker.exchanging
    threading.Timer(0.5, wait.unlink).start()
    assert "Finished" in site.generate()[-1][1]
    assert site.page.generator.pipeline.name == "from small"
    wait_until(lambda: site.page.ui.models.choice.value == "small")


def test_a_choice_behind_a_video_says_that_it_waits(site: Server, hub: Hub) -> None:
    get(site, "small")
    assert "Waiting" not in str(site.call("wait"))
    release = threading.Event()
    site.page.worker.wait_ready(0).on_step = lambda block, step: release.wait(10)
    run = site.page.worker.submit(GenerationRequest(prompt="a red ball", seconds=1))
    wait_until(lambda: site.page.worker.busy)
    assert "as soon as the videos before are done" in str(site.call("wait"))
    release.set()
    assert list(run)


def test_a_folder_of_the_store_is_listed_once_and_the_embedded_model_first(published: Path, tmp_path: Path) -> None:
    choices = ModelChoices(tmp_path / "home" / "small", load, "download", Store(tmp_path / "home"), published)
    demo = app.build_app(ScriptedPipeline(), models=choices)
    menu = next(c["props"] for c in demo.config["components"] if c["props"].get("elem_id") == "model-choice")
    assert [name for _, name in menu["choices"]] == ["embedded", "small", "other"]
    assert menu["value"] == "small"


def test_strange_words_of_the_program_do_not_leave_a_download_running(tmp_path: Path, caplog) -> None:
    lines = ["3", "null", '{"event": "progress"}', '{"event": "error"}', "words"]
    program = f"import sys; print({chr(10).join(lines)!r}); sys.stderr.write('a reason'); sys.exit(1)"
    downloads = Downloads(Store(tmp_path / "home"))
    downloads.program = [sys.executable, "-c", program]
    downloads.start("small")
    wait_until(lambda: not downloads.state.running)
    assert "ended unexpectedly" in downloads.state.error
    assert "a reason" in caplog.text and "words" in caplog.text


def test_what_is_not_here_cannot_be_used(site: Server) -> None:
    with pytest.raises(Refused, match="Small is not here yet. Download it first"):
        site.run("small", name="switch")


@pytest.mark.parametrize("name", ["nothing", ["small"], None, 3])
def test_names_that_are_not_in_the_list_are_refused(site: Server, name: object) -> None:
    for event, arguments in (("switch", [name]), ("start_download", [name, "0"])):
        with pytest.raises(Refused, match="Choose one|not in the list|no model"):
            site.run(*arguments, name=event)
    assert site.page.ui.models.downloads.state is None


def test_a_stopped_download_goes_on(site: Server, hub: Hub) -> None:
    hub.bytes_per_second = 100_000
    downloads = site.page.ui.models.downloads
    downloads.program = [sys.executable, "-c", PROGRAM_WITH_SMALL_PIECES]
    site.run("small", "0", name="start_download")
    wait_until(lambda: hub.sent > 50_000, 60)
    with pytest.raises(Refused, match="being downloaded already"):
        site.run("other", "0", name="start_download")
    stopping = site.run("small", "0", name="stop_download")[-1]
    assert "Stopping" in card(stopping) and visible(stopping) == [False, False, False]
    wait_until(lambda: not downloads.state.running)
    assert downloads.state.stopped and not downloads.state.error
    assert "Partly here" in card(site.run("small", "0", name="show")[-1])
    hub.requests.clear()
    site.run("small", "0", name="start_download")
    wait_until(lambda: any(wanted for _, _, wanted in hub.requests), 60)  # it asks for the rest
    downloads.close()


def test_what_goes_wrong_is_shown(site: Server, hub: Hub) -> None:
    hub.status = {"generator.pt": 500}
    site.run("small", "0", name="start_download")
    wait_until(lambda: not site.page.ui.models.downloads.state.running, 60)
    shown = card(site.run("small", "0", name="show")[-1])
    assert "answered 500" in shown and "kept. Press “Download" in shown and "python -m" not in shown


def test_a_download_that_broke_off_tells_which_button_goes_on(site: Server, hub: Hub) -> None:
    state = site.page.ui.models.downloads.state = DownloadState("small", running=False, error="It broke off.")
    part = site.choices.store.home / ".downloads" / "small" / "generator.pt.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"begun")
    values = site.run("small", "0", name="show")[-1]
    assert "It broke off. Press “Go on with the download” below." in card(values)
    assert settings(values[-2])["value"] == "Go on with the download", "the button that it means"
    state.resumable = False
    assert "Press" not in card(site.run("small", "0", name="show")[-1])


def test_what_is_here_tells_its_size(site: Server, hub: Hub) -> None:
    get(site, "small")
    shown = card(site.run("small", "0", name="show")[-1])
    store = site.choices.store
    model = load_manifest(site.choices.manifest_file).model("small")
    sizes = [sum(entry["bytes"] for entry in store.part_files(part).values()) for part in model.parts]
    said = f"It is here. {gigabytes(sum(sizes))} on the disk, {gigabytes(sum(sizes[1:]))} of it for other models, too."
    assert said in shown
    (site.choices.folder / "vae").mkdir()
    (site.choices.folder / "vae" / "weights").write_bytes(b"x" * 5000)
    assert "<b>In use.</b> 5 kB on the disk." in card(site.run("own", "0", name="show")[-1])


def test_a_size_that_nobody_published_is_an_estimate(tmp_path: Path, published: Path) -> None:
    data = json.loads(published.read_text())
    data["models"][1]["files"][0] |= {"bytes": None, "sha256": None}
    manifest = published.with_name("estimated.json")
    manifest.write_text(json.dumps(data))
    choices = ModelChoices(tmp_path / "own", load, "download", Store(tmp_path / "home"), manifest)
    server = Server(ScriptedPipeline(), models=choices)
    try:
        exact, likely = (server.run(name, "0", name="show")[-1] for name in ("small", "other"))
        total = gigabytes(sum(part.known_bytes or 0 for part in load_manifest(published).model("small").parts))
        assert f"Not here: {total} to download" in card(exact) and settings(exact[-2])["value"] == f"Download {total}"
        assert f"Not here: about {total} to download" in card(likely)
        assert settings(likely[-2])["value"] == f"Download about {total}"
    finally:
        server.close()


def test_a_page_that_may_only_switch_downloads_nothing(site: Server, published: Path, tmp_path: Path) -> None:
    choices = replace(site.choices, mode="switch")
    server = Server(ScriptedPipeline(), models=choices)
    try:
        values = server.run("small", "0", name="show")[-1]
        assert visible(values) == [False, False, False] and "operator" in card(values)
        for event in ("start_download", "stop_download"):
            with pytest.raises(Refused, match="switched off"):
                server.run("small", "0", name=event)
    finally:
        server.close()


def test_a_page_without_a_menu_has_none_of_its_events(server: Server) -> None:
    names = {fn.name for fn in server.demo.fns.values()}
    assert not names & {"switch", "start_download", "stop_download", "look"}


@pytest.mark.parametrize(
    ("arguments", "space", "mode"),
    [
        ([], False, "download"),
        (["--host", "localhost"], False, "download"),
        (["--share", "--allow-public"], False, None),
        (["--host", "0.0.0.0", "--auth", "me:secret"], False, None),
        ([], True, None),
        (["--share", "--allow-public", "--model-menu", "switch"], False, "switch"),
        (["--model-menu", "off"], False, None),
        (["--host", "0.0.0.0", "--allow-public", "--model-menu", "download"], False, "download"),
    ],
)
def test_strangers_get_no_menu_unless_the_operator_says_so(monkeypatch, tmp_path, arguments, space, mode) -> None:
    if space:
        monkeypatch.setenv(app.SPACE_VARIABLE, "me/space")
    choices = app.menu_choices(app.parse(arguments), tmp_path, load)
    assert (choices.mode if choices else None) == mode


def test_a_download_whose_program_dies_is_said(published: Path, tmp_path: Path, hub: Hub) -> None:
    hub.silence = 5
    downloads = Downloads(Store(tmp_path / "home"), published)
    downloads.start("small")
    os.kill(downloads._process.pid, 9)
    wait_until(lambda: not downloads.state.running)
    assert "ended unexpectedly" in downloads.state.error
    downloads.close()


def test_the_page_starts_with_a_real_folder(tmp_path: Path, published: Path) -> None:
    folder = write_model_folder(tmp_path / "model")
    choices = ModelChoices(folder, load, "download", Store(tmp_path / "home"), published)
    demo = app.build_app(ScriptedPipeline(), models=choices)
    menu = next(c["props"] for c in demo.config["components"] if c["props"].get("elem_id") == "model-choice")
    assert [name for _, name in menu["choices"]] == ["embedded", "own", "small", "other"] and menu["value"] == "own"
