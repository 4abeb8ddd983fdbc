"""What a situation is, and what is held of bnguard in it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnguard
import tests.field
from bnguard.findings import Finding, FindingGroup, Severity
from tests.networks import digits

# The frame itself.
_FRAME = {"__main__", "situation", "test_field"}

# Accuracy that has to be lost in a fault, and the share of it that the proposed fix has to restore.
LEAST_HARM = 0.05
LEAST_SHARE_BACK = 0.8


@dataclass(frozen=True)
class Run:
    """What came of one run.

    Attributes:
        accuracy: Accuracy in eval mode at its end.
        findings: What bnguard reported at its end, the first cause first.
        announced: Codes of the warnings and errors that were printed while it ran.
    """

    accuracy: float
    findings: tuple[Finding, ...]
    announced: tuple[str, ...] = ()

    @property
    def accusations(self) -> tuple[str, ...]:
        """Codes of the warnings and errors of the report, in its order, each once."""
        codes = (f.code for f in self.findings if f.severity > Severity.INFO)
        return tuple(dict.fromkeys(codes))


@dataclass
class Watch:
    """A monitor that keeps what it announces; further options go to ``bnguard.watch``."""

    model: nn.Module
    options: dict[str, object] = field(default_factory=dict)
    announced: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.monitor = bnguard.watch(
            self.model, max_overhead=0.0, on_findings=self._note, strict=True, **self.options
        )

    def _note(self, group: FindingGroup) -> None:
        self.announced.append(group.findings[0].code)

    def end(self, accuracy: float) -> Run:
        """Close the monitor and return what came of the run."""
        report = self.monitor.report()
        self.monitor.close()
        return Run(accuracy, report.findings, tuple(self.announced))


@dataclass(frozen=True, kw_only=True)
class Situation:
    """A situation: healthy code that must not be accused, and perhaps the fault and its fix.

    Attributes:
        healthy: Runs code that is right, in the same situation.
        faulty: Runs the code as reported; None where the report is of healthy code.
        cause: Code of the rule that has to stand first for the fault.
        repaired: Applies the fix that bnguard proposes; returns the accuracy. None where the fix
            makes the code the healthy one, which has run already.
        expected_failure: What bnguard gets wrong today; empty where it is right.
    """

    healthy: Callable[[], Run]
    faulty: Callable[[], Run] | None = None
    cause: str = ""
    repaired: Callable[[], float] | None = None
    expected_failure: str = ""


@dataclass(frozen=True)
class Verdict:
    """How bnguard did in a situation; what does not apply is None."""

    healthy: Run
    faulty: Run | None
    share_back: float | None
    cause: str

    @property
    def harm(self) -> float | None:
        """Accuracy that the fault costs."""
        return None if self.faulty is None else self.healthy.accuracy - self.faulty.accuracy

    @property
    def first(self) -> str | None:
        """The first warning or error about the fault."""
        return None if self.faulty is None else next(iter(self.faulty.accusations), None)

    @property
    def is_right(self) -> bool:
        """Whether everything is as it has to be."""
        return (
            not self.healthy.accusations
            and not self.healthy.announced
            and (self.harm is None or self.harm >= LEAST_HARM)
            and (self.faulty is None or self.first == self.cause)
            and (self.share_back is None or self.share_back >= LEAST_SHARE_BACK)
        )


def judge(situation: Situation, seed: int = 0) -> Verdict:
    """Run a situation from a seed, in one thread."""

    def seeded(run: Callable[[], Run]) -> Run:
        torch.manual_seed(seed)
        return run()

    healthy = seeded(situation.healthy)
    faulty = None if situation.faulty is None else seeded(situation.faulty)
    share_back = None
    if faulty is not None:
        torch.manual_seed(seed)
        repaired = healthy.accuracy if situation.repaired is None else situation.repaired()
        lost = healthy.accuracy - faulty.accuracy
        share_back = (repaired - faulty.accuracy) / max(lost, 1e-9)
    return Verdict(healthy, faulty, share_back, situation.cause)


def situations() -> Iterator[tuple[str, Situation]]:
    """Yield name and situation of each file in this folder."""
    for module in sorted(pkgutil.iter_modules(tests.field.__path__), key=lambda info: info.name):
        if module.name not in _FRAME:
            yield module.name, importlib.import_module(f"tests.field.{module.name}").SITUATION


def accuracy(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, batch: int = 128
) -> float:
    """Return the accuracy in the mode that the model is in."""
    with torch.no_grad():
        scores = torch.cat([model(part) for part in images.split(batch)])
    return (scores.argmax(1) == labels).float().mean().item()


def evaluate(watch: Watch, images: torch.Tensor, labels: torch.Tensor, batch: int = 128) -> float:
    """Put the model in eval mode, and return the accuracy of an evaluation that is watched."""
    watch.model.eval()
    with watch.monitor.evaluation():
        return accuracy(watch.model, images, labels, batch)


def shuffled(size: int, count: int = 1200) -> Callable[[], Iterable[Tensor]]:
    """Return a function that deals out the first samples as batches of indices, anew each time."""
    return lambda: torch.randperm(count).split(size)


def train(
    model: nn.Module,
    *,
    loss: Callable[[Tensor], Tensor] | None = None,
    images: Tensor | None = None,
    batches: Callable[[], Iterable[Tensor]] | None = None,
    epochs: int = 4,
    lr: float = 0.05,
    start: Callable[[], object] | None = None,
) -> Run:
    """Train on 1,200 watched digits, and evaluate on the other 597 after each epoch.

    Args:
        loss: Loss of a batch of indices; the cross-entropy of ``images`` where it is None.
        batches: Deals out the batches of an epoch; shuffled, of 64 samples, where it is None.
        start: Called at the start of each epoch in place of ``model.train()``.
    """
    own, labels = digits()
    images = own if images is None else images
    loss = loss or (lambda batch: F.cross_entropy(model(images[batch]), labels[batch]))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    watch = Watch(model, {"optimizer": optimizer})
    for _ in range(epochs):
        (start or model.train)()
        for batch in (batches or shuffled(64))():
            optimizer.zero_grad()
            loss(batch).backward()
            optimizer.step()
            watch.monitor.step()
        last = evaluate(watch, images[1200:], labels[1200:])
    return watch.end(last)
