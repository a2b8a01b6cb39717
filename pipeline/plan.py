"""Memory plans: which parts of a model stay on the device, which come only when needed, and what is made smaller.

A plan is chosen among all combinations: of those that fit, the one whose measures cost least in sum. 8 bits for the
text cost least, then a text encoder that comes and goes, which is exact but makes each new prompt wait for gigabytes to
be moved; TAEHV, a shorter KV cache, 8 bits for the transformer; a text encoder on the CPU is exact, too, but takes many
seconds for each new prompt, so it costs most.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from pipeline.config import ModelSpec

if TYPE_CHECKING:
    from pipeline.memory import ModelNeeds

TextPlace = Literal["device", "offload", "cpu"]
"""`device`: the text encoder stays there. `offload`: it comes for a new prompt and leaves again. `cpu`: it does not."""

CARDS = (8, 12, 16, 24, 80)
"""Sizes of graphics cards in GB for which plans are shown."""

DRIVER_BYTES = 600_000_000
"""What the driver and the kernels' own memory take; a common figure, not measured here."""
SPARE_SHARE = 0.05
"""Share of a card that is lost between allocations; a common figure, too."""

SHORT_WINDOW, SHORT_SINKS = 12, (6, 3)
"""A smaller KV cache, in latent frames: with blocks of 3 it is a sink of two blocks, a recent one and the current one.
That comes nearest to the sink of 5 that flashdreams has for these weights, which were trained with none. A sink's keys
take room twice, so there is a smaller one, as LongLive has it, for where that decides. Models of smaller blocks are to
remember no less; all are rounded up to whole blocks."""

_PLACES: dict[TextPlace, str] = {"device": "on the device", "offload": "comes and goes", "cpu": "on the CPU"}

# What each measure costs, in no unit: only the order of sums matters.
_TEXT_COSTS: dict[tuple[TextPlace, bool], float] = {
    ("device", False): 0,
    ("device", True): 1.5,
    ("offload", False): 1.75,
    ("offload", True): 3.25,
    ("cpu", False): 5,
}
_TAEHV_COST, _WINDOW_COST, _FP8_COST = 2, 3, 4


@dataclass(frozen=True)
class Placement:
    """Where the parts of a model are, and in what form.

    Attributes:
        text_encoder: see `TextPlace`.
        text_fp8: the text encoder's weights are stored in 8 bits.
        fp8: so are the transformer's.
        taehv: frames are decoded by the small decoder.
        window_frames, sink_frames: of the KV cache, in latent frames; None: the model's own.
        start_tiled: what a clip starts from is encoded in tiles, which changes it a little. Costs nothing: it is only
            chosen where there would be no room for a start otherwise.
    """

    text_encoder: TextPlace = "device"
    text_fp8: bool = False
    fp8: bool = False
    taehv: bool = False
    window_frames: int | None = None
    sink_frames: int | None = None
    start_tiled: bool = False

    @property
    def cost(self) -> float:
        return (
            _TEXT_COSTS[self.text_encoder, self.text_fp8]
            + _TAEHV_COST * self.taehv
            + (_WINDOW_COST + 1 / self.sink_frames if self.sink_frames else 0)
            + _FP8_COST * self.fp8
        )

    @property
    def preset(self) -> dict[str, bool]:
        """Options of a request that should be on: without them there may be too little room."""
        return {name: True for name in ("taehv", "fp8") if getattr(self, name)}

    def fitted(self, spec: ModelSpec) -> ModelSpec:
        """The model with this KV cache."""
        if self.window_frames is None:
            return spec
        return replace(spec, window_frames=self.window_frames, sink_frames=self.sink_frames)

    def applied(self, starts: bool = False) -> dict[str, str]:
        """What of it a run should tell: nothing, if all is as the model has it.

        Args:
            starts: the run begins with a picture or a video.
        """
        told = {}
        if self.text_encoder != "device" or self.text_fp8:
            told["text encoder"] = f"{_PLACES[self.text_encoder]}{', 8 bits' if self.text_fp8 else ''}"
        if self.window_frames is not None:
            told["KV cache"] = f"{self.window_frames} latent frames"
        if starts and self.start_tiled:
            told["start"] = "encoded in tiles"
        return told

    def sentences(self) -> list[str]:
        """What it means for whoever uses the model; empty if nothing differs from the model as it is."""
        text = {
            ("device", True): "The text encoder's weights are stored in 8 bits.",
            ("offload", False): "The text encoder comes to the device for each new prompt and leaves again.",
            ("offload", True): "The text encoder, stored in 8 bits, comes for each new prompt and leaves again.",
            ("cpu", False): "The text encoder works on the CPU: a new prompt takes seconds.",
        }.get((self.text_encoder, self.text_fp8))
        said = [
            (text is not None, text),
            (self.taehv, "TAEHV decodes, which is a bit softer than the Wan VAE."),
            (
                self.window_frames is not None,
                f"The KV cache holds {self.window_frames} latent frames, {self.sink_frames} of them the clip's first.",
            ),
            (self.fp8, "The transformer's weights are stored in 8 bits."),
            (self.start_tiled, "A picture or video to start from is encoded in tiles, which changes it a little."),
        ]
        return [sentence for applies, sentence in said if applies and sentence is not None]


AS_THE_MODEL_HAS_IT = Placement()


@dataclass(frozen=True)
class MemoryPlan:
    """A placement and what it takes of the device, in bytes.

    Attributes:
        weights: of transformer and decoders, as they are stored.
        kv_cache: with the prompt's keys and values.
        text_encoder: what of it stays.
        decoder: what the decoder in use keeps from block to block.
        workspace: the most that any step takes besides. Of an offloaded text encoder's visit, what goes beyond the room
            that KV cache and decoder leave it: both are empty then.
        start: what encoding a picture or video to start from takes besides, once, before the first step. Plans are made
            without it: most clips have none.
        budget: of the device, less what the driver takes; None: unlimited.
    """

    placement: Placement
    weights: int
    kv_cache: int
    text_encoder: int
    decoder: int
    workspace: int
    start: int = 0
    budget: int | None = None

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.text_encoder + self.decoder + self.workspace

    @property
    def fits(self) -> bool:
        return self.budget is None or self.total <= self.budget

    @property
    def start_fits(self) -> bool:
        """Whether there is room to start from a picture or a video: before the decoder keeps anything."""
        return self.budget is None or self.total - self.workspace - self.decoder + self.start <= self.budget

    def as_dict(self) -> dict[str, Any]:
        """For JSON: bytes, and the sentences."""
        notes = self.placement.sentences()
        if self.fits and not self.start_fits:
            notes.append("To start from a picture or a video there may be too little memory.")
        return asdict(self) | {
            "total": self.total,
            "fits": self.fits,
            "start_fits": self.start_fits,
            "notes": notes,
        }


def without_losses(free: float) -> int:
    """What a plan may use of so many free bytes."""
    return int(free * (1 - SPARE_SHARE))


def usable(memory: float) -> int:
    """What a plan may use of a device with so many bytes in all."""
    return max(0, without_losses(memory) - DRIVER_BYTES)


def plan_for(needs: ModelNeeds, spec: ModelSpec, budget: int | None) -> MemoryPlan:
    """The plan of least cost that fits; if none does, the smallest.

    Args:
        needs: of the model.
        spec: its sizes.
        budget: bytes that may be used, see `usable`; None: there is no limit.
    """
    plans = [evaluated(needs, spec, placement, budget) for placement in placements(needs, spec)]
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        return min(plans, key=lambda plan: plan.total)
    chosen = min(fitting, key=lambda plan: (plan.placement.cost, plan.total))
    if chosen.start_fits:
        return chosen
    tiled = evaluated(needs, spec, replace(chosen.placement, start_tiled=True), budget)
    return tiled if tiled.start_fits else chosen


def placements(needs: ModelNeeds, spec: ModelSpec) -> Iterator[Placement]:
    """All there are for a model."""
    windows: list[tuple[int | None, int | None]] = [(None, None)]
    windows += [(short, sink) for short, sink in short_windows(spec.frames_per_block) if short < spec.window_frames]
    decoders = [False, True] if "taehv" in needs.decoders else [False]
    for (text, text_fp8), fp8, taehv, (window, sink) in product(_TEXT_COSTS, (False, True), decoders, windows):
        yield Placement(text, text_fp8, fp8, taehv, window, sink)


def short_windows(block: int) -> list[tuple[int, int]]:
    """Latent frames of smaller KV caches and of their sinks, for blocks of so many; a recent block fits in, too."""
    sinks = dict.fromkeys(block * math.ceil(sink / block) for sink in SHORT_SINKS)
    return [(block * math.ceil(max(SHORT_WINDOW, sink + 2 * block) / block), sink) for sink in sinks]


def evaluated(needs: ModelNeeds, spec: ModelSpec, placement: Placement, budget: int | None = None) -> MemoryPlan:
    """What a placement takes."""
    transformer, text = needs.transformer, needs.text_encoder
    decoder = needs.decoders["taehv" if placement.taehv else "vae"]
    text_weights = text.fp8_weights if placement.text_fp8 else text.weights
    denoising = max(transformer.working, transformer.fp8_working if placement.fp8 else 0)
    kv_cache = _kv_bytes(needs, spec, placement)
    encoding = max(text.working, text.fp8_working if placement.text_fp8 else 0)
    if placement.text_encoder == "cpu":
        encoding = 0
    elif placement.text_encoder == "offload":
        encoding += text_weights - kv_cache - decoder.kept
    return MemoryPlan(
        placement=placement,
        # Both decoders are loaded: which one works is up to each request.
        weights=(transformer.fp8_weights if placement.fp8 else transformer.weights)
        + sum(part.weights for part in needs.decoders.values()),
        kv_cache=kv_cache,
        text_encoder=text_weights if placement.text_encoder == "device" else 0,
        decoder=decoder.kept,
        workspace=max(denoising, decoder.working, encoding),
        start=needs.encoding_start_tiled if placement.start_tiled else needs.encoding_start,
        budget=budget,
    )


def _kv_bytes(needs: ModelNeeds, spec: ModelSpec, placement: Placement) -> int:
    # Keys and values of the window, and the sink's keys once more, unmoved: see `cache.LayerCache`.
    whole = 2 * spec.window_frames + spec.sink_frames
    if placement.window_frames is None or placement.sink_frames is None:
        return needs.transformer.kept
    smaller = 2 * placement.window_frames + placement.sink_frames
    return needs.transformer.kept - needs.kv_buffers + round(needs.kv_buffers * smaller / whole)
