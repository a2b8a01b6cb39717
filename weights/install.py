"""From a manifest entry to a model folder: plan, fetch, check, convert, link. Every step may be the last one for now.

Each part goes all the way before the next begins, and its download is deleted once it is converted. So at any moment
the disk holds at most one file twice.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.errors import DownloadError, WeightsError
from weights.hub import BrokenOff, WrongFile, fetch, remote_state, sha256_of
from weights.links import Way, best_way, put
from weights.manifest import Model, Part, RemoteFile
from weights.progress import Listener, Meter, gigabytes
from weights.store import HOME_VARIABLE, INDEX_FILE, PARTS_FIELD, Store, read_index, write_whole

SPARE_BYTES = 200_000_000
"""That a disk should have left in the end."""

HEADER_BYTES = 1_000_000
"""Of a converted part, for names, shapes and configs; a thousand tensors take a tenth of that."""
_DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

Say = Callable[[str], None]
"""Told what a user has to know and no error: a sentence."""


@dataclass(frozen=True)
class Expected:
    """What a file has to be."""

    bytes: int
    sha256: str | None
    """None if nobody names it."""
    named_by: Literal["manifest", "record", "hub"] = "manifest"


@dataclass(frozen=True)
class Plan:
    """What a download comes to."""

    missing: tuple[Part, ...]
    files: dict[str, dict[str, Expected]]
    """Part id -> file name -> what it has to be."""
    fetched: int
    """Bytes of the missing parts that are here already."""
    needed: int
    """Bytes of disk that must be free at the worst moment."""

    @property
    def total(self) -> int:
        return sum(map(_total, self.files.values()))


def download(model: Model, store: Store, listener: Listener, say: Say) -> Path:
    """Get a model and return its folder. What is there already is kept, whatever came of it before.

    Raises:
        DownloadError: no network, no space, somebody else at work. The same call goes on from there.
        WeightsError: what came is not what the manifest means.
    """
    with store.locked():
        way = _way_of(store)
        plan = make_plan(model, store, way)
        check_disk(plan, store)
        if plan.missing:
            store.choose(model)
        if way != "hard link" and not store.linked(model):
            say(f"The disk of the downloads knows no hard links; each file of the model folder is a {way} instead.")
        meter = Meter(plan.total, listener)
        for part in plan.missing:
            sources = [
                fetch_checked(part, file, plan.files[part.id][file.name], store, meter, say) for file in part.files
            ]
            meter.stage(f"Converting the {part.kind.replace('_', ' ')}")
            make_part(part, sources, store)
            shutil.rmtree(store.download_folder(part), ignore_errors=True)
        folder = link_model(model, store, way)
        store.chosen(model)
        return folder


def _way_of(store: Store) -> Way:
    try:
        return best_way(store.home)
    except OSError as error:
        raise DownloadError(
            f"The folder for downloads cannot be used ({error.strerror or error}). Name another one in {HOME_VARIABLE}."
        ) from error


def make_plan(model: Model, store: Store, way: Way = "hard link") -> Plan:
    """Ask what is missing and how large it is. Needs no network if nothing is.

    Raises:
        DownloadError: the hub cannot be asked, or does not have a file.
        WeightsError: a file of the hub is not the one that is meant.
    """
    missing = tuple(part for part in model.parts if not store.has_part(part))
    files = {part.id: {file.name: _expected(part, file, store) for file in part.files} for part in missing}
    fetched = {
        part.id: sum(min(store.fetched_bytes(part, name), file.bytes) for name, file in files[part.id].items())
        for part in missing
    }
    worst = kept = 0
    for part in missing:
        download_bytes = _total(files[part.id])
        result = _converted_bytes(part, download_bytes)
        worst = max(worst, kept + download_bytes - fetched[part.id] + result)
        kept += result - fetched[part.id]  # the download goes, and with it what of it was here before
    if way == "copy" and not store.linked(model):
        here = sum(entry["bytes"] for part in model.parts for entry in store.part_files(part).values())
        worst = max(worst, kept + here + sum(_converted_bytes(part, _total(files[part.id])) for part in missing))
    return Plan(missing, files, sum(fetched.values()), worst)


def _total(files: dict[str, Expected]) -> int:
    return sum(file.bytes for file in files.values())


def _expected(part: Part, file: RemoteFile, store: Store) -> Expected:
    """What a missing file has to be. The hub is asked unless all of the file has come and its hash is known."""
    seen = store.sources(part).get(file.name, {})
    size, sha256 = file.bytes or seen.get("bytes"), file.sha256 or seen.get("sha256")
    named_by: Literal["manifest", "record"] = "manifest" if file.sha256 else "record"
    if size and sha256 and store.is_fetched(part, file.name, size):
        return Expected(size, sha256, named_by)
    remote = remote_state(part, file, size)
    return Expected(remote.bytes, sha256, named_by) if sha256 else Expected(remote.bytes, remote.sha256, "hub")


def _converted_bytes(part: Part, download_bytes: int) -> int:
    """What the converted part will take, and a little more: its numbers are written in a type of the manifest's choice.

    Published transformers are halved, text encoders in 8 bits doubled. Those that keep their type keep their size, but
    for TAEHV, which is published in 16 bits and written in 32.
    """
    if part.dtype is None:
        return 2 * download_bytes if part.kind == "taehv" else download_bytes
    from weights.blueprints import count_of  # torch; a plan in which nothing is missing needs none

    return count_of(part) * _DTYPE_BYTES[part.dtype] + HEADER_BYTES


def check_disk(plan: Plan, store: Store) -> None:
    """Raises `DownloadError` if the disk cannot take what is planned."""
    if not plan.missing:
        return
    free = shutil.disk_usage(store.home).free
    if free < plan.needed + SPARE_BYTES:
        raise BrokenOff(
            f"This needs {gigabytes(plan.needed + SPARE_BYTES)} of free disk, and there are {gigabytes(free)}. Free "
            "some, or name a folder on another disk in SELF_FORCING_WEIGHTS."
        )


def fetch_checked(part: Part, file: RemoteFile, expected: Expected, store: Store, meter: Meter, say: Say) -> Path:
    """A file of the right contents. What is wrong is deleted, so that the next call begins anew."""
    meter.stage(f"Downloading {file.name}")
    path = fetch(part, file, expected.bytes, store.download_folder(part), meter)
    meter.stage(f"Checking {file.name}")
    found = sha256_of(path)
    if expected.sha256 is not None and found != expected.sha256:
        path.unlink()
        raise WrongFile(
            f"{file.name} of {part.repository} is not the file that {_NAMED[expected.named_by]}: its sha256 is "
            f"{found[:16]}…, not {expected.sha256[:16]}…. It was deleted."
            f"{_WAY_OUT if expected.named_by == 'record' else ''}"
        )
    if expected.sha256 is None:
        say(f"Nobody has published the sha256 of {file.name}; that of this download is recorded: {found}.")
    elif expected.named_by == "hub":
        say(f"The sha256 of {file.name} is the one that the hub itself names, and is recorded: {found}.")
    store.remember_source(part, file.name, expected.bytes, found)
    return path


_NAMED = {
    "manifest": "the manifest names",
    "record": "was recorded at the first download",
    "hub": "the hub itself names",
}
_WAY_OUT = (
    " If this is not the first time, the first download was the wrong one: delete .state.json in the folder of the "
    "downloads, and the next one is recorded instead. `python -m weights verify ID` checks a model that is here."
)


def make_part(part: Part, sources: list[Path], store: Store) -> None:
    """Convert a part, and record what it consists of."""
    from weights.convert import convert_part  # torch, for which the first byte need not wait

    def write(folder: Path) -> None:
        convert_part(part, sources, folder)
        files = {path.name: {**_stamp(path), "sha256": sha256_of(path)} for path in sorted(folder.iterdir())}
        store.remember_part(part, files, folder)

    write_whole(store.part_folder(part), write)


def _stamp(path: Path) -> dict[str, int]:
    """What tells without reading a file that it is the one whose hash is known."""
    found = path.stat()
    return {"bytes": found.st_size, "mtime_ns": found.st_mtime_ns}


def link_model(model: Model, store: Store, way: Way) -> Path:
    """Make the model's folder out of its parts."""
    folder = store.model_folder(model)
    if store.linked(model) and read_index(folder) == _index(model):
        return folder

    def write(partial: Path) -> None:
        for part in model.parts:
            (partial / part.kind).mkdir()
            for name in store.part_files(part):
                put(store.part_folder(part) / name, partial / part.kind / name, way)
        (partial / INDEX_FILE).write_text(json.dumps(_index(model), indent=2), encoding="utf-8")

    write_whole(folder, write)
    return folder


def _index(model: Model) -> dict[str, object]:
    from pipeline.folder import index_entries

    named = tuple(part.kind for part in model.parts if part.kind != "tokenizer")
    return {**index_entries(named), PARTS_FIELD: [part.id for part in model.parts], "settings": dict(model.settings)}


def verify(model: Model, store: Store, listener: Listener, again: str | None = None) -> int:
    """Read every file of a model and compare its hash. Returns the number of files.

    Loading a model compares times of writing; those of files that have others now, in a copy perhaps, are noted anew.

    Args:
        again: the command that downloads into this store; default: the one for the usual place.

    Raises:
        WeightsError: a file is missing or damaged. Its part is forgotten, so that `download` fetches it again.
    """
    again = again or f"python -m weights download {model.id}"
    with store.locked():
        if (presence := store.presence(model)) != "present":
            raise WeightsError(f"{model.title} is {_in_words(presence)}. Get it with: {again}")
        folder = store.model_folder(model)
        if read_index(folder) != _index(model):
            raise WeightsError(f"{INDEX_FILE} of {model.id} has changed. Put it right with: {again}")
        records = [
            (part, path, entry)
            for part in model.parts
            for name, entry in store.part_files(part).items()
            for path in _distinct(store.part_folder(part) / name, folder / part.kind / name)
        ]
        meter = Meter(sum(entry["bytes"] for _, _, entry in records), listener)
        stamps: dict[tuple[str, str], dict[str, int]] = {}
        for part, path, entry in records:
            stamps[part.id, path.name] = _stamp(path)  # before it is read: what is written meanwhile has a later one
            meter.stage(f"Checking {part.id}/{path.name}")
            if sha256_of(path, meter.advance) != entry["sha256"]:
                store.forget_part(part)
                (folder / part.kind / path.name).unlink(missing_ok=True)  # that no copy is taken for the new one
                raise WeightsError(
                    f"{path.name} of {part.id} has changed since it was downloaded. Get it again with: {again}"
                )
        for part in model.parts:
            known = store.part_files(part)
            found = {name: entry | stamps[part.id, name] for name, entry in known.items()}
            if found != known:
                store.remember_part(part, found, store.part_folder(part))
    return len(records)


def _distinct(one: Path, other: Path) -> list[Path]:
    """Two names of one file are one; a copy is read, too."""
    return [one] if one.samefile(other) else [one, other]


def _in_words(presence: str) -> str:
    return {"partial": "only partly here", "absent": "not here", "present": "here"}[presence]
