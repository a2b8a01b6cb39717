"""From a manifest entry to a model folder: plan, fetch, check, convert, link. Every step may be the last one for now.

Each part goes all the way before the next begins, and its download is deleted once it is converted. So at any moment
the disk holds at most one file twice.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import DownloadError, WeightsError
from weights.hub import fetch, remote_size, sha256_of
from weights.manifest import Model, Part, RemoteFile
from weights.progress import Listener, Meter, gigabytes
from weights.store import INDEX_FILE, PARTS_FIELD, Store, write_whole

SPARE_BYTES = 200_000_000
"""That a disk should have left in the end."""

Say = Callable[[str], None]
"""Told what a user has to know and no error: a sentence."""


@dataclass(frozen=True)
class Plan:
    """What a download comes to."""

    missing: tuple[Part, ...]
    sizes: dict[str, dict[str, int]]
    """Part id -> file name -> bytes."""
    fetched: int
    """Bytes of the missing parts that are here already."""
    needed: int
    """Bytes of disk that must be free at the worst moment."""

    @property
    def total(self) -> int:
        return sum(sum(files.values()) for files in self.sizes.values())


def download(model: Model, store: Store, listener: Listener, say: Say) -> Path:
    """Get a model and return its folder. What is there already is kept, whatever came of it before.

    Raises:
        DownloadError: no network, no space, somebody else at work. The same call goes on from there.
        WeightsError: what came is not what the manifest means.
    """
    with store.locked():
        plan = make_plan(model, store)
        check_disk(plan, store)
        meter = Meter(plan.total, listener)
        for part in plan.missing:
            sources = [
                fetch_checked(part, file, plan.sizes[part.id][file.name], store, meter, say) for file in part.files
            ]
            meter.stage(f"Converting the {part.kind.replace('_', ' ')}")
            from weights.convert import convert_part  # torch, for which the first byte need not wait

            convert_part(part, sources, store.part_folder(part))
            remember_part(part, store)
            shutil.rmtree(store.download_folder(part), ignore_errors=True)
        return link_model(model, store)


def make_plan(model: Model, store: Store) -> Plan:
    """Ask what is missing and how large it is. Needs no network if nothing is."""
    missing = tuple(part for part in model.parts if not store.has_part(part))
    sizes = {part.id: {file.name: _size_of(part, file, store) for file in part.files} for part in missing}
    fetched = {
        part.id: sum(min(store.fetched_bytes(part, name), size) for name, size in sizes[part.id].items())
        for part in missing
    }
    worst = kept = 0
    for part in missing:
        download_bytes = sum(sizes[part.id].values())
        result = _converted_bytes(part, download_bytes)
        worst = max(worst, kept + download_bytes - fetched[part.id] + result)
        kept += result - fetched[part.id]  # the download goes, and with it what of it was here before
    return Plan(missing, sizes, sum(fetched.values()), worst)


def _size_of(part: Part, file: RemoteFile, store: Store) -> int:
    size = file.bytes or store.record(part).get("source", {}).get(file.name, {}).get("bytes")
    return size if size else remote_size(part, file)


def _converted_bytes(part: Part, download_bytes: int) -> int:
    """No less than the converted part will take. 8-bit files grow when they are written in 16 bits."""
    return 2 * download_bytes if part.kind == "text_encoder" and "fp8" in part.files[0].name else download_bytes


def check_disk(plan: Plan, store: Store) -> None:
    """Raises `DownloadError` if the disk cannot take what is planned."""
    if not plan.missing:
        return
    free = shutil.disk_usage(store.home).free
    if free < plan.needed + SPARE_BYTES:
        raise DownloadError(
            f"This needs {gigabytes(plan.needed + SPARE_BYTES)} of free disk, and there are {gigabytes(free)}. Free "
            "some, or name a folder on another disk in SELF_FORCING_WEIGHTS."
        )


def fetch_checked(part: Part, file: RemoteFile, size: int, store: Store, meter: Meter, say: Say) -> Path:
    """A file of the right contents. What is wrong is deleted, so that the next call begins anew."""
    meter.stage(f"Downloading {file.name}")
    path = fetch(part, file, size, store.download_folder(part), meter)
    meter.stage(f"Checking {file.name}")
    found = sha256_of(path)
    seen = store.record(part).get("source", {})
    expected = file.sha256 or seen.get(file.name, {}).get("sha256")
    if expected is not None and found != expected:
        path.unlink()
        whose = "the manifest names" if file.sha256 else "was recorded at the first download"
        raise WeightsError(
            f"{file.name} of {part.repository} is not the file that {whose}: its sha256 is {found[:16]}…, not "
            f"{expected[:16]}…. It was deleted; the same command fetches it again."
        )
    if expected is None:
        say(f"Nobody has published the sha256 of {file.name}; that of this download is recorded: {found}.")
    store.remember(part, source=seen | {file.name: {"bytes": size, "sha256": found}})
    return path


def remember_part(part: Part, store: Store) -> None:
    """Record what a converted part consists of."""
    folder = store.part_folder(part)
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(folder.iterdir())}
    store.remember(part, revision=part.revision, files=files)


def link_model(model: Model, store: Store) -> Path:
    """Make the model's folder out of its parts."""
    folder = store.model_folder(model)
    if store.linked(model) and _index_of(folder) == _index(model):
        return folder

    def write(partial: Path) -> None:
        for part in model.parts:
            (partial / part.kind).mkdir()
            for name in store.record(part)["files"]:
                _link(store.part_folder(part) / name, partial / part.kind / name)
        (partial / INDEX_FILE).write_text(json.dumps(_index(model), indent=2), encoding="utf-8")

    write_whole(folder, write)
    return folder


def _index(model: Model) -> dict[str, object]:
    from pipeline.folder import index_entries

    named = tuple(part.kind for part in model.parts if part.kind != "tokenizer")
    return {**index_entries(named), PARTS_FIELD: [part.id for part in model.parts], "settings": dict(model.settings)}


def _index_of(folder: Path) -> object:
    try:
        return json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        raise DownloadError(
            f"The folder for downloads is on a file system without hard links ({error.strerror}). Name one on another "
            "disk in SELF_FORCING_WEIGHTS."
        ) from error


def verify(model: Model, store: Store, listener: Listener) -> int:
    """Read every file of a model and compare its hash. Returns the number of files.

    Raises:
        WeightsError: a file is missing or damaged. Its part is forgotten, so that `download` fetches it again.
    """
    again = f"python -m weights download {model.id}"
    with store.locked():
        if (presence := store.presence(model)) != "present":
            raise WeightsError(f"{model.title} is {_in_words(presence)}. Get it with: {again}")
        records = [(part, name, entry) for part in model.parts for name, entry in store.record(part)["files"].items()]
        meter = Meter(sum(entry["bytes"] for _, _, entry in records), listener)
        for part, name, entry in records:
            meter.stage(f"Checking {part.id}/{name}")
            if sha256_of(store.part_folder(part) / name, meter.advance) != entry["sha256"]:
                store.remember(part, files={})
                raise WeightsError(
                    f"{name} of {part.id} has changed since it was downloaded. Get it again with: {again}"
                )
    return len(records)


def _in_words(presence: str) -> str:
    return {"partial": "only partly here", "absent": "not here", "present": "here"}[presence]
