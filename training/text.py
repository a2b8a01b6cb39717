"""Tokenizer and text encoder of the embedded model: `python -m training.text --out training/cache/text`.

The encoder is a small UMT5, trained as a classifier of what a caption states (class 0 of an attribute: not stated). It
is frozen afterwards: its token outputs condition the video model through cross-attention, as with the full-size model.
"""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from training.captions import MAX_TOKENS, make_caption, vocabulary
from training.world import ATTRIBUTES, sample_params

logger = logging.getLogger(__name__)

PAD, EOS, UNK = 0, 1, 2
_SPECIAL = ("[PAD]", "[EOS]", "[UNK]")
_CLIP_NORM, _WARMUP, _BIAS_RATE = 1.0, 30, 10.0


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of lower-case words and commas that adds the end token, as T5's does. Ids 0 pad, 1 end, 2 unknown."""
    ids = {token: index for index, token in enumerate((*_SPECIAL, *vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    # Words of any script are kept, so that a word nobody taught becomes [UNK] instead of vanishing.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\p{L}\p{N}]+|,"), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        model_max_length=MAX_TOKENS,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save so that transformers 4 and 5 load it: version 5 writes a class name that version 4 does not know."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.pop("backend", None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def encoder_config(vocab_size: int) -> UMT5Config:
    return UMT5Config(
        vocab_size=vocab_size,
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=PAD,
        eos_token_id=EOS,
        use_cache=False,
    )


class CaptionClassifier(nn.Module):
    """The encoder, and for each attribute a learned query that reads its token outputs and a linear layer."""

    def __init__(self, encoder: UMT5EncoderModel) -> None:
        super().__init__()
        width = encoder.config.d_model
        self.encoder = encoder
        self.queries = nn.Parameter(torch.randn(len(ATTRIBUTES), width))
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(v) + 1) for name, v in ATTRIBUTES.items()})

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Token ids and mask [B, N] -> logits [B, 1 + values] of each attribute."""
        tokens = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        scores = self.queries @ tokens.transpose(1, 2) / tokens.shape[-1] ** 0.5
        weights = scores.masked_fill(mask[:, None] == 0, -1e4).softmax(dim=-1)
        read = weights @ tokens
        return {name: head(read[:, index]) for index, (name, head) in enumerate(self.heads.items())}


@dataclass
class CaptionBatch:
    """Token ids and mask int64 [B, N], and the stated class [B] of each attribute (0: not stated)."""

    ids: Tensor
    mask: Tensor
    targets: dict[str, Tensor]


class CaptionSampler:
    """Draws random captions of what is not kept for judging; a share has words that the tokenizer does not know."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, unknown_share: float) -> None:
        self.tokenizer, self.unknown_share = tokenizer, unknown_share
        self.rng = np.random.default_rng(seed)

    def batch(self, size: int) -> CaptionBatch:
        captions, stated = [], []
        for _ in range(size):
            caption, states = make_caption(sample_params(self.rng, split="train"), self.rng)
            captions.append(self._with_unknown(caption) if self.rng.random() < self.unknown_share else caption)
            stated.append(states)
        encoded = self.tokenizer(
            captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        )
        targets = {
            name: torch.tensor([values.index(states[name]) + 1 if name in states else 0 for states in stated])
            for name, values in ATTRIBUTES.items()
        }
        return CaptionBatch(encoded["input_ids"], encoded["attention_mask"], targets)

    def _with_unknown(self, caption: str) -> str:
        """Insert one to three unknown words, as far as the caption has room for them."""
        parts = caption.split()
        room = MAX_TOKENS - 1 - len(parts) - caption.count(",")
        for _ in range(min(int(self.rng.integers(1, 4)), room)):
            parts.insert(int(self.rng.integers(len(parts) + 1)), "xyzzy")
        return " ".join(parts)


@torch.no_grad()
def accuracy(model: CaptionClassifier, sampler: CaptionSampler, captions: int = 2000) -> dict[str, float]:
    """Share of captions whose statement about each attribute, "not stated" included, is read correctly."""
    model.eval()
    batch = sampler.batch(captions)
    logits = model(batch.ids, batch.mask)
    return {name: float((logits[name].argmax(-1) == target).float().mean()) for name, target in batch.targets.items()}


@torch.no_grad()
def normalise_outputs(encoder: UMT5EncoderModel, batch: CaptionBatch) -> float:
    """Scale the final norm so that token outputs have unit RMS; returns the RMS there was."""
    outputs = encoder(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state[batch.mask.bool()]
    rms = float(outputs.pow(2).mean().sqrt())
    encoder.encoder.final_layer_norm.weight /= rms
    return rms


def train(
    tokenizer: PreTrainedTokenizerFast,
    steps: int = 500,
    batch_size: int = 96,
    rate: float = 2e-3,
    seed: int = 0,
) -> CaptionClassifier:
    """Train encoder and heads together with AdamW, the rate rising shortly and then falling to zero."""
    torch.manual_seed(seed)
    model = CaptionClassifier(UMT5EncoderModel(encoder_config(len(tokenizer))))
    # "from left to right" is told from "from right to left" by position alone: position biases, of which there are few
    # and which must grow far, learn faster than the matrices.
    biases = [p for name, p in model.named_parameters() if "relative_attention_bias" in name]
    others = [p for name, p in model.named_parameters() if "relative_attention_bias" not in name]
    groups = [
        {"params": others, "factor": 1.0},
        {"params": biases, "factor": _BIAS_RATE, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.01)
    sampler = CaptionSampler(tokenizer, seed + 1, unknown_share=0.15)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * rate * min(1.0, (step + 1) / _WARMUP) * (1 - step / steps)
        batch = sampler.batch(batch_size)
        logits = model(batch.ids, batch.mask)
        losses = [functional.cross_entropy(logits[name], target) for name, target in batch.targets.items()]
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), _CLIP_NORM)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            logger.info("step %d loss %.4f", step, loss.item())
    return model.eval()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Build the tokenizer and train the text encoder.")
    parser.add_argument("--out", type=Path, default=Path("training/cache/text"))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    tokenizer = build_tokenizer()
    model = train(tokenizer, arguments.steps)
    report = {
        "parameters": sum(p.numel() for p in model.encoder.parameters()),
        "vocabulary": len(tokenizer),
        "accuracy": accuracy(model, CaptionSampler(tokenizer, seed=99, unknown_share=0.0)),
        "accuracy_unknown_words": accuracy(model, CaptionSampler(tokenizer, seed=98, unknown_share=1.0)),
        "rms_before_scaling": normalise_outputs(model.encoder, CaptionSampler(tokenizer, 97, 0.1).batch(256)),
    }
    model.encoder.save_pretrained(arguments.out / "text_encoder")
    save_tokenizer(tokenizer, arguments.out / "tokenizer")
    (arguments.out / "report.json").write_text(json.dumps(report, indent=1))
    logger.info("%s", json.dumps(report))


if __name__ == "__main__":
    main()
