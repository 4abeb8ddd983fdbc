"""``bnguard rules``."""

from __future__ import annotations

from jsonargparse import ArgumentParser

from bnguard.cli.output import add_json_option, command_parser, show, show_json
from bnguard.report.pages import rules_document, rules_view
from bnguard.rules import installed_rules

_EXAMPLES = """
examples:
  bnguard rules
  bnguard rules | grep BN3
  bnguard rules --json
"""


def run(arguments: list[str]) -> int:
    """List the rules."""
    values = make_parser().parse_args(arguments)
    rules = installed_rules()
    if values.json:
        show_json(rules_document(rules))
    else:
        show(rules_view(rules))
    return 0


def make_parser() -> ArgumentParser:
    """Return the parser of the command."""
    parser = command_parser("rules", "List the rules.", _EXAMPLES)
    add_json_option(parser)
    return parser
