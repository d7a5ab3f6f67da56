"""Several watched processes that share a list of work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import wait
from typing import Any

from mmformer.datasets.sources import DecodeError
from mmformer.datasets.watchdog import Watchdog


def each(
    work: Callable[[Any], Any], values: Iterable[Any], seconds: float, workers: int
) -> Iterator[tuple[int, Any | DecodeError]]:
    """`work` of every value, as it is done: (place of the value, result), or the error where it refused or was killed.

    A value may take `seconds`. Values are asked for one by one, as processes become free.
    """
    queue = enumerate(values)
    dogs = [Watchdog(work, seconds) for _ in range(workers)]
    busy: dict[Watchdog, int] = {}

    def feed(dog: Watchdog) -> None:
        busy.pop(dog, None)
        for place, value in queue:
            dog.ask(value)
            busy[dog] = place
            return

    try:
        for dog in dogs:
            feed(dog)
        while busy:
            ready = wait([dog.connection for dog in busy], min(dog.left for dog in busy))
            for dog, place in list(busy.items()):
                if dog.connection in ready or not dog.left:
                    yield place, _answer(dog)
                    feed(dog)
    finally:
        for dog in dogs:
            dog.close()


def _answer(dog: Watchdog) -> Any | DecodeError:
    try:
        return dog.answer()
    except DecodeError as error:
        return error
