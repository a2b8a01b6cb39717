"""torch.compile without the wait: pieces of the model are compiled in the background while it goes on working.

A piece is a function without state: a part of a transformer block, one step of a decoder. Installed in the model, it
first only notes what kinds of calls there are. A thread of the `Compiler`'s own then calls the compiled function once
for each kind, on made-up tensors and the model's own weights, which nobody writes to. From then on the piece runs
compiled code for the kinds it knows and the plain function for all others: whoever waits for a video never waits for
a compiler, and what is compiled is just what was counted beforehand, however long a video becomes.

Why a thread: a compilation cannot be interrupted, so on the model thread each one would hold up whoever comes next.
Compiled code belongs to functions, not to threads; dynamo's lock, its callback and the compiler's modes concern the
compiling thread alone, and plain calls elsewhere go on (two to three times slower on two cores, as measured once, for
the interpreter and the processors are shared). Two things do not. `torch.compiler.is_compiling()` is true in every
thread meanwhile: so the model asks `is_dynamo_compiling()`, which is true only in the code that is being compiled. And
dynamo puts back, after each compilation, what it found of torch's global state: of random numbers, which is why noise
has generators of its own, and of the default dtype, which loading changes for a while: so nothing is compiled while
weights are loaded, and nothing loaded while something is compiled.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
import types
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from pipeline import compile_cache
from pipeline.failures import causes, is_out_of_memory
from pipeline.load_lock import loading_alone

logger = logging.getLogger(__name__)

TURN_SECONDS = 0.05
"""Between two compilations. A lock is not fair: else whoever waits to load weights might wait for all of them."""

Kind = tuple[Any, ...]
"""What compiled code depends on of a call's arguments: each is a `Blueprint`, a plain value or a tuple of such."""


@dataclass(frozen=True)
class CompileState:
    """How far the compiled code for a request is."""

    state: Literal["off", "warming", "ready", "failed"] = "off"
    done: int = 0
    total: int = 0
    """Compilations; 0 until the first calls have shown what there is to compile."""
    seconds_left: float | None = None
    """None: nobody knows yet."""
    reason: str = ""
    """Why it failed, in a sentence for the user."""
    to_learn: bool = False
    """Whether a clip with these options, made now, would show more that can be compiled."""

    @property
    def share(self) -> float:
        """Share of the compilations that are done, 0 to 1."""
        return self.done / self.total if self.total else 0.0

    @property
    def ready_in(self) -> str:
        """When it will be ready, in words."""
        if self.seconds_left is None:
            return "ready in a while"
        seconds = max(1, round(self.seconds_left))
        return f"ready in about {seconds} s" if seconds < 90 else f"ready in about {round(seconds / 60)} min"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        told = asdict(self)
        del told["to_learn"]
        left = None if self.seconds_left is None else round(self.seconds_left, 1)
        return told | {"seconds_left": left}


class Blueprint(NamedTuple):
    """A tensor without its numbers."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    inference: bool
    """Whether it was made in inference mode."""

    def build(self) -> torch.Tensor:
        with torch.inference_mode(self.inference):
            return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)


def kind_of(arguments: tuple[Any, ...]) -> Kind:
    return tuple(_kind_of(value) for value in arguments)


def _kind_of(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Blueprint(tuple(value.shape), value.stride(), value.dtype, value.device, value.is_inference())
    return kind_of(value) if isinstance(value, tuple) else value


def build(kind: Kind) -> tuple[Any, ...]:
    """Arguments of this kind."""
    return tuple(_build(value) for value in kind)


def _build(value: Any) -> Any:
    if isinstance(value, Blueprint):
        return value.build()
    return build(value) if isinstance(value, tuple) else value


def settled(result: Any) -> Any:
    """The same numbers with the plain strides of their shapes.

    Compiled code may return others than the plain function; as what comes back is often what goes in next time, one
    kind of call would be two.
    """
    if isinstance(result, torch.Tensor):
        plain = result.stride() == _plain_strides(tuple(result.shape))
        # Through one dimension: `contiguous` does not care for the strides of dimensions of length 1. Dynamo does.
        return result if plain else result.contiguous().view(-1).view(result.shape)
    return tuple(settled(value) for value in result) if isinstance(result, tuple) else result


@lru_cache(maxsize=256)
def _plain_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))


class Piece:
    """A function of the model that is compiled in the background.

    Calls go to the plain function until `enabled` is set; those of a kind that is compiled by then go to the compiled
    one. A kind is compiled when it has come twice in a row: the first frames of a clip, for which a decoder still fills
    its caches, come once each and are not worth the time.

    Args:
        function: takes the module whose weights it uses, and tensors, plain values and tuples of such.
        compiler: is told of new kinds of calls.
    """

    _numbers = itertools.count()

    def __init__(self, function: Callable[..., Any], compiler: Compiler) -> None:
        self.plain = function
        self.backend = compiler.backend
        self.enabled = False
        self.known: set[Kind] = set()
        """Kinds that are compiled or will be."""
        self.ready: set[Kind] = set()
        self.dropped: set[Kind] = set()
        """Kinds that were to be compiled and were not. They will be when they come again."""
        self._compiler = compiler
        self._compiled: Callable[..., Any] | None = None
        self._last: Kind | None = None

    def forget(self) -> None:
        """Let go of what was compiled."""
        self._compiled = None
        self.ready.clear()

    def compiled(self, *arguments: Any) -> Any:
        """Run the compiled function; a kind of call that it does not know yet is compiled here and now."""
        if self._compiled is None:  # not before: the import alone takes seconds
            self._compiled = self._own_compiled()
        return self._compiled(*arguments)

    def _own_compiled(self) -> Callable[..., Any]:
        # Dynamo keeps compiled code with a function's code object, and no more than a few versions of it. With a copy
        # of their own, pieces of the same function (of another model, say) do not get in each other's way, and what was
        # compiled goes when its piece does.
        plain = self.plain
        code = plain.__code__.replace(co_name=f"{plain.__name__}_{next(self._numbers)}")
        own = types.FunctionType(code, plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__)
        # Lengths are part of the code: there are two or three, and loops of a known length are faster.
        return torch.compile(own, dynamic=False, backend=self.backend)

    def __call__(self, owner: nn.Module, *arguments: Any) -> Any:
        kind = kind_of(arguments)
        last, self._last = self._last, kind
        if self.enabled and kind in self.ready:
            return settled(self.compiled(owner, *arguments))
        if kind not in self.known and (kind == last or kind in self.dropped):
            self._compiler.add(self, kind, owner)
        return settled(self.plain(owner, *arguments))


@dataclass(frozen=True)
class _Unit:
    """One compilation."""

    piece: Piece
    kind: Kind
    owner: nn.Module

    @property
    def size(self) -> int:
        """About how much work it is, in no unit."""
        return sum(1 for _ in self.owner.modules())


class Compiler:
    """Compiles the pieces of one model, one after the other, in a thread that lives as long as there is work.

    Args:
        backend: of torch.compile.
    """

    def __init__(self, backend: str | Callable[..., Any] = "inductor") -> None:
        self.backend = backend
        self.failure: str | None = None
        """Why nothing more is compiled, in a sentence."""
        self.may_try_again = False
        """Whether that may pass. See `try_again`."""
        self.learns = True
        """Whether kinds of calls that are new are compiled; otherwise they stay plain."""
        self._lock = threading.Condition()
        self._units: deque[_Unit] = deque()
        self._current: _Unit | None = None
        self._began = 0.0
        self._seconds_done = 0.0
        self._size_done = 0
        self._closed = False
        self._thread: threading.Thread | None = None

    def add(self, piece: Piece, kind: Kind, owner: nn.Module) -> None:
        """Have `piece` compiled for calls of this kind, with the weights of `owner`. Returns at once."""
        with self._lock:
            if not self.learns:
                return
            if self._closed or self.failure is not None:
                piece.dropped.add(kind)
                return
            piece.known.add(kind)
            piece.dropped.discard(kind)
            self._units.append(_Unit(piece, kind, owner))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="compile", daemon=True)
                self._thread.start()

    def state(self, pieces: Iterable[Piece]) -> CompileState:
        """Progress of compiling these pieces."""
        pieces = list(pieces)
        with self._lock:
            known = sum(len(piece.known) for piece in pieces)
            total = known + sum(len(piece.dropped) for piece in pieces)
            done = sum(len(piece.ready) for piece in pieces)
            if self.failure is not None:
                return CompileState("failed", done, total, reason=self.failure, to_learn=self.may_try_again)
            # Pieces are shared: of some, all may be known from runs with other options, and nothing of the rest.
            to_learn = any(piece.dropped or not piece.known for piece in pieces)
            if done < known:
                return CompileState("warming", done, total, self._seconds_left(pieces), to_learn=to_learn)
            if to_learn:
                return CompileState("off", done, total, to_learn=True)
            return CompileState("ready", done, total, 0.0)

    def try_again(self) -> None:
        """Forget a failure that may have passed. What it dropped is compiled when it comes again."""
        with self._lock:
            if self.may_try_again:
                self.failure, self.may_try_again = None, False

    def wait(self, poll: Callable[[], object], seconds: float = 0.2) -> None:
        """Return when nothing is left to compile. `poll` is called again and again; what it raises ends the waiting."""
        while True:
            poll()
            with self._lock:
                if self._thread is None:
                    return
                self._lock.wait(seconds)

    def withdraw(self, pieces: Iterable[Piece], poll: Callable[[], object], seconds: float = 0.2) -> None:
        """Compile nothing more of these pieces. Returns when none is being compiled: their weights may change then.

        A compilation that has begun cannot be interrupted, so this may wait for one; `poll` is called meanwhile, and
        what it raises ends the waiting. Kinds of calls that were not reached are compiled when they come again.
        """
        pieces = set(pieces)
        while True:
            poll()
            with self._lock:
                self._drop([unit for unit in self._units if unit.piece in pieces])
                if self._current is None or self._current.piece not in pieces:
                    return
                self._lock.wait(seconds)

    def close(self, timeout: float | None = 0.0) -> bool:
        """Compile nothing more. A compilation that goes on cannot be interrupted; only who loads weights waits for it.

        Returns whether none goes on after `timeout` seconds; None waits for its end.
        """
        with self._lock:
            self._closed = True
            self._drop(list(self._units))
            return self._lock.wait_for(lambda: self._thread is None, timeout)

    def _drop(self, units: list[_Unit]) -> None:
        """Take them out of the queue. Holds the lock."""
        for unit in units:
            self._units.remove(unit)
            unit.piece.known.discard(unit.kind)
            unit.piece.dropped.add(unit.kind)

    def _seconds_left(self, pieces: list[Piece]) -> float | None:
        if not self._size_done:
            return None
        left = sum(unit.size for unit in self._units if unit.piece in pieces) * self._seconds_done / self._size_done
        if self._current is not None:
            expected = self._current.size * self._seconds_done / self._size_done
            left += max(0.0, expected - (time.monotonic() - self._began))
        return left

    # ---- on the thread

    def _work(self) -> None:
        while self._goes_on():
            with loading_alone():
                self._compile_next()
            time.sleep(TURN_SECONDS)

    def _goes_on(self) -> bool:
        with self._lock:
            if not self._units:
                self._thread = None
                self._lock.notify_all()
            return self._thread is not None

    def _compile_next(self) -> None:
        # Taken only now: while this waited for weights to be loaded, all could be withdrawn without waiting for it.
        if (unit := self._next()) is None:
            return
        failure, passing = None, False
        try:
            self._compile(unit)
        except BaseException as error:  # whatever it is: the model works without compiled code
            logger.error("torch.compile failed", exc_info=error)
            failure, passing = failure_sentence(error), _out_of_memory(error)
        with self._lock:
            self._seconds_done += time.monotonic() - self._began
            self._size_done += unit.size
            self._current = None
            if failure is None:
                unit.piece.ready.add(unit.kind)
            else:
                self.failure, self.may_try_again = failure, passing
                self._units.appendleft(unit)
                self._drop(list(self._units))
            self._lock.notify_all()

    def _next(self) -> _Unit | None:
        with self._lock:
            if self._units:
                self._current = self._units.popleft()
                self._began = time.monotonic()
            return self._current

    def _compile(self, unit: _Unit) -> None:
        compile_cache.use()
        try:
            _call(unit)
        except Exception as error:
            # What is in the cache may be damaged, half-written, of a compiler that has changed, or another program may
            # have emptied it at this moment: once more without it.
            if _out_of_memory(error) or _disk_full(error):
                raise
            compile_cache.give_up()
            logger.warning("torch.compile failed; trying once more, without what its cache held", exc_info=True)
            self._forget(unit)
            _call(unit)

    def _forget(self, unit: _Unit) -> None:
        """Let go of all that was compiled of a piece, and have the rest of it compiled again after this unit."""
        with self._lock:
            self._units.extend(_Unit(unit.piece, kind, unit.owner) for kind in unit.piece.ready)
            unit.piece.forget()


@torch.inference_mode()
def _call(unit: _Unit) -> None:
    unit.piece.compiled(unit.owner, *build(unit.kind))


def failure_sentence(error: BaseException) -> str:
    """What the user is told of an error that ended the compiling."""
    if _disk_full(error):
        return "torch.compile failed: the disk is full. Free some space and restart; everything else works."
    if _out_of_memory(error):
        return (
            "torch.compile failed: there was too little memory beside what else was going on. The next video with it "
            "tries again; without it everything works."
        )
    return (
        f"torch.compile failed on this machine ({_first_cause(error)}). Switch it off; the next run works without it."
    )


def _first_cause(error: BaseException, length: int = 200) -> str:
    """What began it, with its kind: whoever reports the failure copies that."""
    *_, first = causes(error)
    lines = [line.strip() for line in str(first).splitlines() if line.strip()]
    # torch passes on a C++ compiler's whole output: take its `error:` line, else the first line that is no heading.
    complaints = [line for line in lines if "error: " in line]
    said = next(iter(complaints or [line for line in lines if not line.endswith(":")]), "")
    told = f"{type(first).__name__}: {said}" if said else type(first).__name__
    return told if len(told) <= length else told[: length - 1] + "…"


def _out_of_memory(error: BaseException) -> bool:
    return any(is_out_of_memory(link) for link in causes(error))


def _disk_full(error: BaseException) -> bool:
    return any("No space left on device" in str(link) for link in causes(error))
