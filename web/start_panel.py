"""The panel in which a visitor chooses what their video starts from, and sees what the model will see of it."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from pipeline.config import ModelSpec
from pipeline.start import Start
from pipeline.start_file import START_SUFFIXES
from web.adapter import AdaptedPipeline

TITLE = "Start from a picture or video"

_EXPLANATION = """
<p class="sf-explained">The video goes on from a picture, or from the end of a video. The prompt says what happens
then. PNG, JPEG, WEBP; MP4, MOV, WebM, MKV of up to a minute; up to 10 MB.</p>
"""


class StartPanel:
    """The panel's part of the page. To be made inside a `gr.Blocks`."""

    def __init__(self) -> None:
        with gr.Accordion(TITLE, open=False, elem_id="start", visible=False) as self.panel:
            gr.HTML(_EXPLANATION, elem_id="start-explanation", padding=False)
            self.file = gr.File(
                label="Picture or video", file_types=list(START_SUFFIXES), height=140, elem_id="start-file"
            )
            self.preview = gr.HTML("", elem_id="start-preview", padding=False)
            self.checked = gr.State((None, True))  # path of the file that was read last, and whether it is good
            self.remove = gr.Button("Remove", size="sm", elem_id="start-remove", visible=False)

    @property
    def shown(self) -> list[Any]:
        """The components that change with the file."""
        return [self.file, self.panel, self.preview, self.remove]

    def show(self, start: Start | None, spec: ModelSpec | None, note: str = "") -> dict[Any, dict[str, Any]]:
        """Component -> its settings, the file left as it is. `note`: what to say without a start."""
        title = TITLE
        if start is not None:
            title = f"Starts from {'a picture' if start.kind == 'image' else 'the end of a video'}"
        return {
            self.panel: {"label": title},
            self.preview: {"value": preview(start, spec) if start is not None and spec is not None else note},
            self.remove: {"visible": start is not None},
        }

    @property
    def fitted(self) -> list[Any]:
        """The components that depend on the model."""
        return self.shown

    def fitted_to(self, model: AdaptedPipeline) -> dict[Any, dict[str, Any]]:
        """Component -> its settings for a model. A file is to be chosen again: it was cut for the model before."""
        empty = self.show(None, model.spec)
        return {**empty, self.file: {"value": None}, self.panel: {**empty[self.panel], "visible": model.takes_start}}


def preview(start: Start, spec: ModelSpec) -> str:
    """The frames as the model sees them, of a video the first and the last, and what they are cut from."""
    count = len(start.frames)
    seconds = count / spec.native_fps
    if start.kind == "image":
        pictures = _picture(start.frames[0], "The picture as the model sees it")
        facts = "This is what the model sees, and the first frame of the video"
    else:
        pictures = _picture(start.frames[0], "First frame that is used", "first")
        pictures += _picture(start.frames[-1], "Last frame, from which the video goes on", "last")
        whole = (start.source_frames or count) / spec.native_fps
        used = "All of it" if whole - seconds < 0.05 else f"The last {seconds:.2f} s of {whole:.2f} s"
        facts = f"{used} ({count} frames at {spec.native_fps:g} FPS) are used, and come first in the video"
    return (
        f'<div class="sf-start" style="--sf-pictures: {1 if start.kind == "image" else 2}">{pictures}</div>'
        f'<p class="sf-explained" role="status">{facts}: {spec.width}×{spec.height} pixels{_cut(start)}. '
        f"Length counts what is made after that. {escape(spec.start_note(start))}</p>"
    )


def refused(sentence: str) -> str:
    """What is wrong with a file."""
    return f'<p class="sf-wrong" role="alert">{escape(sentence)}</p>'


def _cut(start: Start) -> str:
    if start.crop is None or start.source_size is None:
        return ""
    (_, _, width, height), whole = start.crop, start.source_size
    if (width, height) == whole:
        return f", scaled from {whole[0]}×{whole[1]}"
    return f", from the middle {width}×{height} of {whole[0]}×{whole[1]}"


def _picture(frame: np.ndarray, meaning: str, name: str = "") -> str:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=92, subsampling=0)
    data = base64.b64encode(buffer.getvalue()).decode()
    caption = f"<figcaption>{name}</figcaption>" if name else ""
    return f'<figure><img src="data:image/jpeg;base64,{data}" alt="{meaning}">{caption}</figure>'
