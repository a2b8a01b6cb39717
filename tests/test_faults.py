"""Faults injected wherever one can occur: the run at hand ends with a clear word, the next one is as good as new.

Most of it runs a small random model, because a scripted one has no caches, weights or memory that a fault could spoil.
"""

from __future__ import annotations

import ast
import ctypes
import errno
import gc
import hashlib
import itertools
import logging
import os
import stat
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.exc import InternalTorchDynamoError

from pipeline import GenerationRequest, SelfForcingPipeline, cache, generator, jobs, options, stored_layers, video
from pipeline.attention import attention
from pipeline.blocks import FrameBlock, RunInfo
from pipeline.cache import KVCache
from pipeline.errors import NonFiniteOutput, OptionUnavailable, OutOfMemory, SelfForcingError, VideoError, WeightsError
from pipeline.jobs import QUEUE_BLOCKS
from pipeline.mp4 import count_frames
from pipeline.video import SegmentEncoder, join_segments
from pipeline.worker import ModelWorker, Run
from tests.resources import resident_bytes
from tests.scripted import SPEC, ScriptedPipeline
from tests.small import write_model_folder
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parent.parent
STEPS = 4
FPS = 12


def request(num_blocks: int = 7, **changes: Any) -> GenerationRequest:
    """A request that comes to so many blocks of the small model; TAEHV, because it is the faster decoder."""
    values = {"prompt": "a red balloon rises over the mountains", "seed": 7, "fps": FPS, "taehv": True}
    return GenerationRequest(**(values | {"seconds": (12 * num_blocks - 3) / FPS} | changes))


BRIEF = request(4)
"""Enough blocks to fill the small model's window and turn its sink."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pipe(folder: Path) -> SelfForcingPipeline:
    return SelfForcingPipeline.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def worker(pipe: SelfForcingPipeline) -> Iterator[ModelWorker]:
    """What all tests spoil in turn; so each begins with what the one before left behind."""
    with ModelWorker(pipe) as worker:
        yield worker


@pytest.fixture(scope="module")
def alone(folder: Path) -> Callable[[GenerationRequest], np.ndarray]:
    """The frames of a request as the first run of a freshly loaded pipeline makes them."""
    known: dict[GenerationRequest, np.ndarray] = {}

    def frames_of(request: GenerationRequest) -> np.ndarray:
        if request not in known:
            known[request] = SelfForcingPipeline.from_pretrained(folder, device="cpu").generate(request).frames
        return known[request]

    return frames_of


def joined(blocks: list[FrameBlock]) -> np.ndarray:
    return np.concatenate([block.frames for block in blocks])


def made(worker: ModelWorker, request: GenerationRequest) -> np.ndarray:
    return joined(list(worker.submit(request)))


def failed(run: Run, error: type[SelfForcingError], said: str) -> list[FrameBlock]:
    """The blocks of a run that ends with this error."""
    blocks: list[FrameBlock] = []
    with pytest.raises(error, match=said):
        blocks.extend(run)
    return blocks


def transformer_of(pipe: SelfForcingPipeline) -> nn.Module:
    return pipe._transformer.apply(fp8=False, compile=False)


def decoder_of(pipe: SelfForcingPipeline, taehv: bool = True) -> nn.Module:
    """A module that is called once per block (TAEHV) or latent frame (Wan) and puts out pixels."""
    return pipe._decoders[True]._taehv.decoder[-1] if taehv else pipe._decoders[False]._vae.decoder


@dataclass
class Calls:
    number: int = 0


@contextmanager
def at_call(module: nn.Module, number: int, act: Callable[[torch.Tensor], Any]) -> Iterator[Calls]:
    """While open, `act(output)` happens in the module's call of this number; what it returns replaces the output."""
    calls = Calls()

    def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> Any:
        calls.number += 1
        return act(output) if calls.number == number + 1 else None

    handle = module.register_forward_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()


def raiser(error: BaseException) -> Callable[..., Any]:
    def act(*_: Any) -> None:
        raise error

    return act


def tensor_bytes() -> int:
    """Memory of all tensors that Python can reach."""
    gc.collect()
    tensors = (item for item in gc.get_objects() if type(item) in (torch.Tensor, nn.Parameter))
    return sum(
        storage.nbytes() for storage in {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}.values()
    )


# ---- G1: out of memory at any point

ADVICE = "out of memory. Switch FP8 or TAEHV on"


def no_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 23.5 GiB at /srv/secret")


STEP_PLACES = [(block, step) for block in range(7) for step in range(STEPS)]


@pytest.mark.parametrize("layer", [0, 1])
def test_out_of_memory_in_any_step_spoils_that_run_only(pipe, worker, alone, layer: int) -> None:
    """7 blocks x 4 steps, with the cache of the layers before already written and of those behind not."""
    assert len(STEP_PLACES) == 28
    expected = alone(request())
    for block, step in STEP_PLACES[layer::2]:
        with at_call(transformer_of(pipe).blocks[layer], STEPS * block + step, raiser(no_memory())):
            blocks = failed(worker.submit(request()), OutOfMemory, ADVICE)
        assert len(blocks) == block, "what was finished before still arrives"
        assert not blocks or np.array_equal(joined(blocks), expected[: 12 * block - 3])
        assert np.array_equal(made(worker, request()), expected), (block, step)


def test_out_of_memory_around_the_steps_spoils_that_run_only(pipe, worker, alone, monkeypatch) -> None:
    """While the text is encoded, in a context pass of its own, while decoding, and on the way to 8 bits."""
    text, other = request(2, prompt="the car"), request(2)
    pipe.text._embeddings.clear()
    with at_call(pipe.text.model, 0, raiser(no_memory())):
        assert failed(worker.submit(text), OutOfMemory, ADVICE) == []
    assert np.array_equal(made(worker, text), alone(text)), "the failed embedding was not remembered"

    with monkeypatch.context() as patch, at_call(transformer_of(pipe), STEPS, raiser(no_memory())):
        patch.setattr(pipe, "merge_clean_pass", False)
        assert len(failed(worker.submit(other), OutOfMemory, ADVICE)) == 1
    assert np.array_equal(made(worker, other), alone(other))

    for wan in (replace(other, taehv=False), other):
        with at_call(decoder_of(pipe, wan.taehv), 1, raiser(no_memory())):
            failed(worker.submit(wan), OutOfMemory, ADVICE)
        assert np.array_equal(made(worker, wan), alone(wan))

    with monkeypatch.context() as patch:
        patch.setattr(generator, "to_uint8", raiser(no_memory()))
        assert failed(worker.submit(other), OutOfMemory, ADVICE) == []
    assert np.array_equal(made(worker, other), alone(other))


def test_out_of_memory_while_weights_are_cast_leaves_no_half_cast_model(worker, alone, monkeypatch) -> None:
    round_rows, casts = stored_layers.stored_rows, itertools.count()

    def limited(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if next(casts) == 5:
            raise no_memory()
        return round_rows(*args)

    expected = alone(BRIEF)
    with monkeypatch.context() as patch:
        patch.setattr(stored_layers, "stored_rows", limited)
        failed(worker.submit(replace(BRIEF, fp8=True)), OutOfMemory, ADVICE)
    assert next(casts) > 5
    assert np.array_equal(made(worker, BRIEF), expected)
    assert np.array_equal(made(worker, replace(BRIEF, fp8=True)), alone(replace(BRIEF, fp8=True)))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
    ids=["python", "cpu", "apple", "library"],
)
def test_out_of_memory_is_recognised_by_every_name(pipe, worker, error: Exception) -> None:
    with at_call(transformer_of(pipe), 1, raiser(error)):
        failed(worker.submit(BRIEF), OutOfMemory, ADVICE)


@pytest.mark.parametrize("source", ["run", "load"])
def test_failed_runs_are_forgotten_by_all_but_whoever_caught_the_error(source: str) -> None:
    """An error knows the frames it went through, and with them the run and what was made of it so far."""
    pipeline = ScriptedPipeline(spec=replace(SPEC, height=24, width=64))
    errors, asked, runs = [], [], []
    with ModelWorker(pipeline if source == "run" else raiser(SelfForcingError("There is no model."))) as worker:
        for _ in range(3):
            pipeline.faults[1, 1] = SelfForcingError("It broke.")
            run = worker.submit(GenerationRequest(prompt="x", seconds=4))
            with pytest.raises(SelfForcingError) as caught:
                list(run)
            runs.append(weakref.ref(run))
            errors.append(len(caught.traceback))
            del run, caught
            if source == "load":
                with pytest.raises(SelfForcingError) as caught:
                    worker.wait_ready(5)
                asked.append(len(caught.traceback))
        wait_until(lambda: not worker.busy)
        gc.collect()
        assert [run() for run in runs] == [None] * 3
        assert len(set(errors)) == 1 and len(set(asked)) <= 1, "no trace grows from run to run"


@pytest.mark.parametrize(
    ("error", "told"), [(no_memory(), OutOfMemory), (InternalTorchDynamoError("no"), OptionUnavailable)]
)
def test_a_failed_run_gives_its_memory_back_even_while_its_error_is_kept(pipe, worker, error, told) -> None:
    made(worker, BRIEF)
    before = tensor_bytes()

    def allocate_and_fail(_output: torch.Tensor) -> None:
        tensors = [torch.ones(1000, 1000)]
        raise error if tensors else AssertionError

    with at_call(transformer_of(pipe).blocks[0], 5, allocate_and_fail), pytest.raises(told) as caught:
        list(worker.submit(BRIEF))
    assert isinstance(caught.value, told)
    assert tensor_bytes() - before < 100_000


def test_the_other_decoder_makes_room_for_the_advised_one(folder: Path, caplog) -> None:
    """After an OutOfMemory with Wan's decoder, a run with TAEHV must not share the device with what the first left."""
    caplog.set_level(logging.CRITICAL, "pipeline.failures")  # pytest would keep the trace and all that belongs to it
    with ModelWorker(SelfForcingPipeline.from_pretrained(folder, device="cpu")) as worker:
        made(worker, BRIEF)
        lean = tensor_bytes()
        pipe = worker.wait_ready()
        with at_call(decoder_of(pipe, taehv=False), 5, raiser(no_memory())):
            failed(worker.submit(replace(BRIEF, taehv=False)), OutOfMemory, ADVICE)
        made(worker, BRIEF)
        assert tensor_bytes() - lean < 1000


def test_twenty_out_of_memory_in_a_row_leave_threads_and_memory_flat(pipe, worker, alone) -> None:
    sizes, threads = [], []
    for number in range(20):
        with at_call(transformer_of(pipe), number, raiser(no_memory())):
            failed(worker.submit(request()), OutOfMemory, ADVICE)
        sizes.append(resident_bytes())
        threads.append(threading.active_count())
    assert len(set(threads)) == 1
    assert sizes[-1] - sizes[4] < 20e6, "the first few may still fill pools"
    assert np.array_equal(made(worker, request()), alone(request()))


# ---- G2: NaN and infinities

INVALID = [(block, value) for block in range(7) for value in (float("nan"), float("inf"), float("-inf"))]


def spoiled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def act(output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[(-1,) * output.ndim] = value
        return output

    return act


@contextmanager
def spoiled_cache(pipe: SelfForcingPipeline, block: int, value: float) -> Iterator[None]:
    """One number in the cache as the block's second step reads it: of the oldest frame in sight, if there is one."""
    due = []

    def attend(query: torch.Tensor, key: torch.Tensor, values: torch.Tensor, *rest: Any) -> torch.Tensor:
        if due:
            values[0, -1, 0, 0] = due.pop()  # a view: this is the cache itself
        return attention(query, key, values, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "attention", attend)
        with at_call(transformer_of(pipe), STEPS * block, lambda _: due.append(value)):
            yield


def spoiled_at(pipe: SelfForcingPipeline, stage: str, block: int, value: float) -> Any:
    if stage == "cache":
        return spoiled_cache(pipe, block, value)
    if stage == "latent":
        return at_call(transformer_of(pipe), STEPS * block + STEPS - 1, spoiled(value))
    if stage == "pixels of TAEHV":
        return at_call(decoder_of(pipe), block, spoiled(value))
    return at_call(decoder_of(pipe, taehv=False), 3 * block + 1, spoiled(value))


@pytest.mark.parametrize("stage", ["latent", "cache", "pixels of TAEHV", "pixels of Wan"])
def test_an_invalid_number_ends_the_run_where_it_begins(pipe, worker, alone, stage: str) -> None:
    assert 3 * len(INVALID) == 63
    wanted = request(taehv=stage != "pixels of Wan")
    expected, after = alone(wanted), alone(BRIEF)
    source = "decoder" if stage.startswith("pixels") else "model"
    for block, value in INVALID:
        with spoiled_at(pipe, stage, block, value):
            said = rf"The {source} produced invalid numbers in block {block + 1}\."
            blocks = failed(worker.submit(wanted), NonFiniteOutput, said)
        assert len(blocks) == block
        assert not blocks or np.array_equal(joined(blocks), expected[: 12 * block - 3]), (block, value)
        assert np.array_equal(made(worker, BRIEF), after), (block, value)


# ---- G3: cancel


@pytest.mark.parametrize("way", ["stop", "close"])
def test_cancel_ends_the_run_within_the_step_and_waits_for_nothing(pipe, worker, alone, way: str) -> None:
    wanted, after = request(9), alone(BRIEF)
    expected = alone(wanted)
    seconds = []
    for step in range(9 * STEPS):
        reached, go_on = threading.Event(), threading.Event()

        def pause(_output: torch.Tensor, reached=reached, go_on=go_on) -> None:
            reached.set()
            assert go_on.wait(30)

        with at_call(transformer_of(pipe), step, pause) as calls:
            run = worker.submit(wanted)
            blocks = [next(run) for _ in range(step // STEPS)]
            assert reached.wait(30)
            begun = time.perf_counter()
            getattr(run, way)()
            seconds.append(time.perf_counter() - begun)
            assert list(run) == [] if way == "close" else not run.ended
            go_on.set()
            wait_until(lambda run=run: run.ended)
            assert calls.number == step + 1, "not one more step was begun"
        blocks += run
        # Where the last step of a block was stopped, nothing of that block is left to do.
        assert run.stopped and len(blocks) == (step // STEPS if way == "close" else (step + 1) // STEPS)
        assert not blocks or np.array_equal(joined(blocks), expected[: 12 * len(blocks) - 3])
        assert np.array_equal(made(worker, BRIEF), after), step
    assert len(seconds) == 36
    # On a loaded machine any one call may have to wait for the processor.
    assert median(seconds) < 0.05 and max(seconds) < 1, seconds


def test_a_stop_while_decoding_still_hands_over_that_block(pipe, worker, alone) -> None:
    expected, after = alone(request()), alone(BRIEF)
    for block in range(7):
        run: list[Run] = []
        submitted = threading.Event()

        def stop(_output: torch.Tensor, run=run, submitted=submitted) -> None:
            assert submitted.wait(30)
            run[0].stop()

        with at_call(decoder_of(pipe), block, stop), at_call(transformer_of(pipe), -1, stop) as calls:
            run.append(worker.submit(request()))
            submitted.set()
            blocks = list(run[0])
            assert calls.number == STEPS * (block + 1), "not one more step was begun"
        assert np.array_equal(joined(blocks), expected[: 12 * (block + 1) - 3])
        assert np.array_equal(made(worker, BRIEF), after), block


@pytest.mark.parametrize("ways", list(itertools.product(["stop", "close"], repeat=2)), ids="-".join)
def test_cancelling_twice_is_cancelling_once(worker, alone, ways: tuple[str, str]) -> None:
    with worker.submit(request(60)) as run:
        next(run)
        for way in ways:
            getattr(run, way)()
        rest = list(run)
        assert len(rest) <= QUEUE_BLOCKS + 1 and ("close" not in ways or not rest)
    assert np.array_equal(made(worker, BRIEF), alone(BRIEF))


def test_many_cancel_at_the_same_time(worker, alone) -> None:
    run = worker.submit(request(60))
    next(run)
    gate = threading.Barrier(8)
    threads = [threading.Thread(target=lambda n=n: (gate.wait(30), (run.stop, run.close)[n % 2]())) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert list(run) == []
    assert np.array_equal(made(worker, BRIEF), alone(BRIEF))


@pytest.mark.parametrize("way", ["stop", "close"])
def test_cancelling_after_the_end_changes_nothing(worker, alone, way: str) -> None:
    run = worker.submit(BRIEF)
    blocks = list(run)
    later = worker.submit(BRIEF)
    getattr(run, way)()
    assert list(run) == []
    assert np.array_equal(joined(blocks), alone(BRIEF))
    assert np.array_equal(joined(list(later)), alone(BRIEF)), "nor does it reach the run after it"


def test_cancelled_runs_leave_no_thread(pipe) -> None:
    before = threading.active_count()
    with ModelWorker(pipe) as worker:
        for number in range(10):
            run = worker.submit(request(60))
            if number % 2:
                next(run)
            run.close()
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


# ---- G8: a slow consumer


class Filler(ScriptedPipeline):
    """Blocks of 2 MB, made faster than anybody takes them."""

    def _blocks(self, request: GenerationRequest, run: int, begun: float) -> Iterator[FrameBlock]:
        info = RunInfo(request=request, seed=0, fps=16, num_blocks=200, num_frames=2400)
        for index in range(200):
            self.made.append((run, index))
            frames = np.full((12, 240, 240, 3), index, np.uint8)
            yield FrameBlock(index=index, frames=frames, start_frame=12 * index, run=info, elapsed=0)


def test_a_slow_consumer_costs_no_memory() -> None:
    pipeline = Filler()
    with ModelWorker(pipeline) as worker:
        before = resident_bytes()
        highest = 0
        for taken, block in enumerate(worker.submit(GenerationRequest(prompt="x", seconds=150)), start=1):
            time.sleep(0.002)
            assert block.index == taken - 1 and (block.frames == block.index).all()
            # One lies with the consumer, some in the queue, and one is held by the model until there is room.
            assert len(pipeline.made) <= taken + QUEUE_BLOCKS + 1
            highest = max(highest, resident_bytes())
    assert taken == 200
    assert highest - before < 50e6


def test_the_model_rests_while_nobody_takes_its_blocks() -> None:
    pipeline = ScriptedPipeline(spec=replace(SPEC, height=24, width=64))
    with ModelWorker(pipeline) as worker:
        run = worker.submit(GenerationRequest(prompt="x", seconds=60))
        for taken in range(3):
            wait_until(lambda taken=taken: len(pipeline.made) == taken + QUEUE_BLOCKS + 1)
            time.sleep(0.2)
            assert len(pipeline.made) == taken + QUEUE_BLOCKS + 1
            assert next(run).index == taken
        wait_until(lambda: len(pipeline.made) == 3 + QUEUE_BLOCKS + 1)
        run.stop()
        assert [block.index for block in run] == [3, 4, 5]


# ---- G9: endless runs, and windows of every size

LENGTHS = range(1021, 1027)


class LatentsAsFrames:
    """A `StreamDecoder` that shows the latents themselves: the transformer is what may run out of positions."""

    weights = torch.nn.Linear(1, 1).requires_grad_(False)
    weights.dtype = torch.float32

    def reset(self) -> None:
        self._skipped = 3

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        frames = latents[:, :, :3].sigmoid().repeat_interleave(4, dim=1)[:, self._skipped :]
        self._skipped = 0
        return frames


@pytest.mark.parametrize("window", [3, 21])
def test_a_run_past_frame_1024_is_as_long_as_asked_and_goes_on_as_before(tmp_path, monkeypatch, window: int) -> None:
    """Published code looks angles up in a table of 1024 frames. Here a run across its end equals one at the start."""
    settings = {"height": 16, "width": 16, "frames_per_block": 1, "sink_frames": 0, "denoising_steps": [1000]}
    folder = write_model_folder(tmp_path, window_frames=window, **settings)
    pipe = SelfForcingPipeline.from_pretrained(folder, device="cpu")
    pipe._decoders[True] = LatentsAsFrames()
    wanted = {length: request(fps=30, seconds=(4 * length - 3) / 30) for length in (50, *LENGTHS)}
    blocks = list(pipe.stream(wanted[max(LENGTHS)]))
    ends = [block.start_frame + len(block.frames) for block in blocks]
    for length in LENGTHS:  # a shorter run is the beginning of this one
        plan = pipe.plan(wanted[length])
        assert (plan.num_blocks, plan.num_frames, ends[length - 1]) == (length, 4 * length - 3, 4 * length - 3)
        assert not np.array_equal(blocks[length - 1].frames, blocks[length - 2].frames), "it does not stand still"
    reset = KVCache.reset
    monkeypatch.setattr(KVCache, "reset", lambda self: reset(self, 1000))
    around = pipe.generate(wanted[50]).frames
    assert np.abs(joined(blocks[:50]).astype(int) - around).max() <= 1


@pytest.mark.parametrize(("window", "block"), [(1, 1), (1, 3), (3, 3), (21, 21)])
def test_a_window_without_room_is_refused_with_both_numbers(tmp_path: Path, window: int, block: int) -> None:
    folder = write_model_folder(tmp_path, window_frames=window, frames_per_block=block, sink_frames=0)
    said = rf"window_frames {window} .*(leaves 0 recent frames .* at least one block of {block}|not multiples of)"
    with pytest.raises(WeightsError, match=said):
        SelfForcingPipeline.from_pretrained(folder, device="cpu")


# ---- G10: nothing is held across a yield

LOCK_CLASSES = {"Lock", "RLock", "Condition", "Semaphore", "BoundedSemaphore"}
MODES = {"inference_mode", "no_grad", "enable_grad", "set_grad_enabled", "autocast", "sdpa_kernel"}


def last_name(node: ast.expr) -> str:
    """`lock` of `self._state.lock`, `inference_mode` of `torch.inference_mode()`."""
    if isinstance(node, ast.Call):
        return last_name(node.func)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def lock_names(tree: ast.AST) -> set[str]:
    """Names that a lock is assigned to anywhere in the file."""
    assigned = (node for node in ast.walk(tree) if isinstance(node, ast.Assign | ast.AnnAssign) and node.value)
    return {
        last_name(target)
        for node in assigned
        if any(isinstance(part, ast.Call) and last_name(part) in LOCK_CLASSES for part in ast.walk(node.value))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    }


def own_nodes(statements: list[ast.stmt]) -> Iterator[ast.AST]:
    """All that runs as part of these statements, so nothing of the functions defined in them."""
    for statement in statements:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            continue
        yield statement
        yield from own_nodes(list(ast.iter_child_nodes(statement)))  # type: ignore[arg-type]


def held_across_yield(source: str) -> list[int]:
    """Lines where a lock or a torch mode is entered that a `yield` or an `await` then carries out of the function."""
    tree = ast.parse(source)
    held = lock_names(tree) | MODES
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.With) and any(last_name(item.context_expr) in held for item in node.items):
            if any(isinstance(inner, ast.Yield | ast.YieldFrom | ast.Await) for inner in own_nodes(node.body)):
                lines.append(node.lineno)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inside = list(own_nodes(node.body))
            taken = [inner for inner in inside if isinstance(inner, ast.Call) and last_name(inner) == "acquire"]
            if taken and any(isinstance(inner, ast.Yield | ast.YieldFrom) for inner in inside):
                lines.append(taken[0].lineno)
    return lines


@pytest.mark.parametrize("name", ["pipeline", "prompting", "web"])
def test_no_lock_and_no_torch_mode_is_held_across_a_yield(name: str) -> None:
    files = sorted((ROOT / name).rglob("*.py"))
    assert len(files) > 5
    found = {path.name: lines for path in files if (lines := held_across_yield(path.read_text(encoding="utf-8")))}
    assert not found


@pytest.mark.parametrize(
    "body",
    [
        "with torch.inference_mode():\n  yield 1",
        "with open(x) as f, torch.no_grad():\n  for y in f:\n   yield y",
        "with autocast('cuda'):\n  if x:\n   yield x",
        "with self._lock:\n  yield from x",
        "with shared:\n  yield 1",
        "self._lock.acquire()\n yield 1",
    ],
)
def test_the_search_for_held_locks_finds_them(body: str) -> None:
    file = "import threading\nshared = threading.RLock()\n\ndef f(self, x):\n self._lock = threading.Condition()\n {}\n"
    assert len(held_across_yield(file.format(body))) == 1
    assert held_across_yield(file.format(body.replace("yield from x", "x()").replace("yield", "z ="))) == []


# ---- G11: the same request gives the same frames, whatever came before

SEEDS = (0, 7, 2**32 - 1)


def frames_hash(frames: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(frames)).hexdigest()


def abandoned(worker: ModelWorker, pipe: SelfForcingPipeline) -> None:
    for _ in range(2):
        run = worker.submit(request(9, seed=3))
        next(run)
        run.close()


def after_error(worker: ModelWorker, pipe: SelfForcingPipeline) -> None:
    with at_call(transformer_of(pipe).blocks[0], 6, raiser(no_memory())):
        failed(worker.submit(request(seed=3)), OutOfMemory, ADVICE)


def after_stop(worker: ModelWorker, pipe: SelfForcingPipeline) -> None:
    with worker.submit(request(60, seed=3)) as run:
        next(run)
        run.stop()
        list(run)


ORDERS: dict[str, Callable[[ModelWorker, SelfForcingPipeline], Any]] = {
    "first of all": lambda worker, pipe: None,
    "after another seed": lambda worker, pipe: made(worker, request(seed=3)),
    "after another prompt and decoder": lambda worker, pipe: made(worker, request(prompt="blue car", taehv=False)),
    "after a run with fp8": lambda worker, pipe: made(worker, request(3, fp8=True)),
    "after an error": after_error,
    "after a stop": after_stop,
    "after runs that were abandoned": abandoned,
}

FRESH_PROCESS = """
import sys
import torch
from tests.test_faults import SEEDS, SelfForcingPipeline, frames_hash, request
torch.set_num_threads(int(sys.argv[2]))
pipe = SelfForcingPipeline.from_pretrained(sys.argv[1], device="cpu")
print(*(frames_hash(pipe.generate(request(seed=seed)).frames) for seed in SEEDS))
"""


def test_a_request_gives_the_same_frames_in_every_order_and_process(folder: Path) -> None:
    arguments = [sys.executable, "-c", FRESH_PROCESS, str(folder), str(torch.get_num_threads())]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True) as fresh:
        hashes: dict[str, list[str]] = {}
        for name, disturb in ORDERS.items():
            pipe = SelfForcingPipeline.from_pretrained(folder, device="cpu")
            with ModelWorker(pipe) as worker:
                hashes[name] = []
                for seed in SEEDS:
                    disturb(worker, pipe)
                    hashes[name].append(frames_hash(made(worker, request(seed=seed))))
        output, _ = fresh.communicate(timeout=120)
    hashes["in a fresh process"] = output.split()
    assert sum(map(len, hashes.values())) == 24
    first = hashes["first of all"]
    assert len(set(first)) == len(SEEDS)
    assert {name: values for name, values in hashes.items() if values != first} == {}


# ---- G12: an option that is not available


def no_taehv(pipe: SelfForcingPipeline, patch: pytest.MonkeyPatch, empty: Path) -> None:
    patch.delitem(pipe._decoders, True)


def no_compiler(pipe: SelfForcingPipeline, patch: pytest.MonkeyPatch, empty: Path) -> None:
    patch.setenv("PATH", str(empty))
    patch.delenv("CXX", raising=False)
    patch.delenv("CC", raising=False)


def no_visual_cpp(pipe: SelfForcingPipeline, patch: pytest.MonkeyPatch, empty: Path) -> None:
    no_compiler(pipe, patch, empty)
    patch.setattr(options.sys, "platform", "win32")


def some_compiler(pipe: SelfForcingPipeline, patch: pytest.MonkeyPatch, empty: Path) -> None:
    compiler = empty / "g++"
    compiler.touch(mode=0o755)
    patch.setenv("PATH", str(empty))


def no_headers(pipe: SelfForcingPipeline, patch: pytest.MonkeyPatch, empty: Path) -> None:
    some_compiler(pipe, patch, empty)
    patch.setattr(options.sysconfig, "get_path", lambda name: str(empty))


def no_triton(pipe: SelfForcingPipeline, patch: pytest.MonkeyPatch, empty: Path) -> None:
    no_headers(pipe, patch, empty)
    (empty / "Python.h").touch()
    patch.setattr(options.importlib.util, "find_spec", lambda name: None)
    patch.setattr(pipe._transformer, "device", torch.device("cuda"))


def broken_compiler(pipe: SelfForcingPipeline, patch: pytest.MonkeyPatch, empty: Path) -> None:
    patch.setattr(options, "missing_for_compile", lambda device: None)

    def fail(*_: Any) -> Iterator[torch.Tensor]:
        raise InternalTorchDynamoError("no")
        yield

    patch.setattr(type(pipe), "_roll_out", fail)


UNAVAILABLE = [
    (no_taehv, "taehv", "no TAEHV decoder"),
    (no_compiler, "compile", r"needs a C\+\+ compiler"),
    (no_visual_cpp, "compile", "needs Visual C"),
    (no_headers, "compile", "needs Python's header files"),
    (no_triton, "compile", "needs the package triton"),
    (broken_compiler, "compile", r"torch\.compile failed"),
]


@pytest.mark.parametrize(("lack", "option", "said"), UNAVAILABLE, ids=[lack.__name__ for lack, *_ in UNAVAILABLE])
def test_an_option_that_cannot_work_is_refused_and_never_replaced_in_silence(
    pipe, worker, alone, monkeypatch, tmp_path: Path, lack, option: str, said: str
) -> None:
    plain = request(2, taehv=False)
    with monkeypatch.context() as patch, at_call(transformer_of(pipe), -1, lambda _: None) as calls:
        lack(pipe, patch, tmp_path)
        if lack is not broken_compiler:  # which nobody can know before
            assert list(pipe.unavailable_options()) == [option]
            with pytest.raises(OptionUnavailable, match=said):
                pipe.plan(replace(plain, **{option: True}))
        assert failed(worker.submit(replace(plain, **{option: True})), OptionUnavailable, said) == []
        assert calls.number == 0, "refused before anything was made"
    blocks = list(worker.submit(plain))
    assert np.array_equal(joined(blocks), alone(plain))
    assert {**blocks[0].run.applied} == {
        "device": "cpu",
        "precision": "float32",
        "attention": "PyTorch's choice",
        "decoder": "Wan VAE",
        "compile": "off",
    }


# ---- D2: a full disk


@pytest.fixture(scope="module")
def encoder() -> SegmentEncoder:
    encoder = SegmentEncoder(16)
    for block in ScriptedPipeline().stream(GenerationRequest(prompt="x", seconds=2)):
        encoder.encode(block.frames)
    return encoder


def tell_full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_after(writes: int, folder: Path) -> Path:
    """An encoder that does its work elsewhere and then meets a full disk, after so many tenths of the file."""
    real, script = video.ffmpeg_binary(), folder / "ffmpeg"
    script.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, subprocess, sys\n"
        f"whole = pathlib.Path({str(folder / 'whole.mp4')!r})\n"
        f"subprocess.run([{real!r}, *sys.argv[1:-1], str(whole)], check=True)\n"
        "data = whole.read_bytes()\n"
        f"pathlib.Path(sys.argv[-1].removeprefix('file:')).write_bytes(data[: {writes} * len(data) // 10])\n"
        f"print('av_interleaved_write_frame(): {os.strerror(errno.ENOSPC)}', file=sys.stderr)\n"
        "sys.exit(228)\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


@pytest.mark.parametrize("write", range(1, 11))
def test_a_disk_that_is_full_at_the_nth_write_is_named_and_nothing_remains(
    encoder: SegmentEncoder, tmp_path: Path, monkeypatch, write: int
) -> None:
    tools, target = tmp_path / "tools", tmp_path / "videos"
    tools.mkdir()
    target.mkdir()
    (target / "old.mp4").write_bytes(b"the old one")
    with monkeypatch.context() as patch:
        if write == 10:  # all of it is there, but for its name
            patch.setattr(video.os, "replace", tell_full)
        else:
            script = full_after(write - 1, tools)
            patch.setattr(video, "ffmpeg_binary", lambda: str(script))
        for save in (encoder.write_mp4, lambda path: join_segments(encoder._segments, path)):
            with pytest.raises(VideoError, match="The disk is full, so the video could not be written") as caught:
                save(target / "old.mp4")
            assert str(tmp_path) not in str(caught.value)
            assert [(path.name, path.read_bytes()) for path in target.iterdir()] == [("old.mp4", b"the old one")]
    encoder.write_mp4(target / "old.mp4")
    assert count_frames(target / "old.mp4") == encoder.num_frames


@pytest.mark.parametrize("pages", [1, 2, 4])
def test_a_small_disk_really_filled_is_named_too(encoder: SegmentEncoder, tmp_path: Path, pages: int) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={4 * pages}k", "none", str(disk)]
    try:
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small disk needs more rights than this test has")
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    with ExitStack() as stack:
        stack.callback(subprocess.run, ["umount", str(disk)], check=True)
        with pytest.raises(VideoError, match="disk is full"):
            encoder.write_mp4(disk / "out.mp4")
        assert os.listdir(disk) == []


# ---- R3: the model thread dies


class Killed(BaseException):
    """Nothing that anybody expects."""


DEATHS = (SystemExit, KeyboardInterrupt, GeneratorExit, Killed)


@pytest.fixture
def mortal(monkeypatch) -> Iterator[tuple[ModelWorker, ScriptedPipeline]]:
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.05)
    pipeline = ScriptedPipeline(spec=replace(SPEC, height=24, width=64))
    with ModelWorker(pipeline) as worker:
        yield worker, pipeline


SHORT = GenerationRequest(prompt="x", seconds=2)


def kill(thread: int, death: type[BaseException]) -> None:
    """Raise `death` in another thread, wherever it is: the next time it runs any Python."""
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(death)) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("death", DEATHS)
def test_a_thread_that_dies_between_runs_is_replaced_and_nobody_notices(mortal, death) -> None:
    worker, pipeline = mortal
    assert len(list(worker.submit(SHORT))) == 3
    (ident,) = pipeline.threads
    thread = next(thread for thread in threading.enumerate() if thread.ident == ident)
    kill(ident, death)  # it is asleep, and meets its fate when the next request wakes it
    assert [len(list(run)) for run in (worker.submit(SHORT), worker.submit(SHORT))] == [3, 3]
    assert not thread.is_alive() and len(pipeline.requests) == 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("death", DEATHS)
def test_a_thread_that_dies_with_a_run_in_hand_ends_that_run_and_serves_the_next(mortal, monkeypatch, death) -> None:
    worker, pipeline = mortal
    with monkeypatch.context() as patch:
        patch.setattr(worker, "_run", raiser(death()))
        doomed = worker.submit(SHORT)
        with pytest.raises(SelfForcingError, match="stopped working in the middle of this run. Try again"):
            list(doomed)
    waiting = [worker.submit(SHORT) for _ in range(2)]
    assert [len(list(run)) for run in waiting] == [3, 3]
    assert not worker.busy and doomed.ended


@pytest.mark.parametrize("death", DEATHS)
def test_a_thread_that_is_shot_in_the_middle_of_a_step_survives(mortal, death) -> None:
    worker, pipeline = mortal
    pipeline.step_seconds = 0.02
    run = worker.submit(replace(SHORT, seconds=60))
    next(run)
    (thread,) = pipeline.threads
    kill(thread, death)
    failed(run, SelfForcingError, f"The model failed unexpectedly .{death.__name__}, {run.id}")
    pipeline.step_seconds = 0
    assert len(list(worker.submit(SHORT))) == 3
    assert pipeline.threads == {thread}


# ---- files that are not to blame


@pytest.mark.parametrize(
    "error",
    [RuntimeError("DefaultCPUAllocator: can't allocate memory"), OSError(errno.ENOMEM, "Cannot allocate memory")],
)
def test_too_little_memory_while_loading_is_not_blamed_on_the_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("diffusers.AutoencoderKLWan.from_pretrained", load)
    worker = ModelWorker(lambda: SelfForcingPipeline.from_pretrained(folder, "cpu"))
    with worker, pytest.raises(OutOfMemory, match="while the model was loaded"):
        worker.wait_ready()


def test_a_pickle_in_place_of_weights_is_not_loaded(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(WeightsError, match="The vae of .* cannot be loaded"):
        SelfForcingPipeline.from_pretrained(folder, "cpu")


def test_a_link_to_weights_that_are_gone_is_named(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    weights.symlink_to(tmp_path / "gone")
    with pytest.raises(WeightsError, match="The vae of .* cannot be loaded: a file in .*/vae is missing"):
        SelfForcingPipeline.from_pretrained(folder, "cpu")
