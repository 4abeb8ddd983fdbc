"""What a rule is: a code, a name, limits as typed fields, a page for a docstring, a pure check.

A :class:`Rule` looks at one layer at a time; a :class:`ModelRule` at all of them together, because
it needs their order, or what holds for the whole training; an :class:`ExplainedRule` comes last,
because it names a symptom, and is given those of its causes that were found.
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
    """One fault that a BN layer can have, and the limits beyond which it counts as one.

    Attributes:
        code: Code that is never used for another rule.
        name: Name of the defect, never of the remedy.
        is_static: Whether a checkpoint shows the fault, or before the first batch.
        explains: Codes of the rules whose findings this fault brings about: they are shown after
            it, as its consequences.
        acts_by_statistics: Whether it does harm by running statistics that do not fit alone, so
            that where they do it explains nothing.
        is_local: Whether the fault lies in the layer itself, so that nothing at another explains
            it.
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
        """Return whether the fault can show in what was evaluated, where a layer has it."""
        return not (self.acts_by_statistics and fits(layer))

    @classmethod
    def headline(cls) -> str:
        """Return the first line of the page: the fault in one sentence."""
        return cls.page().partition("\n")[0]

    @classmethod
    def page(cls) -> str:
        """Return the page that ``bnguard explain`` shows: the docstring, and how to silence it."""
        return f"{inspect.cleandoc(cls.__doc__ or '')}\n\n{_SILENCE.format(code=cls.code)}"

    def _finding(
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

    def _skipped(self, layer: LayerHistory | None, reason: str) -> Skipped:
        return Skipped(self.code, None if layer is None else layer.name, reason)


@dataclass(frozen=True, kw_only=True)
class ModelRule(Rule):
    """One fault that shows only where all BN layers of a model are seen together."""

    @abc.abstractmethod
    def check_model(self, history: History) -> Iterator[Finding | Skipped]:
        """Yield what is wrong with the model, or why that is unknown; as :meth:`check`."""

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Look at a layer as if it were the only one of its model."""
        yield from self.check_model(History(layers=(layer,), run=layer.run))


# Gives the root of what the other rules found that explains a symptom at a layer, or of the model
# for None; None if they found nothing that does.
RootAt = Callable[[LayerHistory | None], Finding | None]


@dataclass(frozen=True, kw_only=True)
class ExplainedRule(ModelRule):
    """One symptom that several faults bring about, each with a fix of its own."""

    @abc.abstractmethod
    def check_because(self, history: History, root_at: RootAt) -> Iterator[Finding | Skipped]:
        """Yield what is wrong, with the cause and the fix that belongs to it; as :meth:`check`.

        Args:
            history: What was observed.
            root_at: Gives what explains a symptom at a layer.
        """

    def check_model(self, history: History) -> Iterator[Finding | Skipped]:
        """Look at the model as if no other rule had found anything."""
        yield from self.check_because(history, lambda layer: None)
