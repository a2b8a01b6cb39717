"""A model folder: what must be in it, and loading its parts without letting anything wrong pass in silence."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel

from pipeline.config import ModelSpec
from pipeline.enhance_templates import TEMPLATES_FILE, TemplateEnhancer
from pipeline.errors import WeightsError
from pipeline.load_lock import LOAD_LOCK
from pipeline.taehv import TAEHV
from pipeline.transformer import CausalWanTransformer3DModel

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
        try:
            index = json.loads((self._folder / INDEX_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise WeightsError(
                f"{self._name!r} is not a model folder: it has no {INDEX_FILE}. Pass the folder of a model, for "
                "example weights/embedded."
            ) from error
        except (OSError, ValueError) as error:
            raise WeightsError(
                f"The {INDEX_FILE} of {self._name!r} cannot be read. Get the model folder again."
            ) from error
        if not isinstance(index, dict) or index.get("_class_name") != PIPELINE_CLASS:
            found = index.get("_class_name") if isinstance(index, dict) else type(index).__name__
            raise WeightsError(f"{self._name!r} is a folder for {found}, not for {PIPELINE_CLASS}.")
        for name, expected in index_entries().items():
            entry = index.get(name)
            if entry != expected and not (entry is None and name in OPTIONAL):
                raise WeightsError(f"The {name} of {self._name!r} is {entry}, but must be {expected}.")
        self._index = index

    @cached_property
    def spec(self) -> ModelSpec:
        return ModelSpec.from_config(self._index.get("settings", {}))

    def has(self, name: str) -> bool:
        return name in self._index

    def share_before(self, name: str) -> float:
        """Share of the folder's bytes that lie in the parts before this one, in the order of `CLASSES`."""
        sizes = [sum(file.stat().st_size for file in (self._folder / part).glob("*.safetensors")) for part in CLASSES]
        return sum(sizes[: list(CLASSES).index(name)]) / max(1, sum(sizes))

    def load(self, name: str, dtype: torch.dtype) -> Any:
        """One part, on the CPU, ready for inference. Libraries only warn when tensors are missing; here it is an error.

        Raises:
            WeightsError: a file is missing or damaged, or does not fit its config.
        """
        try:
            with LOAD_LOCK:
                model, report = CLASSES[name][1].from_pretrained(
                    self._folder / name, torch_dtype=dtype, local_files_only=True, output_loading_info=True
                )
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            raise WeightsError(
                f"The {name} of {self.spec.name} cannot be loaded: a file in {self._name}/{name} is missing or "
                "damaged, or does not fit its config. Get the model folder again."
            ) from error
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if names := sorted(map(str, report.get(problem) or ())):
                raise WeightsError(
                    f"The {name} of {self.spec.name} does not fit its config: {len(names)} "
                    f"{problem.replace('_', ' ')}, the first is {names[0]}. Get the model folder again."
                )
        return model.eval().requires_grad_(False)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        try:
            return AutoTokenizer.from_pretrained(
                self._folder / "tokenizer", local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError) as error:
            raise WeightsError(
                f"The tokenizer in {self._name}/tokenizer is missing or damaged. Get the model folder again."
            ) from error

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
                "one does not know, or more than it reads. Get the model folder again."
            )
        return enhancer

    def sha256(self, name: str) -> str:
        """Hash of a part's weight files, in the order of their names."""
        digest = hashlib.sha256()
        for path in sorted((self._folder / name).glob("*.safetensors")):
            with path.open("rb") as file:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
        return digest.hexdigest()
