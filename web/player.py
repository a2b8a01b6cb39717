"""The live video: Gradio's own player, fed with finished segments.

`gr.Video(streaming=True)` plays an HLS playlist that grows while the run goes on. As it comes, it wants each chunk as a
file and runs ffmpeg and ffprobe from PATH on it. Here a chunk is a `Segment` that is already what the player needs, so
the four hooks through which Gradio handles chunks are replaced on the instance. (Not by a subclass: Gradio writes a
`.pyi` file beside the source of every component class it sees.)
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import FileData

from pipeline.video import Segment, join_segments


def live_video(**settings: Any) -> gr.Video:
    """A video output whose values are `Segment`s, played gaplessly one after the other as they come.

    Only a program's last value is the path of a finished file.
    """
    video = gr.Video(streaming=True, autoplay=True, interactive=False, buttons=[], **settings)

    async def stream_output(
        value: Segment | str | None, output_id: str, first_chunk: bool
    ) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        kind = {"meta": {"_type": "gradio.FileData"}}
        if isinstance(value, str):  # the finished file, for programs: the playlist would be no use to them
            return None, {"path": value, "orig_name": Path(value).name, **kind}
        playlist = {"path": output_id, "is_stream": True, "orig_name": "video-stream.mp4", **kind}
        if value is None:
            return None, playlist
        return {"data": value.data, "duration": value.duration, "extension": ".ts"}, playlist

    async def flush_stream_output(output_id: str) -> None:
        return None  # a segment is complete by itself: nothing is held back

    def end_stream_output(output_id: str) -> None:
        return None  # and there is no encoder to shut down

    async def combine_stream(
        stream: list[bytes], desired_output_format: str | None = None, only_file: bool = False
    ) -> FileData:
        # Asked for by API clients, who get the stream as one file.
        folder = Path(tempfile.mkdtemp(dir=video.GRADIO_CACHE))
        path = folder / "video.mp4"
        await asyncio.to_thread(join_segments, stream, path)
        video.temp_files.add(str(path))
        return FileData(path=str(path), is_stream=False, orig_name="video.mp4")

    video.stream_output = stream_output
    video.flush_stream_output = flush_stream_output
    video.end_stream_output = end_stream_output
    video.combine_stream = combine_stream
    return video
