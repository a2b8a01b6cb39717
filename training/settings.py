"""The settings of every training stage, as frozen dataclasses that refuse what cannot work.

Times are in steps, noise levels and timesteps on the 0..1000 scale, lengths in latent frames unless said otherwise.
No size of any model has a default here: sizes stand in the files under `training/configs`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import ClassVar, Literal

from pipeline.cache import CacheWindow
from pipeline.errors import InvalidSettings


def require(condition: bool, sentence: str) -> None:
    """Raise `InvalidSettings` with the sentence unless the condition holds."""
    if not condition:
        raise InvalidSettings(sentence)


def within(name: str, value: float, low: float, high: float) -> None:
    """Raise `InvalidSettings` unless the value is a number between the two."""
    require(
        math.isfinite(value) and low <= value <= high,
        f"{name} is {value!r}, but must be between {low:g} and {high:g}.",
    )


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How long a stage runs, on what, and what it leaves behind."""

    out: str
    """Folder of checkpoints, metrics and, in the end, `transformer/`."""
    steps: int
    batch: int
    """Clips a step, over all processes."""
    micro_batch: int = 0
    """Clips a process takes through the network at once; 0: all of its share."""
    seed: int = 0
    minutes: float = 0.0
    """Stop after so much time in this start, with a checkpoint; 0: never."""
    schedule: Literal["steps", "minutes"] = "steps"
    """What the course of the rates is laid out for. `minutes`: as many steps as fit into `minutes`, estimated on the
    way; for comparisons in which everyone gets the same time. A curriculum follows `steps` all the same, and a run
    that is continued estimates anew, so it does not end with the weights of one that was not."""
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    """What networks compute in. Weights and optimisers stay in float32 (float64 for float64)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    noise: Literal["portable", "device"] = "portable"
    """`portable`: the same noise on every device and however the batch is cut. `device`: drawn where it is used, for
    small networks and large batches on a GPU, which would wait for the CPU."""
    workers: int = 0
    """Processes beside each training process that put its clips together ahead of time; 0: none."""
    keep_gathered: bool = False
    """One process alone keeps all weights gathered, a second copy of every network: for small ones, whose steps on a
    GPU would go by with gathering."""
    gradient_checkpointing: bool = False
    compile: bool = False
    """Compile the blocks of networks that learn: minutes once, then about a fifth less time a step on a CPU."""
    cpu_offload: bool = False
    """Keep weights and optimiser states in the main memory between uses."""
    checkpoint_every: int = 100
    sheet_every: int = 0
    """Steps between sample sheets in TensorBoard; 0: none."""
    sheet_clips: int = 4
    decoder: str = ""
    """Folder of the Wan VAE that decodes sample sheets."""

    def __post_init__(self) -> None:
        within("run.steps", self.steps, 1, 10**9)
        within("run.batch", self.batch, 1, 10**6)
        within("run.micro_batch", self.micro_batch, 0, self.batch)
        within("run.workers", self.workers, 0, 256)
        within("run.minutes", self.minutes, 0, 10**6)
        within("run.checkpoint_every", self.checkpoint_every, 1, 10**9)
        within("run.sheet_every", self.sheet_every, 0, 10**9)
        within("run.sheet_clips", self.sheet_clips, 1, 10**4)
        require(
            self.schedule == "steps" or self.minutes > 0,
            "run.schedule is 'minutes', but run.minutes is 0: say how many.",
        )
        require(bool(self.out), "run.out is empty, but must be a folder.")
        require(not self.sheet_every or bool(self.decoder), "run.sheet_every needs a decoder in run.decoder.")

    def check_processes(self, processes: int) -> None:
        """Every process must get the same number of clips, in parts of the same size."""
        share = self.batch // processes
        require(
            share * processes == self.batch,
            f"run.batch is {self.batch}, but must be a multiple of the {processes} processes.",
        )
        require(
            share % (self.micro_batch or share) == 0,
            f"run.micro_batch is {self.micro_batch}, but must divide the {share} clips of a process.",
        )


@dataclass(frozen=True, kw_only=True)
class NetworkSizes:
    """Sizes of a new transformer, in the names of its class."""

    num_attention_heads: int
    attention_head_dim: int
    ffn_dim: int
    num_layers: int
    freq_dim: int
    in_channels: int
    out_channels: int
    text_dim: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            within(f"network.sizes.{name}", value, 1, 10**6)
        for name in ("attention_head_dim", "freq_dim"):
            value = getattr(self, name)
            require(value % 2 == 0, f"network.sizes.{name} is {value}, but must be even: it holds sines and cosines.")
        require(
            self.out_channels == self.in_channels,
            f"network.sizes.out_channels is {self.out_channels}, but must be in_channels ({self.in_channels}): the "
            "flow has the shape of the clip.",
        )


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """Where a network comes from: a folder of weights, or sizes for a fresh one."""

    init: str = ""
    """A diffusers folder of the transformer, or a model folder that holds one as `transformer/`."""
    sizes: NetworkSizes | None = None

    def __post_init__(self) -> None:
        require(
            bool(self.init) != (self.sizes is not None),
            "network needs either init, a folder of weights, or sizes, for a fresh network.",
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """How one network's weights move. Defaults are the authors'."""

    kind: Literal["adamw", "muon"] = "adamw"
    """`muon`: orthogonalised momentum for the matrices in the blocks, AdamW for the rest."""
    rate: float = 2e-6
    matrix_rate: float = 1e-2
    """Of Muon."""
    betas: tuple[float, float] = (0.0, 0.999)
    weight_decay: float = 0.01
    clip: float = 10.0
    """Largest norm of the gradient."""
    warmup_steps: int = 0
    flat_until: float = 1.0
    """Share of the steps after which the rate falls linearly, and the share of the rate it falls to."""
    floor: float = 0.01
    average_decay: float = 0.99
    """Of the moving average of the weights, which is what a stage hands on. 0: no average, the weights themselves."""
    average_from: int = 0
    """First step that the average sees; until then it equals the weights."""

    section: ClassVar[str] = "optimizer"

    def __post_init__(self) -> None:
        for name, low, high in (
            ("rate", 0, 1),
            ("matrix_rate", 0, 1),
            ("weight_decay", 0, 1),
            ("clip", 1e-9, 1e9),
            ("flat_until", 0, 1),
            ("floor", 0, 1),
            ("average_decay", 0, 0.999999),
            ("warmup_steps", 0, 1e9),
            ("average_from", 0, 1e9),
        ):
            within(f"{self.section}.{name}", getattr(self, name), low, high)
        for beta in self.betas:
            within(f"{self.section}.betas", beta, 0, 0.999999)

    def scale(self, step: int, steps: int) -> float:
        """Factor of the rates at a step."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        progress = step / steps
        if progress < self.flat_until or self.flat_until == 1:
            return warm
        return warm * max(self.floor, (1 - progress) / (1 - self.flat_until))


@dataclass(frozen=True, kw_only=True)
class CriticOptimizerSettings(OptimizerSettings):
    """How the weights of whatever judges the generator move: the authors' critic is slower and has no average."""

    rate: float = 4e-7
    average_decay: float = 0.0

    section: ClassVar[str] = "critic_optimizer"


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """The frozen text encoder."""

    folder: str
    """Holds `text_encoder/` and `tokenizer/`, as a model folder does."""
    length: int
    """Rows of an embedding."""
    device: Literal["same", "cpu"] = "same"
    negative: str = ""
    """The text that guidance leads away from."""

    def __post_init__(self) -> None:
        within("text.length", self.length, 1, 10**5)


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """Clips to learn from: the procedural world's or one's own, encoded by `training.data` or `training.videos`."""

    folder: str
    frames: int
    """Latent frames of a whole window."""
    caption_drop: float = 0.1
    """Share of clips without a caption, so that guidance has something to compare with."""
    later_windows: float = 0.0
    """Share of windows that hold the clip's first block and then later ones, as a cache with a sink does."""
    still_windows: float = 0.0
    """Share of these in which nothing moves between the first block and the last one, which goes on from there."""
    empty_windows: float = 0.0
    """Share of these in which the subject is missing between them, and comes in with the last one. Clips whose subject
    never leaves stay as they are, as do one's own videos, of which no subject is known."""

    def __post_init__(self) -> None:
        within("clips.frames", self.frames, 1, 10**5)
        within("clips.caption_drop", self.caption_drop, 0, 1)
        within("clips.later_windows", self.later_windows, 0, 1)
        within("clips.still_windows", self.still_windows, 0, 1)
        within("clips.empty_windows", self.empty_windows, 0, 1 - self.still_windows)


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """How the student samples; the same values go into the model's `model_index.json`."""

    height: int
    """Of a latent frame, as is the width."""
    width: int
    block_frames: int
    num_blocks: int
    """Blocks of a clip as long as the window that is scored."""
    window_frames: int
    """Frames attention may see, current block and sink included."""
    sink_frames: int = 0
    positions: Literal["relative", "absolute"] = "relative"
    denoising_steps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    shift: float = 5.0
    context_noise: float = 0.0
    """Level at which finished blocks are written into the cache."""
    context_sigma: Literal["exact", "table"] = "exact"
    """Noise added to them: of exactly that level, or, as the authors do, of the table's row nearest to it."""
    exit_per_block: bool = False
    """An exit step for each block instead of one for the clip."""
    last_step_only: bool = False
    gradient_frames: int = 0
    """So many frames at the end of a clip have gradients; 0: as many as are scored."""
    cache_gradients: Literal["detached", "leaky"] = "detached"
    """`detached`: none through the cache, as the paper says. `leaky`: as the authors' code has it."""
    long_share: float = 0.0
    """Share of rollouts that are longer than the scored window, and how long those may get, in blocks."""
    long_blocks: tuple[int, int] = (0, 0)
    long_window: Literal["reencoded", "sink"] = "reencoded"
    """What is scored of a long one: its last frames, the first of them re-encoded from its picture, as the authors do;
    or sink and recent frames, as attention saw them."""
    switch_share: float = 0.0
    """Share of rollouts whose prompt changes at some block."""

    def __post_init__(self) -> None:
        for name in ("height", "width", "block_frames", "num_blocks", "window_frames"):
            within(f"rollout.{name}", getattr(self, name), 1, 10**5)
        for name in ("long_share", "switch_share"):
            within(f"rollout.{name}", getattr(self, name), 0, 1)
        within("rollout.shift", self.shift, 1e-3, 1e3)
        within("rollout.context_noise", self.context_noise, 0, 999)
        require(
            self.gradient_frames == 0 or self.gradient_frames >= self.block_frames,
            f"rollout.gradient_frames is {self.gradient_frames}, but must be 0 or at least the {self.block_frames} "
            "frames of a block.",
        )
        steps = self.denoising_steps
        require(
            bool(steps) and list(steps) == sorted(set(steps), reverse=True) and all(1 <= t <= 1000 for t in steps),
            f"rollout.denoising_steps is {list(steps)}, but must fall from at most 1000 to at least 1.",
        )
        try:
            window = self.window
        except ValueError as error:
            raise InvalidSettings(f"rollout: {error}.") from error
        require(
            window.window_frames % self.block_frames == 0 and window.sink_frames % self.block_frames == 0,
            "rollout.window_frames and rollout.sink_frames must be multiples of rollout.block_frames "
            f"({self.block_frames}).",
        )
        require(
            self.cache_gradients == "detached" or self.positions == "absolute" or not self.sink_frames,
            "rollout.cache_gradients 'leaky' needs rollout.positions 'absolute': a turned sink has no history.",
        )
        if self.long_share:
            low, high = self.long_blocks
            require(
                self.num_blocks < low <= high,
                f"rollout.long_blocks is {[low, high]}, but must rise and exceed the {self.num_blocks} blocks scored.",
            )
            require(
                self.long_window == "sink" or self.num_blocks > 1,
                "rollout.num_blocks is 1, but nothing of a long rollout would be scored: rollout.long_window "
                "'reencoded' leaves the window's first block out.",
            )
            require(
                self.long_window == "reencoded" or self.frames == self.window_frames > self.sink_frames > 0,
                "rollout.long_window 'sink' needs a sink and as many scored frames as window_frames.",
            )

    @property
    def window(self) -> CacheWindow:
        return CacheWindow(self.block_frames, self.window_frames, self.sink_frames, self.positions)

    @property
    def frames(self) -> int:
        """Frames of the scored window."""
        return self.block_frames * self.num_blocks

    @property
    def recorded_frames(self) -> int:
        """Frames at the end of a clip that have gradients."""
        return self.gradient_frames or self.frames


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """The score networks of DMD and SiD: a frozen teacher and a critic that learns the generator's clips."""

    teacher: NetworkSettings
    critic: NetworkSettings | None = None
    """Default: begins as the teacher."""
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    context: Literal["noised", "clean"] = "noised"
    """`noised`: the window is judged as a whole, all of it at one level, as the authors do. `clean`: one block of it,
    given those before it as the generator saw them: whether it goes on well, however good they are. That takes a causal
    teacher which has learnt from such context."""
    guidance: float = 3.0
    """c + guidance * (c - u), the authors' form; the critic has none."""
    fake_guidance: float = 0.0
    shift: float = 5.0
    low: float = 20.0
    high: float = 980.0

    def __post_init__(self) -> None:
        within("score.guidance", self.guidance, 0, 100)
        within("score.fake_guidance", self.fake_guidance, 0, 100)
        within("score.shift", self.shift, 1e-3, 1e3)
        require(
            self.context == "noised" or self.attention == "causal",
            "score.context 'clean' is for causal score networks: set score.attention to 'causal'.",
        )
        within("score.low", self.low, 0, 1000)
        within("score.high", self.high, self.low, 1000)


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """Prompts to learn from."""

    source: str = "world"
    """`world`: captions of the procedural world; otherwise a text file with a prompt in every line."""


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """What all stages share."""

    run: RunSettings
    network: NetworkSettings
    text: TextSettings
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
