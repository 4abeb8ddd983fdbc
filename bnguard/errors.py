"""The errors that bnguard raises: each says in one line what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BNGuardError(Exception):
    """Something that bnguard cannot work with; the message is one line that a user can act on."""


class CheckpointError(BNGuardError):
    """A checkpoint that cannot be read, does not fit, or cannot be written."""


class CalibrationError(BNGuardError):
    """A recalibration that cannot be done; the model is as it was before."""


class ConfigurationError(BNGuardError):
    """An option, a name or a limit that does not exist or does not fit."""


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that was probably meant; None where none is near.

    >>> nearest_name("inspct", ["inspect", "explain"])
    'inspect'
    """
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return near[0] if near else None
