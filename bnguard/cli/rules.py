"""``bnguard rules``."""

from __future__ import annotations

from jsonargparse import ArgumentParser

from bnguard.cli.output import command_parser, show
from bnguard.report.pages import rules_view
from bnguard.rules import installed_rules

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
