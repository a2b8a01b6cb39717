"""Where downloads live, what is known of them, and what of a model is here.

    <home>/<model id>/           model folders, for `--model` and `from_pretrained`
    <home>/.parts/<part id>/     converted parts, each once; model folders hold hard links to their files
                    record.json  of the part: its revision and kind; of each file size, sha256 and time of writing
    <home>/.downloads/<part id>/ what is on its way
                    <model id>.chosen  the parts of a model that is on its way
    <home>/.state.json           size and sha256 of what was downloaded, to be compared with the next download

A hard link is the file itself under a second name: a model folder is complete by itself and may be moved or copied,
and what several models share takes its space once. Where a disk knows no hard links, see `weights.links`.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from pipeline.errors import DownloadError, WeightsError
from weights.hub import PARTIAL, Resumable
from weights.links import same_file
from weights.manifest import Manifest, Model, Part

HOME_VARIABLE = "SELF_FORCING_WEIGHTS"
DEFAULT_HOME = Path(__file__).resolve().parent / "models"
INDEX_FILE = "model_index.json"
RECORD_FILE = "record.json"
PARTS_FIELD = "_parts"
"""In the index: the ids of the parts that a model folder was made of."""

Presence = Literal["present", "partial", "absent"]


def default_home() -> Path:
    return Path(os.environ.get(HOME_VARIABLE) or DEFAULT_HOME)


class DamagedState(Resumable, WeightsError):
    """Nobody can tell any more what was downloaded."""


class StoreInUse(DownloadError):
    """Somebody else changes the store."""


class Store:
    """The downloads below one folder."""

    def __init__(self, home: Path | None = None) -> None:
        self.home = home or default_home()
        self._lock = FileLock(self.home / ".lock")

    def model_folder(self, model: Model) -> Path:
        return self.home / model.id

    def part_folder(self, part: Part) -> Path:
        return self.part_place(part.id)

    def part_place(self, part_id: str) -> Path:
        return self.home / ".parts" / part_id

    @property
    def has_parts(self) -> bool:
        """Whether anything was ever put in place here."""
        return (self.home / ".parts").is_dir()

    def download_folder(self, part: Part) -> Path:
        return self.home / ".downloads" / part.id

    # ---- what is here

    def presence(self, model: Model) -> Presence:
        """Whether a model can be loaded, has begun to come, or is not here."""
        if all(self.has_part(part) for part in model.parts) and self.linked(model):
            return "present"
        own = model.transformer
        begun = self.has_part(own) or any(self.fetched_bytes(own, file.name) for file in own.files)
        return "partial" if begun or self.model_folder(model).exists() else "absent"

    def has_part(self, part: Part) -> bool:
        """Whether the converted part is here, of the manifest's revision, with files of the sizes that they had."""
        folder, files = self.part_folder(part), self.part_files(part)
        return bool(files) and all(_size(folder / name) == entry["bytes"] for name, entry in files.items())

    def linked(self, model: Model) -> bool:
        """Whether the model's folder holds the files of its parts, not older ones of the same names, and its settings.

        What else stands in the index does not change; `python -m weights verify` looks at all of it.
        """
        folder = self.model_folder(model)
        index = read_index(folder)
        if index.get("settings") != dict(model.settings) or index.get(PARTS_FIELD) != [part.id for part in model.parts]:
            return False
        return all(
            same_file(folder / part.kind / name, self.part_folder(part) / name)
            for part in model.parts
            for name in self.part_files(part)
        )

    def fetched_bytes(self, part: Part, name: str) -> int:
        """How much of a file has been downloaded."""
        folder = self.download_folder(part)
        return _size(folder / name) or _size(folder / (name + PARTIAL)) or 0

    def is_fetched(self, part: Part, name: str, size: int) -> bool:
        """Whether all of a file has been downloaded."""
        return _size(self.download_folder(part) / name) == size

    def as_installed(self, model: Model, manifest: Manifest) -> Model:
        """The model with the parts that were chosen for it, which need not be those that it gets by default.

        They are those of the download that has begun, or else those that its folder was made of.
        """
        names = _read_json(self._choice_file(model))
        if not isinstance(names, list):
            names = read_index(self.model_folder(model)).get(PARTS_FIELD)
        for name in _strings(names):
            if name in manifest.parts:
                model = model.with_part(manifest.parts[name])
        return model

    # ---- what is known

    def part_files(self, part: Part) -> dict[str, dict[str, Any]]:
        """File of a converted part -> its bytes and sha256. Empty if it is not here, or of another revision.

        A record that cannot be read counts as none: the part is damaged, then, and is fetched again.
        """
        record = self.read_record(part.id)
        return {} if record is None or record.get("revision") != part.revision else record["files"]

    def read_record(self, part_id: str) -> dict[str, Any] | None:
        """What was noted of a converted part; None if there is no record that can be read."""
        record = _read_json(self.part_place(part_id) / RECORD_FILE)
        files = record.get("files") if isinstance(record, dict) else None
        sound = isinstance(files, dict) and all(
            isinstance(entry, dict) and entry.keys() >= {"bytes", "sha256"} for entry in files.values()
        )
        return record if sound else None

    def sources(self, part: Part) -> dict[str, dict[str, Any]]:
        """File of the hub -> bytes and sha256 that it had when it was downloaded before, at the same revision.

        Raises:
            WeightsError: nobody can tell any more.
        """
        known = self._state().get(part.id, {})
        return known["source"] if known.get("revision") == part.revision else {}

    def remember_source(self, part: Part, name: str, count: int, sha256: str) -> None:
        """Note what a downloaded file is.

        Raises:
            DownloadError: the note cannot be written.
        """
        state = self._state()
        files = self.sources(part) | {name: {"bytes": count, "sha256": sha256}}
        state[part.id] = {"revision": part.revision, "source": files}
        write_json(self._state_file, state)

    def remember_part(self, part: Part, files: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
        """Note in a converted part's folder what it consists of."""
        write_json(folder / RECORD_FILE, {"revision": part.revision, "kind": part.kind, "files": files})

    def forget_part(self, part: Part) -> None:
        """From now on a converted part counts as missing."""
        (self.part_folder(part) / RECORD_FILE).unlink(missing_ok=True)

    def choose(self, model: Model) -> None:
        """Note of which parts a model is to be made, for whoever goes on with its download."""
        write_json(self._choice_file(model), [part.id for part in model.parts])

    def chosen(self, model: Model) -> None:
        """Its download is over; from now on the model's own folder tells."""
        self._choice_file(model).unlink(missing_ok=True)

    def _choice_file(self, model: Model) -> Path:
        return self.home / ".downloads" / f"{model.id}.chosen"

    @property
    def _state_file(self) -> Path:
        return self.home / ".state.json"

    def _state(self) -> dict[str, Any]:
        try:
            state = json.loads(self._state_file.read_text(encoding="utf-8"))
            if not isinstance(state, dict) or not all(_is_source(entry) for entry in state.values()):
                raise ValueError("of another form")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise DamagedState(
                f"{self._state_file.name} in the folder of the downloads cannot be read. Delete it: nothing that is "
                "here is fetched again, but hashes that nobody has published are forgotten."
            ) from error
        return state

    # ---- changing it

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else may change this store meanwhile.

        Raises:
            DownloadError: somebody does.
        """
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            lock = self._lock.acquire(timeout=0)
        except Timeout as error:
            raise StoreInUse(
                "Another download or removal is under way in this folder. Wait for its end, then try again."
            ) from error
        except OSError as error:
            raise DownloadError(
                f"The folder for downloads cannot be used ({error.strerror}). Name another one in {HOME_VARIABLE}."
            ) from error
        with lock:
            yield

    def remove_model(self, model: Model, parts: Iterable[Part], others: Iterable[Model]) -> int:
        """Delete a model, with those of `parts` that no other one needs. Returns the bytes that became free.

        Raises:
            DownloadError: something cannot be deleted.
        """
        freed = _removed(self.model_folder(model))
        self.chosen(model)
        return freed + self.drop(dict.fromkeys([*model.parts, *parts]), others)

    def drop(self, parts: Iterable[Part], others: Iterable[Model]) -> int:
        """Delete those of the parts that none of the other models needs, be it only partly here."""
        needed: set[str] = set()
        for other in others:
            if self.presence(other) != "absent":
                # Those that it is to be made of, and those that it is made of until then.
                needed.update(part.id for part in other.parts)
                needed.update(_strings(read_index(self.model_folder(other)).get(PARTS_FIELD)))
        places = [
            place
            for part in parts
            if part.id not in needed
            for place in (self.part_folder(part), self.download_folder(part))
        ]
        return sum(map(_removed, places))


def write_whole(out: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder beside `out`, then give it its name. After an error nothing is left.

    What has the temporary name, left there by a program that was killed, goes; and what has the name of `out`.
    """
    partial = partial_of(out)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    except OSError as error:
        raise _not_written(out.name, error) from error
    except SafetensorError as error:  # what it has to say of a full disk is no OSError
        full = f"(os error {errno.ENOSPC})" in str(error)
        raise DownloadError(f"{out.name} cannot be written ({error}).{' Free some space.' if full else ''}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def partial_of(out: Path) -> Path:
    """Where `write_whole` collects what becomes `out`."""
    return out.with_name(f"{out.name}.partial")


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file as a whole.

    Raises:
        DownloadError: it cannot be written; what was there is still there.
    """
    partial = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(value, indent=1, sort_keys=True), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise _not_written(path.name, error) from error


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a model folder; empty if there is none that can be read."""
    index = _read_json(folder / INDEX_FILE)
    return index if isinstance(index, dict) else {}


def _not_written(name: str, error: OSError) -> DownloadError:
    advice = f"Name another folder, with {HOME_VARIABLE} for downloads."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "Free some space."
    elif error.errno in (errno.EACCES, errno.EPERM):
        advice = "Change who may write there, or name another folder."
    return DownloadError(f"{name} cannot be written ({error.strerror or error}). {advice}")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _strings(values: Any) -> list[str]:
    """Those of a list of whatever was read; none if it is no list."""
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []


def _is_source(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("source"), dict) and isinstance(entry.get("revision"), str)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _removed(folder: Path) -> int:
    """Delete a folder. Returns the bytes that became free: not those of files that have another name elsewhere."""
    if not folder.is_dir():
        return 0
    try:
        found = [path.lstat() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
        shutil.rmtree(folder)
    except OSError as error:
        raise DownloadError(f"{folder.name} cannot be removed ({error.strerror or error}).") from error
    return sum(about.st_size for about in found if about.st_nlink == 1)
