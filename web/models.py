"""The Model menu: which models there are, what of them is here, and getting or exchanging one.

The model is everybody's: who chooses another one changes it for all visitors. So the exchange stands in the same queue
as the videos, all open pages are told, and a page that others can reach has no menu unless its operator wants it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

import gradio as gr

from pipeline.blocks import StreamingPipeline
from pipeline.cli import EMBEDDED_MODEL
from pipeline.config import ModelSpec
from pipeline.errors import InvalidRequest, SelfForcingError
from pipeline.failures import load_failure
from pipeline.loading import LoadingState
from pipeline.worker import ModelWorker
from web.downloads import Downloads
from weights.manifest import KINDS, MANIFEST_FILE, Manifest, Model, load_manifest
from weights.progress import about, gigabytes
from weights.store import INDEX_FILE, Store

MenuMode = Literal["switch", "download"]
OWN = "own"
"""Id of the folder that the page was started with: the embedded one, unless another one was named."""
EMBEDDED = "embedded"
"""Id of the embedded model where that is another one."""
POLL_SECONDS = 2.0
LOADING_POLL_SECONDS = 0.4


@dataclass(frozen=True)
class ModelChoices:
    """What can be chosen, and how.

    Args:
        folder: of the model that the page starts with.
        load: a model folder -> its pipeline; is called on the model thread.
        mode: whether models may only be exchanged, or downloaded as well.
        check: raises if the model in a folder has no room here. It is asked before the model in use is given up.
    """

    folder: Path
    load: Callable[[Path], StreamingPipeline]
    mode: MenuMode = "download"
    store: Store = Store()
    manifest_file: Path = MANIFEST_FILE
    check: Callable[[Path], None] = lambda folder: None


class ModelMenu:
    """The menu's part of the page. To be made inside a `gr.Blocks`."""

    def __init__(self, choices: ModelChoices, worker: ModelWorker) -> None:
        self._choices = choices
        self._worker = worker
        self._manifest: Manifest = load_manifest(choices.manifest_file)
        self._folders, self._started_with = _own_folders(choices, self._manifest)
        self._current: str | None = self._started_with
        """None if the last exchange left no model at all."""
        self.after_switch: Callable[[], None] = lambda: None
        """Is called on whatever thread, when an exchange is over, well or badly."""
        self.downloads = Downloads(choices.store, choices.manifest_file)
        with gr.Accordion("Model", open=False, elem_id="models"):
            titles = [(self._title(name), name) for name in (*self._folders, *self._manifest.models)]
            chosen = self._started_with
            self.choice = gr.Dropdown(titles, value=chosen, label="Model", container=False, elem_id="model-choice")
            self.card = gr.HTML(self.card_of(chosen), elem_id="model-card", padding=False)
            with gr.Row(elem_id="model-buttons"):
                self.use = gr.Button("Use this model", size="sm", elem_id="model-use", visible=False)
                self.get = gr.Button("Download", size="sm", elem_id="model-get", visible=False)
                self.end = gr.Button("Stop download", size="sm", elem_id="model-end", visible=False)
        self.timer = gr.Timer(POLL_SECONDS)
        # The state of the model that this page shows. Not a `gr.State`: a page that comes later gets the newest one.
        self.seen = gr.Button(str(worker.changes), visible="hidden", elem_id="model-seen")

    @property
    def shown(self) -> list[Any]:
        """The components that depend on the choice and on what is here."""
        return [self.card, self.use, self.get, self.end]

    def show(self, name: str) -> tuple[Any, ...]:
        """New values of `shown`."""
        state = self._state(name)
        running = self._downloading()
        may_get = self._choices.mode == "download"
        return (
            self.card_of(name),
            gr.update(visible=state == "present" and name != self._current),
            gr.update(
                visible=state != "present" and may_get and not running,
                value=self._get_label(name),
            ),
            gr.update(visible=may_get and running == name and not self.downloads.stopping),
        )

    def fit(self) -> None:
        """Make a page that comes from now on open with the model that is in use, or else the one of the start."""
        self.choice.value = name = self._current or self._started_with
        self.card.value = self.card_of(name)
        self.use.visible = self._current is None and self._state(name) == "present"
        self.get.visible = self.end.visible = False

    def _get_label(self, name: str) -> str:
        """What the button says that fetches a model."""
        if self._state(name) == "partial":
            return "Go on with the download"
        return f"Download {size}" if (size := self._missing(name)) else "Download"

    @property
    def waiting(self) -> str:
        """The card of somebody who wants another model while a video is being made."""
        line = "The model is exchanged as soon as the videos before are done."
        return f'<div class="sf-models"><p role="status"><b>Waiting.</b> {line}</p></div>'

    # ---- what the buttons do

    def switch(self, name: str) -> Iterator[tuple[Any, ...]]:
        """Exchange the model, telling how far it is. Yields values of `shown`; to be run in the queue of the model.

        Raises:
            SelfForcingError: the model is not here, or has no room; or it could not be loaded: then the old one is
                back, or this says that it is not.
        """
        model = self._model(name)
        if self._state(name) != "present":
            raise InvalidRequest(f"{self._title(name)} is not here yet. Download it first.")
        folder = self._folders[name] if model is None else self._choices.store.model_folder(model)
        failures: list[SelfForcingError] = []
        checked = threading.Event()

        def work() -> None:
            try:
                self._choices.check(folder)
                checked.set()
                self._worker.switch(lambda: self._choices.load(folder))
                self._current = name
            except Exception as error:  # the check's: loading has words of its own for whatever happens
                failures.append(error if isinstance(error, SelfForcingError) else load_failure(error))
                self._current = self._current if self._has_model() else None
            finally:  # here, and not where it is told: whoever asked may have gone
                self.after_switch()

        thread = threading.Thread(target=work, name="switch", daemon=True)
        thread.start()
        while thread.is_alive():
            loading = self._worker.loading if checked.is_set() else LoadingState("Looking for room")
            bar = _bar(f"Loading {self._title(name)}", f"{loading.stage} …", loading.share)
            yield (bar, *(gr.update(visible=False) for _ in range(3)))
            thread.join(LOADING_POLL_SECONDS)
        yield self.show(name)
        if failures:
            raise failures[0]

    def _has_model(self) -> bool:
        try:
            self._worker.wait_ready(timeout=0)
        except SelfForcingError:
            return False
        except TimeoutError:  # the next exchange has begun, and will say
            pass
        return True

    def start_download(self, name: str) -> None:
        """Raises `InvalidRequest` if this may not or need not be, or another one goes on."""
        if self._choices.mode != "download":
            raise InvalidRequest("Downloads are switched off on this page. Its operator can get models.")
        if self._model(name) is None or self._state(name) == "present":
            raise InvalidRequest(f"{self._title(name)} is here already.")
        self.downloads.start(name)

    def stop_download(self) -> None:
        if self._choices.mode != "download":
            raise InvalidRequest("Downloads are switched off on this page.")
        self.downloads.stop()

    # ---- what is said

    def card_of(self, name: str) -> str:
        """Size, licence and state of a model, or how far its download is."""
        model = self._model(name)
        download = self.downloads.state
        lines = []
        if name == self._current:
            lines.append(f"<p><b>In use.</b> {self._size_here(name)}</p>")
        if model is None:
            return f'<div class="sf-models">{"".join(lines) or f"<p>Here. {self._size_here(name)}</p>"}</div>'
        if download is not None and download.running and download.model_id == name:
            if download.stopped:
                return _bar("Stopping …", "What has come is kept.", download.share)
            return _bar("Downloading", download.line or download.stage, download.share, download.stage)
        if download is not None and download.error and download.model_id == name:
            again = f" Press “{self._get_label(name)}” below." if download.resumable else ""
            lines.append(f'<p class="sf-wrong">{escape(download.error + again)}</p>')
        if download is not None and download.model_id == name:
            lines += [f"<p>{escape(note)}</p>" for note in download.notes]
        if name != self._current:
            lines.append(f"<p>{escape(model.note)} {self._state_in_words(name)}</p>")
        frame = model.spec
        lines.append(f"<p>{frame.width}×{frame.height}, made for a GPU. {_licence(model)}</p>")
        if download is not None and download.running and download.model_id != name:
            lines.append(f"<p>{escape(self._title(download.model_id))} is being downloaded: {download.share:.0%}.</p>")
        return f'<div class="sf-models">{"".join(lines)}</div>'

    def _state_in_words(self, name: str) -> str:
        state, missing = self._state(name), self._missing(name)
        if state == "present":
            return f"It is here. {self._size_here(name)}"
        size = "how much there is to download shows at its start"
        if missing is not None:
            size = f"{missing} to download" if missing else "what came needs to be put together"
        advice = "" if self._choices.mode == "download" else " The operator of this page can get it."
        return f"{'Partly' if state == 'partial' else 'Not'} here: {size}.{advice}"

    def _size_here(self, name: str) -> str:
        """What a model that is here takes, as a sentence."""
        model, shared = self._model(name), ""
        if model is None:
            folder = self._folders[name]
            files = [path for kind in KINDS for path in (folder / kind).glob("*") if path.is_file()]
            size = sum(path.stat().st_size for path in files)
        else:
            size, own = (
                sum(entry["bytes"] for part in parts for entry in self._choices.store.part_files(part).values())
                for parts in (model.parts, model.parts[:1])
            )
            shared = f", {gigabytes(size - own)} of it for other models, too"
        return f"{gigabytes(size)} on the disk{shared}." if size else ""

    def _title(self, name: str) -> str:
        model = self._model(name)
        return _name_of(self._folders[name]) if model is None else model.title

    def _model(self, name: str) -> Model | None:
        if not isinstance(name, str):
            raise InvalidRequest("Choose one of the models in the list.")
        if name in self._folders:
            return None
        return self._choices.store.as_installed(self._manifest.model(name), self._manifest)

    def _state(self, name: str) -> str:
        model = self._model(name)
        return "present" if model is None else self._choices.store.presence(model)

    def _downloading(self) -> str:
        state = self.downloads.state
        return state.model_id if state is not None and state.running else ""

    def _missing(self, name: str) -> str | None:
        """How much would have to be fetched, in words, and as an estimate where it is one.

        Empty: nothing. None if nobody knows.
        """
        model = self._model(name)
        if model is None:
            return ""
        store = self._choices.store
        parts = [part for part in model.parts if not store.has_part(part)]
        sizes = [self._manifest.likely_bytes(part) for part in parts]
        if None in sizes:
            return None
        here = sum(store.fetched_bytes(part, file.name) for part in parts for file in part.files)
        size = max(0, sum(size or 0 for size in sizes) - here)
        in_words = gigabytes if all(part.known_bytes is not None for part in parts) else about
        return in_words(size) if size else ""


def _licence(model: Model) -> str:
    licence = model.transformer.licence
    others = sorted({part.licence.name for part in model.parts} - {licence.name})
    and_others = f" Parts of it: {escape(', '.join(others))}." if others else ""
    return f"Licence <b>{escape(licence.name)}</b>: {escape(licence.terms)}{and_others}"


def _bar(headline: str, line: str, share: float, stage: str = "") -> str:
    return (
        f'<div class="sf-models"><p role="status"><b>{escape(headline)}</b> {escape(line)}</p>'
        f'<div class="sf-bar"><i style="width:{100 * share:.1f}%"></i></div>'
        f"{f'<p>{escape(stage)}</p>' if stage else ''}</div>"
    )


def _own_folders(choices: ModelChoices, manifest: Manifest) -> tuple[dict[str, Path], str]:
    """Models that need no download, by id, and the id of the one that the page starts with.

    The embedded model is always among them. A folder of the store is no further model, but that of its entry.
    """
    folders = {OWN: choices.folder}
    if choices.folder.resolve() == EMBEDDED_MODEL.resolve():
        return folders, OWN
    if (EMBEDDED_MODEL / INDEX_FILE).is_file():
        folders = {EMBEDDED: EMBEDDED_MODEL, **folders}
    for name, model in manifest.models.items():
        if choices.folder.resolve() == choices.store.model_folder(model).resolve():
            del folders[OWN]
            return folders, name
    return folders, OWN


def _name_of(folder: Path) -> str:
    try:
        return ModelSpec.of_folder(folder).name
    except SelfForcingError:
        return folder.name  # loading will say what is wrong with it
