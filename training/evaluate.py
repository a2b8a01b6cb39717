"""Score a model folder: `python -m training.evaluate weights/embedded --prompts 64 --json`.

Prompts are full captions of combinations that training never rendered. The probe reads what the generated videos show;
its readings of real clips of the same prompts are the ceiling. Long videos are read window by window, so that drift,
loss of the subject and freezing show.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from pipeline import GenerationRequest
from training.captions import make_caption
from training.data import ClipDataset
from training.pca import PatchPCA, psnr
from training.probe import WINDOW, AttributeProbe, WindowReading, agreement, held_out_clips
from training.sheets import save_sheet
from training.world import ATTRIBUTES, FPS, ClipParams, render, sample_params

Array = np.ndarray
Decoder = Callable[[Array], Array]
"""Latents float [F, C, h, w] -> frames float [T, H, W, 3] in 0..1."""

_FROZEN = 2e-4
"""Mean change of a pixel between frames, of 1, below which a window of a moving subject counts as frozen."""


class _HasFrames(Protocol):
    frames: Array


class Generator(Protocol):
    """What is scored: a pipeline, or anything that answers a request with uint8 frames [T, H, W, 3]."""

    def generate(self, request: GenerationRequest) -> _HasFrames: ...


@dataclass(frozen=True)
class Prompt:
    """A caption, what it asks for, and the seed of its video."""

    caption: str
    params: ClipParams
    seed: int


def plan_prompts(count: int, seed: int = 0) -> list[Prompt]:
    """Full captions of held-out combinations, the same ones for the same seed."""
    rng = np.random.default_rng(seed)
    prompts = []
    for index in range(count):
        params = sample_params(rng, split="held_out")
        prompts.append(Prompt(make_caption(params, rng, full=True)[0], params, seed * 10_000 + index))
    return prompts


def make_videos(generator: Generator, prompts: Sequence[Prompt], seconds: float, taehv: bool = False) -> list[Array]:
    """One video for each prompt, at the world's native rate."""
    return [
        generator.generate(
            GenerationRequest(prompt=prompt.caption, seed=prompt.seed, seconds=seconds, fps=FPS, taehv=taehv)
        ).frames
        for prompt in prompts
    ]


def real_videos(prompts: Sequence[Prompt], num_frames: int = WINDOW) -> list[Array]:
    """Rendered clips, uint8, of what the prompts ask for."""
    return [(render(prompt.params, prompt.seed, num_frames)[0] * 255 + 0.5).astype(np.uint8) for prompt in prompts]


def score(readings: Sequence[WindowReading], prompts: Sequence[Prompt]) -> dict[str, float]:
    """Agreement by attribute, the share of frames with a visible subject, and the mean speed of moving subjects."""
    moving = [r.speed for r, p in zip(readings, prompts, strict=True) if p.params.motion != "still"]
    return agreement(list(readings), [prompt.params for prompt in prompts]) | {
        "visible": float(np.mean([reading.visible for reading in readings])),
        "speed": float(np.mean(moving)) if moving else float("nan"),
    }


def by_value(readings: Sequence[WindowReading], prompts: Sequence[Prompt], name: str) -> dict[str, str]:
    """For each value of one attribute: how many were right, of how many."""
    counts: dict[str, list[bool]] = {}
    for reading, prompt in zip(readings, prompts, strict=True):
        asked = getattr(prompt.params, name)
        counts.setdefault(asked, []).append(reading.attributes[name] == asked)
    return {value: f"{sum(right)}/{len(right)}" for value, right in sorted(counts.items())}


def score_windows(probe: AttributeProbe, videos: Sequence[Array], prompts: Sequence[Prompt]) -> list[dict[str, float]]:
    """Scores of each window of long videos, with what shows drift: contrast, edges and motion of the pixels."""
    windows = min(len(video) for video in videos) // WINDOW
    moving = np.array([prompt.params.motion != "still" for prompt in prompts])
    rows = []
    for window in range(windows):
        parts = [video[window * WINDOW : (window + 1) * WINDOW] for video in videos]
        row = score([probe.read(part) for part in parts], prompts)
        pixels = [part.astype(np.float32) / 255 for part in parts]
        changes = np.array([np.abs(np.diff(p, axis=0)).mean() for p in pixels])
        row["contrast"] = float(np.mean([p.std() for p in pixels]))
        row["edges"] = float(np.mean([np.abs(np.diff(p, axis=2)).mean() for p in pixels]))
        row["change"] = float(changes.mean())
        row["frozen"] = float((changes[moving] < _FROZEN).mean()) if moving.any() else 0.0
        rows.append(row)
    return rows


def decoder_psnr(decoders: Mapping[str, Decoder], pca: PatchPCA, clips: int = 20) -> dict[str, float]:
    """PSNR in dB of each decoder on the latents of real held-out clips, over all pixels."""
    sums = dict.fromkeys(decoders, 0.0)
    for _, frames in held_out_clips(clips):
        latents = pca.encode(frames)
        for name, decode in decoders.items():
            sums[name] += psnr(decode(latents), frames.astype(np.float32) / 255) / clips
    return sums


def stream_decoders(folder: Path) -> dict[str, Decoder]:
    """The decoders that a model folder holds."""
    from diffusers import AutoencoderKLWan

    from pipeline.decoder import StreamDecoder, TaehvStreamDecoder, WanStreamDecoder
    from pipeline.taehv import TAEHV

    def whole_clip(decoder: StreamDecoder) -> Decoder:
        def decode(latents: Array) -> Array:
            decoder.reset()
            frames = decoder.decode(torch.from_numpy(np.ascontiguousarray(latents, dtype=np.float32))[None])
            return frames[0].permute(0, 2, 3, 1).float().numpy()

        return decode

    decoders: dict[str, Decoder] = {}
    if (folder / "vae").is_dir():
        vae = AutoencoderKLWan.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval()
        decoders["wan"] = whole_clip(WanStreamDecoder(vae))
    if (folder / "taehv").is_dir():
        taehv = TAEHV.from_pretrained(folder / "taehv", torch_dtype=torch.float32).eval()
        decoders["taehv"] = whole_clip(TaehvStreamDecoder(taehv))
    return decoders


def evaluate(
    generator: Generator,
    probe: AttributeProbe,
    prompts: Sequence[Prompt],
    long_prompts: Sequence[Prompt] = (),
    long_seconds: float = 20.0,
    taehv: bool = False,
    sheet: Path | None = None,
) -> dict[str, Any]:
    """Score prompt following on clips of one window, and drift on a few long videos.

    Returns:
        a report of plain numbers; `relative` are the raw scores divided by those of real clips of the same prompts.
    """
    seconds = WINDOW / FPS
    started = time.perf_counter()
    videos = make_videos(generator, prompts, seconds, taehv)
    elapsed = time.perf_counter() - started
    readings = [probe.read(video[:WINDOW]) for video in videos]
    raw = score(readings, prompts)
    ceiling = score([probe.read(video) for video in real_videos(prompts)], prompts)
    report: dict[str, Any] = {
        "prompts": len(prompts),
        "prompt_following": raw,
        "ceiling": ceiling,
        "relative": {name: raw[name] / max(ceiling[name], 1e-6) for name in ATTRIBUTES},
        "by_value": {name: by_value(readings, prompts, name) for name in ("subject", "colour", "motion")},
        "video_fps": sum(len(video) for video in videos) / elapsed,
    }
    long_videos = make_videos(generator, long_prompts, long_seconds, taehv)
    if long_videos:
        report["long_prompts"] = len(long_prompts)
        report["windows"] = score_windows(probe, long_videos, long_prompts)
    if sheet is not None:
        save_sheet(sheet, videos[:24], [prompt.caption for prompt in prompts[:24]])
        if long_videos:
            captions = [prompt.caption for prompt in long_prompts]
            save_sheet(sheet.with_stem(f"{sheet.stem}_long"), long_videos, captions, columns=12)
    return report


def rounded(value: Any, digits: int = 4) -> Any:
    """The same report with rounded numbers; what is not a number becomes None, so that it stays valid JSON."""
    if isinstance(value, dict):
        return {key: rounded(entry, digits) for key, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry, digits) for entry in value]
    if isinstance(value, float):
        return round(value, digits) if np.isfinite(value) else None
    return value


def as_table(report: Mapping[str, Any]) -> str:
    """The report for people."""

    def row(label: str, values: Mapping[str, float], names: Sequence[str]) -> str:
        return f"{label:<12}" + "".join(f"{values[name]:>9.3f}" if name in values else " " * 9 for name in names)

    names = [*ATTRIBUTES, "visible", "speed"]
    lines = [" " * 12 + "".join(f"{name:>9}" for name in names)]
    lines += [row(key, report[key], names) for key in ("prompt_following", "ceiling", "relative")]
    lines[1] = lines[1].replace("prompt_following", "generated   ")
    for name, values in report["by_value"].items():
        lines.append(f"{name}: " + ", ".join(f"{value} {count}" for value, count in values.items()))
    if "windows" in report:
        names = [*names, "contrast", "edges", "change", "frozen"]
        lines += ["", f"{'window':<12}" + "".join(f"{name:>9}" for name in names)]
        lines += [row(str(index), values, names) for index, values in enumerate(report["windows"])]
    lines.append("")
    lines += [f"{name} decoder: {value:.2f} dB" for name, value in report.get("decoder_psnr", {}).items()]
    lines.append(f"{report['prompts']} prompts, {report['video_fps']:.1f} video frames per second")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Score a model of the procedural world.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--long-prompts", type=int, default=8)
    parser.add_argument("--long-seconds", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--taehv", action="store_true", help="decode with TAEHV")
    parser.add_argument("--data", type=Path, default=Path("training/cache"), help="data set folder, for decoder PSNR")
    parser.add_argument("--probe", type=Path, default=Path("training/cache/probe"))
    parser.add_argument("--sheet", type=Path, default=Path("outputs/evaluation.png"))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object last")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    from pipeline import SelfForcingPipeline

    report = evaluate(
        SelfForcingPipeline.from_pretrained(arguments.model),
        AttributeProbe.load(arguments.probe),
        plan_prompts(arguments.prompts, arguments.seed),
        plan_prompts(arguments.long_prompts, arguments.seed + 1),
        arguments.long_seconds,
        arguments.taehv,
        arguments.sheet,
    )
    decoders = stream_decoders(arguments.model)
    if decoders:
        report["decoder_psnr"] = decoder_psnr(decoders, ClipDataset(arguments.data).pca)
    sys.stdout.write(as_table(report) + "\n")
    if arguments.json:
        sys.stdout.write(json.dumps(rounded(report)) + "\n")


if __name__ == "__main__":
    main()
