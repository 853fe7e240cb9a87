"""Work that flows: progress, batches, and reading ahead in threads. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[str, int, int, float | None], None]  # stage, done, total, loss


def silent(stage: str, done: int, total: int, loss: float | None = None) -> None:
    """Progress that nobody watches."""


def ahead(function: Callable[[T], R], items: Iterable[T], workers: int = 2, depth: int = 8) -> Iterator[R]:
    """`map` in threads that stays at most `depth` items ahead of the consumer, in order."""
    with ThreadPoolExecutor(workers) as pool:
        iterator = iter(items)
        waiting = [pool.submit(function, item) for item in islice(iterator, depth)]
        try:
            while waiting:
                result = waiting.pop(0).result()
                waiting += [pool.submit(function, item) for item in islice(iterator, 1)]
                yield result
        finally:  # after Ctrl-C nobody wants the rest
            for future in waiting:
                future.cancel()


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
