"""The edge between bnguard and the user's run: no error of ours crosses it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from bnguard.errors import BNGuardError
from bnguard.lightning.framework import Callback, LightningModule, Trainer
from bnguard.report.lines import show

_Arguments = ParamSpec("_Arguments")
_Self = TypeVar("_Self", bound="GuardedCallback")
_Result = TypeVar("_Result")


class GuardedCallback(Callback):
    """A callback that turns itself off at its first error, and lets the run go on.

    If that was the user's, such as an error in a step that the next cell of a notebook mends, the
    next run is begun anew.

    Args:
        strict: Raise errors instead; for tests.

    Attributes:
        is_off: Whether it has turned itself off.
    """

    def __init__(self, *, strict: bool) -> None:
        super().__init__()
        self.is_strict = strict
        self.is_off = False
        self._is_ours = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew, unless an error of our own ended the run before."""
        self.is_off = self.is_off and self._is_ours

    def let_go(self) -> None:
        """Leave the model as it was found; callable at any time."""

    def turn_off(self, error: Exception) -> None:
        """Do nothing from now on, and say why."""
        self.is_off = True
        self._is_ours = not isinstance(error, BNGuardError)
        # What has failed once may fail again.
        with contextlib.suppress(Exception):
            self.let_go()
        off = f"{type(self).__name__} is off from here, and the run goes on."
        why = f"bnguard: {error}; {off}"
        if self._is_ours:
            why = (
                f"bnguard: an error of its own, {type(error).__name__}: {error}; {off} "
                "Please report it, with strict=True for the trace."
            )
        # A terminal that is gone may be what has failed.
        with contextlib.suppress(OSError, ValueError):
            show(why)


def guarded(
    method: Callable[Concatenate[_Self, _Arguments], _Result],
) -> Callable[Concatenate[_Self, _Arguments], _Result | None]:
    """Keep an error in a method from ending the user's run; it returns None then."""

    @functools.wraps(method)
    def wrapper(
        self: _Self, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> _Result | None:
        if self.is_off:
            return None
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            if self.is_strict:
                raise
            self.turn_off(error)
            return None

    return wrapper
