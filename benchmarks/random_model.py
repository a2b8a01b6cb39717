"""A pipeline of a model's real shapes with random weights: its speed does not depend on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import AutoencoderKLWan
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from benchmarks.session import default_dtype
from benchmarks.watch import WatchedPipeline
from pipeline.attention_backends import AttentionShapes, choose_attention
from pipeline.checkpoint import wan_transformer
from pipeline.config import ModelSpec
from pipeline.memory import Builders
from pipeline.options import TransformerOptions
from pipeline.taehv import TAEHV
from pipeline.text import TextEncoder
from pipeline.wan_layers import speed_up
from weights.blueprints import builders_of
from weights.manifest import load_manifest

_WORDS = ("<pad>", "</s>", "<unk>", "a", "the", "red", "blue", "balloon", "car", "rises", "over", "mountains", "at")
_SMALL = {"height": 32, "width": 48, "text_len": 8}


def published(model_id: str) -> tuple[Builders, ModelSpec]:
    """A model of the manifest, in full size.

    Raises:
        InvalidRequest: the manifest has no such model.
    """
    model = load_manifest().model(model_id)
    return builders_of(model), ModelSpec.from_config(dict(model.settings))


def small(model_id: str) -> tuple[Builders, ModelSpec]:
    """The same kind of model in a size for which any machine will do; block, steps and window are the model's."""
    settings = dict(load_manifest().model(model_id).settings) | _SMALL
    sizes = {"dim": 24, "ffn_dim": 32, "num_heads": 2, "num_layers": 2, "in_dim": 4, "text_dim": 8, "freq_dim": 16}
    text = UMT5Config(vocab_size=len(_WORDS), d_model=8, d_kv=4, num_heads=2, d_ff=16, num_layers=1)
    vae = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    builders = {
        "transformer": lambda: wan_transformer(sizes),
        "text_encoder": lambda: UMT5EncoderModel(text),
        "vae": lambda: AutoencoderKLWan(**vae, **statistics),
        "taehv": lambda: TAEHV(latent_channels=4, decoder_widths=(8, 8, 8, 8), encoder_width=8),
    }
    return builders, ModelSpec.from_config(settings)


class RandomModel:
    """Makes pipelines of one model; they share the text encoder, which is large.

    It is in the device's default dtype whatever theirs is: in float32 it would take 23 GB, and each pipeline converts
    what it makes of a prompt.

    Args:
        builders, spec: of `published` or `small`.
    """

    def __init__(self, builders: Builders, spec: ModelSpec) -> None:
        self._builders, self._spec = builders, spec
        self._text_model: UMT5EncoderModel | None = None

    def load(self, device: torch.device, dtype: torch.dtype) -> WatchedPipeline:
        """A pipeline with random weights, made where they are needed."""
        torch.manual_seed(0)

        def make(name: str, dtype: torch.dtype = dtype) -> nn.Module:
            with _made_in(device, dtype):
                return self._builders[name]().to(device, dtype).eval().requires_grad_(False)

        if self._text_model is None:
            self._text_model = make("text_encoder", default_dtype(device))
        vae = make("vae")
        speed_up(vae)
        transformer = TransformerOptions(lambda: make("transformer"))
        return WatchedPipeline(
            self._spec,
            transformer,
            TextEncoder(self._text_model, tokenizer(), self._spec.text_len),
            vae,
            make("taehv") if "taehv" in self._builders else None,
            attention=choose_attention("auto", AttentionShapes.of(transformer.config, self._spec), device, dtype),
        )


def tokenizer() -> PreTrainedTokenizerFast:
    """Knows a few words: what a prompt says changes nothing here."""
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(_WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@contextmanager
def _made_in(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """New tensors are made there: in float32 on the CPU first, a large text encoder takes a minute and 23 GB."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)
