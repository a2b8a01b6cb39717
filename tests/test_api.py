"""The page's endpoints as programs use them: Gradio's client, MCP, and the example in README."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from mcp import ClientSession
from mcp.client.streamable_http import streamablehttp_client

from pipeline.recipe import read_recipe
from pipeline.worker import ModelWorker
from tests.media import read_media
from tests.scripted import SPEC, WORDS, ScriptedPipeline, read_code
from tests.server import SCRIPTED_PROGRAM, Server, free_port
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parent.parent
PARAMETERS = {
    "/generate": ["prompt", "seed", "fps", "seconds", "taehv", "fp8", "compile"],
    "/generate_from": ["prompt", "start", "seed", "fps", "seconds", "taehv", "fp8", "compile"],
    "/stop": [],
    "/enhance": ["prompt", "variant", "by"],
    "/options": [],
    "/video_generation_handler_streaming": ["prompt", "seed", "fps"],
    "/compare": ["prompt", "seed", "fps", "seconds", "a", "b"],
}


@pytest.fixture
def client(server: Server, tmp_path: Path) -> Client:
    return Client(server.url, download_files=tmp_path, verbose=False)


def codes(path: str) -> list[int]:
    """The numbers of the frames in a video."""
    return [read_code(picture) for picture in read_media(path).frames]


def test_generate_tells_its_progress_and_gives_the_video_and_its_recipe(client: Client) -> None:
    job = client.submit(prompt="a red ball", seed=7, fps=12, seconds=2, api_name="/generate")
    updates = list(job)
    video, recipe, progress = job.result()
    assert [update[2]["state"] for update in updates] == ["starting", "generating", "generating", "finished"]
    assert [update[2]["frames"] for update in updates] == [0, 9, 21, 21]
    assert all(update[:2] == (None, None) for update in updates[:-1])
    assert updates[-1][2] == progress
    assert codes(video) == list(range(21))
    assert recipe == read_recipe(video) and recipe["prompt"] == "a red ball" and recipe["complete"]
    for name in ("block", "num_blocks", "num_frames", "time_to_first_frame", "generation_fps", "applied"):
        assert progress[name], name
    assert (progress["seed"], progress["playback_fps"]) == (7, 12)


def test_defaults_are_those_that_options_names(server: Server, client: Client) -> None:
    defaults = client.predict(api_name="/options")["defaults"]
    client.predict(prompt="a ball", api_name="/generate")
    (request,) = server.pipeline.requests
    assert {name: getattr(request, name) for name in defaults} == defaults


def test_options_tells_what_can_be_asked_for(client: Client) -> None:
    options = client.predict(api_name="/options")
    assert (options["model"], options["width"], options["height"]) == (SPEC.name, SPEC.width, SPEC.height)
    assert options["limits"] == {"prompt": [1, 2000], "seed": [-1, 2**32 - 1], "fps": [1, 60], "seconds": [0.1, 20]}
    assert options["unavailable"] == {"compile": "There is no compiler here."}
    assert options["known_words"] == sorted(WORDS)


def test_stop_gives_what_was_made_until_then(server: Server, client: Client) -> None:
    server.pipeline.step_seconds = 0.03
    job = client.submit(prompt="a red ball", seconds=20, api_name="/generate")
    wait_until(lambda: len(server.pipeline.made) >= 2)
    assert client.predict(api_name="/stop") == {"stopped": "running"}
    video, recipe, progress = job.result(timeout=30)
    assert progress["state"] == "stopped" and recipe["complete"] is False
    shown = codes(video)
    assert shown == list(range(progress["frames"])) and 21 <= len(shown) < 200
    assert client.predict(api_name="/stop") == {"stopped": "none"}


def test_a_program_cannot_stop_another(server: Server, client: Client, tmp_path: Path) -> None:
    server.pipeline.step_seconds = 0.01
    job = client.submit(prompt="a red ball", seconds=2, api_name="/generate")
    wait_until(lambda: server.pipeline.made)
    assert Client(server.url, download_files=tmp_path, verbose=False).predict(api_name="/stop") == {"stopped": "none"}
    assert job.result(timeout=30)[2]["state"] == "finished"


def test_cancelling_a_job_frees_the_model(server: Server, client: Client) -> None:
    server.pipeline.step_seconds = 0.03
    job = client.submit(prompt="a red ball", seconds=20, api_name="/generate")
    wait_until(lambda: len(server.pipeline.made) >= 2)
    job.cancel()
    wait_until(lambda: server.idle)
    assert len(server.pipeline.made) < 15


def test_the_name_that_other_projects_call_gives_a_video_and_a_status(client: Client) -> None:
    job = client.submit("a red ball", 7, 16, api_name="/video_generation_handler_streaming")
    video, status = job.result(timeout=60)
    assert codes(video) == list(range(SPEC.frames_in(SPEC.blocks_for(5, 16))))
    assert "Finished" in status and ">7<" in status
    assert len(job.outputs()) > 3 and "Block 1 of" in str(job.outputs())


def test_it_has_the_options_that_the_device_needs(server: Server, client: Client, monkeypatch) -> None:
    monkeypatch.setattr(server.pipeline, "preset", {"fp8": True, "taehv": True}, raising=False)
    client.predict("a red ball", 7, 16, api_name="/video_generation_handler_streaming")
    request = server.pipeline.requests[-1]
    assert (request.taehv, request.fp8, request.compile) == (True, True, False)


def test_compare_gives_both_videos_in_one_and_what_they_come_to(server: Server, client: Client) -> None:
    job = client.submit(prompt="a red ball", seconds=1, a="taehv=on,fp8=on", b="fp8=on", api_name="/compare")
    updates = list(job)
    video, report, progress = job.result()
    states = [(update[2]["state"], update[2]["side"]) for update in updates]
    assert states[0] == ("preparing", "A") and states[-2:] == [("writing", "B"), ("finished", "B")]
    assert states.index(("generating", "A")) < states.index(("preparing", "B")) < states.index(("generating", "B"))
    assert all(update[:2] == (None, None) for update in updates[:-1]) and progress == updates[-1][2]
    assert len(read_media(video).frames) == report["frames"] == 21
    assert report["identical"] is True and report["psnr"] is None and report["differs"] == ["taehv"]
    assert {request.seed for request in server.pipeline.requests} == {report["seed"]}
    for fields, words in (
        ({"a": "fp8=on", "b": "fp8=on"}, "A and B are the same"),
        ({"a": "fp8"}, "a has 'fp8'"),
        ({"a": "compile=on"}, "no compiler"),
        ({"seconds": 21}, "from 0.1 to 20 here"),
    ):
        with pytest.raises(AppError, match=words):
            client.predict(prompt="a ball", **fields, api_name="/compare")


def test_refusals_are_the_same_sentences_as_on_the_page(server: Server, client: Client) -> None:
    for fields, words in (
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": "a ball", "seconds": 21}, "from 0.1 to 20 here"),
        ({"prompt": "a ball", "compile": True}, "no compiler"),
    ):
        with pytest.raises(AppError, match=words):
            client.predict(**fields, api_name="/generate")
    with pytest.raises(AppError, match="seed is 1.5"):
        client.predict("a ball", 1.5, 16, api_name="/video_generation_handler_streaming")
    assert server.pipeline.requests == []


def test_a_page_that_still_loads_says_so(tmp_path: Path) -> None:
    loaded = threading.Event()

    def load() -> ScriptedPipeline:
        loaded.wait(30)
        return ScriptedPipeline()

    with ModelWorker(load) as worker:
        server = Server(worker)
        try:
            client = Client(server.url, download_files=tmp_path, verbose=False)
            for name, fields in (
                ("/generate", ["a ball"]),
                ("/options", []),
                ("/enhance", ["a ball"]),
                (list(PARAMETERS)[-1], ["a ball"]),
            ):
                with pytest.raises(AppError, match="not ready yet.*Try again"):
                    client.predict(*fields, api_name=name)
            assert client.predict(api_name="/stop") == {"stopped": "none"}
            loaded.set()
            worker.wait_ready(10)
            assert client.predict(api_name="/options")["model"] == SPEC.name
        finally:
            loaded.set()
            server.close()


def test_nothing_but_the_endpoints_is_announced_and_every_parameter_is(server: Server) -> None:
    endpoints = server.http.get("/info").json()["named_endpoints"]
    assert endpoints.keys() == PARAMETERS.keys()
    for name, parameters in PARAMETERS.items():
        announced = endpoints[name]["parameters"]
        assert [parameter["parameter_name"] for parameter in announced] == parameters
        assert len(endpoints[name]["description"]) > 40
        for parameter in announced:
            assert parameter["label"] and parameter["python_type"]["type"] in ("str", "float", "bool", "filepath")
            assert parameter["parameter_has_default"] == (parameter["parameter_name"] not in ("prompt", "start"))


# ---- MCP


@pytest.fixture
def mcp_address(tmp_path: Path) -> Iterator[str]:
    """Where MCP clients are told to connect to."""
    (tmp_path / "model_index.json").write_text("{}")
    program = subprocess.Popen(
        [sys.executable, "-c", SCRIPTED_PROGRAM, "--mcp", "--model", str(tmp_path), "--port", str(free_port())],
        env={**os.environ, "PYTHONPATH": str(ROOT), "GRADIO_TEMP_DIR": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    said = ""
    while not (address := re.search(r"MCP clients connect to (\S+)\.\n", said)):
        line = program.stderr.readline()
        assert line, said
        said += line
    yield address[1]
    program.terminate()
    program.communicate(timeout=20)


def test_mcp_clients_find_and_call_the_tools(mcp_address: str) -> None:
    async def visit() -> tuple[dict[str, Any], str, str, str]:
        async with (
            streamablehttp_client(mcp_address) as (incoming, outgoing, _),
            ClientSession(incoming, outgoing) as session,
        ):
            await session.initialize()
            tools = {tool.name: tool for tool in (await session.list_tools()).tools}
            options = await session.call_tool("options", {})
            video = await session.call_tool("generate", {"prompt": "a red ball", "seed": 7, "seconds": 1})
            refused = await session.call_tool("generate", {"prompt": ""})
            assert refused.isError and not options.isError and not video.isError
            (made,) = set(re.findall(r"http://[^\s\"']+\.mp4", text_of(video)))
            further = await session.call_tool("generate_from", {"prompt": "a red ball", "start": made, "seconds": 1})
            assert not further.isError and "finished" in text_of(further), text_of(further)
            elsewhere = made.replace("/gradio_api/file=", "/other/file=")
            stranger = await session.call_tool("generate_from", {"prompt": "a red ball", "start": elsewhere})
            assert stranger.isError and "A file is needed" in text_of(stranger)
            return tools, text_of(options), text_of(video), text_of(refused)

    def text_of(result: Any) -> str:
        return "\n".join(part.text for part in result.content if part.type == "text")

    # On a thread of its own: a browser test before this one may have left its event loop running on the main thread.
    with ThreadPoolExecutor(1) as elsewhere:
        tools, options, video, refused = elsewhere.submit(asyncio.run, visit()).result()
    assert set(tools) == {name.strip("/") for name in PARAMETERS}
    for name, parameters in PARAMETERS.items():
        tool = tools[name.strip("/")]
        assert list(tool.inputSchema["properties"]) == parameters and len(tool.description) > 40
        assert all(schema.get("description") for schema in tool.inputSchema["properties"].values()), name
    assert f"'{SPEC.name}'" in options and "'limits'" in options
    assert "finished" in video and '"seed": 7' in video.replace("'", '"')
    (address,) = set(re.findall(r"http://[^\s\"']+\.mp4", video))
    assert httpx.get(address).content[4:8] == b"ftyp"
    assert "prompt is empty" in refused


# ---- README


def test_the_example_for_programs_in_readme_runs(server: Server, capsys) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    (example,) = [example for example in examples if "gradio_client" in example]
    assert "http://127.0.0.1:7860" in example
    names: dict[str, Any] = {}
    exec(example.replace("http://127.0.0.1:7860", server.url.rstrip("/")), names)
    (request,) = server.pipeline.requests
    said = capsys.readouterr().out
    assert f"{SPEC.frames_in(SPEC.blocks_for(request.seconds, 16))} of" in said
    assert codes(names["video"])[0] == 0 and names["recipe"]["prompt"] == request.prompt


def test_readme_names_every_endpoint() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("## From other programs")[1].split("\n## ")[0]
    assert set(re.findall(r"`(/\w+)", section)) == set(PARAMETERS)
    assert "--mcp" in section
