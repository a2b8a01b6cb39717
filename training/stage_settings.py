"""Settings of the single stages, put together from the sections in `settings.py`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from training.settings import (
    ClipSettings,
    CriticOptimizerSettings,
    NetworkSettings,
    PromptSettings,
    RolloutSettings,
    ScoreSettings,
    StageSettings,
    require,
    within,
)


@dataclass(frozen=True, kw_only=True)
class FlowSettings(StageSettings):
    """Flow matching on real clips: the bidirectional teacher, and causal students by teacher or diffusion forcing."""

    clips: ClipSettings
    attention: Literal["bidirectional", "causal"]
    forcing: Literal["none", "teacher", "diffusion"]
    """`none`: one noise level a clip. `teacher`: the clean clip stands beside the noisy one. `diffusion`: every block
    has a level of its own."""
    block_frames: int = 1
    first_frame: bool = False
    """The first frame is a block of its own."""
    window_frames: int = 0
    """Frames a causal block may see; 0: all before it."""
    shift: float = 5.0
    lengths: tuple[int, ...] = ()
    """Latent frames of shorter windows that are learnt besides whole ones; a step on those takes more of them."""
    shifts: tuple[float, ...] = ()
    """Their shifts: short windows need less."""
    curriculum: tuple[tuple[float, ...], ...] = ()
    """[progress, share of each of `lengths`..., share of whole windows]: from that share of the steps on."""
    clean_blocks: float = 0.0
    """Diffusion forcing: share of blocks shown nearly clean, as context, and their highest level (0..1)."""
    clean_level: float = 0.12
    context_level: float = 0.0
    """Teacher forcing: highest noise level (0..1) of the clean half."""
    subject_weight: float = 0.0
    """Extra loss weight near the subject, where the data set knows it; later only as far as noise leaves it visible."""

    def __post_init__(self) -> None:
        causal = self.attention == "causal"
        require(
            (self.forcing == "none") != causal,
            f"forcing {self.forcing!r} does not go with {self.attention} attention: bidirectional has 'none', causal "
            "has 'teacher' or 'diffusion'.",
        )
        if not causal:
            self._refuse_causal_settings()
        within("block_frames", self.block_frames, 1, 10**5)
        require(
            self.window_frames == 0 or self.window_frames >= self.block_frames,
            f"window_frames is {self.window_frames}, but must be 0 or hold a block of {self.block_frames}.",
        )
        require(self.forcing != "teacher" or not self.window_frames, "window_frames does not go with teacher forcing.")
        require(
            self.forcing == "diffusion" or not (self.clips.still_windows or self.clips.empty_windows),
            "clips.still_windows and clips.empty_windows are for diffusion forcing: what they make up is never learnt.",
        )
        within("shift", self.shift, 1e-3, 1e3)
        for shift in self.shifts:
            within("shifts", shift, 1e-3, 1e3)
        for length in (*self.lengths, self.clips.frames):
            within("lengths", length, 1, self.clips.frames)
            require(
                length == 1 or (length - self.first_frame) % self.block_frames == 0,
                f"{length} frames do not divide into blocks of {self.block_frames}.",
            )
        require(
            len(self.shifts) == len(self.lengths),
            f"shifts has {len(self.shifts)} values for {len(self.lengths)} lengths.",
        )
        require(bool(self.lengths) == bool(self.curriculum), "lengths and curriculum go together.")
        for phase in self.curriculum:
            require(
                len(phase) == len(self.lengths) + 2 and min(phase) >= 0 and abs(sum(phase[1:]) - 1) < 1e-6,
                f"The curriculum's phase {list(phase)} must be a progress and {len(self.lengths) + 1} shares of sum 1.",
            )
        begins = [phase[0] for phase in self.curriculum]
        require(
            not begins or (begins[0] == 0 and begins == sorted(set(begins))),
            f"The curriculum's phases begin at {begins}, but must begin at 0 and rise.",
        )
        for name in ("clean_blocks", "clean_level", "context_level"):
            within(name, getattr(self, name), 0, 1)
        within("subject_weight", self.subject_weight, 0, 1e6)

    def _refuse_causal_settings(self) -> None:
        """What would do nothing was most likely meant for the other stage."""
        unused = {"first_frame", "window_frames", "clean_blocks", "clean_level", "context_level"}
        if not self.clips.later_windows:  # these begin with a block, whatever the attention
            unused.add("block_frames")
        for entry in fields(self):
            require(
                entry.name not in unused or getattr(self, entry.name) == entry.default,
                f"{entry.name} is for causal attention: a teacher has none.",
            )


@dataclass(frozen=True, kw_only=True)
class TeacherSettings(FlowSettings):
    """The bidirectional teacher."""

    attention: Literal["bidirectional"] = "bidirectional"
    forcing: Literal["none"] = "none"


@dataclass(frozen=True, kw_only=True)
class CausalSettings(FlowSettings):
    """A causal student that learns from real clips."""

    attention: Literal["causal"] = "causal"
    forcing: Literal["teacher", "diffusion"]


@dataclass(frozen=True, kw_only=True)
class OdePairsSettings(StageSettings):
    """Solve the teacher's probability-flow ODE for prompts, and keep the states at the student's timesteps."""

    rollout: RolloutSettings
    prompts: PromptSettings = field(default_factory=PromptSettings)
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    solver_steps: int = 48
    guidance: float = 5.0
    """c + guidance * (c - u): the authors' 6.0 in the form u + g * (c - u)."""

    def __post_init__(self) -> None:
        within("solver_steps", self.solver_steps, 1, 10**5)
        within("guidance", self.guidance, 0, 100)
        for step in self.rollout.denoising_steps:
            index = self.solver_steps * (1 - step / 1000)
            require(
                abs(index - round(index)) < 1e-6,
                f"The student's step {step:g} is none of the solver's {self.solver_steps} steps.",
            )


@dataclass(frozen=True, kw_only=True)
class OdeSettings(StageSettings):
    """Regression on the ODE's trajectories: the few-step start for Self-Forcing."""

    rollout: RolloutSettings
    pairs: str
    """Folder written by the stage `ode_pairs`."""


@dataclass(frozen=True, kw_only=True)
class DistillSettings(StageSettings):
    """What DMD, SiD and GAN share: a generator that rolls out, and a critic trained along."""

    rollout: RolloutSettings
    critic_optimizer: CriticOptimizerSettings = field(default_factory=CriticOptimizerSettings)
    generator_every: int = 5
    """The critic learns in every step, the generator in every so many."""
    critic_warmup: int = 0
    """Steps before the generator moves for the first time."""
    vae: str = ""
    """Folder of the Wan VAE, for long rollouts whose window begins with a re-encoded picture."""

    def __post_init__(self) -> None:
        within("generator_every", self.generator_every, 1, 10**9)
        within("critic_warmup", self.critic_warmup, 0, 10**9)
        require(
            bool(self.vae) or not self.rollout.long_share or self.rollout.long_window != "reencoded",
            "rollout.long_window 'reencoded' needs the Wan VAE's folder in vae.",
        )


@dataclass(frozen=True, kw_only=True)
class DMDSettings(DistillSettings):
    """Distribution matching with a real and a fake score; needs prompts only."""

    score: ScoreSettings
    prompts: PromptSettings = field(default_factory=PromptSettings)


@dataclass(frozen=True, kw_only=True)
class SiDSettings(DMDSettings):
    """Score identity distillation; needs prompts only."""

    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        within("alpha", self.alpha, 0, 100)


@dataclass(frozen=True, kw_only=True)
class GANSettings(DistillSettings):
    """A discriminator on the features of a diffusion network; needs real clips with captions."""

    clips: ClipSettings
    critic: NetworkSettings | None = None
    """The diffusion network. Default: begins as the generator."""
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    taps: tuple[int, ...]
    """Layers (from 0) whose features the discriminator reads; one register token for each."""
    shift: float = 5.0
    low: float = 20.0
    high: float = 980.0
    weight: float = 0.01
    critic_weight: float = 0.01
    relativistic: bool = False
    time_embedding: bool = False
    """Append ten times the time embedding to the register tokens."""
    r1_weight: float = 0.0
    r2_weight: float = 0.0
    """Of the penalties on the judge's slope at real and at rolled-out clips; `critic_weight` does not scale them."""
    penalty_scale: float = 0.01
    """Of the noise that nudges clips. The authors' value; in bfloat16 take more, or rounding is all that is seen."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            bool(self.taps) and list(self.taps) == sorted(set(self.taps)) and self.taps[0] >= 0,
            f"taps is {list(self.taps)}, but must be rising layer numbers.",
        )
        within("shift", self.shift, 1e-3, 1e3)
        within("low", self.low, 0, 1000)
        within("high", self.high, self.low, 1000)
        for name in ("weight", "critic_weight", "r1_weight", "r2_weight"):
            within(name, getattr(self, name), 0, 1e6)
        within("penalty_scale", self.penalty_scale, 1e-9, 1e3)
        rollout = self.rollout
        require(
            not rollout.switch_share,
            f"rollout.switch_share is {rollout.switch_share}, but a GAN has no real clips whose prompt changes: set it "
            "to 0.",
        )
        require(
            not rollout.long_share or rollout.long_window == "sink",
            "rollout.long_window 'reencoded' does not go with a GAN, since real clips have no re-encoded picture: use "
            "'sink', or set rollout.long_share to 0.",
        )
        require(
            self.clips.later_windows == rollout.long_share,
            f"clips.later_windows is {self.clips.later_windows} and rollout.long_share {rollout.long_share}, but they "
            "must be equal: the judge would tell real clips by the kind of their window.",
        )
        require(
            self.clips.frames == self.rollout.frames,
            f"clips.frames is {self.clips.frames}, but clips of the generator have {self.rollout.frames}.",
        )
