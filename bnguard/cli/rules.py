"""``bnguard rules``."""

from __future__ import annotations

from collections.abc import Iterable

from jsonargparse import ArgumentParser

from bnguard.cli.output import command_parser, show
from bnguard.report.pages import rules_view
from bnguard.rules import RULES, Rule, installed_rules

_EXAMPLES = """
examples:
  bnguard rules
  bnguard rules | grep BN3
"""


def run(arguments: list[str]) -> int:
    """List the rules."""
    make_parser().parse_args(arguments)
    show(rules_view(installed_rules()))
    return 0


def make_parser() -> ArgumentParser:
    """Return the parser of the command."""
    return command_parser("rules", "List the rules.", _EXAMPLES)


def rule_table(rules: Iterable[Rule] = RULES) -> str:
    """Return a table with a row a rule: code, name, fault, and whether it needs no training.

    >>> print(rule_table(RULES[:1]).splitlines()[-1])
    | BN101 | frozen-but-updating | A layer whose parameters are frozen goes on changing its \
running statistics. | ✓ |
    """
    rows = [
        f"| {rule.code} | {rule.name} | {rule.headline()} | {'✓' if rule.is_static else ''} |"
        for rule in rules
    ]
    return "\n".join(["| code | name | fault | static |", "|---|---|---|---|", *rows])
