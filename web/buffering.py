"""When playback may begin: at once if the model is fast enough, else only after some video is in hand.

A player that starts too early stalls at every block. Nothing is gained by starting a second earlier then.
"""

from __future__ import annotations

from pipeline.blocks import FrameBlock

MARGIN_SECONDS = 0.35
"""What encoding, network and the player need between a block's existence and its display (measured, busy machine)."""
MAX_BUFFER_SECONDS = 3.0
"""Nobody is made to wait for longer than this, however slow the model."""


class PlaybackBuffer:
    """Decides for one run when its first blocks are released to the player.

    Args:
        seconds_per_frame: Measured on an earlier run like this one; None if there was none.
    """

    def __init__(self, seconds_per_frame: float | None = None) -> None:
        self._seconds_per_frame = seconds_per_frame
        self._first_elapsed = 0.0
        self.playing = False
        self.slower_than_playback = False
        """Whether, as far as is known, the model makes frames slower than they are played."""

    @property
    def seconds_per_frame(self) -> float | None:
        """Time the model takes for one frame, as far as it is known."""
        return self._seconds_per_frame

    def may_play(self, block: FrameBlock, frames_ready: int) -> bool:
        """Tell it of each block as it comes; `frames_ready` counts all frames so far. True once playback may begin."""
        self._measure(block, frames_ready)
        pace = self._seconds_per_frame or 0.0
        fps, remaining = block.run.fps, max(0, block.run.num_frames - frames_ready)
        self.slower_than_playback = pace * fps > 1
        if self.playing or remaining == 0:
            self.playing = True
            return True
        buffered = frames_ready / fps
        next_block = pace * self._block_frames
        shortfall = remaining * max(0.0, pace - 1 / fps)
        waited = block.elapsed - self._first_elapsed
        needed = min(max(next_block, shortfall) + MARGIN_SECONDS, MAX_BUFFER_SECONDS)
        # Waiting for a block that takes longer than anybody is asked to wait would only hide the ones that are there.
        self.playing = buffered >= needed or waited + next_block > MAX_BUFFER_SECONDS
        return self.playing

    def _measure(self, block: FrameBlock, frames_ready: int) -> None:
        if block.index == 0:
            self._first_elapsed = block.elapsed
            self._first_frames = frames_ready
            # The first block has one frame less per latent than those after it, for the same work.
            run = block.run
            rest = run.num_frames - frames_ready
            self._block_frames = rest / (run.num_blocks - 1) if run.num_blocks > 1 else len(block.frames)
            if self._seconds_per_frame is None:
                work = block.denoise_seconds + block.decode_seconds or block.elapsed
                self._seconds_per_frame = work / max(1.0, self._block_frames)
        elif frames_ready > self._first_frames:
            self._seconds_per_frame = (block.elapsed - self._first_elapsed) / (frames_ready - self._first_frames)
