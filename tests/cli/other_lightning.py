"""The demo's network and data once more, with `lightning.pytorch` as their base."""

from __future__ import annotations

import inspect

from bnguard import demo

_SOURCE = inspect.getsource(demo)
_CHANGED = _SOURCE.replace(
    "from bnguard.lightning.framework import", "from lightning.pytorch import"
)
assert _CHANGED != _SOURCE
exec(compile(_CHANGED, __file__, "exec"))


class _SeveralLevelsDeep(DigitsNet):  # noqa: F821
    """A base class of somebody's own, between Lightning's and the network's."""


class DeepDigitsNet(_SeveralLevelsDeep):
    """The network as projects have it."""
