"""Where a language model for prompt help comes from: a folder, or the Hugging Face Hub at a fixed revision.

Only safetensors are read and no code of a model's own is run. What does not fit into memory or on the disk is refused
before it is loaded or fetched.
"""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import container
from pipeline.disk import free_disk
from pipeline.errors import DownloadError, InvalidRequest, OutOfMemory, WeightsError
from pipeline.failures import is_out_of_memory
from pipeline.load_lock import loading_alone

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?@[0-9a-f]{40}")
_FETCHED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
"""What of a repository is downloaded, at its top: no code, no weights in other formats."""
_NOT_FETCHED = ("*/*", "consolidated*")
"""Sub-folders, and a second copy of the weights that some repositories have."""


class Place:
    """Where a language model comes from."""

    def __init__(self, name: str, revision: str | None) -> None:
        self.name = name
        """A folder, or an id on the hub."""
        self.revision = revision
        """None for a folder."""

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Model and tokenizer, on the CPU in float32.

        Raises:
            DownloadError: the hub does not give it, or there is no room for it.
            OutOfMemory: there is not enough memory now.
            WeightsError: it is no causal language model in safetensors, needs code of its own, or is damaged.
        """
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # it counts layers; a download has a bar of its own
        shown = f"The language model {Path(self.name).name if self.revision is None else self.name}"
        folder = Path(self.name) if self.revision is None else self._fetched(shown)
        options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
        try:
            with loading_alone():
                _check_memory(folder, shown)  # here: what was loaded while this waited has its memory now
                tokenizer = AutoTokenizer.from_pretrained(folder, **options)
                model, report = AutoModelForCausalLM.from_pretrained(
                    folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
                )
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            logger.info("The language model cannot be loaded", exc_info=True)
            if is_out_of_memory(error):  # the files are not to blame
                raise
            raise WeightsError(
                f"{shown} cannot be loaded: it is damaged, needs code of its own, or is no causal language model in "
                "safetensors files. Write the prompt yourself."
            ) from error
        if missing := sorted(report.get("missing_keys") or ()):
            raise WeightsError(
                f"{shown} is incomplete: {len(missing)} tensors are missing, the first is {missing[0]}. Write the "
                "prompt yourself."
            )
        return model.eval().requires_grad_(False), tokenizer

    def _fetched(self, shown: str) -> Path:
        """The folder of a hub's files at the revision, downloaded if they are not here yet."""
        import huggingface_hub
        from huggingface_hub import constants

        wanted: dict[str, Any] = {
            "revision": self.revision,
            "allow_patterns": list(_FETCHED),
            "ignore_patterns": list(_NOT_FETCHED),
        }
        try:
            files = huggingface_hub.snapshot_download(self.name, dry_run=True, **wanted)
            missing = sum(file.file_size or 0 for file in files if file.will_download)
        except Exception:  # the size is not known; the download says what is wrong, if anything is
            logger.info("The size of the language model is not known", exc_info=True)
            missing = 0
        if missing and missing > (free := free_disk(Path(constants.HF_HUB_CACHE))):
            raise DownloadError(
                f"{shown} is {_gigabytes(missing)} to download, but only {_gigabytes(free)} are free on the disk. "
                "Write the prompt yourself."
            )
        try:
            return Path(huggingface_hub.snapshot_download(self.name, **wanted))
        except Exception as error:
            logger.info("The language model cannot be fetched", exc_info=True)
            raise DownloadError(
                f"{shown} cannot be fetched at this revision: there is none of this name, or no way to it. "
                "Ask again later, or write the prompt yourself."
            ) from error


def checked_source(source: str) -> Place:
    """The place that `source` names; see `language.LanguageEnhancer`."""
    folder = Path(source).expanduser()
    is_hub_id = _HUB_ID.fullmatch(source) is not None
    try:
        is_folder = folder.is_dir()
    except (OSError, ValueError):  # a name that the file system cannot have
        is_folder = False
    if is_folder and is_hub_id:
        raise InvalidRequest(
            f"enhancer is {_shown(source)}, which is a folder here and could be a revision on the Hugging Face Hub. "
            "Write ./ before the name of the folder, or rename it."
        )
    if not is_folder:
        if not is_hub_id:
            raise InvalidRequest(
                f"enhancer is {_shown(source)}, but must be the folder of a language model, or its name on the Hugging "
                "Face Hub with the 40 digits of a revision: name@0123456789abcdef0123456789abcdef01234567."
            )
        name, _, revision = source.partition("@")
        return Place(name, revision)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{folder.name!r} is no language model: it has no config.json that can be read. Name another folder with "
            "--enhancer."
        ) from error
    if not isinstance(config, dict) or not any(folder.glob("*.safetensors")):
        raise WeightsError(
            f"{folder.name!r} has no weights in safetensors files, the only ones that are read. Name another folder "
            "with --enhancer."
        )
    return Place(str(folder), None)


def _check_memory(folder: Path, shown: str) -> None:
    """Raises `OutOfMemory` if the weights, as float32, are larger than the memory that is free now."""
    needed, free = _float32_bytes(folder), container.free_memory()
    if needed > free:
        raise OutOfMemory(
            f"{shown} needs {_gigabytes(needed)} of memory, but only {_gigabytes(free)} are free. Ask again later, or "
            "write the prompt yourself."
        )


def _float32_bytes(folder: Path) -> int:
    """Bytes of the tensors in a model's safetensors files; files that cannot be read count as nothing."""
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        files = {folder / name for name in index["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        single = folder / "model.safetensors"
        files = {single} if single.is_file() else set(folder.glob("*.safetensors"))
    total = 0
    for path in files:
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(length, path.stat().st_size)))
            total += sum(4 * math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return total


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _shown(source: str) -> str:
    return repr(source if len(source) <= 60 else f"{source[:57]}...")
