"""Keeps what bnguard runs of a module out of what the run logs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def unlogged(module: nn.Module) -> Iterator[None]:
    """Let ``self.log`` do nothing inside, in the module and in the modules of Lightning in it.

    A forward may call it. Lightning would average that with what the user's own steps log, and
    raise where no step is under way.
    """
    # Both packages have a class of their own, and what they have in common is no class.
    attributes = [vars(part) for part in module.modules() if hasattr(type(part), "log_dict")]
    before = [own.get("log") for own in attributes]
    for own in attributes:
        own["log"] = _log_nothing
    try:
        yield
    finally:
        for own, log in zip(attributes, before, strict=True):
            del own["log"]
            if log is not None:
                own["log"] = log


def _log_nothing(*_: object, **__: object) -> None:
    return None
