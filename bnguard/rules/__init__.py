"""The rules, one per file: a new one is its file, named after its code, and a line below."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterable, Iterator
from difflib import SequenceMatcher
from importlib.metadata import EntryPoint, entry_points

from bnguard.errors import ConfigurationError, in_one_line, nearest_name
from bnguard.rules import (  # noqa: F401
    bn101_frozen_but_updating,
    bn102_batch_of_one,
    bn103_momentum_out_of_range,
    bn104_untracked_statistics,
    bn105_low_precision_statistics,
    bn106_unsynchronised_small_batch,
    bn107_accumulation_blind,
    bn108_lost_activation,
    bn109_hygiene,
    bn201_variance_collapse,
    bn202_noisy_batch_statistics,
    bn203_correlated_batches,
    bn204_dead_channels,
    bn205_double_update,
    bn206_update_outside_training,
    bn207_several_streams,
    bn208_unfrozen_by_train,
    bn209_trained_in_eval,
    bn210_rank_disagreement,
    bn211_padded_input,
    bn301_statistic_drift,
    bn302_mode_gap,
    bn303_unconverged_statistics,
    bn304_stale_statistics,
    bn305_input_shift,
    bn306_skipped_in_evaluation,
    bn401_nonfinite_batch,
    bn402_poisoned_statistics,
    bn403_amplifying_channel,
    bn404_half_precision_overflow,
)
from bnguard.rules.base import ExplainedRule, ModelRule, Rule

# What the modules imported above define, in the order of the codes.
RULES: tuple[Rule, ...] = tuple(
    sorted(
        (
            rule()
            for form in (Rule, ModelRule, ExplainedRule)
            for rule in form.__subclasses__()
            if not inspect.isabstract(rule)
        ),
        key=lambda rule: rule.code,
    )
)

PLUGINS = "bnguard.rules"


@functools.cache
def installed_rules() -> tuple[Rule, ...]:
    """Return :data:`RULES` and the rules of installed packages, imported at the first call.

    A package names its rules in the entry point group ``bnguard.rules``: a rule, a class of rules
    without required arguments, or a list of these. Unusable ones are left out with a warning.
    """
    rules = list(RULES)
    for plugin in entry_points(group=PLUGINS):
        try:
            found = list(_rules_of(plugin))
        except Exception as error:
            _warn(plugin, in_one_line(error))
            continue
        for rule in found:
            names = {rule.code.lower(), rule.name.lower()}
            same = [known for known in rules if names & {known.code.lower(), known.name.lower()}]
            if same:
                _warn(
                    plugin, f"{rule.code} {rule.name} collides with {same[0].code} {same[0].name}"
                )
            else:
                rules.append(rule)
    return tuple(rules)


def _rules_of(plugin: EntryPoint) -> Iterator[Rule]:
    loaded = plugin.load()
    is_several = isinstance(loaded, Iterable) and not isinstance(loaded, type)
    for given in loaded if is_several else [loaded]:
        rule = given() if isinstance(given, type) else given
        if not isinstance(rule, Rule):
            raise TypeError(f"{given!r} is not a bnguard.Rule")
        if not all(isinstance(getattr(rule, name, None), str) for name in ("code", "name")):
            raise TypeError(f"{type(rule).__name__} needs a code and a name")
        yield rule


def _warn(plugin: EntryPoint, problem: str) -> None:
    package = f" of {plugin.dist.name}" if plugin.dist else ""
    warnings.warn(
        f"bnguard: a rule is left out, entry point {plugin.name}{package}: {problem}",
        stacklevel=3,
    )


def rule_named(name: str) -> Rule:
    """Return the rule with this code or name, in any case.

    Raises:
        ConfigurationError: There is no such rule; the message has the nearest name.

    Example:
        >>> rule_named("statistic-drift").code
        'BN301'
    """
    by_name = {key: rule for rule in installed_rules() for key in (rule.code.lower(), rule.name)}
    if name.lower() in by_name:
        return by_name[name.lower()]
    family = [
        rule.code
        for rule in installed_rules()
        if _is_code(name) and rule.code[:3] == name.upper()[:3]
    ]
    likeness = {code: SequenceMatcher(None, code, name.upper()).ratio() for code in family}
    misread = [code for code in family if likeness[code] == max(likeness.values())]
    if len(misread) > 1:
        raise ConfigurationError(
            f"no rule is called {name!r}: there are {', '.join(family)}; 'bnguard rules' lists them"
        )
    near = misread[0].lower() if misread else nearest_name(name.lower(), by_name)
    hint = f"did you mean {by_name[near].code} {by_name[near].name}? " if near else ""
    raise ConfigurationError(f"no rule is called {name!r}: {hint}'bnguard rules' lists them")


def _is_code(name: str) -> bool:
    return name[:2].upper() == "BN" and name[2:3].isdigit()


__all__ = ["RULES", "ExplainedRule", "ModelRule", "Rule", "installed_rules", "rule_named"]
