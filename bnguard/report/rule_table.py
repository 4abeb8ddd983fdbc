"""The table of all rules in Markdown, as the README shows it."""

from __future__ import annotations

from collections.abc import Iterable

from bnguard.rules import RULES, Rule


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
