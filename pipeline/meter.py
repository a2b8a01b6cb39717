"""What a run has made so far and how fast, counted from its blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipeline.blocks import FrameBlock, RunInfo


@dataclass
class RunMeter:
    """Counts what a run has produced."""

    run: RunInfo
    blocks: int = 0
    frames: int = 0
    time_to_first_frame: float = 0.0
    notes: list[str] = field(default_factory=list)
    _first_frames: int = 0
    _last_elapsed: float = 0.0
    _worked: float = 0.0
    """Seconds that the model took for the blocks after the first; 0 if they do not say."""

    def count(self, block: FrameBlock) -> None:
        self.run = block.run
        self.blocks += 1
        self.frames += len(block.frames)
        self._last_elapsed = block.elapsed
        if self.blocks == 1:
            self.time_to_first_frame = block.elapsed
            self._first_frames = self.frames
        else:
            self._worked += block.denoise_seconds + block.decode_seconds

    @property
    def generation_fps(self) -> float:
        """Frames made per second, leaving out what happens once per run."""
        if self.frames > self._first_frames and self._last_elapsed > self.time_to_first_frame:
            return (self.frames - self._first_frames) / (self._last_elapsed - self.time_to_first_frame)
        made = self.frames - self.run.start_frames
        return made / self._last_elapsed if self._last_elapsed > 0 else 0.0

    @property
    def model_fps(self) -> float:
        """As `generation_fps`, but without the time in which the model waited for whoever takes its frames."""
        made = self.frames - self._first_frames
        return made / self._worked if made and self._worked > 0 else self.generation_fps

    @property
    def share(self) -> float | None:
        """Share of the video that is made, 0 to 1; None if the pipeline does not say how long it will be."""
        return min(1.0, self.frames / self.run.num_frames) if self.run.num_frames else None

    def as_dict(self) -> dict[str, Any]:
        """For programs that call the API."""
        return {
            "block": self.blocks,
            "num_blocks": self.run.num_blocks,
            "frames": self.frames,
            "num_frames": self.run.num_frames,
            "time_to_first_frame": round(self.time_to_first_frame, 3),
            "generation_fps": round(self.generation_fps, 2),
            "playback_fps": self.run.fps,
            "seed": self.run.seed,
            "applied": dict(self.run.applied),
        }
