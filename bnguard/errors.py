"""The errors that bnguard raises: each says in one line what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class BNGuardError(Exception):
    """Something that bnguard cannot work with; the message is one line that a user can act on."""


class CheckpointError(BNGuardError):
    """A checkpoint that cannot be read, does not fit, or cannot be written."""


class NoBatchNormError(CheckpointError):
    """A valid file without BN layers, or a text file that is not a checkpoint."""


class CalibrationError(BNGuardError):
    """A recalibration that cannot be done; the model is unchanged."""


class LoaderError(CalibrationError):
    """A loader that raises an exception, or that yields no batches."""


class ConfigurationError(BNGuardError, ValueError):
    """An option, a name or a limit that does not exist or does not fit."""


class UserCodeError(BNGuardError):
    """Code of the user's that raised an exception when bnguard ran it."""


@contextmanager
def user_code(name: str) -> Iterator[None]:
    """Mark exceptions of the user's code, which runs inside, as the user's.

    Args:
        name: What the code is, as in "your validation_step raised".

    Raises:
        UserCodeError: It raised an exception other than one of bnguard's.
    """
    try:
        yield
    except BNGuardError:
        raise
    except Exception as error:
        raise UserCodeError(f"your {name} raised {in_one_line(error)}") from error


class Guard:
    """Keeps bnguard's own errors from ending the user's run: the first turns bnguard off.

    Args:
        strict: Raise errors instead.
        let_go: Leaves the model as it was found; called at the first error.
        tell: Shows the user one line.
        consequence: What happens to the run, as in "the run goes on".

    Attributes:
        failure: The line that was shown; None before the first error.
    """

    def __init__(
        self,
        *,
        strict: bool,
        let_go: Callable[[], object],
        tell: Callable[[str], object],
        consequence: str,
    ) -> None:
        self._is_strict = strict
        self.failure: str | None = None
        self._is_ours = False
        self._let_go = let_go
        self._tell = tell
        self._consequence = consequence

    def __call__(
        self,
        action: Callable[_Arguments, _Result],
        *args: _Arguments.args,
        **kwargs: _Arguments.kwargs,
    ) -> _Result | None:
        """Call a function unless turned off; return None if it is, and after an error."""
        if self.failure is not None:
            return None
        try:
            return action(*args, **kwargs)
        except Exception as error:
            self.turn_off(error)
            return None

    def turn_off(self, error: Exception) -> None:
        """Do nothing from now on and say why once; raise the error if strict."""
        if self._is_strict:
            raise error
        if self.failure is not None:
            return
        self._is_ours = not isinstance(error, BNGuardError)
        self.failure = f"bnguard: {error}; {self._consequence}."
        if self._is_ours:
            self.failure = (
                f"bnguard: an error of its own, {type(error).__name__}: {error}; "
                f"{self._consequence}. Please report it, with strict=True for the trace."
            )
        # What failed once may fail again.
        with suppress(Exception):
            self._let_go()
        # A closed terminal may be the cause.
        with suppress(OSError, ValueError):
            self._tell(self.failure)

    def begin_anew(self) -> None:
        """Forget an error of the user's code, which the next run may not have."""
        if not self._is_ours:
            self.failure = None


def in_one_line(error: BaseException) -> str:
    r"""Return the class of an error and the first line of its message.

    If the message holds the traceback of another process, such as a ``DataLoader`` worker, return
    the error at its end.

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


def printable(text: str) -> str:
    r"""Return a text as one line in which nothing can control a terminal.

    >>> print(printable("σ" + chr(10) + "end"))
    σ\nend
    """
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def path_from_here(path: Path) -> Path:
    """Return a path as it is typed in the current folder: relative if it is below that.

    >>> path_from_here(Path.cwd() / "last.ckpt"), path_from_here(Path("/elsewhere"))
    (PosixPath('last.ckpt'), PosixPath('/elsewhere'))
    """
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that was probably meant; None if none is near.

    >>> nearest_name("inspct", ["inspect", "explain"])
    'inspect'
    """
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return near[0] if near else None
