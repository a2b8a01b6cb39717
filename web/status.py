"""The status card under the video, as HTML: where the run is, how fast it goes, what was really done."""

from __future__ import annotations

import shlex
from functools import cache
from html import escape
from typing import TYPE_CHECKING, Any

from pipeline.cli import EMBEDDED_MODEL
from pipeline.config import OPTIONS
from pipeline.file_hashes import hash_files, weight_files
from pipeline.loading import LoadingState
from pipeline.meter import RunMeter
from web.sessions import Place

if TYPE_CHECKING:
    from pipeline.compiling import CompileState


def loading(state: LoadingState) -> str:
    return card("busy", "Loading the model", f"{state.stage} …", share=state.share)


def idle(line: str) -> str:
    return card("idle", "Ready", line)


def waiting(place: Place) -> str:
    if place.ahead == 0:
        return starting()
    runs = "1 run is" if place.ahead == 1 else f"{place.ahead} runs are"
    wait = "" if place.seconds is None else f" About {_duration(place.seconds)} to go."
    line = f"{runs} ahead of yours.{wait} It starts by itself."
    return card("busy", f"Number {place.ahead + 1} in the queue", line, share=0.0)


def starting() -> str:
    return card("busy", "Starting", "The model reads your prompt.", share=0.0)


def stopped_early() -> str:
    return card("idle", "Stopped", "Nothing was made yet.")


def generating(meter: RunMeter, *, buffering: bool = False) -> str:
    run = meter.run
    of_blocks = f" of {run.num_blocks}" if run.num_blocks else ""
    of_frames = f" of {run.num_frames}" if run.num_frames else ""
    line = f"Block {meter.blocks}{of_blocks} · {meter.frames}{of_frames} frames"
    return card("busy", "Buffering" if buffering else "Generating", line, share=meter.share, meter=meter)


def finished(meter: RunMeter, recipe: dict[str, Any] | None = None, *, stopped: bool = False) -> str:
    seconds = meter.frames / meter.run.fps
    line = f"{meter.frames} frames · {seconds:.2f} s of video"
    if stopped:
        line, share = f"{line}, all that was made", meter.share
    else:
        share = 1.0
    return card("done", "Stopped" if stopped else "Finished", line, share=share, meter=meter, recipe=recipe)


def not_made() -> str:
    return card("failed", "Not made", "Nothing came of it. Generate asks for it once more.")


def connection_lost() -> str:
    return card("failed", "Given up", "Your connection was lost for a while, so nothing more was made.")


def failed(message: str, meter: RunMeter | None = None) -> str:
    return card("failed", "Failed", message, meter=meter)


def warming(state: CompileState, *, learning: bool) -> str:
    """How far torch.compile is, for a line of its own below the card.

    Args:
        learning: Whether a clip waits or is being made that shows what there is to compile.
    """
    if state.state == "failed":
        return f'<p class="sf-warming sf-wrong">{escape(state.reason)}</p>'
    if state.state == "ready":
        return '<p class="sf-warming">torch.compile is ready: the next video is made with it.</p>'
    if state.state == "off" and not learning:  # no clip was asked for, or a short one took too long
        line = "torch.compile begins with your next video, in the background; until it is ready, none is made with it."
        return f'<p class="sf-warming">{line}</p>'
    counting = state.state == "warming"
    share = state.share if counting else 0.0
    left = "" if state.seconds_left is None else f", about {_duration(state.seconds_left)} left"
    counted = f": {state.done} of {state.total}{left}" if counting else ""
    line = f"torch.compile is warming up{counted}; videos are made without it until then."
    bar = f'<div class="sf-bar" aria-hidden="true"><i style="width:{100 * share:.1f}%"></i></div>'
    return f'<div class="sf-warming"><p role="status">{line}</p>{bar}</div>'


def card(
    state: str,
    headline: str,
    line: str,
    *,
    share: float | None = None,
    meter: RunMeter | None = None,
    recipe: dict[str, Any] | None = None,
) -> str:
    """A card in a state (busy, idle, done, failed), with a bar if `share` says how much is done."""
    parts = [f'<p class="sf-headline"><b>{escape(headline)}</b> <span>{escape(line)}</span></p>']
    if share is not None:
        percent = f"{100 * share:.1f}%"
        parts.append(f'<div class="sf-bar" aria-hidden="true"><i style="width:{percent}"></i></div>')
    elif state == "busy":
        parts.append('<div class="sf-bar sf-endless" aria-hidden="true"><i></i></div>')
    if meter is not None and meter.blocks:
        parts.append(_facts(meter, seed_button=state != "busy"))
    if recipe is not None:
        parts.append(_recipe(recipe))
    # The script reads the headline out to screen readers, and the rest of it when something failed.
    return f'<div class="sf-status sf-{state}">{"".join(parts)}</div>'


def _facts(meter: RunMeter, *, seed_button: bool) -> str:
    run = meter.run
    keeps_up = meter.generation_fps >= run.fps
    # Not while the card is drawn again and again: whoever has just reached it with the keyboard would lose it.
    button = _seed_button(run.seed) if seed_button else ""
    seed = f"{run.seed}{button}" if run.seed >= 0 else "random"
    facts = [
        ("First frame", f"{meter.time_to_first_frame:.2f} s", ""),
        ("Generation", f"{meter.generation_fps:.1f} FPS", "sf-good" if keeps_up else "sf-slow"),
        ("Playback", f"{run.fps:g} FPS", ""),
        ("Seed", seed, ""),
    ]
    cells = "".join(f'<div><dt>{label}</dt><dd class="{tone}">{value}</dd></div>' for label, value, tone in facts)
    chips = "".join(
        f"<li><span>{escape(option)}</span> {escape(str(value))}</li>" for option, value in run.applied.items()
    )
    notes = "".join(f'<p class="sf-note">{escape(note)}</p>' for note in meter.notes)
    return f'<dl class="sf-facts">{cells}</dl>{notes}' + (f'<ul class="sf-chips">{chips}</ul>' if chips else "")


def _seed_button(seed: int) -> str:
    return f'<button type="button" class="sf-link" data-use-seed="{seed}">use this seed</button>'


def _recipe(recipe: dict[str, Any]) -> str:
    """What it takes to make the video again, as it stands in the file too, and as a command."""
    settings = recipe["settings"]
    switched_on = ", ".join(name for name in OPTIONS if settings[name]) or "none"
    rows = {
        "Prompt": recipe["prompt"],
        "Seed": recipe["seed"],
        "Length": f"{settings['seconds']:g} s at {settings['fps']:g} FPS",
        "Options": switched_on,
        "Model": recipe["model"] or "unknown",
        "Weights": recipe["weights_sha256"][:12] or "unknown",
    }
    if start := recipe.get("start"):
        rows["Starts from"] = started_from(start)
    if not recipe["complete"]:
        rows["Stopped"] = f"after {recipe['frames']} frames; made again, it has its full length"
    cells = "".join(f"<dt>{label}</dt><dd>{escape(str(value))}</dd>" for label, value in rows.items())
    command = _command(recipe)
    return (
        '<details class="sf-recipe"><summary>Recipe</summary>'
        "<p>It is in the MP4, too: drop the file on this page and every setting comes back.</p>"
        f"<dl>{cells}</dl><div><code>{escape(command)}</code>"
        f'<button type="button" class="sf-link" data-copy="{escape(command)}">copy</button></div></details>'
    )


def started_from(start: dict[str, Any]) -> str:
    """What a video starts from, by what `Start.describe` tells of it."""
    what = "picture" if start["kind"] == "image" else f"last {start['frames']} frames of the video"
    return f"the {what} with sha256 {start['sha256'][:12]}"


def _command(recipe: dict[str, Any]) -> str:
    settings = recipe["settings"]
    words = ["python", "-m", "pipeline", "--seed", str(recipe["seed"])]
    if recipe["weights_sha256"] != _embedded_sha256():  # only the visitor knows where theirs lies
        words += ["--model", "FOLDER"]
    words += ["--seconds", f"{settings['seconds']:g}", "--fps", f"{settings['fps']:g}"]
    words += [f"--{name}" for name in OPTIONS if settings[name]]
    if start := recipe.get("start"):
        words += [f"--{start['kind']}", "FILE"]
    # After `--`: a prompt may begin as an option does, or be the name of a command.
    return shlex.join([*words, "--", recipe["prompt"]])


@cache
def _embedded_sha256() -> str:
    """Of the weights that the command takes if it names none. Not their name: a model trained here has the same."""
    return hash_files(weight_files(EMBEDDED_MODEL / "transformer")).together


def _duration(seconds: float) -> str:
    whole = max(1, round(seconds))
    return f"{whole} s" if whole < 90 else f"{round(whole / 60)} min"
