"""The rules: one a file, and the explicit tuple of all of them, in the order of their codes."""

from __future__ import annotations

from bnguard.errors import ConfigurationError, nearest_name
from bnguard.rules.base import Rule
from bnguard.rules.batch_of_one import BatchOfOne
from bnguard.rules.frozen_but_updating import FrozenButUpdating
from bnguard.rules.poisoned_statistics import PoisonedStatistics
from bnguard.rules.statistic_drift import StatisticDrift
from bnguard.rules.unconverged_statistics import UnconvergedStatistics
from bnguard.rules.variance_collapse import VarianceCollapse

RULES: tuple[Rule, ...] = (
    FrozenButUpdating(),
    BatchOfOne(),
    VarianceCollapse(),
    StatisticDrift(),
    UnconvergedStatistics(),
    PoisonedStatistics(),
)


def rule_named(name: str) -> Rule:
    """Return the rule with this code or name, in any case.

    Raises:
        ConfigurationError: There is none; the message has the nearest name.

    Example:
        >>> rule_named("statistic-drift").code
        'BN301'
    """
    by_name = {key: rule for rule in RULES for key in (rule.code.lower(), rule.name)}
    if name.lower() in by_name:
        return by_name[name.lower()]
    near = nearest_name(name.lower(), by_name)
    hint = f"did you mean {by_name[near].code} {by_name[near].name}? " if near else ""
    raise ConfigurationError(f"no rule is called {name!r}: {hint}'bnguard rules' lists them")


__all__ = [
    "RULES",
    "BatchOfOne",
    "FrozenButUpdating",
    "PoisonedStatistics",
    "Rule",
    "StatisticDrift",
    "UnconvergedStatistics",
    "VarianceCollapse",
    "rule_named",
]
