"""Where downloads live, what is known of them, and what of a model is here.

    <home>/<model id>/           model folders, for `--model` and `from_pretrained`
    <home>/.parts/<part id>/     converted parts, each once; model folders hold hard links to their files
    <home>/.downloads/<part id>/ what is on its way
    <home>/.state.json           hashes: of what was downloaded, and of what became of it

A hard link is the file itself under a second name: a model folder is complete by itself and may be moved or copied,
and what several models share takes its space once.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from pipeline.errors import DownloadError, WeightsError
from weights.hub import PARTIAL
from weights.manifest import Manifest, Model, Part

HOME_VARIABLE = "SELF_FORCING_WEIGHTS"
DEFAULT_HOME = Path(__file__).resolve().parent / "models"
INDEX_FILE = "model_index.json"
PARTS_FIELD = "_parts"
"""In the index: the ids of the parts that a model folder was made of."""

Presence = Literal["present", "partial", "absent"]


def default_home() -> Path:
    return Path(os.environ.get(HOME_VARIABLE) or DEFAULT_HOME)


class Store:
    """The downloads below one folder."""

    def __init__(self, home: Path | None = None) -> None:
        self.home = home or default_home()
        self._lock = FileLock(self.home / ".lock")

    def model_folder(self, model: Model) -> Path:
        return self.home / model.id

    def part_folder(self, part: Part) -> Path:
        return self.home / ".parts" / part.id

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
        known = self.record(part)
        if known.get("revision") != part.revision or not known.get("files"):
            return False
        folder = self.part_folder(part)
        return all(_size(folder / name) == entry["bytes"] for name, entry in known["files"].items())

    def linked(self, model: Model) -> bool:
        """Whether the model's folder holds the files of its parts, and not older ones of the same names."""
        folder = self.model_folder(model)
        if not (folder / INDEX_FILE).is_file():
            return False
        return all(
            _same_file(folder / part.kind / name, self.part_folder(part) / name)
            for part in model.parts
            for name in self.record(part).get("files", ())
        )

    def fetched_bytes(self, part: Part, name: str) -> int:
        """How much of a file has been downloaded."""
        folder = self.download_folder(part)
        return _size(folder / name) or _size(folder / (name + PARTIAL)) or 0

    def as_installed(self, model: Model, manifest: Manifest) -> Model:
        """The model with the parts that its folder was made of, which need not be those that it gets by default."""
        try:
            index = json.loads((self.model_folder(model) / INDEX_FILE).read_text(encoding="utf-8"))
            names = index.get(PARTS_FIELD, [])
        except (OSError, ValueError, AttributeError):
            return model
        for name in names:
            if name in manifest.parts:
                model = model.with_part(manifest.parts[name])
        return model

    # ---- what is known

    def record(self, part: Part) -> dict[str, Any]:
        """revision, source (file -> bytes, sha256), files (file -> bytes, sha256); empty if nothing is known."""
        return self._state().get(part.id, {})

    def remember(self, part: Part, **facts: Any) -> None:
        """Add to what is known of a part."""
        state = self._state()
        state[part.id] = state.get(part.id, {}) | facts
        self.home.mkdir(parents=True, exist_ok=True)
        partial = self._state_file.with_suffix(".tmp")
        partial.write_text(json.dumps(state, indent=1, sort_keys=True), encoding="utf-8")
        partial.replace(self._state_file)

    @property
    def _state_file(self) -> Path:
        return self.home / ".state.json"

    def _state(self) -> dict[str, Any]:
        try:
            state = json.loads(self._state_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise WeightsError(
                f"{self._state_file.name} in the folder of the downloads cannot be read. Delete it, then run "
                "python -m weights download again: what is there is checked and kept."
            ) from error
        return state if isinstance(state, dict) else {}

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
            raise DownloadError(
                "Another download or removal is under way in this folder. Wait for its end, then try again."
            ) from error
        except OSError as error:
            raise DownloadError(
                f"The folder for downloads cannot be used ({error.strerror}). Name another one in {HOME_VARIABLE}."
            ) from error
        with lock:
            yield

    def remove_model(self, model: Model, others: Iterable[Model]) -> int:
        """Delete a model with the parts that no other one needs. Returns the bytes that became free."""
        shutil.rmtree(self.model_folder(model), ignore_errors=True)
        return self.drop(model.parts, others)

    def drop(self, parts: Iterable[Part], others: Iterable[Model]) -> int:
        """Delete those of the parts that none of the other models needs, be it only partly here."""
        needed = {part.id for other in others if self.presence(other) != "absent" for part in other.parts}
        freed = 0
        for part in parts:
            if part.id in needed:
                continue
            for place in (self.part_folder(part), self.download_folder(part)):
                freed += _tree_bytes(place)
                shutil.rmtree(place, ignore_errors=True)
            if self.record(part):  # what was downloaded is remembered: the next time it must be the same
                self.remember(part, files={})
        return freed


def write_whole(out: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder beside `out`, then give it its name. After an error nothing is left."""
    partial = out.with_name(f"{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    except OSError as error:
        raise DownloadError(f"{out.name} cannot be written ({error.strerror or error}). Free some space.") from error
    except SafetensorError as error:  # what it has to say of a full disk is no OSError
        raise DownloadError(f"{out.name} cannot be written ({error}). Free some space.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _tree_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
