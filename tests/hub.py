"""A hub on this machine, and a published model small enough to come through it in no time."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub_constants
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import Unigram, WordLevel
from tokenizers.pre_tokenizers import Metaspace, Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

GOLDEN = Path(__file__).parent / "data" / "golden"
REPOSITORY, REVISION = "somebody/small", "0123456789abcdef0123456789abcdef01234567"

PROGRAM_WITH_SMALL_PIECES = """
import sys
import huggingface_hub.constants as constants
constants.DOWNLOAD_CHUNK_SIZE = 4096
from weights.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""`python -m weights`, for `python -c`, that notices the end of a connection in the middle of a small file."""


@dataclass
class Hub:
    """Serves files as huggingface.co does, and misbehaves as it is told.

    Args:
        files: path -> contents.
    """

    files: dict[str, bytes]
    cuts: list[int] = field(default_factory=list)
    """After so many bytes of an answer the connection is closed; one for each request, then no more."""
    status: dict[str, int] = field(default_factory=dict)
    error_code: str = ""
    """Of the answers in `status`: GatedRepo, RepoNotFound, RevisionNotFound, EntryNotFound."""
    commit: str = REVISION
    tags: dict[str, str] = field(default_factory=dict)
    """Path -> ETag; that of large files is their sha256, which is what all others get here."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Path -> what is said of its size when only that is asked for."""
    ranges: bool = True
    bytes_per_second: float | None = None
    silence: float = 0.0
    """Seconds before the first byte of an answer's body."""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """(method, path, Range header)"""
    sent: int = 0

    def __enter__(self) -> Hub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, *, body: bool) -> None:
                hub.answer(self, body)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def answer(self, handler: BaseHTTPRequestHandler, with_body: bool) -> None:
        wanted = handler.headers.get("Range", "")
        self.requests.append((handler.command, handler.path, wanted))
        path = handler.path.removeprefix(f"/{REPOSITORY}/resolve/{REVISION}/").replace("%2B", "+")
        status = self.status.get(path, 200 if path in self.files else 404)
        if status >= 400:
            code = self.error_code or ("EntryNotFound" if status == 404 else "")
            handler.send_response(status)
            if code:
                handler.send_header("X-Error-Code", code)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        content = self.files[path]
        begin = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        handler.send_response(206 if begin else 200)
        handler.send_header("X-Repo-Commit", self.commit)
        handler.send_header("ETag", f'"{self.tags.get(path) or hashlib.sha256(content).hexdigest()}"')
        size = len(content) if with_body else self.sizes.get(path, len(content))
        handler.send_header("Content-Length", str(size - begin))
        if begin:
            handler.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        handler.end_headers()
        if with_body:
            self._send(handler, content[begin:])

    def _send(self, handler: BaseHTTPRequestHandler, content: bytes) -> None:
        end = self.cuts.pop(0) if self.cuts else len(content)
        step = 4096
        time.sleep(self.silence)
        try:
            for start in range(0, min(end, len(content)), step):
                piece = content[start : min(start + step, end)]
                handler.wfile.write(piece)
                self.sent += len(piece)
                if self.bytes_per_second:
                    time.sleep(len(piece) / self.bytes_per_second)
        except OSError:
            pass
        if end < len(content):
            handler.close_connection = True
            handler.connection.close()


def point_to(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    """Make this program take `hub` for the Hugging Face Hub, as HF_ENDPOINT does for one that starts."""
    patch.setattr(hub_constants, "ENDPOINT", hub.url)
    template = hub_constants.HUGGINGFACE_CO_URL_TEMPLATE.split("/{repo_id}")[1]
    patch.setattr(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}" + template)


def golden_weights(name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights in their published names, and the config, of a recorded case."""
    with safe_open(GOLDEN / name, "pt") as file:
        config = json.loads(file.metadata()["config"])
        return {key[2:]: file.get_tensor(key) for key in file.keys() if key.startswith("w.")}, config  # noqa: SIM118


def write_published(folder: Path, sha256: bool = True) -> Path:
    """Files as their makers publish them, and the manifest that lists them. Returns the manifest's path.

    The transformer's names carry what FSDP leaves, as in some published checkpoints.
    """
    files = folder / "files"
    (files / "tokenizer").mkdir(parents=True)
    transformer, config = golden_weights("case3_kv_chunkwise.safetensors")
    wrapped = {f"model._fsdp_wrapped_module.{name}": tensor for name, tensor in transformer.items()}
    torch.save({"generator_ema": wrapped, "generator": {"model.other": torch.zeros(1)}}, files / "generator.pt")
    (folder / "transformer.json").write_text(json.dumps(config["model"]))

    text_config = {
        "vocab_size": 12,
        "d_model": config["model"]["text_dim"],
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    (folder / "text.json").write_text(json.dumps(text_config))
    text = random_text_encoder(text_config)
    torch.save(wan_text_names(text), files / "text.pth")
    save_file(scaled_to_8_bits(text), files / "text_fp8.safetensors")

    vae, about = golden_weights("case11_wan_vae_small.safetensors")
    torch.save(vae, files / "vae.pth")
    (folder / "vae.json").write_text(
        json.dumps({"base_dim": about["dim"], "z_dim": about["z_dim"], "dim_mult": about["dim_mult"]})
    )
    taehv, _ = golden_weights("case8_taehv_small.safetensors")
    save_file({name: tensor.half() for name, tensor in taehv.items()}, files / "taehv.safetensors")
    (folder / "taehv.json").write_text("{}")
    write_tokenizer(files / "tokenizer")

    def entry(name: str, kind: str, *paths: str, **more: Any) -> dict[str, Any]:
        return {
            "id": name,
            "kind": kind,
            "title": f"The {kind}",
            "repository": REPOSITORY,
            "revision": REVISION,
            "files": [remote(path) for path in paths],
            "licence": {"name": "Test-1.0", "terms": "Do as you like."},
            "config": None,
            "dtype": None,
            **more,
        }

    def remote(path: str) -> dict[str, Any]:
        content = (files / path).read_bytes()
        known = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        return {"path": path, **(known if sha256 else {"bytes": None, "sha256": None})}

    tokenizer = sorted(str(path.relative_to(files)) for path in (files / "tokenizer").iterdir())
    parts = [
        entry("text", "text_encoder", "text.pth", config="text.json"),
        entry("text-fp8", "text_encoder", "text_fp8.safetensors", config="text.json", dtype="float32"),
        entry("words", "tokenizer", *tokenizer),
        entry("vae", "vae", "vae.pth", config="vae.json"),
        entry("taehv", "taehv", "taehv.safetensors", config="taehv.json"),
    ]
    settings = {
        "name": "Small",
        "height": 32,
        "width": 48,
        "fps": 12,
        "native_fps": 16,
        "frames_per_block": 3,
        "text_len": config["model"]["text_len"],
        "denoising_steps": [1000, 500],
        "shift": 5.0,
        "window_frames": 9,
        "sink_frames": 3,
    }
    models = [
        entry(
            name,
            "transformer",
            "generator.pt",
            key="generator_ema",
            config="transformer.json",
            title=title,
            note="For tests.",
            parts=["text", "words", "vae", "taehv"],
            settings=settings | {"name": title},
        )
        for name, title in (("small", "Small"), ("other", "Other"))
    ]
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({"version": 1, "parts": parts, "models": models}))
    return manifest


def published_files(manifest: Path) -> dict[str, bytes]:
    """Path -> contents, for a `Hub`."""
    files = manifest.parent / "files"
    return {path.relative_to(files).as_posix(): path.read_bytes() for path in files.rglob("*") if path.is_file()}


def random_text_encoder(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    state = UMT5EncoderModel(UMT5Config(**config)).state_dict()
    return {name: torch.randn_like(tensor) / 4 for name, tensor in state.items() if "embed_tokens" not in name}


def wan_text_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of models_t5_umt5-xxl-enc-bf16.pth."""
    pairs = [
        ("encoder.block.", "blocks."),
        (".layer.0.SelfAttention.relative_attention_bias", ".pos_embedding.embedding"),
        (".layer.0.SelfAttention.", ".attn."),
        (".layer.0.layer_norm", ".norm1"),
        (".layer.1.layer_norm", ".norm2"),
        (".layer.1.DenseReluDense.wi_0", ".ffn.gate.0"),
        (".layer.1.DenseReluDense.wi_1", ".ffn.fc1"),
        (".layer.1.DenseReluDense.wo", ".ffn.fc2"),
        ("encoder.final_layer_norm", "norm"),
        ("shared.", "token_embedding."),
    ]
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in pairs:
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    return renamed


def scaled_to_8_bits(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The layout of umt5_xxl_fp8_e4m3fn_scaled: matrices in 8 bits with a scale beside each, the tokenizer, a mark."""
    scaled: dict[str, torch.Tensor] = {
        "scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn),
        "spiece_model": torch.zeros(5, dtype=torch.uint8),
    }
    for name, tensor in state.items():
        if "SelfAttention" in name and "bias" not in name or "DenseReluDense" in name:
            scale = tensor.abs().max() / 448
            scaled[name] = (tensor / scale).to(torch.float8_e4m3fn)
            scaled[name.removesuffix("weight") + "scale_weight"] = scale
        else:
            scaled[name] = tensor.half()
    return scaled


def write_tokenizer(folder: Path) -> None:
    words = ("[PAD]", "[EOS]", "[UNK]", "a", "red", "blue", "balloon", "car", "rises", "over", "the", "mountains")
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]"
    ).save_pretrained(folder)


def write_umt5_tokenizer(folder: Path) -> None:
    """In the layout of the published one, with few words: bytes for what is rare, `<unk>` as the fourth of all, and a
    config that names T5's class."""
    specials = ("<pad>", "</s>", "<s>", "<unk>")
    rare = tuple(f"<0x{byte:02X}>" for byte in range(256))
    extra = tuple(f"<extra_id_{number}>" for number in range(300))
    words = [*((word, 0.0) for word in specials), *((word, -10.0) for word in rare), ("\u2581", -2.0)]
    words += [*((f"\u2581{word}", -1.0) for word in ("a", "red", "balloon")), *((word, 0.0) for word in extra)]
    backend = Tokenizer(Unigram(words, unk_id=3, byte_fallback=True))
    backend.pre_tokenizer = Metaspace()
    backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    about = {"tokenizer_class": "T5Tokenizer", "extra_ids": 300, "additional_special_tokens": extra}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | about))
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
