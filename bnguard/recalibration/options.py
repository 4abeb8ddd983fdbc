"""Options that several repairs have in common: how good a model is, and on how many samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from numbers import Integral

from torch import nn

from bnguard.errors import ConfigurationError

Score = Callable[[nn.Module], float]


def is_whole(number: object, fewest: int) -> bool:
    """Return whether it is a whole number, NumPy's too, and large enough.

    >>> is_whole(2, 1), is_whole(0, 1), is_whole(2.0, 1)
    (True, False, False)
    """
    return isinstance(number, Integral) and int(number) >= fewest


def require_samples(samples: object, fewest: int) -> None:
    """Make sure that a number of samples is one.

    Raises:
        ConfigurationError: It is something else, or there are too few.
    """
    if not is_whole(samples, fewest):
        raise ConfigurationError(f"samples={samples!r} is no whole number from {fewest} on")


def require_batch_sizes(sizes: object) -> None:
    """Make sure that each of several batches has a size.

    Raises:
        ConfigurationError: One has less than a sample, or there are not several.
    """
    numbers = tuple(sizes) if isinstance(sizes, Iterable) else (0,)
    if not all(is_whole(number, 1) for number in numbers):
        raise ConfigurationError(f"batch_sizes={sizes!r} are not whole numbers from 1 on")


def require_score(score: object) -> None:
    """Make sure that a score can be asked for, where there is one.

    Raises:
        ConfigurationError: It cannot be called.
    """
    if score is not None and not callable(score):
        raise ConfigurationError(f"score={score!r} is no function: score(model) returns a number")


def as_number(score: object) -> float:
    """Return what a score gave.

    Raises:
        ConfigurationError: It is no number.
    """
    try:
        return float(score)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(
            f"score= has to return a number, the higher the better, not {score!r}"
        ) from error
