"""``bnguard completion``."""

from __future__ import annotations

import importlib
from typing import Literal

from jsonargparse import ArgumentParser

from bnguard.cli.output import command_parser, say
from bnguard.errors import ConfigurationError

_EXAMPLES = """
examples:
  bnguard completion bash > ~/.local/share/bash-completion/completions/bnguard
  bnguard completion zsh > ~/.zfunc/_bnguard
"""
# The arguments that are files or folders.
_PATHS = ("after", "before", "checkpoint", "config", "html", "logdir", "output", "paths", "state")


def run(arguments: list[str]) -> int:
    """Print what makes a shell complete commands, options and files."""
    values = make_parser().parse_args(arguments)
    try:
        import shtab
    except ImportError as error:
        raise ConfigurationError("completion takes shtab: pip install shtab") from error
    from bnguard.cli.main import COMMANDS, overview

    parsers = {
        name: importlib.import_module(f"bnguard.cli.{name}").make_parser() for name in COMMANDS
    }
    for parser in parsers.values():
        for action in parser._actions:
            if action.dest in _PATHS:
                action.complete = shtab.FILE
    say(overview(parsers).get_completion_script(f"shtab-{values.shell}"))
    return 0


def make_parser() -> ArgumentParser:
    """Return the parser of the command."""
    parser = command_parser(
        "completion",
        "Print a script that makes a shell complete commands, options and files; "
        "it takes the package shtab.",
        _EXAMPLES,
    )
    parser.add_argument("shell", type=Literal["bash", "zsh", "tcsh"], help="for which shell")
    return parser
