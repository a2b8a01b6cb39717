"""A running page in this process, and a visitor of it who speaks HTTP."""

from __future__ import annotations

import json
import socket
import uuid
from collections.abc import Iterator
from typing import Any

import httpx

import app
from web.page import Page

SCRIPTED_PROGRAM = """
import sys
import app
from tests.scripted import ScriptedPipeline
sys.exit(app.main(load=lambda folder, device: ScriptedPipeline()))
"""
"""`python app.py` with a scripted model, for `python -c`. It wants a `--model` folder, which may hold anything."""


class Server:
    """A running page, and a visitor of it who speaks HTTP.

    Args:
        pipeline: What `build_app` takes.
        launch: Further arguments for `launch()`.
        **settings: Further arguments for `build_app`.
    """

    def __init__(self, pipeline, launch: dict[str, Any] | None = None, **settings) -> None:
        self.pipeline = pipeline
        self.demo = app.build_app(pipeline, **settings)
        _, self.url, _ = self.demo.launch(
            prevent_thread_lock=True, quiet=True, server_port=free_port(), **(launch or {})
        )
        self.http = httpx.Client(base_url=self.url.rstrip("/") + "/gradio_api", timeout=30)

    @property
    def page(self) -> Page:
        """What `build_app` wired up."""
        return self.demo.fns[self.fn_index("_stop")].fn.__self__

    @property
    def idle(self) -> bool:
        """Whether the model has nothing to do."""
        return not self.page.worker.busy

    def fn_index(self, name: str) -> int:
        """Of an event, by the name of its function."""
        return next(index for index, fn in self.demo.fns.items() if fn.name == name)

    def join(self, *data, session: str, name: str = "_generate") -> httpx.Response:
        """Ask for a run as the page does, but without a ticket: nothing was announced."""
        body = json.dumps({"data": self._whole(name, data), "fn_index": self.fn_index(name), "session_hash": session})
        return self.http.post("/queue/join", content=body, headers={"content-type": "application/json"})

    def _whole(self, name: str, data: tuple) -> list:
        """An event's inputs, those that are left out at the end being empty."""
        missing = len(self.demo.fns[self.fn_index(name)].inputs) - len(data)
        return [*data, *[None] * missing]

    def events(self, session: str) -> Iterator[dict]:
        with self.http.stream("GET", f"/queue/data?session_hash={session}") as stream:
            for line in stream.iter_lines():
                if line.startswith("data:"):
                    event = json.loads(line[5:])
                    if event["msg"] == "close_stream":
                        return
                    yield event

    def generate(self, prompt="a red ball", seed=7, fps=16, seconds=2, *options, session: str | None = None) -> list:
        """All values that a run gives to (video, status, file); raises what the visitor is told if it fails."""
        return self.run(prompt, seed, fps, seconds, *(options or (False, False, False)), session=session)

    def run(self, *data, name: str = "_generate", session: str | None = None) -> list:
        """All values that an event gives one after the other; raises what the visitor is told if it fails."""
        session = session or uuid.uuid4().hex
        answer = self.join(*data, session=session, name=name)
        assert answer.status_code == 200, answer.text
        values, last = [], []
        for event in self.events(session):
            if event["msg"] == "process_generating":
                last = merged(last, event["output"]["data"]) if values else event["output"]["data"]
                values.append(list(last))
            elif event["msg"] == "process_completed":
                if not event["success"]:
                    raise Refused(event["output"].get("error"), values)
                return values or [event["output"]["data"]]
        raise AssertionError("the stream of events ended before the run")

    def click(self, *inputs, session: str) -> list:
        """As `run`, but with all that a click on Generate does on the page, before and after the run."""
        ticket = self.run(*inputs, name="_begin", session=session)[-1][0]
        try:
            return self.run(*inputs, ticket, session=session)
        finally:
            self.call("_end", ticket, session=session)

    def call(self, name: str, *data, session: str = "s") -> list:
        """The answer of an event outside of the queue."""
        body = {"data": self._whole(name, data), "fn_index": self.fn_index(name), "session_hash": session}
        answer = self.http.post("/run/predict", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def reset(self) -> None:
        """Forget what earlier tests asked of a scripted pipeline."""
        self.pipeline.step_seconds, self.pipeline.on_step = 0.0, None
        for record in ("faults", "requests", "made", "intervals", "stamps"):
            getattr(self.pipeline, record).clear()

    def close(self) -> None:
        self.http.close()
        self.demo.close(verbose=False)


class Refused(Exception):
    def __init__(self, message: str | None, values: list) -> None:
        super().__init__(message)
        self.values = values


def merged(old: list, changes: list) -> list:
    """Gradio sends only what changed, each output as a list of edits."""
    from gradio_client.utils import apply_diff

    return [apply_diff(value, change) for value, change in zip(old, changes, strict=True)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
