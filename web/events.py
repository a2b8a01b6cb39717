"""What the events of the page and of the API have in common: who asks, what they are shown, how they are refused."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import gradio as gr
from gradio.blocks import Block

from pipeline.errors import InvalidRequest, SelfForcingError
from web import status
from web.generation import Update

Values = tuple[Any, ...]
"""New values of components, in the order of an event's outputs."""


def shown(update: Update) -> Values:
    """An update as the page shows it: (video, status, download)."""
    meter = update.meter
    video: Any = update.segment or gr.skip()
    if update.state == "starting":
        return video, status.starting(), None
    if not update.is_last:
        return video, status.generating(meter, buffering=update.state == "buffering"), gr.skip()
    if meter.frames:
        # None adds nothing to the stream, but names it once more. So Gradio names it again at the very end, and the
        # player asks at once for the playlist that says so; otherwise it would ask 5 s after the last segment.
        video = None
    if update.state == "failed":
        return video, status.failed(update.message, meter), update.file
    if not meter.frames:
        return video, status.stopped_early(), None
    return video, status.finished(meter, update.recipe, stopped=update.state == "stopped"), update.file


def run_buttons(*, running: bool) -> tuple[Any, Any]:
    """Generate and Stop, of which there is only ever one."""
    return gr.update(visible=not running), gr.update(visible=running)


def session_of(request: gr.Request | None) -> str:
    # A call without a session (the plain HTTP API) is a visitor of its own.
    return getattr(request, "session_hash", None) or secrets.token_hex(8)


def refusal(error: SelfForcingError) -> gr.Error:
    """An error as Gradio passes it on to whoever asked."""
    title = "This cannot be made" if isinstance(error, InvalidRequest) else "Error"
    return gr.Error(str(error), title=title, print_exception=False)


def _behind(address: object, home: Path) -> str | None:
    """The file below `home` that an address of this server leads to; None for anything else."""
    if not isinstance(address, str) or not address.startswith(("http://", "https://")):
        return None
    _, found, name = urlsplit(address).path.partition("/gradio_api/file=")
    file = Path(unquote(name)).resolve()
    return str(file) if found and file.is_relative_to(home.resolve()) else None


def take_files_only(component: Block) -> None:
    """Let nobody send anything but an uploaded file as the value of `component`.

    Not a folder: Gradio notes down every path below its temporary folder that comes in, to remove it later, and stops
    removing anything when that turns out to be a folder. And no address, for Gradio would fetch whatever it leads to;
    but MCP clients have nothing else, and one of a file that this server hands out stands for that file.
    """
    take = component.async_move_resource_to_block_cache

    async def take_file(path: str | Path | None) -> str | None:
        path = _behind(path, Path(component.GRADIO_CACHE)) or path
        if path is not None and not Path(path).is_file():
            raise gr.Error(
                "A file is needed here. If you sent one, it is gone by now: choose it again.", print_exception=False
            )
        return await take(path)

    component.async_move_resource_to_block_cache = take_file
