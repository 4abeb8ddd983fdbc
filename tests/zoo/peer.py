"""What torch-audit says of the same runs, where it is installed (extra ``bench``).

It takes the place of ``bnguard.watch`` and ``bnguard.inspect``: the runs are the same, and so is
how often it looks. Only faults that one of its checks is meant for are scored.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import nn

from bnguard.observe.history import History, Run
from bnguard.report import Report

INSTALL = "pip install torch-audit"

# Its rules by ours: unused layers, devices and data types of weights are no faults of BN.
MATCHING: dict[str, tuple[str, ...]] = {
    "BN102": ("TA304",),  # a batch below 8 beside BN
    "BN106": ("TA304",),
    "BN107": ("TA304",),
    "BN109": ("TA400", "TA402"),  # a bias before BN, weight decay on it
    "BN201": ("TA304",),
    "BN202": ("TA304",),
    "BN204": ("TA105", "TA405"),  # dead activations, dead filters
    "BN205": ("TA501",),  # a BN layer called several times in a forward
    "BN207": ("TA501",),
    "BN401": ("TA100",),  # NaN or Inf in parameters or gradients
    "BN402": ("TA100",),
}


@dataclass(frozen=True)
class Audit:
    """Whether torch-audit named a fault, and accused its twin of the same."""

    is_named: bool
    is_twin_accused: bool


def is_installed() -> bool:
    return importlib.util.find_spec("torch_audit") is not None


def audit(code: str, run: Callable[..., object]) -> Audit | None:
    """Run a fault and its twin under torch-audit; None where it has no check, or sees nothing."""
    if code not in MATCHING:
        return None
    named = []
    for is_faulty in (True, False):
        with _in_place_of_bnguard() as watchers:
            run(is_faulty=is_faulty)
        if not watchers:
            return None
        rules = {rule for watcher in watchers for rule in watcher.rules}
        named.append(not rules.isdisjoint(MATCHING[code]))
    return Audit(*named)


class Watcher:
    """Looks like a monitor of bnguard to the loops of the zoo, and lets torch-audit look on."""

    def __init__(self, model: nn.Module, optimizer: object, every_n_steps: int) -> None:
        from torch_audit import Auditor

        owner = optimizer if isinstance(optimizer, torch.optim.Optimizer) else None
        self._auditor = Auditor(model, optimizer=owner, every_n_steps=every_n_steps)
        self._auditor.autopatch()
        self._is_counting = owner is not None

    @property
    def rules(self) -> set[str]:
        return {finding.rule_id for finding in self._auditor.findings}

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *error: object) -> None:
        self._auditor.unpatch()

    def step(self) -> None:
        # With an optimizer torch-audit counts its steps.
        if not self._is_counting:
            self._auditor.step += 1

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        yield

    def report(self) -> Report:
        return _SILENCE


_SILENCE = Report(History(layers=(), run=Run()), (), ())


@contextmanager
def _in_place_of_bnguard() -> Iterator[list[Watcher]]:
    watchers: list[Watcher] = []

    def watch(model, *, optimizer=None, every_n_steps=50, **_options):
        watchers.append(Watcher(model, optimizer, every_n_steps))
        return watchers[-1]

    def inspect(subject):
        if isinstance(subject, nn.Module):
            watchers.append(Watcher(subject, None, 1))
        return _SILENCE

    with ExitStack() as stack:
        stack.enter_context(mock.patch("bnguard.watch", watch))
        stack.enter_context(mock.patch("bnguard.inspect", inspect))
        yield watchers
