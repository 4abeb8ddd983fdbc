"""How commands look: help, errors in one line, text, tables and JSON on standard output."""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
from argparse import SUPPRESS, Action, RawDescriptionHelpFormatter, _ActionsContainer
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter

from bnguard.errors import ConfigurationError, printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult


_KEY = re.compile(r'(?:Parser key|Key) "([^"]+)":?\s*')
# jsonargparse's types of numbers, and how it refuses a value.
_NUMBERS = {
    "PositiveInt": "a whole number above 0",
    "NonNegativeInt": "a whole number, 0 or more",
    "PositiveFloat": "a number above 0",
    "NonNegativeFloat": "a number, 0 or more",
    "OpenUnitInterval": "a number between 0 and 1",
}
_NOT_OF_TYPE = re.compile(
    rf"Not of type ({'|'.join(_NUMBERS)}): (?:.*: )?(.+?)(?: does not conform to .*)?$"
)
_EXPECTED = re.compile(r"Expected a (?:typing\.Literal\[(.+?)\]|(\w+))\. Got value: ")
_UNION = re.compile(
    r"Does not validate against any of the Union subtypes .*?\[(.+)\] Errors: .* Given value: "
)
_CLASS = re.compile(r"<class '(?:\w+\.)*(\w+)'>")
_REQUIRED = re.compile(r"the following arguments are required: (\w+\..*)")


class _HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of examples, and shows a default only if there is one."""

    def _get_help_string(self, action: Action) -> str:
        text = (action.help or "").replace("(default: %(default)s)", "").rstrip()
        has_default = action.option_strings and action.default not in (None, False, [], SUPPRESS)
        return f"{text} (default: {action.default})" if has_default else text


def command_parser(
    command: str, description: str, epilog: str, usage: str | None = None
) -> ArgumentParser:
    """Return the parser of a command; ``usage`` is for one that does not know all its options."""
    program = f"bnguard {command}"
    return ArgumentParser(
        program,
        usage=None if usage is None else f"{program} {usage}",
        description=textwrap.fill(description, 79),
        epilog=epilog,
        formatter_class=_HelpFormatter,
        exit_on_error=False,
    )


def add_json_option(parser: _ActionsContainer) -> None:
    """Add ``--json``, which every command that reports something has."""
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def print_error(error: Exception | str) -> None:
    """Print one line, in which no name from a file can control the terminal."""
    message = in_a_line(error) if isinstance(error, ArgumentError) else str(error)
    print(f"bnguard: error: {printable(' '.join(message.split()))}", file=sys.stderr)


def in_a_line(error: ArgumentError) -> str:
    """Return the message of an error in one line, with options as they are typed.

    >>> in_a_line(ArgumentError(None, 'Parser key "dry_run": no bool'))
    '--dry-run: no bool'
    >>> in_a_line(ArgumentError(None, "Expected a typing.Literal['train', 'val']. Got value: vel"))
    "use one of 'train', 'val', not vel"
    >>> in_a_line(ArgumentError(None, "Not of type PositiveInt: 0 does not conform to ..."))
    'use a whole number above 0, not 0'
    >>> in_a_line(ArgumentError(None, "Expected a <class 'list'>. Got value: 3"))
    'use list, not 3'
    >>> in_a_line(ArgumentError(None, "the following arguments are required: paths"))
    'the following arguments are required: paths'
    >>> in_a_line(ArgumentError(None, "the following arguments are required: model.config"))
    'missing: --model.config; pass it, or name a function that needs no arguments'
    """

    def as_typed(found: re.Match[str]) -> str:
        # The arguments of a class keep their own names.
        return f"--{found[1] if '.' in found[1] else found[1].replace('_', '-')}: "

    text = " ".join(str(error).split())
    if found := _REQUIRED.fullmatch(text):
        return missing_arguments(found[1].split(", "))
    text = _CLASS.sub(r"\1", text).replace("NoneType", "None")
    text = _UNION.sub(lambda found: f"use one of {found[1]}, not ", text)
    text = _NOT_OF_TYPE.sub(lambda found: f"use {_NUMBERS[found[1]]}, not {found[2]}", text)
    text = _EXPECTED.sub(lambda found: f"use {found[2] or f'one of {found[1]}'}, not ", text)
    return _KEY.sub(as_typed, text)


def missing_arguments(names: Iterable[str]) -> str:
    """Return the message of arguments of a class or function that are missing."""
    listed = ", ".join(f"--{name}" for name in names)
    return f"missing: {listed}; pass it, or name a function that needs no arguments"


@contextmanager
def failing_as(what: str) -> Iterator[None]:
    """Turn an error in the user's code, which may even exit, into a ``ConfigurationError``."""
    try:
        yield
    except ConfigurationError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigurationError(f"{what} failed with {type(error).__name__}: {error}") from error


STANDARD_OUTPUT, STANDARD_ERROR = 1, 2


class _Output:
    """The stream that a command prints to, if it is not standard output."""

    apart: TextIO | None = None


def output() -> TextIO:
    """Return the stream that a command prints its own words to."""
    return _Output.apart or sys.stdout


@contextmanager
def output_apart() -> Iterator[None]:
    """Keep standard output for what bnguard prints: everything else goes to standard error.

    That includes libraries in C and child processes, since the file descriptor itself is replaced.
    """
    before, stream = _Output.apart, sys.stdout
    is_of_process = stream is sys.__stdout__
    stream.flush()
    if not is_of_process:  # a notebook or a test captures the output
        _Output.apart = stream
        try:
            with redirect_stdout(sys.stderr):
                yield
        finally:
            _Output.apart = before
        return
    descriptor = stream.fileno()
    kept = os.dup(descriptor)
    os.dup2(STANDARD_ERROR, descriptor)
    _Output.apart = own = os.fdopen(kept, "w", encoding=stream.encoding, errors="replace")
    try:
        with redirect_stdout(sys.stderr):
            yield
        own.flush()
    except BrokenPipeError:
        # Closing the stream must not try to write the rest again.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, kept)
        os.close(nowhere)
        raise
    finally:
        _Output.apart = before
        stream.flush()
        own.flush()
        os.dup2(kept, descriptor)
        own.close()


def say(text: str) -> None:
    """Print a line as it is."""
    print(text, file=output())


def show_json(document: Mapping[str, object]) -> None:
    """Print a document as strict JSON."""
    from bnguard.report.json_document import strict_json

    say(json.dumps(strict_json(document), indent=2, allow_nan=False))


def show(renderable: RenderableType) -> None:
    """Print a table or text, in which no name from a file can control the terminal.

    It is as wide as the terminal; without one, nothing is wrapped or padded.
    """
    from rich.console import Console

    from bnguard.report.terminal import UNWRAPPED
    from bnguard.report.views import capture_text

    stream = output()
    console = Console(file=stream, width=None if stream.isatty() else UNWRAPPED)
    stream.write(f"{capture_text(_Printable(renderable), console)}\n")


@dataclass(frozen=True)
class _Printable:
    renderable: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.segment import Segment

        for text, style, control in console.render(self.renderable, options):
            lines = text.split("\n")
            yield Segment("\n".join(map(printable, lines)), style, control)
