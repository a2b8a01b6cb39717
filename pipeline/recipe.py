"""A video's recipe: everything it takes to make the same video again, kept inside the video file itself."""

from __future__ import annotations

import json
import platform
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.blocks import RunInfo
from pipeline.config import GenerationRequest
from pipeline.errors import VideoError
from pipeline.mp4 import read_comment
from pipeline.start import Start

RECIPE_FORMAT = "self-forcing-recipe"
RECIPE_VERSION = 1
STARTED_VERSION = 2
"""Of videos that began with a picture or a video: programs that do not know of those would make another one."""
COMPARISON_FORMAT = "self-forcing-comparison"
"""Kind of a video that shows two side by side, which cannot be made again from one set of settings."""

_PACKAGES = ("torch", "diffusers", "transformers", "imageio-ffmpeg")


def build_recipe(run: RunInfo, num_frames: int) -> dict[str, Any]:
    """The recipe of a video of which `num_frames` frames exist (fewer than `run.num_frames` if it was stopped)."""
    request = run.request
    return {
        "format": RECIPE_FORMAT,
        "version": RECIPE_VERSION if request.start is None else STARTED_VERSION,
        "prompt": request.prompt,
        "seed": run.seed,
        "model": run.model,
        "weights_sha256": run.weights_sha256,
        "settings": {
            "seconds": request.seconds,
            "fps": run.fps,
            "taehv": request.taehv,
            "fp8": request.fp8,
            "compile": request.compile,
        },
        **({} if request.start is None else {"start": request.start.describe()}),
        "applied": dict(run.applied),
        "frames": num_frames,
        "complete": num_frames >= run.num_frames,
        "versions": _versions(),
    }


def build_comparison_recipe(report: dict[str, Any]) -> dict[str, Any]:
    """What a side-by-side video says of itself: `Comparison.report()` without its numbers per frame."""
    kept = {name: value for name, value in report.items() if name != "psnr_frames"}
    return {"format": COMPARISON_FORMAT, "version": RECIPE_VERSION, **kept, "versions": _versions()}


def request_from_recipe(recipe: dict[str, Any], start: Start | None = None) -> GenerationRequest:
    """The request that makes the recipe's video again.

    Args:
        start: what the video began with, read from the same file; a recipe only tells which.

    Raises:
        VideoError: a field is missing, this is no recipe of ours, or `start` is not what the video began with.
        InvalidRequest: a field has a value that is not allowed.
    """
    request = settings_from_recipe(recipe)
    needed = needed_start(recipe)
    if needed is None:
        return request
    if start is None or not start.matches(needed):
        raise VideoError(f"{start_sentence(needed)} It takes the same file to make it again.")
    return replace(request, start=start)


def needed_start(recipe: dict[str, Any]) -> dict[str, Any] | None:
    """What `Start.describe` told of the file that the recipe's video began with; None if it began with none."""
    start = recipe.get("start")
    return start if isinstance(start, dict) else None


def start_sentence(needed: dict[str, Any]) -> str:
    """Which file a video began with, for people."""
    kind = "a picture" if needed.get("kind") == "image" else "a video"
    return f"That video began with {kind} (sha256 {str(needed.get('sha256'))[:12]})."


def settings_from_recipe(recipe: dict[str, Any]) -> GenerationRequest:
    """The recipe's settings without what its video began with: alone they make it again only if it began with nothing.

    Raises:
        VideoError, InvalidRequest: as `request_from_recipe`, which see.
    """
    known = recipe.get("version") in (RECIPE_VERSION, STARTED_VERSION) and type(recipe["version"]) is int
    if recipe.get("format") != RECIPE_FORMAT or not known:
        raise VideoError("The recipe was written by another program or by a newer version of this one.")
    try:
        settings = recipe["settings"]
        return GenerationRequest(
            prompt=recipe["prompt"],
            seed=recipe["seed"],
            seconds=settings["seconds"],
            fps=settings["fps"],
            taehv=settings["taehv"],
            fp8=settings["fp8"],
            compile=settings["compile"],
        )
    except (KeyError, TypeError) as error:
        raise VideoError("The recipe is incomplete.") from error


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Read the recipe out of an MP4 file made here.

    Raises:
        VideoError: the file cannot be read, is no MP4 file, or holds no recipe.
    """
    try:
        comment = read_comment(Path(path))
    except OSError as error:
        raise VideoError(f"The video file cannot be read ({error.strerror}).") from error
    try:
        recipe = json.loads(comment or "")
    except (ValueError, RecursionError):  # text that nests too deeply is no recipe either
        recipe = None
    if isinstance(recipe, dict) and recipe.get("format") == COMPARISON_FORMAT:
        raise VideoError("This video shows two side by side, so there is not one set of settings to get back.")
    if not isinstance(recipe, dict) or recipe.get("format") != RECIPE_FORMAT:
        raise VideoError(
            "This video holds no recipe: it was not made here, or another program saved it again. To go on from it, "
            "drop it into “Start from a picture or video”."
        )
    return recipe


def _versions() -> dict[str, str]:
    # From the installed packages' notes, not by importing them: torch alone would take seconds.
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
