"""The command line: arguments become calls, and what they return becomes an exit status.

0: done, and nothing at the fail level; 1: findings at it; 2: unusable input; 130: Ctrl-C was
pressed; 141: the reader of the output, such as ``head``, stopped before its end.
Unusable input is a ``CheckpointError`` or a ``ConfigurationError`` wherever it is found.
Standard output carries what the command prints, and nothing that the user's code prints.
"""

from __future__ import annotations

import atexit
import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from jsonargparse import ArgumentError, ArgumentParser

from bnguard import __version__
from bnguard.cli.output import STANDARD_ERROR, STANDARD_OUTPUT, output_apart, print_error
from bnguard.errors import BNGuardError, ConfigurationError, nearest_name

# A command's module is imported, and torch with it, only when the command is called.
COMMANDS = {
    "run": "watch what an unchanged training script trains",
    "demo": "train, break, name and repair a small network on real digits",
    "inspect": "find problems of the BN layers in checkpoints",
    "diff": "compare two checkpoints",
    "diagnose": "try other statistics: what is wrong, and which layers are to blame",
    "recalibrate": "write a checkpoint with new running statistics",
    "swap": "replace BN by another norm, distil, and write the checkpoint",
    "report": "print the reports in a log directory, or write them as one page",
    "explain": "show the page of a rule",
    "rules": "list the rules",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["run"]:
        return _run_script(given[1:])
    if arguments is not None:
        return _status(given)
    status = _status(given)
    # What the user's code prints when the process ends is not the command's output either.
    # Registered last, this is called first.
    atexit.register(os.dup2, STANDARD_ERROR, STANDARD_OUTPUT)
    return status


def _run_script(arguments: list[str]) -> int:
    """Run the user's script without touching its output or errors."""
    from bnguard.cli.run import prepare

    try:
        script = prepare(arguments)
    except (ArgumentError, BNGuardError) as error:
        print_error(error)
        return 2
    return script()


def _status(arguments: list[str]) -> int:
    # A character that the terminal lacks must not end the command.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        status = _run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader, such as `head`, has enough; the rest goes nowhere.
        is_of_process = sys.stdout is sys.__stdout__
        if is_of_process:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # a shell's status of a process that SIGPIPE ended
    except (ArgumentError, BNGuardError) as error:
        print_error(error)
        return 2
    except (KeyboardInterrupt, SystemExit) as error:
        if not _is_interruption(error):
            raise
        print("bnguard: interrupted; no file is left half written", file=sys.stderr)
        return 130


def _is_interruption(error: BaseException) -> bool:
    """Return whether Ctrl-C was pressed, which a Trainer turns into the end of the process."""
    return isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        _overview().parse_args(arguments or ["--help"])
    command = arguments[0]
    if command not in COMMANDS:
        near = nearest_name(command, COMMANDS)
        hint = f"did you mean 'bnguard {near}'?" if near else "'bnguard --help' lists them"
        raise ConfigurationError(f"unknown command {command!r}: {hint}")
    run = importlib.import_module(f"bnguard.cli.{command}").run
    # Help is printed by the parsers, before anything of the user's runs.
    is_help = not {"-h", "--help"}.isdisjoint(arguments)
    with nullcontext() if is_help else output_apart():
        status: int = run(arguments[1:])
    return status


def _overview() -> ArgumentParser:
    """Return a parser that shows the commands without importing them."""
    parser = ArgumentParser(
        prog="bnguard",
        description="Find and repair faults of the batch normalisation in PyTorch networks.",
        version=__version__,
        exit_on_error=False,
    )
    commands = parser.add_subcommands(required=False, metavar="COMMAND", title="commands")
    for name, summary in COMMANDS.items():
        commands.add_subcommand(name, ArgumentParser(), help=summary)
    return parser
