"""A model folder that lies in a store of downloads: what mends it, and whether its files are still what was downloaded.

Whoever loads a folder knows only its path. What the store noted of it lies beside it, see `weights.store`; for a folder
that lies elsewhere, a copy of such a one perhaps, nothing is known and nothing compared.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import WeightsError
from weights.hub import sha256_of
from weights.manifest import Manifest, load_manifest
from weights.store import PARTS_FIELD, Store, default_home, read_index


class StoredModel:
    """A folder of the store, to be found by `stored_at`."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._manifest = manifest
        self._store = Store(folder.parent)

    @property
    def get(self) -> str:
        """The command that fetches what is missing of the model."""
        return self._command("download")

    @property
    def mend(self) -> str:
        """What to do about a damaged file, as a sentence: `download` alone takes one of the right size for sound."""
        return f"Run {self._command('verify')}, then {self._command('download')}."

    def _command(self, name: str) -> str:
        # Names and not paths: those of a server are none of a visitor's business.
        elsewhere = "" if self._store.home == default_home().resolve() else " --home FOLDER"
        unlisted = "" if self._folder.name in self._manifest.models else " --manifest FILE"
        return f"`python -m weights {name} {self._folder.name}{elsewhere}{unlisted}`"

    def check(self, kind: str, hash_of: Callable[[str], str | None] = lambda name: None) -> None:
        """Compare a part's files with what was noted of them when they were converted.

        Size and time of writing are compared, and the hash where it is known or where the time is another one, as in a
        copy of the whole store; `python -m weights verify` notes the new time.

        Args:
            kind: of the part, as its folder is called.
            hash_of: file name -> its sha256, where somebody has read the file already.

        Raises:
            WeightsError: a file is missing or has changed.
        """
        for name, noted in self._noted(kind).items():
            path = self._folder / kind / name
            try:
                found = path.stat()
            except OSError as error:
                raise self._changed(kind, name, "is missing") from error
            known = hash_of(name)
            if known is None and (found.st_size, found.st_mtime_ns) == (noted["bytes"], noted.get("mtime_ns")):
                continue
            if found.st_size != noted["bytes"] or (known or sha256_of(path)) != noted["sha256"]:
                raise self._changed(kind, name, "has changed since it was downloaded")

    def _changed(self, kind: str, name: str, what: str) -> WeightsError:
        return WeightsError(f"{name} in {self._folder.name}/{kind} {what}. {self.mend}")

    def _noted(self, kind: str) -> Mapping[str, Mapping[str, Any]]:
        """File -> what was noted of it; empty where the part never was this store's."""
        names = read_index(self._folder).get(PARTS_FIELD)
        for name in names if isinstance(names, list) else ():
            if not isinstance(name, str) or not self._store.part_place(name).is_dir():
                continue
            record = self._store.read_record(name)
            if record is None:
                raise WeightsError(
                    f"A part of {self._folder.name}, {name}, is damaged or not whole. Get it again with {self.get}."
                )
            if (record.get("kind") or self._kind_of(name)) == kind:
                return record["files"]
        return {}

    def _kind_of(self, part: str) -> str | None:
        """Of a part in whose record it does not stand yet."""
        if part == self._folder.name:
            return "transformer"
        return self._manifest.parts[part].kind if part in self._manifest.parts else None


def stored_at(folder: Path) -> StoredModel | None:
    """The store's model that this folder is; None for any other folder."""
    place, manifest = folder.resolve(), load_manifest()
    listed = place.name in manifest.models
    if place.parent == default_home().resolve():
        is_stored = listed or PARTS_FIELD in read_index(place)
    else:
        is_stored = Store(place.parent).has_parts and (listed or PARTS_FIELD in read_index(place))
    return StoredModel(place, manifest) if is_stored else None


def how_to_get(folder: Path) -> str | None:
    """What to do where there is no such folder, or no model in it; None if its name is not that of a published model.

    The name alone will do, without the path of a folder.
    """
    manifest = load_manifest()
    if (model := manifest.models.get(folder.name)) is None:
        return None
    stored = stored_at(folder)
    store = Store(folder.resolve().parent) if stored is not None else Store()
    model = store.as_installed(model, manifest)
    presence = store.presence(model)
    if presence == "present":
        return f"{model.title} is here already: pass --model {_near(store.model_folder(model))}."
    command = stored.get if stored is not None else f"`python -m weights download {model.id}`"
    if presence == "partial":
        return f"{model.title} is only partly here. Go on with {command}."
    return f"Get {model.title} with {command}."


def _near(path: Path) -> str:
    """A path as short as it can be typed from here."""
    absolute = os.path.abspath(path)
    relative = os.path.relpath(absolute)
    return absolute if relative.startswith(os.pardir) else relative
