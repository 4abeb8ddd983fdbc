"""The rules: one a file, and the explicit tuple of all of them, in the order of their codes."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Iterator
from difflib import SequenceMatcher
from importlib.metadata import EntryPoint, entry_points

from bnguard.errors import ConfigurationError, in_one_line, nearest_name
from bnguard.rules.accumulation_blind import AccumulationBlind
from bnguard.rules.amplifying_channel import AmplifyingChannel
from bnguard.rules.base import ExplainedRule, ModelRule, Rule
from bnguard.rules.batch_of_one import BatchOfOne
from bnguard.rules.correlated_batches import CorrelatedBatches
from bnguard.rules.dead_channels import DeadChannels
from bnguard.rules.double_update import DoubleUpdate
from bnguard.rules.frozen_but_updating import FrozenButUpdating
from bnguard.rules.half_precision_overflow import HalfPrecisionOverflow
from bnguard.rules.hygiene import Hygiene
from bnguard.rules.input_shift import InputShift
from bnguard.rules.lost_activation import LostActivation
from bnguard.rules.low_precision_statistics import LowPrecisionStatistics
from bnguard.rules.mode_gap import ModesDisagree
from bnguard.rules.momentum_out_of_range import MomentumOutOfRange
from bnguard.rules.noisy_batch_statistics import NoisyBatchStatistics
from bnguard.rules.nonfinite_batch import NonFiniteBatch
from bnguard.rules.padded_input import PaddedInput
from bnguard.rules.poisoned_statistics import PoisonedStatistics
from bnguard.rules.rank_disagreement import RankDisagreement
from bnguard.rules.several_streams import SeveralStreams
from bnguard.rules.stale_statistics import StaleStatistics
from bnguard.rules.statistic_drift import StatisticDrift
from bnguard.rules.trained_in_eval import TrainedInEval
from bnguard.rules.unconverged_statistics import UnconvergedStatistics
from bnguard.rules.unfrozen_by_train import UnfrozenByTrain
from bnguard.rules.unsynchronised_small_batch import UnsynchronisedSmallBatch
from bnguard.rules.untracked_statistics import UntrackedStatistics
from bnguard.rules.update_outside_training import UpdateOutsideTraining
from bnguard.rules.variance_collapse import VarianceCollapse

RULES: tuple[Rule, ...] = (
    FrozenButUpdating(),
    BatchOfOne(),
    MomentumOutOfRange(),
    UntrackedStatistics(),
    LowPrecisionStatistics(),
    UnsynchronisedSmallBatch(),
    AccumulationBlind(),
    LostActivation(),
    Hygiene(),
    VarianceCollapse(),
    NoisyBatchStatistics(),
    CorrelatedBatches(),
    DeadChannels(),
    DoubleUpdate(),
    UpdateOutsideTraining(),
    SeveralStreams(),
    UnfrozenByTrain(),
    TrainedInEval(),
    RankDisagreement(),
    PaddedInput(),
    StatisticDrift(),
    ModesDisagree(),
    UnconvergedStatistics(),
    StaleStatistics(),
    InputShift(),
    NonFiniteBatch(),
    PoisonedStatistics(),
    AmplifyingChannel(),
    HalfPrecisionOverflow(),
)


PLUGINS = "bnguard.rules"


@functools.cache
def installed_rules() -> tuple[Rule, ...]:
    """Return :data:`RULES` and those of installed packages, which are imported at the first call.

    A package names its rules in the entry point group ``bnguard.rules``: a rule, a class of rules
    without required arguments, or a list of these. What cannot be used is left out with a warning.
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
        ConfigurationError: There is none; the message has the nearest name.

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
