"""Batches that can be read more than once, also where they come from a generator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


class _Remembered:
    """What an iterator yields, kept as far as it was read."""

    def __init__(self, source: Iterator[object]) -> None:
        self._source = source
        self._kept: list[object] = []

    def __iter__(self) -> Iterator[object]:
        yield from self._kept
        for item in self._source:
            self._kept.append(item)
            yield item


def repeatable(data: Iterable[object]) -> Iterable[object]:
    """Return the data, or what can be read again where they can be read once.

    >>> numbers = repeatable(iter([1, 2]))
    >>> next(iter(numbers)), list(numbers), list(numbers)
    (1, [1, 2], [1, 2])
    """
    return _Remembered(data) if isinstance(data, Iterator) else data
