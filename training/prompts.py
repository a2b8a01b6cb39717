"""Prompts to learn from: captions of the procedural world, or the lines of a text file."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from pipeline.config import checked_prompt
from pipeline.errors import InvalidRequest, TrainingDataError
from training.captions import make_caption
from training.draws import Draws
from training.settings import PromptSettings
from training.world import sample_params


class PromptSource(Protocol):
    """Where prompts come from."""

    def draw(self, draws: Draws, purpose: str) -> list[str]:
        """A prompt for each clip of this part of the batch."""


class WorldPrompts:
    """Captions of the procedural world, of combinations that are not kept for judging."""

    def draw(self, draws: Draws, purpose: str) -> list[str]:
        return [make_caption(sample_params(rng, split="train"), rng)[0] for rng in draws.own(purpose)]


class PromptFile:
    """One prompt a line, each as likely as the others.

    Args:
        path: UTF-8 text.
        tokenizer, length: prompts that the text encoder would cut are refused.

    Raises:
        TrainingDataError: naming the file and the line.
    """

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise TrainingDataError(f"The prompt file {path} cannot be read: {reason}.") from error
        if not lines:
            raise TrainingDataError(f"The prompt file {path} is empty.")
        self.prompts = [
            checked_caption(line, f"Line {n} of {path}", tokenizer, length) for n, line in enumerate(lines, 1)
        ]

    def draw(self, draws: Draws, purpose: str) -> list[str]:
        return [self.prompts[int(rng.integers(len(self.prompts)))] for rng in draws.own(purpose)]


def checked_caption(text: str, where: str, tokenizer: PreTrainedTokenizerBase, length: int) -> str:
    """The cleaned caption; empty and over-long ones are refused in a sentence that begins with `where`."""
    if not text.strip():
        raise TrainingDataError(f"{where} is empty, but must hold a prompt.")
    try:
        prompt = checked_prompt(text)
    except InvalidRequest as error:
        raise TrainingDataError(f"{where} cannot be a prompt: {error}") from error
    tokens = len(tokenizer(prompt).input_ids)
    if tokens > length:
        raise TrainingDataError(f"{where} has {tokens} tokens, but the text encoder reads {length}: shorten it.")
    return prompt


def open_prompts(settings: PromptSettings, tokenizer: PreTrainedTokenizerBase, length: int) -> PromptSource:
    """The source that the settings name."""
    if settings.source == "world":
        return WorldPrompts()
    return PromptFile(Path(settings.source), tokenizer, length)
