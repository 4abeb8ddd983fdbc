"""``bnguard explain``."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser

from bnguard.cli.output import add_json_option, command_parser, say, show, show_json
from bnguard.errors import ConfigurationError
from bnguard.report.pages import page_view, pages_html, rules_document
from bnguard.rules import installed_rules, rule_named

_EXAMPLES = """
examples:
  bnguard explain BN301
  bnguard explain statistic-drift
  bnguard explain --all --html rules.html
"""


def run(arguments: list[str]) -> int:
    """Show the page of a rule, or of all of them, or write them as HTML."""
    values = make_parser().parse_args(arguments)
    if values.all == (values.rule is not None):
        raise ConfigurationError("name one rule, or use --all; 'bnguard rules' lists them")
    rules = installed_rules() if values.all else (rule_named(values.rule),)
    if values.json:
        show_json(rules_document(rules, with_pages=True))
        return 0
    if values.html is None:
        for index, rule in enumerate(rules):
            if index:
                say("")
            show(page_view(rule))
        return 0
    try:
        values.html.write_text(pages_html(rules), "utf-8")
    except OSError as error:
        raise ConfigurationError(f"{values.html} cannot be written: {error.strerror}") from error
    say(f"written: {values.html}")
    return 0


def make_parser() -> ArgumentParser:
    """Return the parser of the command."""
    parser = command_parser("explain", "Show the page of a rule.", _EXAMPLES)
    parser.add_argument("rule", type=str, nargs="?", help="code or name of the rule")
    parser.add_argument("--all", action="store_true", help="show the pages of all rules")
    shown_as = parser.add_mutually_exclusive_group()
    shown_as.add_argument("--html", type=Path, metavar="FILE", help="write HTML to a file")
    add_json_option(shown_as)
    return parser
