"""Objects of the user's script that are alive: found among all that the garbage collector tracks.

It takes some hundredths of a second, and is for rare moments.
"""

from __future__ import annotations

import gc
from typing import TypeVar

from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

T = TypeVar("T")


def find_alive(cls: type[T]) -> list[T]:
    """Return the objects of a class, and of classes derived from it.

    Also those whose ``__init__`` is still to run.
    """
    things = gc.get_objects()
    kinds = {kind for kind in set(map(type, things)) if issubclass(kind, cls)}
    return [thing for thing in things if type(thing) in kinds]


def find_loader_in_use() -> DataLoader[object] | None:
    """Return the loader that a loop is drawing from; None if there is none, or several."""
    drawn = [
        batches for batches in find_alive(_BaseDataLoaderIter) if vars(batches).get("_num_yielded")
    ]
    samplers = {id(batches._index_sampler) for batches in drawn}
    used = [
        loader
        for loader in find_alive(DataLoader)
        if id(getattr(loader, "batch_sampler", None)) in samplers
    ]
    return used[0] if len(used) == len(drawn) == 1 else None
