"""A benchmark's result as a JSON object, and as text for whoever waits in front of it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ratios import FEWEST_PAIRS
from pipeline.errors import InvalidRequest, SelfForcingError

FOLDER = Path(__file__).resolve().parent / "results"
SCHEMA = 1
NAMES = {
    "block_fp32": "transformer, a block, float32",
    "block_bf16": "transformer, a block, bfloat16",
    "block_bf16_both": "transformer, a block, bfloat16 on both sides",
    "stream": "whole stream, text to encoded segment",
}


def plain(value: Any, digits: int = 5) -> Any:
    """The same with rounded numbers; one that is none becomes None, so that it stays valid JSON."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry, digits) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry, digits) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def write(result: Mapping[str, Any], folder: Path) -> Path:
    """Write a result under a name made of its date and machine.

    Raises:
        InvalidRequest: the folder cannot be written to.
    """
    machine = result["machine"]
    name = machine["gpu"]["name"] if machine["gpu"] else machine["processor"]
    slug = re.sub(r"[^a-z0-9]+", "-", f"{result['model']['name']} {name}".lower()).strip("-")
    path = folder / f"{result['made'][:16].replace(':', '')}-{slug}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"The result cannot be written to {folder} ({error.strerror}).") from error
    return path


def read_all(folder: Path) -> list[dict[str, Any]]:
    """All results in a folder that are meant to be published, oldest first.

    Raises:
        SelfForcingError: one of them cannot be read.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SelfForcingError(f"{path} cannot be read as a result. Make it again or remove it.") from error
        if not isinstance(result, dict) or result.get("schema") != SCHEMA:
            raise SelfForcingError(f"{path} is not a result of this version of the benchmark. Remove it.")
        if not result["quick"] and "gpu_state" not in result:  # `benchmarks.gpu` prints a table of its own
            found.append(result)
    return found


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def as_tables(result: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """What was measured as titled tables, the first row of each its header. Parts that were not are left out."""
    parts = result["parts"]
    tables: list[tuple[str, list[list[str]]]] = []
    if compared := parts.get("reference"):
        tables.append(("Against the reference mode", _reference_rows(compared)))
    if found := parts.get("switches"):
        tables.append((f"Switches, against the default ({found['default']})", _switch_rows(found)))
    if found := parts.get("speed"):
        title = f"Frames per second ({found['dtype']}, {found['threads']} threads, {found['blocks']} blocks)"
        tables.append((title, _speed_rows(found["rows"])))
    seconds = _seconds_rows(parts)
    if len(seconds) > 1:
        tables.append(("Waiting, memory, long videos", seconds))
    return tables


def _reference_rows(compared: Mapping[str, Any]) -> list[list[str]]:
    rows = [["times as fast", "ratio", "95 %", "middle half", "best of", "pairs", "control"]]
    for name, row in compared["rows"].items():
        rows.append([NAMES[name], *_ratio_cells(row)])
    for name, reasons in compared["why_null"].items():
        if name not in compared["rows"]:
            rows.append([NAMES[name], "not measured", *[""] * 4, reasons[0]])
    return rows


def _ratio_cells(row: Mapping[str, Any]) -> list[str]:
    if row["ratio"] is None:
        return [_why_none(row), "", "", "", str(row["measured"]["pairs"]), ""]
    found, control = row["measured"], row["control"]
    return [
        number(row["ratio"]),
        f"{found['low']:.2f} to {found['high']:.2f}",
        f"{found['lower_quartile']:.2f} to {found['upper_quartile']:.2f}",
        number(found["best"]),
        str(found["pairs"]),
        number(control["value"]),
    ]


def _why_none(row: Mapping[str, Any]) -> str:
    """In two or three words, why there is no ratio."""
    if row["measured"]["pairs"] < FEWEST_PAIRS:
        return "too few pairs"
    return "too noisy" if row["too_noisy"] else "not given"


def _switch_rows(found: Mapping[str, Any]) -> list[list[str]]:
    rows = [["", "kind", "block, times", "video, times", "PSNR", "latents differ by"]]
    for name, row in found["rows"].items():
        ratios = [_why_none(row[part]) if row[part]["ratio"] is None else number(row[part]["ratio"]) for part in _PARTS]
        psnr = "equal" if row["psnr"] is None else number(row["psnr"], 1, " dB")
        rows.append(
            [name, "exact" if row["exact"] else "approximate", *ratios, psnr, f"{row['latents_differ_by']:.0e}"]
        )
    for name, reason in found["missing"].items():
        rows.append([name, "not measured", reason, "", "", ""])
    return rows


_PARTS = ("block", "stream")


def _speed_rows(found: Mapping[str, Any]) -> list[list[str]]:
    rows = [["decoder", "FPS", "limit", "reached", "last block", "its limit", "reached", "jitter", "worst block"]]
    for decoder, row in found.items():
        wrong = " (measurement wrong)" if row["measurement_wrong"] else ""
        rows.append(
            [
                {"vae": "Wan VAE", "taehv": "TAEHV"}[decoder],
                number(row["fps"], 1),
                number(row["limit_fps"], 1),
                number(100 * row["of_limit"], 0, " %") + wrong,
                number(row["last_block_fps"], 1),
                number(row["last_block_limit_fps"], 1),
                "-" if row["last_block_of_limit"] is None else number(100 * row["last_block_of_limit"], 0, " %"),
                number(row["jitter_p95"]),
                number(row["block_seconds_worst"], 2, " s"),
            ]
        )
    return rows


def _seconds_rows(parts: Mapping[str, Any]) -> list[list[str]]:
    rows = [["", ""]]

    def add(name: str, value: float | None, digits: int, unit: str) -> None:
        if value is not None:
            rows.append([name, number(value, digits, unit)])

    first, cold = parts.get("first_frame") or {}, parts.get("cold") or {}
    long, compiled, encoded = (parts.get(name) or {} for name in ("rollout", "compile", "encoding"))
    add("first frame, from the start of the program", cold.get("first_frame"), 2, " s")
    add("first frame, new prompt", first.get("new_prompt"), 3, " s")
    add("first frame, prompt asked for before", first.get("cached_prompt"), 3, " s")
    add("peak main memory", cold.get("peak_memory") and cold["peak_memory"] / 2**30, 2, " GB")
    add("peak GPU memory", cold.get("peak_gpu_memory") and cold["peak_gpu_memory"] / 2**30, 2, " GB")
    add("compiling, first time", compiled.get("cold"), 1, " s")
    add("compiling, again", compiled.get("cached"), 1, " s")
    add("encoding, processor time a frame", encoded.get("cpu_milliseconds_a_frame"), 2, " ms")
    if long:
        name = f"{long['seconds']:.0f} s of video"
        add(f"{name}, frames per second", long["fps"], 1, "")
        add(f"{name}, its end as fast as its start by", long["end_of_start"], 2, "")
    return rows


def as_text(result: Mapping[str, Any]) -> str:
    """For people."""
    machine = result["machine"]
    device = machine["gpu"]["name"] if machine["gpu"] else f"{machine['processor']}, {machine['cpu_capability']}"
    lines = [f"{result['model']['name']} on {device}, torch {machine['packages']['torch']}, {result['made']}"]
    for title, rows in as_tables(result):
        lines += ["", title, *aligned(rows)]
    if agreement := result["agreement"]:
        verdict = "makes the same video" if agreement["holds"] else "does NOT make the same video"
        decoders = ", ".join(f"{name} {value:.0e}" for name, value in agreement["frames"].items())
        lines += ["", f"The reference mode {verdict}: latents {agreement['latents']:.0e}, {decoders}."]
    for name, reasons in (result["parts"].get("reference") or {}).get("why_null", {}).items():
        lines += [f"{NAMES[name]}: {reason}" for reason in reasons]
    lines += [f"{name}: not measured. {reason}" for name, reason in result["not_measured"].items()]
    return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
