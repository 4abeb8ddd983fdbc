"""What a rule is: a code, a name, limits as typed fields, its page as docstring, a pure check.

A :class:`Rule` checks one layer at a time, a :class:`ModelRule` all layers together. An
:class:`ExplainedRule` finds a symptom: it runs last, and gets the causes that were found.
"""

from __future__ import annotations

import abc
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped
from bnguard.observe.history import History, LayerHistory
from bnguard.rules.measurements import fits

_SILENCE = """\
Silence:
    On some layers, by the pattern of their names; or in ``[tool.bnguard]`` of pyproject.toml::

        bnguard.watch(model, per_layer_ignores={{"backbone.*": ["{code}"]}})
"""


@dataclass(frozen=True, kw_only=True)
class Rule(abc.ABC):
    """One fault that a BN layer can have, and the limits beyond which it is one.

    Attributes:
        code: Code, never reused for another rule.
        name: Name of the defect, never of the remedy.
        is_static: Whether a checkpoint shows the fault, or a model before its first batch.
        explains: Codes of the rules whose findings this fault causes; those are shown after it.
        acts_by_statistics: Whether it harms only through running statistics that do not fit, so
            that it explains nothing if they do.
        is_local: Whether the fault is in the layer itself, so that no other layer explains it.
    """

    code: ClassVar[str]
    name: ClassVar[str]
    is_static: ClassVar[bool] = False
    explains: ClassVar[tuple[str, ...]] = ()
    acts_by_statistics: ClassVar[bool] = False
    is_local: ClassVar[bool] = False

    @abc.abstractmethod
    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Yield what is wrong with the layer, or why that is unknown; nothing if it is fine.

        Must not raise on odd data (NaN, one channel, no data): that is a reason to skip.
        """

    def has_done_harm(self, layer: LayerHistory) -> bool:
        """Return whether the fault of a layer can have changed the newest evaluation."""
        return not (self.acts_by_statistics and fits(layer))

    @classmethod
    def headline(cls) -> str:
        """Return the first line of the page: the fault in one sentence."""
        return cls.page().partition("\n")[0]

    @classmethod
    def page(cls) -> str:
        """Return the page that ``bnguard explain`` shows: the docstring, and how to silence it."""
        return f"{inspect.cleandoc(cls.__doc__ or '')}\n\n{_SILENCE.format(code=cls.code)}"

    def make_finding(
        self,
        layer: LayerHistory | None,
        severity: Severity,
        message: str,
        evidence: Evidence,
        fix: Fix,
        *,
        reasons: tuple[Evidence, ...] = (),
        channels: tuple[int, ...] = (),
        step: int | None = None,
    ) -> Finding:
        """Return a finding of this rule at a layer, or at the model for None.

        Args:
            layer: The layer.
            severity: How bad it is.
            message: What is wrong, with the layer or the model as the subject.
            evidence: The number that shows it, and its limit.
            fix: What to do.
            reasons: The numbers that show the cause, if the message names one.
            channels: The channels concerned.
            step: First step from which it holds, if the rule knows it.
        """
        return Finding(
            code=self.code,
            name=self.name,
            severity=severity,
            layer=None if layer is None else layer.name,
            message=message,
            evidence=evidence,
            fix=fix,
            reasons=reasons,
            channels=channels,
            step=step,
        )

    def skip(self, layer: LayerHistory | None, reason: str) -> Skipped:
        """Return that this rule cannot judge a layer, or the model for None, and why."""
        return Skipped(self.code, None if layer is None else layer.name, reason)


@dataclass(frozen=True, kw_only=True)
class ModelRule(Rule):
    """One fault that only all BN layers of a model together show."""

    @abc.abstractmethod
    def check_model(self, history: History) -> Iterator[Finding | Skipped]:
        """Yield what is wrong with the model, or why that is unknown; as :meth:`check`."""

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Check a layer as if it were the only one of its model."""
        yield from self.check_model(History(layers=(layer,), run=layer.run))


# Returns the root cause, among the findings of other rules, of a symptom at a layer, or of the
# model for None; None if there is no cause.
RootAt = Callable[[LayerHistory | None], Finding | None]


@dataclass(frozen=True, kw_only=True)
class ExplainedRule(ModelRule):
    """One symptom that several faults cause, each with its own fix."""

    @abc.abstractmethod
    def check_because(self, history: History, root_at: RootAt) -> Iterator[Finding | Skipped]:
        """Yield what is wrong, with its cause and the fix of that cause; as :meth:`check`.

        Args:
            history: What was observed.
            root_at: Returns the root cause of a symptom at a layer.
        """

    def check_model(self, history: History) -> Iterator[Finding | Skipped]:
        """Check the model as if no other rule had found anything."""
        yield from self.check_because(history, lambda layer: None)
