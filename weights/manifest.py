"""What can be downloaded: the manifest, read and checked as a whole.

The manifest is data. A checkpoint of the same architecture is one more entry in it and nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config import ModelSpec
from pipeline.errors import InvalidRequest, WeightsError

MANIFEST_FILE = Path(__file__).resolve().parent / "manifest.json"
VERSION = 1

KINDS = ("transformer", "text_encoder", "tokenizer", "vae", "taehv")
"""Parts of a model, by the name of their folder in it."""
NEEDED = frozenset(KINDS) - {"taehv"}
DTYPES = ("bfloat16", "float16", "float32")

_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_REVISION = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository."""

    path: str
    bytes: int | None
    sha256: str | None
    """None where nobody has published it: then the hash of the first download is recorded."""

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Licence:
    name: str
    terms: str
    """In one line, for people who are about to download."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Something that is fetched and converted on its own: a transformer, or what several models share."""

    id: str
    kind: str
    title: str
    repository: str
    revision: str
    files: tuple[RemoteFile, ...]
    licence: Licence
    config: Path | None
    """Of the network, in the naming in which it was published; tokenizers have none."""
    dtype: str | None
    """Of the converted weights; None keeps that of the file."""
    key: str | None = None
    """Entry of the checkpoint that holds the network."""

    @property
    def known_bytes(self) -> int | None:
        """Size of the download; None if one of its files has an unknown size."""
        sizes = [file.bytes for file in self.files]
        return None if None in sizes else sum(size for size in sizes if size is not None)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A checkpoint with all it takes to make video."""

    id: str
    title: str
    note: str
    parts: tuple[Part, ...]
    """The transformer first."""
    settings: Mapping[str, Any]
    """As they go into the folder's `model_index.json`."""
    spec: ModelSpec

    @property
    def transformer(self) -> Part:
        return self.parts[0]

    def with_part(self, part: Part) -> Model:
        """The same model with another part of that kind."""
        return replace(self, parts=tuple(part if old.kind == part.kind else old for old in self.parts))


@dataclass(frozen=True)
class Manifest:
    parts: Mapping[str, Part]
    """Shared parts by id."""
    models: Mapping[str, Model]

    def likely_bytes(self, part: Part) -> int | None:
        """Size of a part's download; where nobody has published it, that of other checkpoints of the same network.

        None if there are none of known size. `Part.known_bytes` tells whether it is more than an estimate.
        """
        if part.known_bytes is not None:
            return part.known_bytes
        others = [model.transformer for model in self.models.values()] + list(self.parts.values())
        sizes = [other.known_bytes for other in others if (other.kind, other.config) == (part.kind, part.config)]
        return max((size for size in sizes if size is not None), default=None)

    def model(self, name: str) -> Model:
        """Raises `InvalidRequest` for a name that is not in the manifest."""
        if name not in self.models:
            raise InvalidRequest(f"There is no model {name!r}. Choose one of: {', '.join(self.models)}.")
        return self.models[name]

    def part(self, name: str, kind: str) -> Part:
        """A shared part of one kind. Raises `InvalidRequest` if there is none of that name."""
        names = [part.id for part in self.parts.values() if part.kind == kind]
        if name not in names:
            raise InvalidRequest(f"There is no {kind.replace('_', ' ')} {name!r}. Choose one of: {', '.join(names)}.")
        return self.parts[name]


def load_manifest(path: Path = MANIFEST_FILE) -> Manifest:
    """Read and check a manifest.

    Raises:
        WeightsError: naming the entry, the field and what is wrong with it.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"The manifest {path.name} cannot be read: {error}.") from error
    top = _Entry("the manifest", data)
    if (version := top.take("version")) != VERSION:
        raise WeightsError(f"The manifest {path.name} has version {version!r}; this program reads {VERSION}.")
    parts: dict[str, Part] = {}
    for entry in top.entries("parts"):
        part = _read_part(entry, path.parent)
        entry.end()
        if part.id in parts:
            raise entry.wrong("id", part.id, "used only once")
        if part.kind == "transformer":
            raise entry.wrong("kind", part.kind, "one of a shared part; a transformer is an entry of models")
        parts[part.id] = part
    models: dict[str, Model] = {}
    for entry in top.entries("models"):
        model = _read_model(entry, path.parent, parts)
        if model.id in models or model.id in parts:
            raise entry.wrong("id", model.id, "used only once")
        models[model.id] = model
    top.end()
    return Manifest(parts, models)


def _read_model(entry: _Entry, folder: Path, shared: Mapping[str, Part]) -> Model:
    transformer = _read_part(entry, folder, key=entry.take("key", str, None))
    if transformer.kind != "transformer":
        raise entry.wrong("kind", transformer.kind, "'transformer' for a model")
    note, names, settings = entry.take("note", str), entry.take("parts", list), entry.take("settings", dict)
    entry.end()
    if unknown := [name for name in names if name not in shared]:
        raise entry.wrong("parts", unknown[0], f"among {', '.join(shared)}")
    parts = (transformer, *(shared[name] for name in names))
    kinds = [part.kind for part in parts]
    if missing := sorted(NEEDED.difference(kinds)):
        raise entry.wrong("parts", names, f"complete: the {missing[0].replace('_', ' ')} is missing")
    if len(kinds) != len(set(kinds)):
        raise entry.wrong("parts", names, "one of each kind")
    try:
        spec = ModelSpec.from_config(settings)
    except WeightsError as error:
        raise WeightsError(f"In the manifest, {entry.name} has settings that cannot work: {error}") from error
    return Model(id=transformer.id, title=transformer.title, note=note, parts=parts, settings=settings, spec=spec)


def _read_part(entry: _Entry, folder: Path, key: str | None = None) -> Part:
    config = entry.take("config", str, None)
    place = None if config is None else folder / config
    kind = entry.take("kind", str, among=KINDS)
    if (place is None) != (kind == "tokenizer"):
        raise entry.wrong("config", config, "null for a tokenizer and a file for everything else")
    if place is not None and not place.is_file():
        raise entry.wrong("config", config, "a file beside the manifest")
    licence = entry.inner("licence")
    part = Part(
        id=entry.take("id", str, like=_ID),
        kind=kind,
        title=entry.take("title", str),
        repository=entry.take("repository", str, like=_REPOSITORY),
        revision=entry.take("revision", str, like=_REVISION),
        files=tuple(_read_file(file) for file in entry.entries("files")),
        licence=Licence(licence.take("name", str), licence.take("terms", str)),
        config=place,
        dtype=entry.take("dtype", str, None, among=DTYPES),
        key=key,
    )
    licence.end()
    if not part.files or (kind != "tokenizer" and len(part.files) > 1):
        raise entry.wrong("files", len(part.files), "one file, or several of a tokenizer")
    if len({file.name for file in part.files}) < len(part.files):
        raise entry.wrong("files", [file.name for file in part.files], "of different names")
    return part


def _read_file(entry: _Entry) -> RemoteFile:
    file = RemoteFile(
        entry.take("path", str), entry.take("bytes", int, None), entry.take("sha256", str, None, like=_SHA256)
    )
    entry.end()
    if file.path.startswith("/") or "\\" in file.path or not all(p.strip(".") for p in file.path.split("/")):
        raise entry.wrong("path", file.path, "a path inside the repository")
    if file.bytes is not None and file.bytes < 1:
        raise entry.wrong("bytes", file.bytes, "at least 1, or null")
    return file


_NEEDED = object()


class _Entry:
    """An object of the manifest from which fields are taken one by one; none may be left over."""

    def __init__(self, name: str, data: Any) -> None:
        if not isinstance(data, dict):
            raise WeightsError(f"In the manifest, {name} is {_shown(data)}, but must be an object.")
        self.name = repr(data["id"]) if isinstance(data.get("id"), str) else name
        self._data = dict(data)

    def take(
        self,
        field: str,
        kind: type | None = None,
        default: Any = _NEEDED,
        *,
        like: re.Pattern[str] | None = None,
        among: tuple[str, ...] = (),
    ) -> Any:
        if field not in self._data:
            raise WeightsError(f"In the manifest, {self.name} has no {field}.")
        value = self._data.pop(field)
        if value is None and default is None:
            return None
        if kind is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise self.wrong(field, value, f"of type {kind.__name__}")
        if isinstance(value, str) and not value.strip():
            raise self.wrong(field, value, "filled in")
        if like is not None and not like.fullmatch(value):
            raise self.wrong(field, value, f"of the form {like.pattern}")
        if among and value not in among:
            raise self.wrong(field, value, f"one of {', '.join(among)}")
        return value

    def inner(self, field: str) -> _Entry:
        return _Entry(f"the {field} of {self.name}", self.take(field))

    def entries(self, field: str) -> Iterator[_Entry]:
        values = self.take(field, list)
        for index, value in enumerate(values):
            yield _Entry(f"entry {index + 1} of {field} of {self.name}", value)

    def end(self) -> None:
        if self._data:
            raise WeightsError(f"In the manifest, {self.name} has the unknown field {next(iter(self._data))!r}.")

    def wrong(self, field: str, value: Any, must_be: str) -> WeightsError:
        return WeightsError(f"In the manifest, {field} of {self.name} is {_shown(value)}, but must be {must_be}.")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
