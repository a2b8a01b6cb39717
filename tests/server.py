"""A running page in this process, and a visitor of it who speaks HTTP."""

from __future__ import annotations

import json
import socket
import time
import uuid
from collections.abc import Iterator

import httpx

import app


class Server:
    """A running page, and a visitor of it who speaks HTTP."""

    def __init__(self, pipeline, **settings) -> None:
        self.pipeline = pipeline
        self.demo = app.build_app(pipeline, **settings)
        _, self.url, _ = self.demo.launch(prevent_thread_lock=True, quiet=True, server_port=free_port())
        self.http = httpx.Client(base_url=self.url.rstrip("/") + "/gradio_api", timeout=30)

    def fn_index(self, name: str) -> int:
        """Of an event, by the name of its function."""
        return next(index for index, fn in self.demo.fns.items() if fn.name == name)

    def join(self, *data, session: str, name: str = "_generate") -> httpx.Response:
        """Ask for a run as the page does, but without a ticket: nothing was announced."""
        data = [*data, None] if name == "_generate" else data
        body = json.dumps({"data": data, "fn_index": self.fn_index(name), "session_hash": session})
        return self.http.post("/queue/join", content=body, headers={"content-type": "application/json"})

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
        session = session or uuid.uuid4().hex
        answer = self.join(prompt, seed, fps, seconds, *(options or (False, False, False)), session=session)
        assert answer.status_code == 200, answer.text
        values, last = [], [None, None, None]
        for event in self.events(session):
            if event["msg"] == "process_generating":
                last = merged(last, event["output"]["data"]) if values else event["output"]["data"]
                values.append(list(last))
            elif event["msg"] == "process_completed":
                if not event["success"]:
                    raise Refused(event["output"]["error"], values)
                return values
        raise AssertionError("the stream of events ended before the run")

    def call(self, name: str, *data, session: str = "s") -> list:
        """The answer of an event outside of the queue."""
        body = {"data": data, "fn_index": self.fn_index(name), "session_hash": session}
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


def wait_until(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
