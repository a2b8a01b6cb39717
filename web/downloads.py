"""Downloads that a page starts: `python -m weights download` in a process of its own, which can be ended at any time.

A process, because ending it is then the same as any other end of a download, from which the next one goes on; and
because what it takes to convert 11 GB goes back to the machine with it.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import DownloadError, InvalidRequest
from weights.manifest import MANIFEST_FILE
from weights.progress import duration, gigabytes
from weights.store import Store

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
STOP_SECONDS = 5.0
LINE_CHARS, TAIL_BYTES = 200, 4000
"""Of what a download says, as much goes into the log."""


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
    resumable: bool = True
    """After an error: whether another download goes on from what has come."""
    stopped: bool = False
    notes: list[str] = field(default_factory=list)
    """What there is to say besides, such as files whose hash nobody has published."""


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
            complaints = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `_follow`, when the process is over
            try:
                self._process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=os.environ | {"PYTHONPATH": str(ROOT)},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=complaints,
                    text=True,
                    encoding="utf-8",
                    errors="replace",
                )
            except OSError as error:
                complaints.close()
                raise DownloadError(f"The download could not be started ({error.strerror}).") from error
            self.state = DownloadState(model_id)
            threading.Thread(target=self._follow, args=(self._process, self.state, complaints), daemon=True).start()

    def stop(self) -> None:
        """End the download that goes on; what has come is kept. Returns at once."""
        with self._lock:
            if self._process is not None and self.state is not None and self.state.running:
                self.state.stopped = True
                self._process.terminate()

    @property
    def stopping(self) -> bool:
        """Whether the download was stopped and has not ended yet."""
        return self.state is not None and self.state.running and self.state.stopped

    def close(self) -> None:
        """As `stop`, and wait: the program is about to end."""
        self.stop()
        if self._process is not None:
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()

    def _follow(self, process: subprocess.Popen[str], state: DownloadState, complaints: BinaryIO) -> None:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                try:
                    self._read(json.loads(line), state)
                except (ValueError, KeyError, TypeError, AttributeError):  # some library's words, or another version's
                    logger.warning("The download of %s said: %s", state.model_id, line.strip()[:LINE_CHARS])
        finally:
            code = process.wait()
            with complaints:
                complaints.seek(max(0, complaints.seek(0, os.SEEK_END) - TAIL_BYTES))
                tail = complaints.read().decode("utf-8", "replace")
            if code != 0 and not state.stopped:
                logger.error("The download of %s ended with %d\n%s", state.model_id, code, tail)
                state.error = state.error or "The download ended unexpectedly. What has come is kept."
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
        elif event.get("event") == "note":
            state.notes.append(event["text"])
        elif event.get("event") == "error" and not state.stopped:
            state.error, state.resumable = event["message"], bool(event.get("resumable"))
