"""The Compare panel: one switch, on at the left and off at the right, and a line between them that can be moved."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from html import escape
from typing import Any

import gradio as gr

from pipeline.config import OPTIONS
from web import status
from web.comparing import ComparisonUpdate

_EXPLANATION = """
<p class="sf-explained">Makes the video of the prompt and settings on this page twice, from the same noise: A with the
switch on, B with it off. Everything else is alike.</p>
"""

_VIEWER = """
<p class="sf-sr" id="compare-live" role="status" aria-live="polite"></p>
<div class="sf-compared" id="compared" role="group" aria-label="Both videos" hidden>
  <div class="sf-wipe">
    <video id="compared-b" muted playsinline preload="auto" aria-label="Video B"></video>
    <video id="compared-a" muted playsinline preload="auto" aria-label="Video A"></video>
    <b aria-hidden="true">A</b><b aria-hidden="true">B</b>
    <input type="range" id="compared-wipe" min="0" max="100" value="50" aria-label="Line between A and B"
      aria-valuetext="A 50 %, B 50 %">
    <i aria-hidden="true"></i>
  </div>
  <div class="sf-player">
    <button type="button" id="compared-play">Play</button>
    <input type="range" id="compared-time" min="0" max="1000" value="0" aria-label="Place in both videos"
      aria-valuetext="0.0 seconds">
  </div>
</div>
"""
"""The script gives it the videos. It is drawn once: what a visitor holds in their hand must not be exchanged."""


class ComparePanel:
    """The panel's part of the page. To be made inside a `gr.Blocks`.

    Args:
        labels: Switch -> what it is called on the page.
    """

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._labels = labels
        with gr.Accordion("Compare", open=False, elem_id="compare", visible=False) as self.panel:
            gr.HTML(_EXPLANATION, elem_id="compare-explanation", padding=False)
            self.switch = gr.Radio(self._choices(()), label="Switch", elem_id="compare-switch")
            with gr.Row(elem_id="compare-buttons"):
                self.make = gr.Button("Make both", elem_id="compare-make", interactive=False)
                self.stop = gr.Button("Stop both", variant="stop", elem_id="compare-stop", visible=False)
            gr.HTML(_VIEWER, elem_id="compare-view", padding=False)
            self.status = gr.HTML("", elem_id="compare-status", padding=False)
            with gr.Row(elem_id="compare-files", visible=False) as self.files:
                self.both = gr.DownloadButton("Download side by side", size="sm", elem_id="compare-both")
                self.a = gr.DownloadButton("Download A", size="sm", elem_id="compare-a")
                self.b = gr.DownloadButton("Download B", size="sm", elem_id="compare-b")
        # As the page's own ticket, which see.
        self.ticket = gr.Button("", visible="hidden", elem_id="compare-ticket")

    @property
    def downloads(self) -> list[Any]:
        return [self.files, self.both, self.a, self.b]

    @property
    def fitted(self) -> list[Any]:
        """The components that depend on the model."""
        return [self.panel, self.switch, self.make]

    def without_model(self) -> dict[Any, dict[str, Any]]:
        """Component -> its settings while there is no model."""
        return {self.make: {"interactive": False}}

    def fitted_to(self, unavailable: Mapping[str, str], preset: Collection[str] = ()) -> dict[Any, dict[str, Any]]:
        """Component -> its settings for a model.

        Args:
            unavailable: Switches that cannot work, and why.
            preset: Switches that have to be on for want of memory: one side without them would fail.
        """
        choices = self._choices({*unavailable, *preset})
        kept = [self._labels[name] for name in OPTIONS if name in preset and name not in unavailable]
        info = f"Not {' or '.join(kept)}: without it this device may lack the memory." if kept else None
        return {
            self.panel: {"visible": bool(choices)},
            self.switch: {"choices": choices, "info": info, "value": choices[0][1] if choices else None},
            self.make: {"interactive": True},
        }

    def _choices(self, left_out: Collection[str]) -> list[tuple[str, str]]:
        return [(self._labels[name], name) for name in OPTIONS if name not in left_out]


def card(update: ComparisonUpdate) -> str:
    """An update as the panel shows it."""
    if update.state == "stopped":
        return status.card("idle", "Stopped", "It takes both videos to compare them, so nothing was kept.")
    if update.state == "failed":
        return status.card("failed", "Failed", update.message)
    if update.state == "preparing":
        return status.card("busy", f"Preparing {update.side}", "A short clip that is not counted sets the switch.")
    if update.state == "writing":
        return status.card("busy", "Writing", "Both videos are there and are being compared.")
    if update.report is not None:
        return status.card("done", _difference(update.report), _lowest(update.report)) + _table(update.report)
    meter = update.meter
    assert meter is not None
    of_frames = f" of {meter.run.num_frames}" if meter.run.num_frames else ""
    line = f"{meter.frames}{of_frames} frames · {meter.model_fps:.1f} FPS"
    share = None if meter.share is None else (meter.share + (update.side == "B")) / 2
    return status.card("busy", f"Making {update.side}", line, share=share)


def _difference(report: dict[str, Any]) -> str:
    return "Identical" if report["identical"] else f"PSNR {report['psnr']:.2f} dB"


def _lowest(report: dict[str, Any]) -> str:
    if report["identical"]:
        return "Every pixel of every frame is the same."
    return f"lowest {report['psnr_lowest']:.2f} dB, frame {report['psnr_lowest_frame']}; the higher, the more alike"


def _table(report: dict[str, Any]) -> str:
    sides = [report["a"], report["b"]]
    names = "".join(
        f'<th scope="col">{name}: {escape(side["label"])}</th>' for name, side in zip("AB", sides, strict=True)
    )
    rows = {
        "Generation": [f"{side['generation_fps']:.1f} FPS" for side in sides],
        "First frame": [f"{side['time_to_first_frame']:.2f} s" for side in sides],
        "Prepared in": [f"{side['prepare_seconds']:.1f} s" for side in sides],
    }
    cells = "".join(
        f'<tr><th scope="row">{label}</th>{"".join(f"<td>{value}</td>" for value in values)}</tr>'
        for label, values in rows.items()
    )
    facts = f"{report['frames']} frames, seed {report['seed']}."
    if report["start"] is not None:
        facts += f" Both start from {escape(status.started_from(report['start']))}."
    return (
        f'<table class="sf-sides"><thead><tr><td></td>{names}</tr></thead><tbody>{cells}</tbody></table>'
        f'<p class="sf-explained">{escape(report["meaning"])} {facts}</p>'
    )
