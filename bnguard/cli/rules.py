"""``bnguard rules``."""

from __future__ import annotations

import rich
from jsonargparse import ArgumentParser

from bnguard.report.pages import rules_view
from bnguard.rules import RULES


def run(arguments: list[str]) -> int:
    """List the rules."""
    parser = ArgumentParser("bnguard rules", description="List the rules.", exit_on_error=False)
    parser.parse_args(arguments)
    rich.print(rules_view(RULES))
    return 0
