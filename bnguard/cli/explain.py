"""``bnguard explain``."""

from __future__ import annotations

from jsonargparse import ArgumentParser

from bnguard.cli.output import command_parser, show
from bnguard.report.pages import page_view
from bnguard.rules import rule_named

_EXAMPLES = """
examples:
  bnguard explain BN301
  bnguard explain statistic-drift
"""


def run(arguments: list[str]) -> int:
    """Show the page of a rule."""
    values = make_parser().parse_args(arguments)
    show(page_view(rule_named(values.rule)))
    return 0


def make_parser() -> ArgumentParser:
    """Return the parser of the command."""
    parser = command_parser("explain", "Show the page of a rule.", _EXAMPLES)
    parser.add_argument("rule", type=str, help="code or name of the rule")
    return parser
