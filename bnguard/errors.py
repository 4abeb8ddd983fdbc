"""The errors that bnguard raises: each says in one line what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class BNGuardError(Exception):
    """Something that bnguard cannot work with; the message is one line that a user can act on."""


class CheckpointError(BNGuardError):
    """A checkpoint that cannot be read, does not fit, or cannot be written."""


class NoBatchNormError(CheckpointError):
    """A file that is in order and holds no BN layers, or is no checkpoint but text."""


class CalibrationError(BNGuardError):
    """A recalibration that cannot be done; the model is as it was before."""


class ConfigurationError(BNGuardError, ValueError):
    """An option, a name or a limit that does not exist or does not fit."""


class UserCodeError(BNGuardError):
    """Code of the user's that raised an exception when bnguard ran it."""


@contextmanager
def user_code(name: str) -> Iterator[None]:
    """Tell an exception of the user's code, which runs inside, from an error of our own.

    Args:
        name: What of the user's it is, as in "your validation_step raised".

    Raises:
        UserCodeError: It raised an exception; one of bnguard's passes as it is.
    """
    try:
        yield
    except BNGuardError:
        raise
    except Exception as error:
        raise UserCodeError(f"your {name} raised {in_one_line(error)}") from error


def in_one_line(error: BaseException) -> str:
    r"""Return the class of an error and the first line of what it says.

    Where another process sent a traceback along, as a worker of a ``DataLoader`` does, what it
    raised follows that.

    >>> in_one_line(ValueError("no such image\nat line 5")), in_one_line(KeyboardInterrupt())
    ('ValueError: no such image', 'KeyboardInterrupt')
    """
    lines = str(error).strip().splitlines()
    traceback = [number for number, line in enumerate(lines) if line.startswith('  File "')]
    for line in lines[traceback[-1] :] if traceback else ():
        if not line.startswith(" "):
            return line
    name = type(error).__name__
    return f"{name}: {lines[0]}" if lines else name


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that was probably meant; None where none is near.

    >>> nearest_name("inspct", ["inspect", "explain"])
    'inspect'
    """
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return near[0] if near else None
