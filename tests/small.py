"""Small random networks for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from pipeline.cache import CacheWindow, KVCache
from pipeline.folder import index_entries
from pipeline.taehv import TAEHV
from pipeline.transformer import CausalWanTransformer3DModel, TextKV

CHANNELS, HEIGHT, WIDTH, TEXT_LEN, TEXT_DIM = 4, 4, 6, 5, 8


def small_transformer(seed: int = 0, **changes: Any) -> CausalWanTransformer3DModel:
    """A network of a few thousand parameters with every weight random and non-zero."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "text_dim": TEXT_DIM,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
    }
    model = CausalWanTransformer3DModel(**(config | changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        nn.init.normal_(parameter, std=1.5 * fan_in**-0.5, generator=generator)
    return model.requires_grad_(False)


def random_text(model: CausalWanTransformer3DModel, batch: int = 1, seed: int = 1) -> TextKV:
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(batch, TEXT_LEN, TEXT_DIM, generator=generator)
    embeds[:, TEXT_LEN - 2 :] = 0
    return model.encode_text(embeds)


def random_latents(frames: int, batch: int = 1, seed: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, frames, CHANNELS, HEIGHT, WIDTH, generator=generator)


def make_cache(model: CausalWanTransformer3DModel, window: CacheWindow, batch: int = 1) -> KVCache:
    return model.make_cache(window, HEIGHT, WIDTH, batch)


def write_blocks(
    model: CausalWanTransformer3DModel,
    cache: KVCache,
    latents: torch.Tensor,
    text: TextKV,
    block: int,
    timestep: float = 300.0,
    first_position: int = 0,
) -> torch.Tensor:
    """Call the model once per block and return its flows; the cache goes on to the next block each time."""
    cache.reset(first_position)
    flows = []
    for part in latents.split(block, dim=1):
        cache.begin_block(part.shape[1])
        flows.append(model(part, torch.full(part.shape[:2], timestep), text, cache=cache))
    return torch.cat(flows, dim=1)


SMALL_SETTINGS: dict[str, Any] = {
    "name": "small",
    "height": 16,
    "width": 32,
    "fps": 12,
    "native_fps": 16,
    "frames_per_block": 3,
    "text_len": 8,
    "denoising_steps": [1000, 750, 500, 250],
    "shift": 5.0,
    "window_frames": 9,
    "sink_frames": 3,
    "context_noise": 0.0,
}
WORDS = ("a", "red", "blue", "balloon", "car", "rises", "over", "the", "mountains")


def write_model_folder(folder: Path, *, taehv: bool = True, **settings: Any) -> Path:
    """A complete random model of 16 x 32 pixels, small enough to stream in a test."""
    torch.manual_seed(0)
    transformer = small_transformer(in_channels=4, out_channels=4, text_dim=8)
    transformer.save_pretrained(folder / "transformer")
    statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **statistics).save_pretrained(
        folder / "vae"
    )
    parts = ("transformer", "text_encoder", "vae", "taehv") if taehv else ("transformer", "text_encoder", "vae")
    if taehv:
        TAEHV(latent_channels=4, decoder_widths=(8, 8, 8, 8), encoder_width=8).save_pretrained(folder / "taehv")
    vocabulary = {word: index for index, word in enumerate(("[PAD]", "[EOS]", "[UNK]", *WORDS))}
    config = UMT5Config(
        vocab_size=len(vocabulary),
        d_model=8,
        d_kv=4,
        num_heads=2,
        d_ff=16,
        num_layers=1,
        pad_token_id=0,
        eos_token_id=1,
    )
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer = Lowercase()
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]"
    ).save_pretrained(folder / "tokenizer")
    index = {**index_entries(parts), "settings": SMALL_SETTINGS | settings}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_language_model(folder: Path, *, ends: bool = True, room: int = 4096) -> Path:
    """A random language model of a dozen words; `ends`: whether it knows a token for the end of a text."""
    torch.manual_seed(0)
    specials = ("<pad>", "<unk>", "<eos>")
    vocabulary = {word: index for index, word in enumerate((*specials, *WORDS, "light", "camera", "slowly"))}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", **({"eos_token": "<eos>"} if ends else {})
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=room,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2 if ends else None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
