"""Proof on a GPU, without any download: random weights in the published shapes, every plan, every switch, ten runs.

    python scripts/prove_on_gpu.py --report runs/gpu-proof.json             # on the GPU
    python scripts/prove_on_gpu.py --small --device cpu                     # the same steps with a tiny model

No GPU has run this yet: it was written and tried on CPUs. Its floors, and the eight minutes that it is meant to take,
are estimates, and the report says so, until somebody has run it and puts in what was found.

Parts, in this order (`--parts` names some):

* `plans`: for cards of 8 to 80 GB, the plan that `--memory` would take, with torch kept to that much memory, and no
  more allocated than was planned and what plans spare of a card;
* `attention`: every backend forced, which must be called, and what `auto` measures;
* `growth`: memory after each of ten runs, with switches changing between them, torch.compile among them;
* `switches`: each must be applied, and off again give the first video back bit for bit; FP8 and torch.compile together;
* `start`: a clip that starts from a picture, with each decoder: made twice it is the same, and it takes no more memory
  than the plan says;
* `offload`: the text encoder made to come and go: the video is the same, and the memory that which is planned.

What is exact must come close to the plain video (`FLOORS`). What fails is told and the rest goes on; what this machine
lacks is `none`, neither passed nor failed. The last thing printed is a table; the exit code is 1 if a row failed, or if
none passed. Nothing else is said of the pictures: the weights are random. Takes 15 GB of disk and 30 GB of main memory
in the published shapes.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402

from pipeline import GenerationRequest, SelfForcingPipeline  # noqa: E402
from pipeline.attention_backends import BACKENDS, AttentionChoice, AttentionShapes, choose_attention  # noqa: E402
from pipeline.config import ModelSpec  # noqa: E402
from pipeline.device import dtype_name  # noqa: E402
from pipeline.errors import OptionUnavailable  # noqa: E402
from pipeline.float8 import form_on  # noqa: E402
from pipeline.folder import ModelFolder, index_entries  # noqa: E402
from pipeline.memory import GB, META, ModelNeeds, builders_of, rehearse  # noqa: E402
from pipeline.plan import (  # noqa: E402
    CARDS,
    DRIVER_BYTES,
    MemoryPlan,
    Placement,
    evaluated,
    plan_for,
    usable,
    without_losses,
)
from pipeline.start import Start  # noqa: E402
from scripts.prove_published import random_tensor, take_folder  # noqa: E402
from tests.hub import write_tokenizer  # noqa: E402
from tests.small import write_model_folder  # noqa: E402
from weights import blueprints  # noqa: E402
from weights.manifest import load_manifest  # noqa: E402

PROMPT = "a red balloon rises over the mountains"
WEIGHT_FILES = {"text_encoder": "model.safetensors"}
"""Part -> what its library calls the file; the others: diffusers' name."""
GROWTH_ALLOWED = {"cuda": 1 << 20, "cpu": 64 << 20}
"""Bytes from a kind's second run to its last. A process's memory on a CPU says little: allocators keep some."""
FLOORS = {"cuda": 20.0, "cpu": 40.0}
"""PSNR in dB that an exact variant must reach. Pictures of random weights that have nothing to do with each other have
about 10; bfloat16 rounds differently in each kernel, which the steps make larger. Not yet confirmed on a GPU."""
GROWTH_KINDS = 3
UNCONFIRMED = (
    "This proof was written without a GPU: its floors and its time limit are estimates that none has confirmed."
)


@dataclass
class Row:
    """What one case came to."""

    part: str
    case: str
    passed: bool | None
    """None: it cannot be tried on this machine."""
    seconds: float
    facts: dict[str, Any]
    error: str = ""

    def line(self) -> str:
        told = ", ".join(f"{name} {value}" for name, value in self.facts.items()) or self.error
        if self.facts and self.error:
            told = f"{self.error}; {told}"
        verdict = {True: "ok", False: "FAIL", None: "none"}[self.passed]
        return f"{verdict:<4} {self.part:<10}{self.case:<16}{self.seconds:>7.1f} s  {told}"


class Proof:
    """The rows so far, the model, and what every part needs.

    Args:
        folder: of the model.
        device: to run on.
        blocks: of each clip.
        runs: of `growth`.
        report: JSON file that is written anew after each row, so that whatever ends the script leaves it behind.
        minutes: cases that would begin later are left out, which fails them.
    """

    def __init__(
        self, folder: Path, device: torch.device, blocks: int, runs: int, report: Path | None, minutes: float
    ) -> None:
        self.folder, self.device, self.blocks, self.runs = folder, device, blocks, runs
        self.spec = ModelFolder(folder).spec
        self.report = report
        self.rows: list[Row] = []
        self._until = time.monotonic() + 60 * minutes
        self._pipe: SelfForcingPipeline | None = None
        self._needs: ModelNeeds | None = None

    def case(self, part: str, name: str, action: Callable[[], dict[str, Any]]) -> None:
        """Run a case; what it raises becomes a row, too.

        Args:
            action: returns facts. Two may be among them: `faults`, sentences that fail the case, and `not_here`, why it
                cannot be tried.
        """
        began = time.perf_counter()
        facts, error = {}, ""
        if time.monotonic() > self._until:
            error = "left out: the time is over"
        else:
            try:
                facts = action()
            except Exception as raised:
                error = _told(raised)
        error = error or "; ".join(facts.pop("faults", ()))
        passed = None if "not_here" in facts and not error else not error
        self.add(Row(part, name, passed, round(time.perf_counter() - began, 1), facts, error))
        self.clean()

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(row.line(), flush=True)
        if self.report is not None:
            self.report.write_text(json.dumps(self.as_dict(), indent=2) + "\n")

    def as_dict(self) -> dict[str, Any]:
        on_gpu = self.device.type == "cuda"
        return {
            "passed": any(row.passed for row in self.rows) and not self.count(False),
            "device": torch.cuda.get_device_name(self.device) if on_gpu else self.device.type,
            "torch": torch.__version__,
            "model": self.spec.name,
            "blocks": self.blocks,
            "remark": UNCONFIRMED,
            "rows": [asdict(row) for row in self.rows],
        }

    def count(self, passed: bool | None) -> int:
        return sum(row.passed is passed for row in self.rows)

    # ---- memory and runs

    def clean(self) -> None:
        """Let go of what nobody holds, and count peaks anew."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def held(self) -> int:
        """Bytes of living tensors on a GPU; of the process on a CPU."""
        gc.collect()
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return psutil.Process().memory_info().rss

    def peak(self) -> int | None:
        """Most bytes of tensors at once since the last `clean`; None on a CPU, where nobody counts them."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    def reserved(self) -> int | None:
        """As `peak`, with what was lost between allocations."""
        return torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else None

    def needs(self) -> ModelNeeds:
        if self._needs is None:
            with torch.inference_mode():
                self._needs = rehearse(builders_of(self.folder), self.spec, torch.bfloat16)
        return self._needs

    def against_plan(self, planned: int) -> tuple[dict[str, Any], list[str]]:
        """Facts on the peak so far, and a fault if it is above what was planned (bytes).

        Plans count the model's tensors. What kernels take to work in comes out of what a plan spares of a card.
        """
        peak, reserved = self.peak(), self.reserved()
        facts = {
            "planned_gb": in_gb(planned),
            "peak_gb": in_gb(peak),
            "peak_less_planned_gb": None if peak is None else in_gb(peak - planned),
            "reserved_gb": in_gb(reserved),
        }
        above = peak is not None and without_losses(peak) > planned
        return facts, [f"{in_gb(peak)} GB were allocated, {in_gb(planned)} planned"] if above else []

    def load(self, **settings: Any) -> SelfForcingPipeline:
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return SelfForcingPipeline.from_pretrained(self.folder, self.device, dtype, **settings)

    def pipe(self) -> SelfForcingPipeline:
        """Everything on the device, loaded at the first use: reading the text encoder takes longer than a clip."""
        if self._pipe is None:
            self._pipe = self.load()
        return self._pipe

    def drop_pipe(self) -> None:
        """Let go of it, for a case that loads the model in another way and counts memory."""
        self._pipe = None
        self.clean()

    def request(self, blocks: int, **changes: Any) -> GenerationRequest:
        seconds = self.spec.frames_in(blocks) / self.spec.fps
        return replace(GenerationRequest(prompt=PROMPT, seed=7, seconds=seconds), **changes)

    def make(
        self, pipe: SelfForcingPipeline, blocks: int | None = None, **changes: Any
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """A clip, and facts: what was applied, the first frame's and the rest's speed."""
        blocks = blocks or self.blocks
        video = pipe.generate(self.request(blocks, **changes))
        later = self.spec.frames_in(blocks) - self.spec.frames_in(1)
        fps = round(later / (video.elapsed - video.time_to_first_frame), 1) if later else None
        applied = {name: video.run.applied[name] for name in ("precision", "attention", "decoder", "compile")}
        return video.frames, {**applied, "first_frame_s": round(video.time_to_first_frame, 2), "later_fps": fps}

    def below_floor(self, frames: np.ndarray, plain: np.ndarray) -> list[str]:
        """A fault, if what should be the same clip but for rounding is another."""
        reached, floor = psnr(frames, plain), FLOORS[self.device.type]
        return [] if reached is None or reached >= floor else [f"{reached} dB, where exact ones reach {floor:g}"]


def prove_plans(proof: Proof) -> None:
    """Each card's plan makes a clip in that card's memory."""
    proof.drop_pipe()
    needs = proof.needs()
    total = torch.cuda.mem_get_info(proof.device)[1] if proof.device.type == "cuda" else None

    def run(plan: MemoryPlan, size: int) -> dict[str, Any]:
        if total is not None:  # the driver takes its share of a card, but not of what torch may have
            torch.cuda.set_per_process_memory_fraction(min(1.0, (size * GB - DRIVER_BYTES) / total), proof.device)
        try:
            placement = plan.placement
            pipe = proof.load(placement=placement)
            _, facts = proof.make(pipe, **placement.preset)
            memory, faults = proof.against_plan(plan.total)
        finally:
            if total is not None:
                torch.cuda.set_per_process_memory_fraction(1.0, proof.device)
        return {
            **memory,
            "fits": plan.fits,
            **facts,
            **placement.applied(),
            "faults": faults + ([] if plan.fits else ["the plan does not fit"]),
        }

    for size in CARDS:
        if total is not None and size * GB > 1.05 * total:
            absent = {"not_here": f"this card has {total / GB:.0f} GB"}
            proof.case("plans", f"{size} GB", lambda absent=absent: absent)
            continue
        plan = plan_for(needs, proof.spec, usable(size * GB))
        proof.case("plans", f"{size} GB", lambda plan=plan, size=size: run(plan, size))


def prove_attention(proof: Proof) -> None:
    """`auto`, and each backend by name: a clip with it, compared with that of torch's own choice."""
    pipe = proof.pipe()
    shapes = AttentionShapes.of(pipe._transformer.config, proof.spec)
    chosen = pipe.attention

    def use(choice: AttentionChoice) -> None:
        pipe.attention = choice
        pipe._transformer.use_attention(choice.kernel)

    use(AttentionChoice())
    plain, _ = proof.make(pipe)

    def run(name: str) -> dict[str, Any]:
        try:
            choice = choose_attention(name, shapes, proof.device, pipe._transformer.dtype)
        except OptionUnavailable as why:
            return {"not_here": str(why).partition(". What can")[0]}
        calls: list[int] = []
        if kernel := choice.kernel:
            choice = replace(choice, kernel=lambda *arguments: calls.append(1) or kernel(*arguments))
        use(choice)
        frames, facts = proof.make(pipe)
        faults = [] if BACKENDS[choice.name].approximate else proof.below_floor(frames, plain)
        if kernel and not calls:
            faults.append("its kernel was never called")
        if name != "auto" and not facts["attention"].startswith(BACKENDS[name].title):
            faults.append(f"{facts['attention']} attended")
        measured = {"milliseconds": choice.milliseconds, "unusable": choice.unusable}
        return {**facts, "psnr": psnr(frames, plain), **(measured if name == "auto" else {}), "faults": faults}

    for name in ("auto", *BACKENDS):
        if name == "math" and proof.device.type == "cuda" and shapes.queries * max(shapes.keys) > 10**8:
            proof.case("attention", name, lambda: {"not_here": "its scores alone would take gigabytes"})
            continue
        proof.case("attention", name, lambda name=name: run(name))
    use(chosen)


def prove_growth(proof: Proof) -> None:
    """Memory after each run. Three kinds of run take turns, and each is compared with its own earlier ones."""
    compiles = "compile" not in proof.pipe().unavailable_options()
    kinds: list[dict[str, bool]] = [{}, {"taehv": True, "compile": compiles}, {"fp8": True}]
    assert len(kinds) == GROWTH_KINDS

    def run() -> dict[str, Any]:
        pipe, held = proof.pipe(), []
        for index in range(proof.runs):
            proof.make(pipe, min(2, proof.blocks), seed=index, **kinds[index % GROWTH_KINDS])
            held.append(proof.held())
        by_kind = [held[first::GROWTH_KINDS] for first in range(GROWTH_KINDS)]
        grown = max(max(0, counts[-1] - counts[1]) for counts in by_kind)
        allowed = GROWTH_ALLOWED[proof.device.type]
        return {
            "held_mb": [round(count / 2**20) for count in held],
            "largest_growth_bytes": grown,
            "compile": "among them" if compiles else "not here",
            "faults": [] if grown <= allowed else [f"memory grew by more than {allowed} bytes"],
        }

    proof.case("growth", f"{proof.runs} runs", run)


def prove_switches(proof: Proof) -> None:
    """Each switch changes the clip, and switched off gives the first one back."""
    pipe = proof.pipe()
    plain, facts = proof.make(pipe)
    proof.case("switches", "none", lambda: facts | {"faults": wrongly_applied(pipe, (), facts)})
    unavailable = pipe.unavailable_options()

    def run(*names: str) -> dict[str, Any]:
        if missing := [unavailable[name] for name in names if name in unavailable]:
            return {"not_here": missing[0]}
        began = time.perf_counter()
        proof.make(pipe, **dict.fromkeys(names, True))  # what happens only once
        prepared = time.perf_counter() - began
        frames, facts = proof.make(pipe, **dict.fromkeys(names, True))
        peak = proof.peak()
        back, _ = proof.make(pipe)
        same = bool(np.array_equal(back, plain))
        faults = wrongly_applied(pipe, names, facts) + ([] if same else ["the first video does not come back"])
        if set(names) == {"compile"}:
            faults += proof.below_floor(frames, plain)
        return {
            **facts,
            "first_run_s": round(prepared, 1),
            "psnr": psnr(frames, plain),
            "peak_gb": in_gb(peak),
            "comes_back": same,
            "faults": faults,
        }

    for names in (("fp8",), ("taehv",), ("compile",), ("fp8", "compile")):
        proof.case("switches", "+".join(names), lambda names=names: run(*names))


def prove_start(proof: Proof) -> None:
    """A clip that starts from a picture is another one, the same each time, and leaves the plain one as it was."""
    pipe = proof.pipe()
    plain, _ = proof.make(pipe)

    def run(taehv: bool) -> dict[str, Any]:
        proof.clean()  # peaks are counted from here: what the clip before took is not this one's
        switches = {"taehv": True} if taehv else {}
        frames, facts = proof.make(pipe, start=picture(proof.spec), **switches)
        plan = evaluated(proof.needs(), proof.spec, Placement(taehv=taehv))
        encoding = plan.total - plan.workspace - plan.decoder + plan.start
        memory, faults = proof.against_plan(max(plan.total, encoding))
        again, _ = proof.make(pipe, start=picture(proof.spec), **switches)
        unstarted, _ = proof.make(pipe, **switches)
        back, _ = proof.make(pipe)
        if not np.array_equal(frames, again):
            faults.append("it is another one the second time")
        if np.array_equal(frames[-len(unstarted) + 1 :], unstarted[1:]):
            faults.append("the picture changes nothing")
        if not np.array_equal(back, plain):
            faults.append("the first video does not come back")
        return {**memory, **facts, "frames": len(frames), "faults": faults}

    for taehv in (False, True):
        proof.case("start", "picture+taehv" if taehv else "picture", lambda taehv=taehv: run(taehv))


def prove_offload(proof: Proof) -> None:
    """The text encoder, forced to come for each prompt and to leave, makes the same video in less memory."""

    def run(text_fp8: bool) -> dict[str, Any]:
        placement = Placement(text_encoder="offload", text_fp8=text_fp8)
        kept, _ = proof.make(proof.pipe()) if not text_fp8 else (None, None)
        proof.drop_pipe()
        pipe = proof.load(placement=placement)
        frames, facts = proof.make(pipe)
        again, _ = proof.make(pipe)
        memory, faults = proof.against_plan(evaluated(proof.needs(), proof.spec, placement).total)
        where = {tensor.device.type for tensor in pipe.text.model.parameters()}
        if where != {"cpu"}:
            faults.append(f"the text encoder stayed on {', '.join(sorted(where))}")
        if not np.array_equal(frames, again):
            faults.append("it is another one the second time")
        if kept is not None and not np.array_equal(frames, kept):
            faults.append("the video is another one than with the text encoder on the device")
        return {**memory, **facts, **placement.applied(), "faults": faults}

    for text_fp8 in (False, True):
        proof.case("offload", "text in 8 bits" if text_fp8 else "text", lambda text_fp8=text_fp8: run(text_fp8))


def picture(spec: ModelSpec) -> Start:
    """A smooth picture of the model's size with some noise in it."""
    y, x = np.mgrid[0 : spec.height, 0 : spec.width]
    noise = np.random.default_rng(0).integers(0, 40, (spec.height, spec.width))
    colours = [x * 200 // spec.width + noise, y * 200 // spec.height + noise, 200 - x * 200 // spec.width]
    return Start(kind="image", frames=np.stack(colours, -1).astype(np.uint8)[None])


def wrongly_applied(pipe: SelfForcingPipeline, names: Sequence[str], applied: dict[str, Any]) -> list[str]:
    """A fault for each switch that was asked for and did not do what it does on this device.

    8-bit weights can be computed with, and so compiled, from capability 8.9 on and with torchao; else only the decoder
    is. That torchao is there, and fails when it is tried, is a fault.
    """
    dtype = pipe._transformer.dtype
    form = form_on(pipe.device, dtype, trial=lambda device: None)
    fp8, whole = "fp8" in names, "fp8" not in names or form.row_wise
    wanted = {
        "precision": form.precision(dtype) if fp8 else dtype_name(dtype),
        "decoder": "TAEHV" if "taehv" in names else "Wan VAE",
        "compile": ("on" if whole else "the decoder only, because of FP8") if "compile" in names else "off",
    }
    return [f"{name} is {applied[name]!r}, not {what!r}" for name, what in wanted.items() if applied[name] != what]


PARTS = {
    "plans": prove_plans,
    "attention": prove_attention,
    "growth": prove_growth,
    "switches": prove_switches,
    "start": prove_start,
    "offload": prove_offload,
}


def _told(error: Exception) -> str:
    """The first line of an error."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def in_gb(count: int | None) -> float | None:
    """Of 2^30 bytes, as cards have them; None stays None."""
    return None if count is None else round(count / GB, 2)


def psnr(frames: np.ndarray, plain: np.ndarray) -> float | None:
    """In dB; None where both are equal."""
    error = float(((frames.astype(np.float32) - plain) ** 2).mean())
    return None if error == 0 else round(float(10 * np.log10(255**2 / error)), 1)


def write_published(folder: Path, name: str) -> None:
    """A model folder in the shapes of a manifest's model, bfloat16, with random weights."""
    model = load_manifest().model(name)
    for part, build in blueprints.builders_of(model).items():
        with META:
            network = build()
        target = folder / part
        target.mkdir(parents=True)
        config = network.config
        if hasattr(config, "save_pretrained"):
            config.save_pretrained(target)
        else:
            network.save_config(target)
        file = target / WEIGHT_FILES.get(part, "diffusion_pytorch_model.safetensors")
        save_file(random_state(network), file, metadata={"format": "pt"})
    write_tokenizer(folder / "tokenizer")
    index = {**index_entries(), "settings": dict(model.settings)}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def random_state(network: nn.Module) -> dict[str, torch.Tensor]:
    """Weights for a network without content; what has two names is written once."""
    shared = {"encoder.embed_tokens.weight"}
    return {
        name: random_tensor(name, tuple(tensor.shape), torch.bfloat16)
        for name, tensor in network.state_dict().items()
        if name not in shared
    }


def with_index(name: str) -> torch.device:
    """The device of a name; of `cuda`, the current one by its number, without which torch limits no memory."""
    device = torch.device(name)
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "gpu-proof", help="folder for the random model")
    parser.add_argument("--report", type=Path, help="JSON to write, after each row")
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:1 or cpu")
    parser.add_argument("--model", default="self-forcing-dmd", help="entry of the manifest whose shapes are taken")
    parser.add_argument("--small", action="store_true", help="a tiny model instead, to try the script")
    parser.add_argument("--blocks", type=int, help="of each clip (default: as many as the window holds)")
    parser.add_argument("--runs", type=int, default=10, help="of the part `growth` (default: 10)")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=7.5, help="no case begins later than this (default: 7.5)")
    options = parser.parse_args(argv)
    options.parts = options.parts.split(",")
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"there is no part {unknown[0]!r}")
    if options.runs < 3 * GROWTH_KINDS:  # a kind's first run is not compared
        least = f"--runs must be at least {3 * GROWTH_KINDS}"
        parser.error(f"growth compares {GROWTH_KINDS} kinds of run with themselves: {least}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no GPU here; --small --device cpu tries the script without one")
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the proof. Returns 0, or 1 if a row failed."""
    options = parse(argv)
    began = time.monotonic()
    take_folder(options.work)
    folder = options.work / "model"
    if options.small:
        write_model_folder(folder)
    else:
        write_published(folder, options.model)
    spec = ModelFolder(folder).spec
    built = time.monotonic() - began
    print(f"{spec.name} with random weights, written in {built:.0f} s\n{UNCONFIRMED}", flush=True)
    blocks = options.blocks or spec.window_frames // spec.frames_per_block
    if options.report is not None:
        options.report.parent.mkdir(parents=True, exist_ok=True)
    device, minutes = with_index(options.device), options.minutes - built / 60
    proof = Proof(folder, device, blocks, options.runs, options.report, minutes)
    for part in options.parts:
        try:
            PARTS[part](proof)
        except Exception as error:  # between its cases
            proof.add(Row(part, "itself", False, 0.0, {}, _told(error)))
        proof.clean()
    print("\n" + "\n".join(row.line() for row in proof.rows))
    counts = f"{proof.count(False)} failed, {proof.count(None)} not here"
    print(f"{len(proof.rows)} rows, {counts}, {(time.monotonic() - began) / 60:.1f} minutes")
    return 0 if proof.as_dict()["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
