"""Proof without the download: random weights in the published layouts go through convert, load and a few blocks.

    python scripts/prove_published.py --work runs/proof --report runs/proof-report.json

Makes, in full width and with the published names: the 1.3B transformer (all 825 tensors, FSDP infixes, bfloat16), the
Wan VAE, TAEHV, and UMT5-XXL with fewer layers and a smaller vocabulary. Each is converted as a download would be; what
is read back is compared tensor by tensor with what was made; then the whole folder makes video on the CPU at a small
size. Takes 6 GB of disk, 15 GB of memory and some minutes. Says nothing of speed or of beauty.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.machine import peak_memory  # noqa: E402
from pipeline import GenerationRequest, SelfForcingPipeline  # noqa: E402
from pipeline.checkpoint import load_checkpoint  # noqa: E402
from pipeline.folder import index_entries  # noqa: E402
from pipeline.taehv import TAEHV  # noqa: E402
from tests.hub import scaled_to_8_bits, wan_text_names, write_tokenizer  # noqa: E402
from weights.convert import read_config, write_taehv, write_text_encoder, write_transformer, write_vae  # noqa: E402
from weights.manifest import load_manifest  # noqa: E402

INFIX = "model._fsdp_wrapped_module."
TEXT_LAYERS, TEXT_WORDS = 2, 12
HEIGHT, WIDTH = 32, 48
MARK_FILE = "PROOF"
"""In the folder for files: that all in it is this script's own."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "runs" / "proof",
        help="folder for files: new, empty, or of an earlier proof; is deleted in the end",
    )
    parser.add_argument("--report", type=Path, help="JSON to write (default: report.json beside the folder)")
    parser.add_argument("--model", default="self-forcing-dmd", help="entry of the manifest whose settings are taken")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="do not delete the files")
    options = parser.parse_args()
    report_file = options.report or options.work.with_name(f"{options.work.name}-report.json")
    take_folder(options.work)
    report = prove(options)
    if not options.keep:
        shutil.rmtree(options.work)
    report_file.parent.mkdir(parents=True, exist_ok=True)  # after that: it may be in there
    report_file.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    sys.exit(0 if report["passed"] else 1)


def take_folder(work: Path) -> None:
    """Make the folder for files, empty. What is in it already must be this script's own.

    Raises:
        SystemExit: it is not.
    """
    if work.exists() and (not work.is_dir() or (any(work.iterdir()) and not (work / MARK_FILE).is_file())):
        sys.exit(f"{work} is not empty, and not the folder of an earlier proof. Name another one with --work.")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / MARK_FILE).write_text("Made by scripts/prove_published.py, which may empty this folder.\n")


def prove(options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    model = load_manifest().model(options.model)
    configs = {part.kind: part.config for part in model.parts if part.config is not None}
    folder = options.work / "model"
    report: dict[str, Any] = {"model": model.id}

    def step(name: str, action: Callable[[], dict[str, Any]]) -> None:
        began = time.perf_counter()
        report[name] = action() | {"seconds": round(time.perf_counter() - began, 1), "peak_gb": peak_gb()}
        print(name, report[name], flush=True)

    step("transformer", lambda: prove_transformer(options.work, folder, read_config(configs["transformer"])))
    step("text_encoder", lambda: prove_text_encoder(options.work, folder, read_config(configs["text_encoder"])))
    step("vae", lambda: prove_vae(options.work, folder, read_config(configs["vae"])))
    step("taehv", lambda: prove_taehv(options.work, folder, read_config(configs["taehv"])))
    write_tokenizer(folder / "tokenizer")
    settings = dict(model.settings) | {"height": HEIGHT, "width": WIDTH}
    index = {**index_entries(), "settings": settings}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    step("video", lambda: prove_video(folder, options.blocks))
    report["passed"] = all(part["passed"] for part in report.values() if isinstance(part, dict))
    return report


def prove_transformer(work: Path, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Every tensor under its published name, as EMA weights of a sharded training have them."""
    source = work / "generator.pt"
    names = published_transformer(config)
    state = {INFIX + name: random_tensor(name, shape, torch.bfloat16) for name, shape in names.items()}
    parameters = sum(tensor.numel() for tensor in state.values())
    torch.save({"generator_ema": state}, source)
    del state
    out = made(folder / "transformer")
    write_transformer(source, out, config, "generator_ema", torch.bfloat16)
    published = load_checkpoint(source, "generator_ema")
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    differing = [
        name
        for name, tensor in convert_wan_transformer_to_diffusers(dict(published)).items()
        if not torch.equal(tensor, read_back(out, name))
    ]
    count = len(published)
    del published
    source.unlink()
    return {
        "tensors": count,
        "parameters": parameters,
        "files": sorted(path.name for path in out.iterdir()),
        "differing": differing,
        "passed": count == 825 and parameters == 1_418_996_800 and not differing,
    }


def published_transformer(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the original Wan layout."""
    width, ffn, text, freq = config["dim"], config["ffn_dim"], config["text_dim"], config["freq_dim"]
    channels, layers = config["in_dim"], config["num_layers"]
    shapes: dict[str, tuple[int, ...]] = {"patch_embedding.weight": (width, channels, 1, 2, 2)}
    shapes["patch_embedding.bias"] = (width,)

    def linear(name: str, outputs: int, inputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    linear("text_embedding.0", width, text)
    linear("text_embedding.2", width, width)
    linear("time_embedding.0", width, freq)
    linear("time_embedding.2", width, width)
    linear("time_projection.1", 6 * width, width)
    for layer in range(layers):
        block = f"blocks.{layer}"
        shapes[f"{block}.modulation"] = (1, 6, width)
        for attention in ("self_attn", "cross_attn"):
            for matrix in "qkvo":
                linear(f"{block}.{attention}.{matrix}", width, width)
            shapes[f"{block}.{attention}.norm_q.weight"] = (width,)
            shapes[f"{block}.{attention}.norm_k.weight"] = (width,)
        shapes[f"{block}.norm3.weight"], shapes[f"{block}.norm3.bias"] = (width,), (width,)
        linear(f"{block}.ffn.0", ffn, width)
        linear(f"{block}.ffn.2", width, ffn)
    shapes["head.modulation"] = (1, 2, width)
    linear("head.head", 4 * config["out_dim"], width)
    return shapes


def prove_text_encoder(work: Path, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Both published layouts at full width; few layers and words, which repeat."""
    from transformers import UMT5Config, UMT5EncoderModel

    small = config | {"num_layers": TEXT_LAYERS, "vocab_size": TEXT_WORDS}
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in UMT5EncoderModel(UMT5Config(**small)).state_dict().items()}
    state = {
        name: random_tensor(name, shape, torch.bfloat16) for name, shape in shapes.items() if "embed_tokens" not in name
    }
    torch.save(wan_text_names(state), work / "text.pth")
    out = made(folder / "text_encoder")
    write_text_encoder(work / "text.pth", out, small, torch.bfloat16)
    differing = [name for name, tensor in state.items() if not torch.equal(tensor, read_back(out, name))]

    from safetensors.torch import save_file

    save_file(scaled_to_8_bits({name: tensor.float() for name, tensor in state.items()}), work / "text.safetensors")
    rounded = made(work / "text_8_bits")
    write_text_encoder(work / "text.safetensors", rounded, small, torch.bfloat16)
    errors = [
        ((read_back(rounded, name).float() - tensor.float()).norm() / tensor.float().norm()).item()
        for name, tensor in state.items()
    ]
    return {
        "tensors": len(state),
        "differing": differing,
        "largest_relative_error_of_8_bits": round(max(errors), 4),
        "passed": not differing and max(errors) < 0.05,
    }


def prove_vae(work: Path, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(config)
    wanted = vae.state_dict()
    published = {name: random_tensor(name, shape, torch.float32) for name, shape in published_vae(config).items()}
    torch.save(published, work / "vae.pth")
    out = made(folder / "vae")
    write_vae(work / "vae.pth", out, config, None)
    renamed = convert_wan_vae_to_diffusers(dict(published))
    differing = [name for name, tensor in renamed.items() if not torch.equal(tensor, read_back(out, name))]
    return {
        "tensors": len(published),
        "parameters": sum(tensor.numel() for tensor in published.values()),
        "differing": differing,
        "passed": not differing and renamed.keys() == wanted.keys(),
    }


def published_vae(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the published Wan VAE: stages of residual blocks, numbered through with what lies between."""
    base, latent, factors = config["base_dim"], config["z_dim"], config["dim_mult"]
    blocks, time_down = config["num_res_blocks"], config["temperal_downsample"]
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, outputs: int, inputs: int, *kernel: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs, *kernel), (outputs,)

    def residual(name: str, inputs: int, outputs: int) -> None:
        shapes[f"{name}.residual.0.gamma"] = (inputs, 1, 1, 1)
        conv(f"{name}.residual.2", outputs, inputs, 3, 3, 3)
        shapes[f"{name}.residual.3.gamma"] = (outputs, 1, 1, 1)
        conv(f"{name}.residual.6", outputs, outputs, 3, 3, 3)
        if inputs != outputs:
            conv(f"{name}.shortcut", outputs, inputs, 1, 1, 1)

    def middle(name: str, width: int) -> None:
        residual(f"{name}.0", width, width)
        shapes[f"{name}.1.norm.gamma"] = (width, 1, 1)
        conv(f"{name}.1.to_qkv", 3 * width, width, 1, 1)
        conv(f"{name}.1.proj", width, width, 1, 1)
        residual(f"{name}.2", width, width)

    def head(name: str, width: int, outputs: int) -> None:
        shapes[f"{name}.0.gamma"] = (width, 1, 1, 1)
        conv(f"{name}.2", outputs, width, 3, 3, 3)

    widths = [base * factor for factor in (1, *factors)]
    conv("encoder.conv1", widths[0], 3, 3, 3, 3)
    index = 0
    for stage, (inputs, outputs) in enumerate(zip(widths, widths[1:], strict=False)):
        for number in range(blocks):
            residual(f"encoder.downsamples.{index}", inputs if number == 0 else outputs, outputs)
            index += 1
        if stage < len(factors) - 1:
            conv(f"encoder.downsamples.{index}.resample.1", outputs, outputs, 3, 3)
            if time_down[stage]:
                conv(f"encoder.downsamples.{index}.time_conv", outputs, outputs, 3, 1, 1)
            index += 1
    middle("encoder.middle", widths[-1])
    head("encoder.head", widths[-1], 2 * latent)
    conv("conv1", 2 * latent, 2 * latent, 1, 1, 1)
    conv("conv2", latent, latent, 1, 1, 1)

    widths = [base * factor for factor in (factors[-1], *reversed(factors))]
    conv("decoder.conv1", widths[0], latent, 3, 3, 3)
    middle("decoder.middle", widths[0])
    index = 0
    for stage, (inputs, outputs) in enumerate(zip(widths, widths[1:], strict=False)):
        inputs = inputs if stage == 0 else inputs // 2  # an upsampling halves the channels
        for number in range(blocks + 1):
            residual(f"decoder.upsamples.{index}", inputs if number == 0 else outputs, outputs)
            index += 1
        if stage < len(factors) - 1:
            conv(f"decoder.upsamples.{index}.resample.1", outputs // 2, outputs, 3, 3)
            if time_down[::-1][stage]:
                conv(f"decoder.upsamples.{index}.time_conv", 2 * outputs, outputs, 3, 1, 1)
            index += 1
    head("decoder.head", widths[-1], 3)
    return shapes


def prove_taehv(work: Path, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    from safetensors.torch import save_file

    state = {
        name: random_tensor(name, tuple(tensor.shape), torch.float16) for name, tensor in TAEHV().state_dict().items()
    }
    for index, rows in (("7", 256), ("13", 256), ("19", 128)):  # stages as published may make more frames than are used
        name = f"decoder.{index}.conv.weight"
        state[name] = random_tensor(name, (max(rows, state[name].shape[0]), *state[name].shape[1:]), torch.float16)
    save_file(state, work / "taehv.safetensors")
    out = made(folder / "taehv")
    write_taehv(work / "taehv.safetensors", out, config, None)
    differing = [
        name
        for name, tensor in state.items()
        if not torch.equal(tensor[-read_back(out, name).shape[0] :].float(), read_back(out, name).float())
    ]
    return {"tensors": len(state), "differing": differing, "passed": len(state) == 128 and not differing}


def prove_video(folder: Path, blocks: int) -> dict[str, Any]:
    """Both decoders; the same seed twice."""
    pipe = SelfForcingPipeline.from_pretrained(folder, device="cpu", dtype=torch.bfloat16)
    seconds = pipe.spec.frames_in(blocks) / pipe.spec.fps
    request = GenerationRequest(prompt="a red balloon rises over the mountains", seed=7, seconds=seconds)
    first = list(pipe.stream(request))
    # The same and with the other decoder, one block each.
    short = GenerationRequest(prompt=request.prompt, seed=7, seconds=pipe.spec.frames_in(1) / pipe.spec.fps)
    again = list(pipe.stream(short))
    taehv = list(pipe.stream(replace(short, taehv=True)))
    shapes = [list(block.frames.shape) for block in first]
    same = (first[0].frames == again[0].frames).all()
    return {
        "blocks": shapes,
        "pixel_spread": [round(float(block.frames.std()), 2) for block in (*first, *taehv)],
        "same_seed_same_frames": bool(same),
        "passed": bool(same)
        and len(first) == blocks
        and sum(shape[0] for shape in shapes) == pipe.spec.frames_in(blocks)
        and all(block.frames.std() > 0 for block in (*first, *taehv)),
    }


# ---- tools


def random_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Numbers of the size that keeps a signal's size from layer to layer; norms around one."""
    if name.endswith(("norm.weight", "gamma", "norm_q.weight", "norm_k.weight", "norm3.weight")):
        return (1 + 0.1 * torch.randn(shape)).to(dtype)
    fan_in = math.prod(shape[1:])
    scale = fan_in**-0.5 if len(shape) > 1 else 0.02
    # A thousand millions of normal numbers take minutes; a window of a fixed set, elsewhere for each tensor, does not.
    numbers = normal_numbers()
    start = zlib.crc32(name.encode()) % (len(numbers) // 4)
    count = math.prod(shape)
    window = numbers[start:].repeat(-(-count // (len(numbers) - start)))[:count]
    return (window.view(shape) * scale).to(dtype)


@functools.cache
def normal_numbers() -> Tensor:
    return torch.randn(20_000_011)


def made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def read_back(folder: Path, name: str) -> Tensor:
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            if name in file.keys():  # noqa: SIM118 - it is no dictionary
                return file.get_tensor(name)
    raise KeyError(name)


def weight_files(folder: Path) -> Iterator[Path]:
    return folder.glob("*.safetensors")


def peak_gb() -> float:
    return round(peak_memory() / 1e9, 1)


if __name__ == "__main__":
    main()
