"""torch.compile without the wait: pieces of the model are compiled in the background while it goes on working.

A piece is a function without state: a part of a transformer block, one step of a decoder. Installed in the model, it
first only notes what kinds of calls there are. A thread of the `Compiler`'s own then calls the compiled function once
for each kind, on made-up tensors and the model's own weights, which nobody writes to. From then on the piece runs
compiled code for the kinds it knows and the plain function for all others: whoever waits for a video never waits for
a compiler, and what is compiled is just what was counted beforehand, however long a video becomes.

Why a thread: a compilation cannot be interrupted, so on the model thread each one would hold up whoever comes next.
Compiled code belongs to functions, not to threads; dynamo's lock, its callback and the compiler's modes concern the
compiling thread alone, and plain calls elsewhere go on (two to three times slower on two cores, as measured once, for
the interpreter and the processors are shared).
Dynamo puts torch's global random state back after each compilation; noise has generators of its own.
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

logger = logging.getLogger(__name__)

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
    """Of a failure, in a sentence for the user."""

    @property
    def share(self) -> float:
        """Of the compilations, 0 to 1."""
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
        left = None if self.seconds_left is None else round(self.seconds_left, 1)
        return asdict(self) | {"seconds_left": left}


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
        if self.enabled and kind in self.ready:
            return settled(self.compiled(owner, *arguments))
        if kind == self._last and kind not in self.known:
            self._compiler.add(self, kind, owner)
        self._last = kind
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
            piece.known.add(kind)
            if self._closed or self.failure is not None:
                return
            self._units.append(_Unit(piece, kind, owner))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="compile", daemon=True)
                self._thread.start()

    def state(self, pieces: Iterable[Piece]) -> CompileState:
        """Of what consists of these pieces."""
        pieces = list(pieces)
        with self._lock:
            total = sum(len(piece.known) for piece in pieces)
            done = sum(len(piece.ready) for piece in pieces)
            if self.failure is not None:
                return CompileState("failed", done, total, reason=self.failure)
            if not total:
                return CompileState()
            if done == total and all(piece.known for piece in pieces):
                return CompileState("ready", done, total, 0.0)
            return CompileState("warming", done, total, self._seconds_left(pieces))

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
        what it raises ends the waiting. Kinds of calls that were not reached may be learnt anew.
        """
        pieces = set(pieces)
        while True:
            poll()
            with self._lock:
                for unit in [unit for unit in self._units if unit.piece in pieces]:
                    self._units.remove(unit)
                    unit.piece.known.discard(unit.kind)
                if self._current is None or self._current.piece not in pieces:
                    return
                self._lock.wait(seconds)

    def close(self, timeout: float = 0.0) -> bool:
        """Compile nothing more. A compilation that goes on cannot be interrupted, but nobody needs to wait for its end.

        Returns whether none goes on after `timeout` seconds.
        """
        with self._lock:
            self._closed = True
            self._units.clear()
            return self._lock.wait_for(lambda: self._thread is None, timeout)

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
        while (unit := self._next()) is not None:
            failure = None
            try:
                self._compile(unit)
            except BaseException as error:  # noqa: BLE001 - whatever it is: the model works without compiled code
                logger.error("torch.compile failed", exc_info=error)
                failure = failure_sentence(error)
            with self._lock:
                self._seconds_done += time.monotonic() - self._began
                self._size_done += unit.size
                self._current = None
                if failure is None:
                    unit.piece.ready.add(unit.kind)
                else:
                    self.failure = failure
                    self._units.clear()
                self._lock.notify_all()
            del unit  # or its weights would outlive a model that is given up

    def _next(self) -> _Unit | None:
        with self._lock:
            if not self._units:
                self._thread = None
                self._lock.notify_all()
                return None
            self._current = unit = self._units.popleft()
            self._began = time.monotonic()
            return unit

    def _compile(self, unit: _Unit) -> None:
        compile_cache.use()
        try:
            _call(unit)
        except Exception:
            # What is in the cache may be damaged, half-written, of a compiler that has changed: once more without it.
            if not compile_cache.give_up():
                raise
            logger.warning("torch.compile failed with what the cache holds; trying without", exc_info=True)
            unit.piece.forget()
            _call(unit)


@torch.inference_mode()
def _call(unit: _Unit) -> None:
    unit.piece.compiled(unit.owner, *build(unit.kind))


def failure_sentence(error: BaseException) -> str:
    """What the user is told of an error that ended the compiling."""
    link: BaseException | None = error
    while link is not None:
        if "No space left on device" in str(link):
            return "torch.compile failed: the disk is full. Free some space and restart; everything else works."
        if isinstance(link, torch.OutOfMemoryError):
            return "torch.compile failed: the device ran out of memory. Switch it off; the next run works without it."
        link = link.__cause__ or link.__context__
    return "torch.compile failed on this machine. Switch it off; the next run works without it."
