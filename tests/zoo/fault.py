"""What a fault in the zoo is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bnguard.findings import Severity
from tests.zoo.training import Watched


@dataclass(frozen=True)
class Fault:
    """A run with one BN fault, and the same run without it.

    Attributes:
        code: Code of the rule that has to name it, first among warnings and errors where it
            is a cause of drift.
        name: What is wrong.
        run: Runs an architecture with the fault, or its healthy twin without it.
        architectures: What it is run on.
        shows_early: Whether it has to be named before a quarter of the run is over.
        severity: The least that the finding has to have.
        is_cause: Whether the finding has to be the first, as the root cause.
    """

    code: str
    name: str
    run: Callable[[bool, str], Watched]
    architectures: tuple[str, ...] = ("conv",)
    shows_early: bool = True
    severity: Severity = Severity.WARNING
    is_cause: bool = False

    def watched(self, *, is_faulty: bool, architecture: str, seed: int) -> Watched:
        """Run it from a seed."""
        torch.manual_seed(seed)
        return self.run(is_faulty, architecture)


@dataclass(frozen=True)
class Healthy:
    """A run of which nothing worse than ``info`` may be said.

    Attributes:
        name: What is special about it.
        run: Runs it.
    """

    name: str
    run: Callable[[], Watched]

    def watched(self, seed: int) -> Watched:
        """Run it from a seed."""
        torch.manual_seed(seed)
        return self.run()
