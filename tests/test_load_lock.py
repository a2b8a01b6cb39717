"""Waiting for somebody else's weights to be loaded: one at a time, and a run that waits can be stopped."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pipeline import GenerationRequest, ModelWorker, SelfForcingPipeline
from pipeline.control import RunControl
from pipeline.errors import Cancelled, DeadlineExceeded
from pipeline.load_lock import LOAD_LOCK, loading_alone
from tests.small import write_model_folder
from tests.waiting import wait_until


@contextmanager
def somebody_loading() -> Iterator[None]:
    """Another thread holds the lock, as the enhancer does while its language model is loaded."""
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with loading_alone():
            held.set()
            release.wait(60)

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    assert held.wait(10)
    try:
        yield
    finally:
        release.set()
        thread.join(10)


def is_free() -> bool:
    free = LOAD_LOCK.acquire(blocking=False)
    if free:
        LOAD_LOCK.release()
    return free


def test_whoever_waits_for_the_lock_can_be_stopped() -> None:
    control = RunControl()
    threading.Timer(0.3, control.cancel).start()
    with somebody_loading():
        with control.active(), pytest.raises(Cancelled), loading_alone():
            raise AssertionError("two at a time")
        with RunControl(max_seconds=0.2).active(), pytest.raises(DeadlineExceeded), loading_alone():
            raise AssertionError("two at a time")
    assert is_free()


def test_an_error_lets_go_of_the_lock() -> None:
    with pytest.raises(ValueError, match="damaged"), loading_alone():
        raise ValueError("damaged")
    with somebody_loading():
        pass


def test_without_a_run_it_waits_for_its_turn() -> None:
    with somebody_loading():
        taken: list[float] = []

        def load() -> None:
            with loading_alone():
                taken.append(time.monotonic())

        waiting = threading.Thread(target=load, daemon=True)
        waiting.start()
        time.sleep(0.4)
        assert taken == []
    waiting.join(10)
    assert len(taken) == 1


def test_a_run_that_reloads_weights_behind_a_language_model_hears_its_stop(tmp_path: Path) -> None:
    pipe = SelfForcingPipeline.from_pretrained(write_model_folder(tmp_path), device="cpu")
    plain = GenerationRequest(prompt="a red balloon", seed=3, seconds=1)
    in_8_bits = GenerationRequest(prompt="a red balloon", seed=3, seconds=1, fp8=True)
    first = pipe.generate(plain).frames
    with ModelWorker(lambda: pipe) as worker:
        worker.wait_ready(10)
        assert list(worker.submit(in_8_bits))
        with somebody_loading():
            run = worker.submit(plain)  # needs the weights as they were
            wait_until(lambda: run.begun)
            time.sleep(0.3)
            assert not run.ended
            run.stop()
            wait_until(lambda: run.ended, 10)
            assert list(run) == []
        again = np.concatenate([block.frames for block in worker.submit(plain)])
    assert np.array_equal(again, first)
