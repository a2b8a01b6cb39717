"""Downloads that a page starts: `python -m weights download` in a process of its own, which can be ended at any time.

A process, because ending it is then the same as any other end of a download, from which the next one goes on; and
because what it takes to convert 11 GB goes back to the machine with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import DownloadError, InvalidRequest
from weights.manifest import MANIFEST_FILE
from weights.progress import duration, gigabytes
from weights.store import Store

ROOT = Path(__file__).resolve().parent.parent
STOP_SECONDS = 5.0


@dataclass
class DownloadState:
    """How far a download is, or how it ended."""

    model_id: str
    running: bool = True
    stage: str = "Starting"
    share: float = 0.0
    line: str = ""
    """Bytes, speed and time left, in words."""
    error: str = ""
    stopped: bool = False


class Downloads:
    """One download at a time, whoever started it."""

    def __init__(self, store: Store, manifest: Path = MANIFEST_FILE) -> None:
        self._store = store
        self._manifest = manifest
        self.program = [sys.executable, "-m", "weights"]
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self.state: DownloadState | None = None
        """Of the last download; None if there was none."""

    def start(self, model_id: str) -> None:
        """Raises `InvalidRequest` if one goes on, `DownloadError` if the program cannot be started."""
        command = [*self.program, "download", model_id, "--json"]
        command += ["--home", str(self._store.home.absolute()), "--manifest", str(self._manifest.absolute())]
        with self._lock:
            if self.state is not None and self.state.running:
                raise InvalidRequest("A model is being downloaded already. Wait for its end, or stop it first.")
            try:
                self._process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=os.environ | {"PYTHONPATH": str(ROOT)},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    encoding="utf-8",
                )
            except OSError as error:
                raise DownloadError(f"The download could not be started ({error.strerror}).") from error
            self.state = DownloadState(model_id)
            threading.Thread(target=self._follow, args=(self._process, self.state), daemon=True).start()

    def stop(self) -> None:
        """End the download that goes on; what has come is kept. Returns at once."""
        with self._lock:
            if self._process is not None and self.state is not None and self.state.running:
                self.state.stopped = True
                self._process.terminate()

    def close(self) -> None:
        """As `stop`, and wait: the program is about to end."""
        self.stop()
        if self._process is not None:
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()

    def _follow(self, process: subprocess.Popen[str], state: DownloadState) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with contextlib.suppress(ValueError):
                self._read(json.loads(line), state)
        code = process.wait()
        if code != 0 and not state.stopped and not state.error:
            state.error = "The download ended unexpectedly. What has come is kept: download again to go on."
        state.running = False

    def _read(self, event: dict[str, Any], state: DownloadState) -> None:
        if event.get("event") == "progress":
            state.stage, state.share = event["stage"], event["share"]
            line = f"{gigabytes(event['done'])} of {gigabytes(event['total'])}"
            if event["speed"]:
                line += f" · {gigabytes(event['speed'])}/s"
            if event["seconds_left"]:
                line += f" · {duration(event['seconds_left'])} left"
            state.line = line
        elif event.get("event") == "error" and not state.stopped:
            state.error = event["message"]
