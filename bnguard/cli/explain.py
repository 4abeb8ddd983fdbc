"""``bnguard explain``."""

from __future__ import annotations

import rich
from jsonargparse import ArgumentParser

from bnguard.report.pages import page_view
from bnguard.rules import rule_named

_EXAMPLES = """
examples:
  bnguard explain BN301
  bnguard explain statistic-drift
"""


def run(arguments: list[str]) -> int:
    """Show the page of a rule."""
    parser = ArgumentParser(
        "bnguard explain",
        description="Show the page of a rule.",
        epilog=_EXAMPLES,
        exit_on_error=False,
    )
    parser.add_argument("rule", type=str, help="code or name of the rule")
    values = parser.parse_args(arguments)
    rich.print(page_view(rule_named(values.rule)))
    return 0
