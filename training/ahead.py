"""What steps learn from, put together ahead of time by other processes: torch's own DataLoader, one item a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

Part = TypeVar("Part")


class _Steps(Dataset, Generic[Part]):
    """A step's parts by its number."""

    def __init__(self, make: Callable[[int], Iterable[Part]]) -> None:
        self.make = make

    def __getitem__(self, step: int) -> list[Part]:
        return list(self.make(step))


class Ahead(Generic[Part]):
    """Gives the parts of one step after another.

    Args:
        make: step -> its parts, as a function of the number alone.
        steps: of the whole run: none is made beyond.
        workers: processes that make them; 0: each part is made when it is asked for.
    """

    def __init__(self, make: Callable[[int], Iterable[Part]], steps: int, workers: int) -> None:
        self.make = make
        self.steps = steps
        self.workers = workers
        self._next = -1
        self._coming: Iterator[list[Part]] = iter(())

    def __call__(self, step: int) -> Iterable[Part]:
        if not self.workers:
            return self.make(step)
        if step != self._next:  # the first one, or that of a run which was continued
            loader = DataLoader(
                _Steps(self.make),
                batch_size=None,
                sampler=range(step, self.steps),
                num_workers=self.workers,
                multiprocessing_context="fork",
            )
            self._coming = iter(loader)
        self._next = step + 1
        return next(self._coming)
