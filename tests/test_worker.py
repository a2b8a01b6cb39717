"""The model thread: order, stopping, errors of every kind, consumers that misbehave. More of it: `test_faults.py`."""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace

import pytest

from pipeline.config import GenerationRequest
from pipeline.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    NonFiniteOutput,
    OutOfMemory,
    SelfForcingError,
    WeightsError,
)
from pipeline.jobs import QUEUE_BLOCKS
from pipeline.worker import ModelWorker
from tests.scripted import SPEC, ScriptedPipeline, read_code
from tests.waiting import wait_until

TINY = replace(SPEC, height=24, width=64)  # painting is what takes the time here
REQUEST = GenerationRequest(prompt="a red ball", seed=7, seconds=4)
NUM_FRAMES = 69
NUM_BLOCKS = 6


@pytest.fixture
def pipeline() -> ScriptedPipeline:
    return ScriptedPipeline(spec=TINY)


@pytest.fixture
def worker(pipeline: ScriptedPipeline):
    with ModelWorker(pipeline) as worker:
        yield worker


def codes(blocks) -> list[int]:
    return [read_code(picture) for block in blocks for picture in block.frames]


def test_blocks_arrive_in_order_and_whole(worker: ModelWorker) -> None:
    run = worker.submit(REQUEST)
    blocks = list(run)
    assert [block.index for block in blocks] == list(range(NUM_BLOCKS))
    assert codes(blocks) == list(range(NUM_FRAMES))
    assert run.ended and not run.stopped
    assert list(run) == []


def test_one_thread_owns_the_model(worker: ModelWorker, pipeline: ScriptedPipeline) -> None:
    for _ in range(3):
        list(worker.submit(REQUEST))
    assert len(pipeline.threads) == 1 and threading.get_ident() not in pipeline.threads


def test_runs_are_served_in_turn(worker: ModelWorker, pipeline: ScriptedPipeline) -> None:
    runs = [worker.submit(replace(REQUEST, seed=seed)) for seed in (1, 2, 3)]
    results: dict[int, list[int]] = {}
    readers = [
        threading.Thread(target=lambda n=n, run=run: results.update({n: codes(run)})) for n, run in enumerate(runs)
    ]
    for reader in reversed(readers):
        reader.start()
    for reader in readers:
        reader.join(20)
    assert results == {n: list(range(NUM_FRAMES)) for n in range(3)}
    assert [request.seed for request in pipeline.requests] == [1, 2, 3]
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(pipeline.intervals))


def test_a_run_stopped_before_its_turn_never_begins(worker: ModelWorker, pipeline: ScriptedPipeline) -> None:
    pipeline.step_seconds = 0.02
    first, second = worker.submit(REQUEST), worker.submit(REQUEST)
    second.stop()
    second.stop()
    assert codes(first) == list(range(NUM_FRAMES))
    assert list(second) == []
    assert len(pipeline.requests) == 1


def test_leaving_the_with_block_stops_the_run(worker: ModelWorker, pipeline: ScriptedPipeline) -> None:
    pipeline.step_seconds = 0.02
    with worker.submit(REQUEST) as run:
        next(iter(run))
    wait_until(lambda: not worker.busy)
    assert len(pipeline.made) < NUM_BLOCKS


def test_a_dropped_run_stops(worker: ModelWorker, pipeline: ScriptedPipeline) -> None:
    pipeline.step_seconds = 0.02
    run = worker.submit(replace(REQUEST, seconds=60))
    next(run)
    del run
    gc.collect()
    wait_until(lambda: not worker.busy)
    assert len(pipeline.made) < 10


def test_a_consumer_that_never_reads_loses_the_model_at_the_deadline(worker: ModelWorker) -> None:
    abandoned = worker.submit(replace(REQUEST, seconds=60), max_seconds=0.3)
    begun = time.monotonic()
    assert codes(worker.submit(REQUEST)) == list(range(NUM_FRAMES))
    assert time.monotonic() - begun < 5
    with pytest.raises(DeadlineExceeded, match=r"0\.3 s"):
        list(abandoned)


def test_deadline_keeps_the_blocks_made_before_it(worker: ModelWorker, pipeline: ScriptedPipeline) -> None:
    pipeline.step_seconds = 0.03
    blocks = []
    with pytest.raises(DeadlineExceeded):
        blocks.extend(worker.submit(replace(REQUEST, seconds=60), max_seconds=0.5))
    assert blocks and codes(blocks) == list(range(len(codes(blocks))))


@pytest.mark.parametrize("place", [(0, 0), (1, 2), (5, 3)])
@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (MemoryError(), OutOfMemory),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), OutOfMemory),
        (OutOfMemory("It does not fit."), OutOfMemory),
        (NonFiniteOutput("Block 1 has NaN."), NonFiniteOutput),
        (InvalidRequest("No."), InvalidRequest),
        (RuntimeError("shape mismatch in /srv/secret/model.py"), SelfForcingError),
        (SystemExit(3), SelfForcingError),
        (KeyboardInterrupt(), SelfForcingError),
        (GeneratorExit(), SelfForcingError),
        (StopIteration(), SelfForcingError),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_error_reaches_its_run_and_no_other(worker, pipeline, fault, expected, place) -> None:
    pipeline.faults[place] = fault
    blocks = []
    with pytest.raises(expected) as caught:
        blocks.extend(worker.submit(REQUEST))
    assert len(blocks) == place[0]
    assert "/srv" not in str(caught.value)
    assert codes(worker.submit(REQUEST)) == list(range(NUM_FRAMES))
    assert len(pipeline.threads) == 1


def test_the_model_is_loaded_on_its_own_thread() -> None:
    threads = []

    def load() -> ScriptedPipeline:
        threads.append(threading.get_ident())
        time.sleep(0.1)
        return ScriptedPipeline(spec=TINY)

    with ModelWorker(load) as worker:
        run = worker.submit(REQUEST)  # before it is ready
        with pytest.raises(TimeoutError):
            worker.wait_ready(0)
        assert codes(run) == list(range(NUM_FRAMES))
        assert worker.wait_ready(1).threads == set(threads)


def test_a_model_that_does_not_load_says_so() -> None:
    def load() -> ScriptedPipeline:
        raise SelfForcingError("There is no model here.")

    with ModelWorker(load) as worker:
        with pytest.raises(SelfForcingError, match="no model here"):
            worker.wait_ready(5)
        with pytest.raises(SelfForcingError, match="no model here"):
            list(worker.submit(REQUEST))


@pytest.mark.parametrize(
    ("fault", "expected", "message"),
    [
        (RuntimeError("CUDA driver at /srv/secret is too old"), SelfForcingError, "could not be loaded .RuntimeError."),
        (MemoryError(), OutOfMemory, "out of memory"),
        (SystemExit(3), SelfForcingError, "could not be loaded .SystemExit."),
    ],
)
def test_an_unexpected_error_while_loading_becomes_a_sentence(fault, expected, message: str) -> None:
    def load() -> ScriptedPipeline:
        raise fault

    with ModelWorker(load) as worker, pytest.raises(expected, match=message) as caught:
        worker.wait_ready(5)
    assert "/srv" not in str(caught.value)


def test_closing_ends_everything(pipeline: ScriptedPipeline) -> None:
    pipeline.step_seconds = 0.02
    worker = ModelWorker(pipeline)
    current, waiting = worker.submit(REQUEST), worker.submit(REQUEST)
    next(current)
    assert worker.close()
    assert len(list(current)) <= QUEUE_BLOCKS + 1
    with pytest.raises(Cancelled):
        list(waiting)
    with pytest.raises(SelfForcingError, match="shut down"):
        worker.submit(REQUEST)
    assert worker.close()


@pytest.mark.parametrize(("timeout", "left"), [(0.3, 0.0), (None, None)])
def test_closing_has_one_deadline_for_all(
    pipeline: ScriptedPipeline, timeout: float | None, left: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float | None] = []
    monkeypatch.setattr(pipeline, "close", lambda timeout: told.append(timeout) or True, raising=False)
    pipeline.step_seconds = 1.0
    worker = ModelWorker(pipeline)
    current = worker.submit(REQUEST)
    wait_until(lambda: current.begun)
    assert worker.close(timeout) == (timeout is None)
    assert told == [left], "nothing is left of the time when the model has taken all of it"
    assert worker.close(10)


def test_importing_the_worker_does_not_import_torch() -> None:
    code = "import sys, pipeline.worker, pipeline.video; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- another model


class Named(ScriptedPipeline):
    """A pipeline of which one can tell whether it is still there."""


def test_the_old_model_is_gone_before_the_new_one_loads() -> None:
    first: list[weakref.ref] = []
    alive_at_load: list[bool] = []

    def load_first() -> ScriptedPipeline:
        pipeline = Named(spec=TINY)
        first.append(weakref.ref(pipeline))
        return pipeline

    def load_second() -> ScriptedPipeline:
        alive_at_load.append(first[0]() is not None)
        return ScriptedPipeline(spec=replace(TINY, name="second"))

    with ModelWorker(load_first) as worker:
        assert len(list(worker.submit(REQUEST))) == NUM_BLOCKS
        worker.switch(load_second)
        assert alive_at_load == [False]
        assert worker.wait_ready(timeout=0).spec.name == "second" and worker.changes == 2
        assert [block.run.model for block in worker.submit(REQUEST)][-1] == "second"


def test_a_model_is_exchanged_after_the_runs_that_wait(pipeline: ScriptedPipeline, worker: ModelWorker) -> None:
    pipeline.step_seconds = 0.01
    runs = [worker.submit(REQUEST) for _ in range(2)]
    switching = threading.Thread(target=worker.switch, args=(lambda: ScriptedPipeline(spec=TINY),))
    switching.start()
    assert [len(list(run)) for run in runs] == [NUM_BLOCKS, NUM_BLOCKS]
    switching.join(10)
    assert len(pipeline.requests) == 2 and worker.wait_ready(0) is not pipeline


def test_only_one_exchange_waits(pipeline: ScriptedPipeline, worker: ModelWorker) -> None:
    may_load = threading.Event()

    def load() -> ScriptedPipeline:
        may_load.wait(10)
        return ScriptedPipeline(spec=TINY)

    switching = threading.Thread(target=worker.switch, args=(load,))
    switching.start()
    wait_until(lambda: worker.busy)
    with pytest.raises(InvalidRequest, match="exchanged already"):
        worker.switch(load)
    with pytest.raises(TimeoutError):
        worker.wait_ready(timeout=0)
    run = worker.submit(REQUEST)  # meanwhile runs may be asked for; they wait
    may_load.set()
    assert len(list(run)) == NUM_BLOCKS
    switching.join(10)


@pytest.mark.parametrize("error", [WeightsError("It is damaged."), MemoryError(), SystemExit(3), ValueError("bad")])
def test_a_model_that_cannot_be_loaded_leaves_the_old_one(error: BaseException) -> None:
    def broken() -> ScriptedPipeline:
        raise error

    loads: list[int] = []

    def load() -> ScriptedPipeline:
        loads.append(1)
        return ScriptedPipeline(spec=TINY)

    with ModelWorker(load) as worker:
        worker.wait_ready(10)
        with pytest.raises(SelfForcingError) as raised:
            worker.switch(broken)
        told = {WeightsError: "damaged", MemoryError: "out of memory"}.get(type(error), "could not be loaded")
        assert told in str(raised.value)
        assert len(loads) == 2 and len(list(worker.submit(REQUEST))) == NUM_BLOCKS


def test_when_neither_model_loads_both_errors_are_told_and_another_can_be_chosen() -> None:
    loads: list[int] = []

    def first() -> ScriptedPipeline:
        loads.append(1)
        if len(loads) > 1:
            raise WeightsError("Its folder is gone.")
        return ScriptedPipeline(spec=TINY)

    def broken() -> ScriptedPipeline:
        raise WeightsError("It is damaged.")

    with ModelWorker(first) as worker:
        worker.wait_ready(10)
        with pytest.raises(WeightsError, match=r"It is damaged\. The model before it .*: Its folder is gone\."):
            worker.switch(broken)
        assert worker.loaded and not worker.exchanging
        for question in (lambda: worker.wait_ready(0), lambda: list(worker.submit(REQUEST))):
            with pytest.raises(WeightsError, match=r"^Its folder is gone\.$"):
                question()
        worker.switch(lambda: ScriptedPipeline(spec=TINY))
        assert len(list(worker.submit(REQUEST))) == NUM_BLOCKS


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: unspecified launch failure"), SystemExit(3)])
def test_an_error_on_giving_up_the_old_model_is_no_success(monkeypatch, error: BaseException) -> None:
    def fault() -> None:
        raise error

    with ModelWorker(lambda: ScriptedPipeline(spec=TINY)) as worker:
        worker.wait_ready(10)
        with monkeypatch.context() as patch:
            patch.setattr("pipeline.failures.free_memory", fault)
            with pytest.raises(SelfForcingError, match="could not be loaded"):
                worker.switch(lambda: ScriptedPipeline(spec=TINY))
            with pytest.raises(SelfForcingError, match="could not be loaded"):
                list(worker.submit(REQUEST))
        worker.switch(lambda: ScriptedPipeline(spec=TINY))
        assert len(list(worker.submit(REQUEST))) == NUM_BLOCKS


def test_a_device_that_broke_cannot_hide_why_the_model_did_not_load(monkeypatch) -> None:
    def fault() -> None:
        raise RuntimeError("CUDA error")

    def load() -> ScriptedPipeline:
        raise MemoryError

    monkeypatch.setattr("pipeline.failures.free_memory", fault)
    with ModelWorker(load) as worker, pytest.raises(OutOfMemory, match="out of memory while the model was loaded"):
        worker.wait_ready(5)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_new_thread_loads_the_model_that_the_old_one_lost() -> None:
    with ModelWorker(lambda: ScriptedPipeline(spec=TINY)) as worker:
        worker.wait_ready(10)
        thread, worker._exchange = worker._thread, lambda switch: worker._no_such_thing  # type: ignore[method-assign]
        worker._pipeline = None
        with pytest.raises(SelfForcingError, match="restarted"):
            worker.switch(lambda: ScriptedPipeline(spec=TINY))
        assert not thread.is_alive()
        assert len(list(worker.submit(REQUEST))) == NUM_BLOCKS


def test_a_closed_worker_exchanges_nothing(worker: ModelWorker) -> None:
    worker.close()
    with pytest.raises(SelfForcingError, match="shut down"):
        worker.switch(lambda: ScriptedPipeline(spec=TINY))
