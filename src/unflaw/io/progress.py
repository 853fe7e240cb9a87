"""Progress callbacks, batches, and reading ahead in threads. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[str, int, int, float | None], None]  # stage, done, total, loss


def silent(stage: str, done: int, total: int, loss: float | None = None) -> None:
    """No-op progress callback."""


def ahead(function: Callable[[T], R], items: Iterable[T], workers: int = 2, depth: int = 8) -> Iterator[R]:
    """Like `map`, in order, in threads that are at most `depth` items ahead of the consumer."""
    with ThreadPoolExecutor(workers) as pool:
        iterator = iter(items)
        waiting = [pool.submit(function, item) for item in islice(iterator, depth)]
        try:
            while waiting:
                result = waiting.pop(0).result()
                waiting += [pool.submit(function, item) for item in islice(iterator, 1)]
                yield result
        finally:  # after Ctrl-C
            for future in waiting:
                future.cancel()


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Iterate over lists of `size` items; the last one may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
