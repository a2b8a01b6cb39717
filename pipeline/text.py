"""Prompts to embeddings: UMT5, the reference's padding, and a small memory of what was encoded before."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from pipeline.config import clean_prompt


class TextEncoder:
    """Encodes prompts to [B, text_len, text_dim], zero after the end token.

    Args:
        model: the UMT5 encoder, large or small.
        tokenizer: right-padding, adding an end token.
        text_len: rows of the result, whatever the prompt's length; longer prompts are cut.
        remembered: how many embeddings to keep. A prompt that is asked for again costs nothing.
        visits: device where the model works; it comes for each text and goes back to where it rests. None: it works
            where it is.
    """

    def __init__(
        self,
        model: UMT5EncoderModel,
        tokenizer: PreTrainedTokenizerBase,
        text_len: int,
        remembered: int = 16,
        *,
        visits: torch.device | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.text_len = text_len
        self._remembered = remembered
        self._visits = visits
        self._embeddings: OrderedDict[str, torch.Tensor] = OrderedDict()

    @torch.inference_mode()
    def __call__(self, prompt: str) -> torch.Tensor:
        """Embedding [1, text_len, text_dim] of one prompt, in the encoder's dtype, on the device where it works."""
        remembered, prompt = self.remembers(prompt), clean_prompt(prompt)
        if remembered:
            self._embeddings.move_to_end(prompt)
        else:
            self._embeddings[prompt] = self.encode([prompt])
            while len(self._embeddings) > self._remembered:
                self._embeddings.popitem(last=False)
        return self._embeddings[prompt]

    def remembers(self, prompt: str) -> bool:
        """Whether the model need not work for this prompt."""
        return clean_prompt(prompt) in self._embeddings

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        """Embeddings [B, text_len, text_dim] of several prompts, without remembering them."""
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.text_len,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        )
        with self._at_work() as model:
            ids, mask = tokens.input_ids.to(model.device), tokens.attention_mask.to(model.device)
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
            # The encoder leaves something in padded rows; the video model was trained on zeros there, unmasked.
            return hidden * mask.unsqueeze(-1).to(hidden.dtype)

    @contextmanager
    def _at_work(self) -> Iterator[UMT5EncoderModel]:
        if self._visits is None:
            yield self.model
            return
        home = self.model.device
        try:
            yield self.model.to(self._visits)
        finally:  # also when there was no room for all of it
            self.model.to(home)

    @property
    def vocabulary(self) -> frozenset[str]:
        """The words a small model knows; empty when the tokenizer can spell any word."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None or not isinstance(backend.model, WordLevel):
            return frozenset()
        return frozenset(word for word in backend.get_vocab(with_added_tokens=False) if word.isalpha())

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of the prompt that a small model ignores, in order, each once.

        Those are the words it has never seen, and those behind the last one that it has room for.
        """
        vocabulary = self.vocabulary
        if not vocabulary:
            return []
        backend = self.tokenizer.backend_tokenizer
        text = clean_prompt(prompt)
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        room = self.text_len - backend.num_special_tokens_to_add(is_pair=False)
        read = vocabulary.intersection(pieces[:room])
        words = (piece for piece in pieces if any(character.isalnum() for character in piece))
        return [word for word in dict.fromkeys(words) if word not in read]
