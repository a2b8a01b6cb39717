"""torch.compile in the background: what is compiled, when, how often, and what happens when it cannot be."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.overrides import TorchFunctionMode

import app
from pipeline import GenerationRequest, SelfForcingPipeline, compile_cache, compiled_runs
from pipeline.blocks import FrameBlock
from pipeline.compile_cache_room import make_room
from pipeline.compiling import Blueprint, Compiler, CompileState, Piece, failure_sentence, kind_of
from pipeline.errors import OptionUnavailable
from pipeline.folder import ModelFolder
from pipeline.load_lock import LOAD_LOCK, loading_alone
from pipeline.rotary import apply_rotary
from pipeline.transformer import CausalWanBlock, CausalWanTransformer3DModel, gelu
from pipeline.wan_layers import speed_up
from pipeline.worker import ModelWorker
from tests.scripted import ScriptedPipeline
from tests.small import write_model_folder
from tests.waiting import wait_until
from web import status, warming
from web.comparing import Comparer
from web.generation import Generator
from web.page import Page
from web.storage import VideoStore

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "a red balloon rises over the mountains"
PIECES = len(CausalWanBlock.COMPILED)


class Counted:
    """A backend that compiles nothing, counts, and can be held up or made to fail."""

    def __init__(self) -> None:
        self.counter = CompileCounter()
        self.threads: set[str] = set()
        self.going = threading.Event()
        self.going.set()
        self.error: Exception | None = None
        self.attempts = 0

    @property
    def compilations(self) -> int:
        return self.counter.frame_count

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        self.threads.add(threading.current_thread().name)
        self.attempts += 1
        assert self.going.wait(60)
        if self.error is not None:
            raise self.error
        return self.counter(graph, inputs)


class TorchFunctionNames(TorchFunctionMode):
    """The functions of torch that are called on this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def backend() -> Counted:
    return Counted()


@pytest.fixture
def pipe(folder: Path, backend: Counted) -> Iterator[SelfForcingPipeline]:
    pipe = SelfForcingPipeline.from_pretrained(folder, device="cpu")
    pipe.compiled.waits = False
    use(pipe, backend)
    yield pipe
    backend.going.set()
    assert pipe.close(60)


def use(pipe: SelfForcingPipeline, backend: Counted) -> None:
    pipe.compiled.compiler.backend = backend
    for piece in pipe.compiled.decoder_steps.values():
        piece.backend = backend


def request(**changes: Any) -> GenerationRequest:
    return GenerationRequest(**({"prompt": PROMPT, "seed": 7, "seconds": 3, "compile": True} | changes))


def made(pipe: SelfForcingPipeline, **changes: Any) -> tuple[np.ndarray, str]:
    video = pipe.generate(request(**changes))
    return video.frames, video.run.applied["compile"]


def alike(frames: np.ndarray, plain: np.ndarray) -> bool:
    """Compiled code computes some functions another way: here and there a value is rounded to the next one."""
    apart = np.abs(frames.astype(int) - plain.astype(int))
    return bool(apart.max() <= 1 and (apart > 0).mean() < 1e-3)


def finish(pipe: SelfForcingPipeline) -> None:
    pipe.compiled.compiler.wait(lambda: None)


# ---- pieces


def doubled(owner: nn.Module, x: torch.Tensor, pair: tuple[torch.Tensor | None, bool]) -> torch.Tensor:
    return owner.weight * x * (2 if pair[1] else 1)


def test_a_kind_of_call_is_compiled_when_it_comes_twice_in_a_row(backend: Counted) -> None:
    compiler, owner = Compiler(backend), nn.Linear(3, 1)
    piece = Piece(doubled, compiler)
    first, other = (torch.ones(3), (None, True)), (torch.ones(2, 3), (None, True))
    for arguments in (first, other, first, other):
        piece(owner, *arguments)
    compiler.wait(lambda: None)
    assert compiler.state([piece]) == CompileState(to_learn=True) and backend.compilations == 0
    piece(owner, *other)
    compiler.wait(lambda: None)
    assert compiler.state([piece]) == CompileState("ready", 1, 1, 0.0)
    assert backend.compilations == 1 and backend.threads == {"compile"}
    piece.enabled = True
    with torch.inference_mode():
        assert torch.equal(piece(owner, *other), doubled(owner, *other))
        assert torch.equal(piece(owner, *first), doubled(owner, *first))
    assert backend.compilations == 1 and piece.ready == {kind_of(other)}
    compiler.learns = False
    for _ in range(2):
        piece(owner, *first)
    assert piece.known == {kind_of(other)}


def test_what_a_kind_is() -> None:
    x = torch.ones(2, 3, dtype=torch.float16)
    same = kind_of((torch.zeros(2, 3, dtype=torch.float16), (None, "Rep"), 1))
    assert kind_of((x, (None, "Rep"), 1)) == same
    others = [x.float(), x.t().contiguous().t(), x[:1]]
    assert all(kind_of((other, (None, "Rep"), 1)) != same for other in others)
    assert kind_of((x, (x, "Rep"), 1)) != same != kind_of((x, (None, "Rep"), 2))
    built = kind_of((others[1],))[0]
    assert isinstance(built, Blueprint) and built.build().stride() == (1, 2)


# ---- and loading


@pytest.fixture
def default_dtype() -> Iterator[None]:
    """Goes with the test, whatever it leaves behind."""
    yield
    torch.set_default_dtype(torch.float32)


def called_twice(piece: Piece, owner: nn.Module, rows: int = 1) -> None:
    """So that this kind of call is compiled."""
    for _ in range(2):
        piece(owner, torch.ones(rows, 3, dtype=torch.float32), (None, True))


def test_a_compilation_waits_for_weights_that_are_being_loaded(
    folder: Path, backend: Counted, monkeypatch: pytest.MonkeyPatch, default_dtype: None
) -> None:
    """Begun inside `from_pretrained` and ended after it, it would leave the default dtype of the weights behind."""
    inside, going = threading.Event(), threading.Event()
    build = CausalWanTransformer3DModel.from_config
    compiler, owner = Compiler(backend), nn.Linear(3, 1)  # not later: what loading makes has no content at first
    piece = Piece(doubled, compiler)

    def held_up(*arguments: Any, **settings: Any) -> nn.Module:
        inside.set()
        assert going.wait(60)
        return build(*arguments, **settings)

    monkeypatch.setattr(CausalWanTransformer3DModel, "from_config", held_up)
    backend.going.clear()
    with ThreadPoolExecutor(1) as other:
        loaded = other.submit(ModelFolder(folder).load, "transformer", torch.bfloat16)
        assert inside.wait(60) and torch.get_default_dtype() == torch.bfloat16, "or nothing shows"
        called_twice(piece, owner)
        time.sleep(0.5)  # in which it would begin
        begun = backend.attempts
        going.set()
        assert loaded.result(60).dtype == torch.bfloat16
    backend.going.set()
    compiler.wait(lambda: None)
    assert torch.get_default_dtype() == torch.float32
    assert begun == 0 and compiler.state([piece]).state == "ready" and backend.attempts == 1


def test_weights_are_loaded_between_two_compilations(folder: Path, backend: Counted, default_dtype: None) -> None:
    backend.going.clear()
    compiler, owner = Compiler(backend), nn.Linear(3, 1)
    piece = Piece(doubled, compiler)
    for rows in range(1, 5):
        called_twice(piece, owner, rows)
    wait_until(lambda: backend.threads)
    with ThreadPoolExecutor(1) as other:
        loaded = other.submit(ModelFolder(folder).load, "transformer", torch.bfloat16)
        attempts: list[int] = []
        loaded.add_done_callback(lambda _: attempts.append(backend.attempts))
        with pytest.raises(TimeoutError):
            loaded.result(timeout=1)
        backend.going.set()
        assert loaded.result(60).dtype == torch.bfloat16
    compiler.wait(lambda: None)
    assert torch.get_default_dtype() == torch.float32
    assert attempts[0] < 4, "it does not wait for all of them"
    assert len(piece.ready) == 4 and backend.attempts == 4, "none failed and was tried again"


def test_what_waits_for_weights_to_be_loaded_can_be_withdrawn(backend: Counted) -> None:
    compiler = Compiler(backend)
    piece = Piece(doubled, compiler)
    with loading_alone():
        called_twice(piece, nn.Linear(3, 1))
        time.sleep(0.3)  # its thread waits now
        compiler.withdraw([piece], lambda: None)
        assert compiler.state([piece]).to_learn and not piece.known
    assert compiler.close(10) and backend.attempts == 0
    assert LOAD_LOCK.acquire(timeout=10)
    LOAD_LOCK.release()


# ---- the pipeline


def test_a_run_is_plain_and_says_so_until_everything_is_compiled(pipe: SelfForcingPipeline, backend: Counted) -> None:
    plain, said = made(pipe, compile=False)
    assert said == "off" and pipe.compile_state(request()).state == "off"
    backend.going.clear()
    for _ in range(2):
        frames, said = made(pipe)  # ends, although the compiler does not
        assert said.startswith("warming up: this run is uncompiled, ready in")
        assert np.array_equal(frames, plain)
    state = pipe.compile_state(request())
    assert (state.state, state.done, state.total) == ("warming", 0, 2 * PIECES + 1)
    backend.going.set()
    finish(pipe)
    assert pipe.compile_state(request()).state == "ready"
    frames, said = made(pipe)
    assert said == "on" and alike(frames, plain)
    assert backend.threads == {"compile"}

    # Compiled code really runs: without the plain functions, all but the first frames of a clip can be made.
    for piece in pipe._transformer.pieces(False):
        piece.plain = None
    assert alike(made(pipe)[0], plain)
    pipe.compiled.decoder_steps[False].plain = None
    with pytest.raises(TypeError):
        made(pipe)

    # Switched off, everything is as it was.
    block = pipe._transformer._transformer.blocks[0]
    assert set(CausalWanBlock.COMPILED) <= set(vars(block))
    assert np.array_equal(made(pipe, compile=False)[0], plain)
    assert not set(CausalWanBlock.COMPILED) & set(vars(block))
    assert block.close_attention.__func__ is CausalWanBlock.close_attention
    assert pipe._decoders[False].step is None


def test_what_is_compiled_is_known_beforehand_and_nothing_is_added(pipe: SelfForcingPipeline, backend: Counted) -> None:
    made(pipe)
    finish(pipe)
    # One block and, with the clean pass of the one before, two; one step of the decoder.
    assert backend.compilations == 2 * PIECES + 1
    assert len(pipe._transformer._transformer.blocks) == 2, "both layers run the same code"
    spec, graphs = pipe.spec, backend.compilations
    assert spec.blocks_for(9, spec.fps) * spec.frames_per_block > 2 * spec.window_frames
    plain, _ = made(pipe, seconds=9, compile=False)
    frames, said = made(pipe, seconds=9)
    assert said == "on" and alike(frames, plain)
    made(pipe, prompt="a blue car", seed=8, fps=24)
    pipe.merge_clean_pass = False
    made(pipe)
    pipe.merge_clean_pass = True
    assert backend.compilations == graphs
    half_known = pipe.compile_state(request(taehv=True))
    assert (half_known.state, half_known.to_learn) == ("off", True), "nobody learns what the other decoder does"
    made(pipe, taehv=True)
    finish(pipe)
    taehv, _ = made(pipe, taehv=True, compile=False)
    assert alike(made(pipe, taehv=True, seconds=3)[0], taehv)
    made(pipe, taehv=True, seconds=5)
    assert backend.compilations == graphs + 1


def test_with_weights_in_8_bits_only_the_decoder_is_compiled(pipe: SelfForcingPipeline, backend: Counted) -> None:
    plain, _ = made(pipe, fp8=True, compile=False)
    made(pipe, fp8=True)
    finish(pipe)
    assert backend.compilations == 1
    frames, said = made(pipe, fp8=True)
    assert said == "the decoder only, because of FP8" and alike(frames, plain)
    made(pipe)
    finish(pipe)
    graphs = backend.compilations
    whole, _ = made(pipe)
    made(pipe, fp8=True)
    again, said = made(pipe)  # loaded anew, and run by the code compiled for the weights before
    assert said == "on" and np.array_equal(again, whole) and backend.compilations == graphs


def test_weights_do_not_change_under_the_compiler(pipe: SelfForcingPipeline, backend: Counted) -> None:
    backend.going.clear()
    made(pipe)
    wait_until(lambda: backend.threads)
    blocks = pipe._transformer.pieces(False)
    before = pipe._transformer.apply(fp8=False, compile=False)
    with ThreadPoolExecutor(1) as other:
        changed = other.submit(pipe._transformer.apply, fp8=True, compile=False)
        with pytest.raises(TimeoutError):
            changed.result(timeout=1)
        assert next(before.blocks.parameters()).dtype == torch.float32  # still as they are compiled
        backend.going.set()
        assert changed.result(timeout=60) is before
    finish(pipe)
    assert sum(len(piece.ready) for piece in blocks) == 1  # what had begun, and nothing after it
    assert all(piece.known == piece.ready for piece in blocks)


def test_what_was_withdrawn_is_compiled_when_it_comes_again(pipe: SelfForcingPipeline, backend: Counted) -> None:
    backend.going.clear()
    made(pipe)
    wait_until(lambda: backend.threads)
    with ThreadPoolExecutor(1) as other:
        withdrawn = other.submit(pipe.compiled.compiler.withdraw, pipe._transformer.pieces(False), lambda: None)
        backend.going.set()
        withdrawn.result(timeout=60)
    finish(pipe)
    state = pipe.compile_state(request())
    assert (state.state, state.total, state.to_learn) == ("off", 2 * PIECES + 1, True)
    made(pipe)
    finish(pipe)
    assert pipe.compile_state(request()) == CompileState("ready", 2 * PIECES + 1, 2 * PIECES + 1, 0.0)


def test_after_8_bits_the_weights_are_such_as_were_compiled_for(pipe: SelfForcingPipeline, backend: Counted) -> None:
    made(pipe)
    finish(pipe)
    made(pipe, fp8=True)
    finish(pipe)
    graphs = backend.compilations
    frames, said = made(pipe)
    assert said == "on" and alike(frames, made(pipe, compile=False)[0])
    assert backend.compilations == graphs and backend.threads == {"compile"}
    assert not any(tensor.is_inference() for tensor in pipe._transformer.apply(fp8=False, compile=False).parameters())


def test_plain_code_stays_what_it_is_while_the_compiler_works(backend: Counted) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 5, 2, 120, generator=generator)
    angles = torch.randn(1, 5, 1, 60, generator=generator)
    vae = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    speed_up(vae)
    latent = torch.randn(1, 4, 1, 4, 4, generator=generator)

    def plain() -> list[torch.Tensor]:
        return [gelu(x), apply_rotary(x, (angles.cos(), angles.sin())), vae.post_quant_conv(latent)]

    compiler, owner = Compiler(backend), nn.Linear(3, 1)
    piece = Piece(doubled, compiler)
    with torch.inference_mode():
        before = plain()
        others = [F.gelu(x, approximate="tanh"), apply_rotary(x.double(), (angles.cos(), angles.sin())).float()]
        assert not any(torch.equal(one, other) for one, other in zip(before, others, strict=False)), "or nothing shows"
        backend.going.clear()
        for _ in range(2):
            piece(owner, torch.ones(3), (None, True))
        wait_until(lambda: backend.threads)
        with TorchFunctionNames() as called:
            meanwhile = plain()
        backend.going.set()
    compiler.wait(lambda: None)
    assert all(torch.equal(one, other) for one, other in zip(before, meanwhile, strict=True))
    assert {"sigmoid_", "view_as_complex", "mkldnn_convolution"} <= called.names


@pytest.mark.parametrize("waits", [False, True])
def test_a_model_that_goes_frame_by_frame_is_compiled_whole(
    backend: Counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    pipe = SelfForcingPipeline.from_pretrained(write_model_folder(tmp_path, frames_per_block=1), device="cpu")
    pipe.compiled.waits = waits
    use(pipe, backend)
    learnt = pipe.learning_request(request())
    assert pipe.plan(learnt).num_blocks == 4
    if waits:
        assert made(pipe, seconds=1)[1] == "on"
        return
    pipe.generate(learnt)
    finish(pipe)
    assert pipe.compile_state(request()).state == "ready"
    monkeypatch.setattr(compiled_runs, "LEARNING_LATENTS", 3)
    pipe = SelfForcingPipeline.from_pretrained(tmp_path, device="cpu")
    use(pipe, backend)
    with pytest.raises(OptionUnavailable, match=r"no further than 6 of 6 parts"):
        made(pipe, seconds=1)


def test_who_waits_gets_compiled_code_in_the_first_run(pipe: SelfForcingPipeline, backend: Counted) -> None:
    heard: list[CompileState] = []
    pipe.compiled.waits, pipe.compiled.on_progress = True, heard.append
    plain, _ = made(pipe, seconds=1, compile=False)
    frames, said = made(pipe, seconds=1)
    assert said == "on" and alike(frames, plain)
    assert backend.compilations == 2 * PIECES + 1
    assert heard[-1].state == "ready" and pipe.compiled.waits
    shares = [state.done for state in heard]
    assert shares == sorted(shares)


@pytest.mark.parametrize("waits", [False, True])
def test_a_compiler_that_fails_is_told_and_the_model_goes_on(
    pipe: SelfForcingPipeline, backend: Counted, waits: bool
) -> None:
    plain, _ = made(pipe, compile=False)
    backend.error = RuntimeError("no such instruction")
    pipe.compiled.waits = waits
    if waits:
        with pytest.raises(OptionUnavailable, match=r"torch\.compile failed on this machine \(.*no such instruction"):
            made(pipe)
    else:
        assert made(pipe)[1].startswith("warming up")
        finish(pipe)
    state = pipe.compile_state(request())
    assert state.state == "failed" and "torch.compile failed" in state.reason
    assert "torch.compile failed" in pipe.unavailable_options()["compile"]
    with pytest.raises(OptionUnavailable, match="Switch it off"):
        made(pipe)
    assert np.array_equal(made(pipe, compile=False)[0], plain)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), MemoryError()])
@pytest.mark.parametrize("waits", [False, True])
def test_a_want_of_memory_may_pass(pipe: SelfForcingPipeline, backend: Counted, waits: bool, error: Exception) -> None:
    plain, _ = made(pipe, compile=False)
    backend.error = error
    pipe.compiled.waits = waits
    for attempts in (1, 2):
        if waits:
            with pytest.raises(OptionUnavailable, match="too little memory"):
                made(pipe)
        else:
            assert np.array_equal(made(pipe)[0], plain)
            finish(pipe)
        state = pipe.compile_state(request())
        assert state.state == "failed" and "too little memory" in state.reason and state.to_learn
        assert "compile" not in pipe.unavailable_options()
        assert backend.attempts == attempts, "once for each run that asks for it"
    backend.error = None
    made(pipe)
    finish(pipe)
    frames, said = made(pipe)
    assert said == "on" and alike(frames, plain)


@pytest.mark.parametrize(
    ("error", "emptied"),
    [
        (torch.OutOfMemoryError("no room"), False),
        (MemoryError(), False),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), False),
        (RuntimeError("unexpected end of file"), True),
    ],
)
def test_only_what_may_come_of_the_cache_empties_it(
    backend: Counted, monkeypatch: pytest.MonkeyPatch, error: Exception, emptied: bool
) -> None:
    compiler, owner = Compiler(backend), nn.Linear(3, 1)
    piece = Piece(doubled, compiler)
    for _ in range(2):
        piece(owner, torch.ones(3), (None, True))
    compiler.wait(lambda: None)
    asked: list[bool] = []

    def give_up() -> bool:
        asked.append(True)
        backend.error = None
        return True

    monkeypatch.setattr(compile_cache, "give_up", give_up)
    backend.error = error
    for _ in range(2):
        piece(owner, torch.ones(2, 3), (None, True))
    compiler.wait(lambda: None)
    assert bool(asked) == emptied
    # What was ready went with the cache, and is compiled again.
    assert compiler.state([piece]).state == ("ready" if emptied else "failed")
    assert len(piece.ready) == (2 if emptied else 1) and backend.compilations == (3 if emptied else 1)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("no such instruction", "RuntimeError: no such instruction"),
        ("backend='x' raised:\nRuntimeError: odd\n\nSet VERBOSE=1", "RuntimeError: RuntimeError: odd"),
        ("C++ compile error\n\nCommand:\ng++ a.cpp\n\nOutput:\ng++: fatal error: Killed", "g++: fatal error: Killed"),
        ("", "(RuntimeError)"),
        ("x" * 1000, "x…)"),
    ],
)
def test_a_failure_names_its_cause(said: str, told: str) -> None:
    error = ValueError("compiling")
    error.__cause__ = RuntimeError(said)
    sentence = failure_sentence(error)
    assert told in sentence and len(sentence) < 400 and "Switch it off" in sentence


def test_a_full_disk_is_told(pipe: SelfForcingPipeline, backend: Counted) -> None:
    backend.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    made(pipe)
    finish(pipe)
    assert "the disk is full" in pipe.compile_state(request()).reason


def test_a_model_that_is_given_up_leaves_nothing_but_what_is_being_compiled(folder: Path, backend: Counted) -> None:
    def load() -> SelfForcingPipeline:
        pipe = SelfForcingPipeline.from_pretrained(folder, device="cpu")
        pipe.compiled.waits = False
        use(pipe, backend)
        return pipe

    backend.going.clear()
    with ModelWorker(load) as worker:
        list(worker.submit(request()))
        wait_until(lambda: backend.threads)
        old = weakref.ref(worker.wait_ready())
        embedding = weakref.ref(worker.wait_ready()._transformer._transformer.patch_embedding)
        worker.switch(lambda: ScriptedPipeline())
        gc.collect()
        assert old() is None and embedding() is None, "all but the block that is being compiled"
        blocks: list[FrameBlock] = list(worker.submit(request(compile=False)))
        assert blocks
        backend.going.set()


def test_closing_says_whether_a_compilation_goes_on(pipe: SelfForcingPipeline, backend: Counted) -> None:
    backend.going.clear()
    worker = ModelWorker(pipe)
    list(worker.submit(request()))
    wait_until(lambda: backend.threads)
    assert not worker.close(timeout=0.2), "the program must then not wait for the thread, nor leave it without torch"
    backend.going.set()
    assert pipe.close(60) and backend.compilations == 1, "nothing more was begun"


@pytest.mark.parametrize("seconds", [None, 60])
def test_closing_can_wait_for_a_compilation(pipe: SelfForcingPipeline, backend: Counted, seconds: float | None) -> None:
    backend.going.clear()
    worker = ModelWorker(pipe)
    list(worker.submit(request()))
    wait_until(lambda: backend.threads)
    release = threading.Timer(0.5, backend.going.set)
    release.start()
    assert worker.close(timeout=seconds) and backend.compilations == 1
    release.join()


# ---- the page


@pytest.fixture
def generator(pipe: SelfForcingPipeline, tmp_path: Path) -> Iterator[Generator]:
    with ModelWorker(pipe) as worker:
        worker.wait_ready()
        yield Generator(worker, VideoStore(tmp_path / "videos"))


def test_a_comparison_waits_for_the_warm_up(generator: Generator, backend: Counted) -> None:
    backend.going.clear()
    comparer = Comparer(generator)
    plain = request(compile=False)
    for _ in range(2):
        with pytest.raises(OptionUnavailable, match=r"warming up .*Try again"):
            comparer.checked_pair(plain, {"compile": True}, {"compile": False})
    comparer.checked_pair(plain, {"taehv": True}, {"taehv": False})
    backend.going.set()
    wait_until(lambda: generator.warm_ups.state(request()).state == "ready", 60)
    assert comparer.checked_pair(plain, {"compile": True}, {"compile": False}).differs == ("compile",)
    assert backend.compilations == 2 * PIECES + 1, "everything, although nobody has made a video"
    (*_, last) = generator.run(request(), "somebody", streamed=False)
    assert last.meter.run.applied["compile"] == "on" and backend.compilations == 2 * PIECES + 1


def test_other_options_are_warmed_up_after_the_first(generator: Generator, backend: Counted) -> None:
    warm_ups = generator.warm_ups
    warm_ups.begin(request())
    wait_until(lambda: warm_ups.state(request()).state == "ready", 60)
    warm_ups.begin(request(taehv=True))
    wait_until(lambda: warm_ups.state(request(taehv=True)).state == "ready", 60)
    assert backend.compilations == 2 * PIECES + 2
    wait_until(lambda: not warm_ups._learning)
    warm_ups.begin(request(taehv=True))
    assert not warm_ups._learning, "there is nothing to learn"


def test_two_warm_ups_at_once(generator: Generator, backend: Counted) -> None:
    for taehv in (False, True):
        generator.warm_ups.begin(request(taehv=taehv))
    for taehv in (False, True):
        wait_until(lambda taehv=taehv: generator.warm_ups.state(request(taehv=taehv)).state == "ready", 60)
    assert backend.compilations == 2 * PIECES + 2


def test_a_clip_for_nobody_is_broken_off_and_can_be_made_again(
    generator: Generator, backend: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparer, warm_ups, plain = Comparer(generator), generator.warm_ups, request(compile=False)
    on, off = {"compile": True}, {"compile": False}
    monkeypatch.setattr(warming, "LEARNING_SECONDS", 0.0)
    with pytest.raises(OptionUnavailable, match=r"warming up .*Try again"):
        comparer.checked_pair(plain, on, off)
    wait_until(lambda: not warm_ups._learning)
    state = warm_ups.state(request())
    assert (state.state, state.to_learn) == ("off", True) and not warm_ups.learns(request())
    with pytest.raises(OptionUnavailable, match="Make a video with it first"):
        comparer.checked_pair(plain, on, off)
    wait_until(lambda: not warm_ups._learning)
    warm_ups.forget()  # as when the model is exchanged: nothing was found too slow of the new one
    with pytest.raises(OptionUnavailable, match=r"warming up .*Try again"):
        comparer.checked_pair(plain, on, off)
    wait_until(lambda: not warm_ups._learning)
    assert backend.attempts == 0
    monkeypatch.setattr(warming, "LEARNING_SECONDS", 60.0)
    warm_ups.begin(request())
    wait_until(lambda: warm_ups.state(request()).state == "ready", 60)
    assert comparer.checked_pair(plain, on, off).differs == ("compile",)


def test_a_warm_up_that_ran_out_of_memory_can_be_begun_again(generator: Generator, backend: Counted) -> None:
    warm_ups = generator.warm_ups
    backend.error = torch.OutOfMemoryError("no room")
    warm_ups.begin(request())
    wait_until(lambda: warm_ups.state(request()).state == "failed" and not warm_ups._learning, 60)
    backend.error = None
    warm_ups.begin(request())
    wait_until(lambda: warm_ups.state(request()).state == "ready", 60)


def test_the_page_tells_how_far_it_is() -> None:
    def told(state: CompileState, learning: bool = False) -> str:
        return status.warming(state, learning=learning)

    line = told(CompileState("warming", 3, 8, 40.4))
    assert "torch.compile is warming up: 3 of 8, about 40 s left; videos are made without it until then" in line
    assert "width:37.5%" in line
    assert "warming up; videos" in told(CompileState("off"), learning=True)
    half_known = told(CompileState("off", 6, 6, to_learn=True), learning=True)
    assert "warming up; videos" in half_known and "width:0.0%" in half_known
    nothing_goes_on = told(CompileState("off", to_learn=True))
    assert "begins with your next video" in nothing_goes_on and "warming up" not in nothing_goes_on
    assert "is ready" in told(CompileState("ready", 8, 8, 0.0))
    failed = told(CompileState("failed", reason="No <compiler>."))
    assert "sf-wrong" in failed and "&lt;compiler" in failed
    assert CompileState("warming", 3, 8, 40.44).as_dict() == {
        "state": "warming",
        "done": 3,
        "total": 8,
        "seconds_left": 40.4,
        "reason": "",
    }


def test_the_box_begins_the_warm_up(pipe: SelfForcingPipeline, backend: Counted) -> None:
    with ModelWorker(pipe) as worker:
        worker.wait_ready()
        page = Page(worker, 20)
        (choose, look) = (
            next(f.fn for f in page.blocks.fns.values() if getattr(f.fn, "__name__", "") == name and "warming" in where)
            for name, where in (("want_compiled", "warming"), ("ask_warming", "warming"))
        )
        assert choose(False, False, False)[0] == "" and choose("yes", 1, None)[0] == ""
        assert page.ui.warming_timer.active, "the box may be ticked when a visitor comes"
        assert page.ui.warming_timer in page.ui.fitted, "or when the model is exchanged"
        assert not look(False, False, False)[1].active
        assert "begins with your next video" in look(False, False, True)[0], "nobody has asked for it yet"
        line, timer = choose(False, False, True)
        assert "warming up" in line and timer.active
        wait_until(lambda: "is ready" in look(False, False, True)[0], 60)
        assert not look(False, False, True)[1].active
        answer = next(f.fn for f in page.blocks.fns.values() if f.api_name == "options")()
        assert answer["compile"] == CompileState("ready", 7, 7, 0.0).as_dict()


def test_the_warm_up_can_begin_at_the_start(pipe: SelfForcingPipeline, backend: Counted) -> None:
    assert app.parse(["--compile"]).compile and not app.parse([]).compile
    assert app.warmed_up(pipe) is pipe and pipe.compile_state(request()).state == "off"
    assert app.warmed_up(pipe, compile=True) is pipe
    assert pipe.compile_state(request()).state in ("warming", "ready")
    finish(pipe)
    assert pipe.compile_state(request()).state == "ready"
    app.warmed_up(ScriptedPipeline(), compile=True)


def test_a_pipeline_that_compiles_nothing_has_no_line(tmp_path: Path) -> None:
    with ModelWorker(ScriptedPipeline()) as worker:
        worker.wait_ready()
        generator = Generator(worker, VideoStore(tmp_path))
        generator.warm_ups.begin(request())
        assert generator.warm_ups.state(request()) is None
        Comparer(generator).checked_pair(request(compile=False), {"compile": True}, {"compile": False})


# ---- the cache


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv(compile_cache.TORCH_VARIABLE, "")  # so that what `use` sets goes with the test
    monkeypatch.delenv(compile_cache.TORCH_VARIABLE)
    monkeypatch.setenv(compile_cache.HOME_VARIABLE, str(tmp_path / "home"))
    monkeypatch.setattr(compile_cache, "_own", None)
    monkeypatch.setattr(compile_cache, "_given_up", False)
    return tmp_path / "home" / "compile"


def test_the_cache_is_a_folder_that_stays(no_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_cache.use()
    assert os.environ[compile_cache.TORCH_VARIABLE] == str(no_cache) and no_cache.is_dir()
    assert not compile_cache.give_up(), "there is nothing in it"
    (no_cache / "code").write_bytes(b"x" * 1000)
    assert compile_cache.size() == 1000
    assert compile_cache.give_up() and no_cache.is_dir() and compile_cache.size() == 0
    assert list(no_cache.parent.iterdir()) == [no_cache]
    (no_cache / "code").write_bytes(b"x")
    assert not compile_cache.give_up(), "once is enough"


def test_a_cache_that_somebody_removed_does_not_hinder_trying_again(no_cache: Path) -> None:
    compile_cache.use()
    shutil.rmtree(no_cache)
    assert compile_cache.give_up() and no_cache.is_dir()


@pytest.mark.parametrize("written", ["{}", "{}/", "{}/."])
def test_a_folder_that_somebody_chose_is_left_alone(
    no_cache: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    chosen = no_cache.parent.parent / "chosen"
    chosen.mkdir()
    (chosen / "code").touch()
    monkeypatch.setenv(compile_cache.TORCH_VARIABLE, written.format(chosen))
    compile_cache.use()
    assert compile_cache.folder() == chosen and not compile_cache.give_up() and (chosen / "code").exists()


def test_without_a_place_for_it_torch_takes_its_own(no_cache: Path) -> None:
    no_cache.parent.write_text("a file")
    compile_cache.use()
    assert compile_cache.TORCH_VARIABLE not in os.environ
    assert compile_cache.size() == 0


DAY = 24 * 3600.0


def put(path: Path, size: int, days: float) -> Path:
    """A file that was used so many days ago; it was written earlier."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    os.utime(path, (time.time() - days * DAY, time.time() - 100 * DAY))
    return path


def test_what_was_not_used_for_longest_makes_room(tmp_path: Path) -> None:
    old = [put(tmp_path / "ab" / name, 50, 30) for name in ("cabc.main.cpp", "cabc.main.so")]
    # What belongs to something that is used is used.
    used = [put(tmp_path / "ab" / "cabd.main.cpp", 50, 40), put(tmp_path / "ab" / "cabd.main.so", 50, 10)]
    header, precompiled = put(tmp_path / "headers" / "c1.h", 10, 50), put(tmp_path / "headers" / "c1.h.gch", 500, 20)
    lock = put(tmp_path / "locks" / "cabc.lock", 0, 60)
    assert make_room(tmp_path, 700) == 0 and all(path.exists() for path in old)
    assert make_room(tmp_path, 699) == 100
    assert not any(path.exists() for path in old) and all(path.exists() for path in (*used, header, precompiled))
    assert make_room(tmp_path, 150) == 500
    assert not precompiled.exists() and all(path.exists() for path in (*used, header, lock))


def test_a_kernel_of_triton_goes_as_a_whole(tmp_path: Path) -> None:
    kernels = tmp_path / "triton" / "0"
    for name, days in (("old", 20), ("used", 3)):
        put(kernels / name / "k.cubin", 100, 30)
        put(kernels / name / "k.json", 100, days)
        put(kernels / name / "__grp__k.json", 100, 30)
    assert make_room(tmp_path, 599) == 300
    assert [path.name for path in kernels.iterdir()] == ["used"] and len(list((kernels / "used").iterdir())) == 3
    assert list(tmp_path.iterdir()) == [tmp_path / "triton"], "nothing is left on the way"


def test_what_may_be_in_use_stays(tmp_path: Path) -> None:
    young = [put(tmp_path / "ab" / f"c{number}.so", 100, number) for number in (0, 1)]
    assert make_room(tmp_path, 0) == 0 and all(path.exists() for path in young)
    written = put(tmp_path / "ab" / "c3.so", 100, 30)
    os.utime(written, (time.time() - 30 * DAY, time.time()))  # where no reading is noted
    assert make_room(tmp_path, 0) == 0 and written.exists()
    assert make_room(tmp_path, 0, spared_seconds=0.5 * DAY) == 100 and not young[1].exists()


def test_making_room_touches_nothing_outside_and_minds_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, outside = tmp_path / "cache", put(tmp_path / "outside" / "c0.so", 100, 30)
    stuck, other = put(cache / "ab" / "c1.so", 100, 30), put(cache / "ab" / "c2.so", 100, 20)
    (cache / "link").symlink_to(outside.parent)
    (cache / "ab" / "c3.so").symlink_to(outside)
    unlink = Path.unlink

    def fail_for_one(path: Path, missing_ok: bool = False) -> None:
        if path == stuck:
            raise PermissionError(errno.EACCES, "in use")
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", fail_for_one)
    assert make_room(cache, 150) == 100 and stuck.exists() and not other.exists() and outside.exists()
    assert make_room(tmp_path / "nowhere", 0) == 0


def test_room_is_made_once_and_only_where_this_program_keeps_its_code(
    no_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(compile_cache, "make_room", lambda folder: asked.append(folder) or 0)
    compile_cache.use()
    compile_cache.use()
    assert asked == [no_cache]
    monkeypatch.setenv(compile_cache.TORCH_VARIABLE, str(no_cache.parent / "chosen"))
    compile_cache.use()
    assert asked == [no_cache], "whoever chose another folder looks after it"


COMPILES = """
import torch
from torch._dynamo.utils import counters
from pipeline.compiling import Compiler, Piece
from pipeline.transformer import CausalWanBlock
from tests.small import small_transformer

block = small_transformer().blocks[0]
compiler = Compiler()
piece = Piece(CausalWanBlock.close_attention, compiler)
hidden, out, modulation = torch.ones(1, 6, 24), torch.ones(1, 6, 2, 12), torch.ones(1, 3, 4, 1, 24)
with torch.inference_mode():
    plain = [piece(block, hidden, out, modulation) for _ in range(2)][0]
    compiler.wait(lambda: None)
    piece.enabled = True
    assert compiler.state([piece]).state == "ready", compiler.failure
    assert torch.allclose(piece(block, hidden, out, modulation), plain, atol=1e-5)
found = counters["inductor"]
print(found["fxgraph_cache_hit"], found["fxgraph_cache_miss"])
"""


def test_the_second_start_finds_what_the_first_has_compiled(no_cache: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}

    def start() -> str:
        done = subprocess.run(
            [sys.executable, "-c", COMPILES], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.strip()

    assert start() == "0 1"
    assert start() == "1 0"
    for file in [path for path in no_cache.rglob("*") if path.is_file()]:
        file.write_bytes(b"damaged")
    hit, missed = start().split()
    assert (hit, int(missed) > 0) == ("0", True), "what is damaged is compiled anew"
