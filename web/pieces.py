"""Pieces of HTML that are no status and no component: header, hints beside the controls, the player's buttons."""

from __future__ import annotations

from html import escape

from pipeline.config import FPS_RANGE, SECONDS_RANGE, checked_number, checked_prompt, checked_seed
from pipeline.errors import InvalidRequest
from pipeline.start import Start
from web.adapter import AdaptedPipeline

_MARK = """
<svg class="sf-mark" viewBox="0 0 32 32" aria-hidden="true">
  <defs><linearGradient id="sf-dusk" x2="1" y2="1"><stop stop-color="#ea580c"/><stop offset="1" stop-color="#db2777"/>
  </linearGradient></defs>
  <rect width="32" height="32" rx="9" fill="url(#sf-dusk)"/><path d="M12 9.5v13l11-6.5z" fill="#fff"/>
</svg>
"""

ANNOUNCEMENTS = """
<p class="sf-notice" id="page-notice" role="status" hidden></p>
<p class="sf-sr" id="live" role="status" aria-live="polite"></p>
"""
"""What the script has to say: for everybody, and for screen readers only. The rest of the page is drawn too often."""

PLAYER_BUTTONS = """
<div class="sf-player" role="group" aria-label="Player">
  <button type="button" data-player="replay" disabled>Replay</button>
  <button type="button" data-player="loop" aria-pressed="false">Loop</button>
  <button type="button" data-player="fullscreen" disabled>Full screen</button>
</div>
"""
"""The script gives them their work. Replay and full screen wait for a video."""


def header(model: AdaptedPipeline | None) -> str:
    """Title and model. The style makes the place for the video the shape of this model's frames."""
    shape = model.spec if model else None
    aspect = f"{shape.width} / {shape.height}" if shape else "16 / 9"
    name = f'<span class="sf-model">{escape(model.name)}</span>' if model else ""
    return (
        f"{_MARK}<h1>Self-Forcing</h1><p>Type a sentence. The video plays while it is still being made.</p>{name}"
        f"<style>.gradio-container {{ --sf-aspect: {aspect}; }}</style>"
    )


def news(sentence: str) -> str:
    """Something that concerns everybody on the page."""
    return f'<p class="sf-notice" role="status">{escape(sentence)}</p>'


def describe(model: AdaptedPipeline) -> str:
    spec = model.spec
    return f"{spec.name} · {spec.width}×{spec.height} at {spec.fps:g} FPS" if spec else "The model is loaded."


def word_list(words: list[str]) -> str:
    return f'<ul class="sf-words">{"".join(f"<li>{escape(word)}</li>" for word in words)}</ul>'


def prompt_notice(prompt: str, model: AdaptedPipeline | None) -> str:
    """What is wrong with a prompt, or what the model will make of it; empty if there is nothing to say."""
    if not prompt.strip():
        return ""
    try:
        checked_prompt(prompt)
    except InvalidRequest as error:
        return _notice(escape(str(error)), wrong=True)
    ignored = model.unknown_words(prompt) if model else []
    known = set(model.known_words()) if ignored and model else set()
    unknown, unread = [w for w in ignored if w not in known], [w for w in ignored if w in known]
    return (_notice(f"Not known to this model, so it ignores: {_words(unknown)}") if unknown else "") + (
        _notice(f"Too far back for this model to read: {_words(unread)}") if unread else ""
    )


def _words(words: list[str], shown: int = 12) -> str:
    return ", ".join(f"<b>{escape(word)}</b>" for word in words[:shown]) + (" …" if len(words) > shown else "")


def settings_notice(
    seed: object,
    fps: object,
    seconds: object,
    max_seconds: float,
    model: AdaptedPipeline | None,
    start: Start | None = None,
) -> str:
    """What is wrong with the numbers; if nothing is, what they come to after what the video starts from."""
    wrong = []
    high = min(SECONDS_RANGE[1], max_seconds)
    checks = [
        lambda: checked_seed(seed),
        lambda: fps is None or checked_number("fps", fps, *FPS_RANGE),
        lambda: checked_number("seconds", seconds, SECONDS_RANGE[0], high),
    ]
    for check in checks:
        try:
            check()
        except InvalidRequest as error:
            wrong.append(_notice(escape(str(error)), wrong=True))
    if wrong or model is None or model.spec is None or not isinstance(seconds, int | float):
        return "".join(wrong)
    rate = fps if isinstance(fps, int | float) else model.fps
    blocks, frames = model.spec.length(seconds, rate, start)
    given = "" if start is None else f", {len(start.frames)} of them what it starts from"
    plan = f"{blocks} block{'s' if blocks > 1 else ''}, {frames} frames{given}, {frames / rate:.2f} s of video."
    if rate != model.native_fps:
        plan += f" Motion looks natural at {model.native_fps:g} FPS; this plays it at {rate / model.native_fps:.2g}×."
    return _notice(plan, tone="sf-plan")


def _notice(html: str, *, wrong: bool = False, tone: str = "sf-hint") -> str:
    return f'<p class="{"sf-wrong" if wrong else tone}">{html}</p>'
