"""Settings of the single stages, put together from the sections in `settings.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from training.settings import (
    ClipSettings,
    NetworkSettings,
    OptimizerSettings,
    PromptSettings,
    RolloutSettings,
    ScoreSettings,
    StageSettings,
    require,
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
    """Extra loss weight near the subject, where the data set knows it; gone at 90 % of the stage."""

    def __post_init__(self) -> None:
        causal = self.attention == "causal"
        require(
            (self.forcing == "none") != causal,
            f"forcing {self.forcing!r} does not go with {self.attention} attention: bidirectional has 'none', causal "
            "has 'teacher' or 'diffusion'.",
        )
        require(self.forcing != "teacher" or not self.window_frames, "window_frames does not go with teacher forcing.")
        for length in (*self.lengths, self.clips.frames):
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
                len(phase) == len(self.lengths) + 2 and abs(sum(phase[1:]) - 1) < 1e-6,
                f"The curriculum's phase {list(phase)} must be a progress and {len(self.lengths) + 1} shares of sum 1.",
            )
        require(not self.curriculum or self.curriculum[0][0] == 0, "The curriculum must begin at progress 0.")
        for name in ("clean_blocks", "clean_level", "context_level"):
            require(0 <= getattr(self, name) <= 1, f"{name} is {getattr(self, name)}, but must be between 0 and 1.")


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
        for step in self.rollout.denoising_steps:
            index = self.solver_steps * (1 - step / 1000)
            require(
                self.solver_steps > 0 and abs(index - round(index)) < 1e-6,
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
    critic_optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(rate=4e-7, average_decay=0.0))
    generator_every: int = 5
    """The critic learns in every step, the generator in every so many."""
    critic_warmup: int = 0
    """Steps before the generator moves for the first time."""
    vae: str = ""
    """Folder of the Wan VAE, for long rollouts whose window begins with a re-encoded picture."""

    def __post_init__(self) -> None:
        require(self.generator_every >= 1, "generator_every must be at least 1.")
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
        require(self.penalty_scale > 0, "penalty_scale must be positive.")
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
