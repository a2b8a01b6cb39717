"""The status line under the video, as HTML: where the run is, how fast it goes, what was really done."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape

from pipeline.blocks import FrameBlock, RunInfo


@dataclass
class RunMeter:
    """Counts what a run has produced, for the status line."""

    run: RunInfo
    blocks: int = 0
    frames: int = 0
    time_to_first_frame: float = 0.0
    notes: list[str] = field(default_factory=list)
    _first_frames: int = 0
    _last_elapsed: float = 0.0

    def count(self, block: FrameBlock) -> None:
        self.run = block.run
        self.blocks += 1
        self.frames += len(block.frames)
        self._last_elapsed = block.elapsed
        if self.blocks == 1:
            self.time_to_first_frame = block.elapsed
            self._first_frames = self.frames

    @property
    def generation_fps(self) -> float:
        """Frames made per second, leaving out what happens once per run."""
        if self.frames > self._first_frames and self._last_elapsed > self.time_to_first_frame:
            return (self.frames - self._first_frames) / (self._last_elapsed - self.time_to_first_frame)
        return self.frames / self._last_elapsed if self._last_elapsed > 0 else 0.0

    @property
    def share(self) -> float | None:
        """Share of the video that is made, 0 to 1; None if the pipeline does not say how long it will be."""
        return min(1.0, self.frames / self.run.num_frames) if self.run.num_frames else None


def idle(line: str) -> str:
    return _card("idle", "Ready", line)


def waiting(ahead: int) -> str:
    if ahead == 0:
        return _card("busy", "Starting", "The model reads your prompt.", share=0.0)
    runs = "1 run is" if ahead == 1 else f"{ahead} runs are"
    return _card("busy", "In the queue", f"{runs} ahead of yours. It starts by itself.", share=0.0)


def stopping() -> str:
    return _card("busy", "Stopping", "What is finished so far becomes your video.")


def stopped_early() -> str:
    return _card("idle", "Stopped", "Nothing was made yet.")


def generating(meter: RunMeter, *, buffering: bool = False) -> str:
    run = meter.run
    of_blocks = f" of {run.num_blocks}" if run.num_blocks else ""
    of_frames = f" of {run.num_frames}" if run.num_frames else ""
    line = f"Block {meter.blocks}{of_blocks} · {meter.frames}{of_frames} frames"
    return _card("busy", "Buffering" if buffering else "Generating", line, share=meter.share, meter=meter)


def finished(meter: RunMeter, *, stopped: bool = False) -> str:
    seconds = meter.frames / meter.run.fps
    line = f"{meter.frames} frames · {seconds:.2f} s of video"
    if stopped:
        return _card("done", "Stopped", f"{line}, all that was made", share=meter.share, meter=meter)
    return _card("done", "Finished", line, share=1.0, meter=meter)


def failed(message: str, meter: RunMeter | None = None) -> str:
    return _card("failed", "Failed", message, meter=meter)


def _card(state: str, headline: str, line: str, *, share: float | None = None, meter: RunMeter | None = None) -> str:
    parts = [f'<p class="sf-headline"><b>{escape(headline)}</b> <span>{escape(line)}</span></p>']
    if share is not None:
        percent = f"{100 * share:.1f}%"
        parts.append(f'<div class="sf-bar" aria-hidden="true"><i style="width:{percent}"></i></div>')
    elif state == "busy":
        parts.append('<div class="sf-bar sf-endless" aria-hidden="true"><i></i></div>')
    if meter is not None and meter.blocks:
        parts.append(_facts(meter))
    # Screen readers are told the headline only; the numbers change too often to be read out.
    return (
        f'<div class="sf-status sf-{state}"><span class="sf-sr" role="status" aria-live="polite">'
        f"{escape(headline)}</span>{''.join(parts)}</div>"
    )


def _facts(meter: RunMeter) -> str:
    run = meter.run
    keeps_up = meter.generation_fps >= run.fps
    facts = [
        ("First frame", f"{meter.time_to_first_frame:.2f} s", ""),
        ("Generation", f"{meter.generation_fps:.1f} FPS", "sf-good" if keeps_up else "sf-slow"),
        ("Playback", f"{run.fps:g} FPS", ""),
        ("Seed", str(run.seed) if run.seed >= 0 else "random", ""),
    ]
    cells = "".join(
        f'<div><dt>{label}</dt><dd class="{tone}">{escape(value)}</dd></div>' for label, value, tone in facts
    )
    chips = "".join(
        f"<li><span>{escape(option)}</span> {escape(str(value))}</li>" for option, value in run.applied.items()
    )
    notes = "".join(f'<p class="sf-note">{escape(note)}</p>' for note in meter.notes)
    return f'<dl class="sf-facts">{cells}</dl>{notes}' + (f'<ul class="sf-chips">{chips}</ul>' if chips else "")
