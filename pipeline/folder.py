"""A model folder: what must be in it, and loading its parts without letting anything wrong pass in silence."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, UMT5EncoderModel

from pipeline.config import ModelSpec
from pipeline.errors import WeightsError
from pipeline.failures import is_out_of_memory
from pipeline.file_hashes import FileHashes, hash_files, weight_bytes, weight_files
from pipeline.load_lock import loading_alone
from pipeline.taehv import TAEHV
from pipeline.transformer import CausalWanTransformer3DModel
from prompting.templates import TEMPLATES_FILE, TemplateEnhancer
from weights.stored import stored_at

INDEX_FILE = "model_index.json"
PIPELINE_CLASS = "SelfForcingPipeline"
CLASSES: dict[str, tuple[str, Any]] = {
    "transformer": ("pipeline", CausalWanTransformer3DModel),
    "text_encoder": ("transformers", UMT5EncoderModel),
    "vae": ("diffusers", AutoencoderKLWan),
    "taehv": ("pipeline", TAEHV),
}
"""Part of a model -> the library and the class that the index must name for it."""
OPTIONAL = ("taehv",)


def index_entries(parts: tuple[str, ...] = tuple(CLASSES)) -> dict[str, Any]:
    """The index of a model with these parts, but for its settings."""
    entries = {name: [CLASSES[name][0], CLASSES[name][1].__name__] for name in parts}
    return {"_class_name": PIPELINE_CLASS, **entries}


class ModelFolder:
    """Reads a diffusers-style folder: `model_index.json`, one sub-folder for each part, one for the tokenizer.

    Raises:
        WeightsError: no such folder, or one of another pipeline. A stock Wan folder would load without complaint
            and then make video with bidirectional attention.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._name = self._folder.name
        self._stored = stored_at(self._folder)
        self._hashes: dict[str, tuple[list[tuple[str, int, int]], FileHashes]] = {}
        """Part -> name, size and time of writing of its weight files, and their hashes."""
        try:
            index = json.loads((self._folder / INDEX_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            advice = "Pass the folder of a model, for example weights/embedded."
            if self._stored is not None:
                advice = f"Get it with {self._stored.get}."
            raise WeightsError(f"{self._name!r} is not a model folder: it has no {INDEX_FILE}. {advice}") from error
        except (OSError, ValueError) as error:
            raise WeightsError(f"The {INDEX_FILE} of {self._name!r} cannot be read. {self.mend}") from error
        if not isinstance(index, dict) or index.get("_class_name") != PIPELINE_CLASS:
            found = index.get("_class_name") if isinstance(index, dict) else type(index).__name__
            raise WeightsError(f"{self._name!r} is a folder for {found}, not for {PIPELINE_CLASS}.")
        for name, expected in index_entries().items():
            entry = index.get(name)
            if entry != expected and not (entry is None and name in OPTIONAL):
                raise WeightsError(f"The {name} of {self._name!r} is {entry}, but must be {expected}.")
        self._index = index

    @property
    def mend(self) -> str:
        """What to do about a folder with something wrong in it, as a sentence."""
        return "Get the model folder again." if self._stored is None else self._stored.mend

    @cached_property
    def spec(self) -> ModelSpec:
        return ModelSpec.from_config(self._index.get("settings", {}))

    def has(self, name: str) -> bool:
        return self._index.get(name) is not None

    def share_before(self, name: str) -> float:
        """Share of the folder's bytes that lie in the parts before this one, in the order of `CLASSES`."""
        sizes = [weight_bytes(self._folder / part) for part in CLASSES]
        return sum(sizes[: list(CLASSES).index(name)]) / max(1, sum(sizes))

    def load(self, name: str, dtype: torch.dtype) -> Any:
        """One part, on the CPU, ready for inference. Libraries only warn when tensors are missing; here it is an error.

        Raises:
            WeightsError: a file is missing or damaged, or does not fit its config. A folder of the store is compared
                with what was downloaded before anything is loaded: the transformer by its hash, since that is needed
                anyway, all else by sizes and times of writing, see `weights.stored`.
        """
        self._check(name)
        try:
            with loading_alone():
                model, report = CLASSES[name][1].from_pretrained(
                    self._folder / name,
                    torch_dtype=dtype,
                    local_files_only=True,
                    use_safetensors=True,
                    output_loading_info=True,
                )
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            if is_out_of_memory(error):  # the files are not to blame
                raise
            raise WeightsError(
                f"The {name} of {self.spec.name} cannot be loaded: a file in {self._name}/{name} is missing or "
                f"damaged, or does not fit its config. {self.mend}"
            ) from error
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if names := sorted(map(str, report.get(problem) or ())):
                raise WeightsError(
                    f"The {name} of {self.spec.name} does not fit its config: {len(names)} "
                    f"{problem.replace('_', ' ')}, the first is {names[0]}. {self.mend}"
                )
        return model.eval().requires_grad_(False)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """As its tokenizer.json says, whatever class the config beside it names.

        For UMT5's that is `T5Tokenizer`, which builds another one of the vocabulary: without UMT5's bytes for rare
        characters, and with the number that its `<s>` has for what is unknown.

        Raises:
            WeightsError: a file is missing or damaged.
        """
        self._check("tokenizer")
        try:
            return PreTrainedTokenizerFast.from_pretrained(self._folder / "tokenizer", local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"The tokenizer in {self._name}/tokenizer is missing or damaged. {self.mend}") from error

    def load_enhancer(self, vocabulary: frozenset[str]) -> TemplateEnhancer | None:
        """The templates for prompts, if the folder has any.

        Args:
            vocabulary: The words that the text encoder knows; empty: any.

        Raises:
            WeightsError: the file is damaged, or was made for a model that knows other words or reads more of them.
        """
        enhancer = TemplateEnhancer.from_folder(self._folder)
        if enhancer is None:
            return None
        strange = enhancer.vocabulary - vocabulary if vocabulary else ()
        if strange or enhancer.max_words >= self.spec.text_len:  # one more is the end
            raise WeightsError(
                f"The {TEMPLATES_FILE} of {self._name!r} belongs to another model: its sentences hold words that this "
                f"one does not know, or more than it reads. {self.mend}"
            )
        return enhancer

    def sha256(self, name: str) -> str:
        """Hash of a part's weight files, in the order of their names.

        Raises:
            WeightsError: one cannot be read.
        """
        return self._hashed(name).together

    def _hashed(self, name: str) -> FileHashes:
        """Hashes of a part's weight files. What has not been written since is not read again."""
        try:
            files = weight_files(self._folder / name)
            stamps = [(path.name, (about := path.stat()).st_size, about.st_mtime_ns) for path in files]
            if name not in self._hashes or self._hashes[name][0] != stamps:
                self._hashes[name] = stamps, hash_files(files)
        except OSError as error:
            raise WeightsError(
                f"A file in {self._name}/{name} cannot be read ({error.strerror}). {self.mend}"
            ) from error
        return self._hashes[name][1]

    def _check(self, name: str) -> None:
        if self._stored is None:
            return
        hashes = self._hashed(name).single if name == "transformer" else {}
        self._stored.check(name, hashes.get)
