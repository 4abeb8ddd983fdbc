"""Parsers of commands: how their help looks, and how errors are told."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import textwrap
from argparse import SUPPRESS, Action, RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter

from bnguard.errors import ConfigurationError, printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult


_KEY = re.compile(r'(?:Parser key|Key) "([^"]+)":?\s*')
_REQUIRED = re.compile(r"the following arguments are required: (\w+\..*)")
_TYPE = re.compile(r"<(?:class|enum) '(?:[^']*\.)?([^'.]+)'>")
_CHOICE = re.compile(r"(?:typing\.)?Literal\[([^\]]*)\]")
_EXPECTED = re.compile(r"Expected an? (.*?)\. Got value: (.*)")
_RESTRICTED = re.compile(r"Not of type \w+: (.*?) does not conform to restriction (.*)")


class _HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of examples as they are, and says of an option what a user needs."""

    def _get_help_string(self, action: Action) -> str:
        text = (action.help or "").replace("(default: %(default)s)", "").rstrip()
        has_default = action.option_strings and action.default not in (None, False, [], SUPPRESS)
        return f"{text} (default: {action.default})" if has_default else text


def command_parser(
    command: str, description: str, epilog: str, usage: str | None = None
) -> ArgumentParser:
    """Return the parser of a command; what stands behind the options keeps its lines.

    Args:
        command: Its name.
        description: What it does.
        epilog: What stands behind the options.
        usage: What follows the name where the parser does not know all options by itself.
    """
    program = f"bnguard {command}"
    return ArgumentParser(
        program,
        usage=None if usage is None else f"{program} {usage}",
        description=textwrap.fill(description, 79),
        epilog=epilog,
        formatter_class=_HelpFormatter,
        exit_on_error=False,
    )


def print_error(message: str) -> None:
    """Print one line, in which no name from a file can make the terminal do anything."""
    print(f"bnguard: error: {printable(' '.join(message.split()))}", file=sys.stderr)


# Ways out that messages of the library name in Python, and what does the same here.
_WRAPPED = "name a function with --model that wraps the model in one that"
_IN_OPTIONS = [
    (r"; if it takes anything else, pass forward=…", f"; if it takes more, {_WRAPPED} takes it"),
    (r"pass forward=lambda model, batch: … that returns (.*)", rf"{_WRAPPED} returns \1"),
    (r"pass forward=lambda model, batch: …", f"{_WRAPPED} takes the batch"),
    (r"pass score=, or keep='always'", "--keep always does not compare"),
    (r"leave it out by layers=, or use method='precise'", "use --method precise"),
    (r", or leave such batches out with on_nonfinite='skip'", ""),
    (r": use in_place=True, without teacher_data", ": use --steps 0"),
    (r": use in_place=True", ": it has to be taken out of there"),
    (r", or pass a factory as to= that makes both", ""),
    (r"pass a factory as to=, or leave it out", "leave it out"),
    (r"give bnguard\.swap a sample= so that it chooses them", "leave them to bnguard swap"),
    (r"teacher_data=? is empty", "the data are empty"),
    (r"on teacher_data\b", "on the data"),
    (r"leave teacher_data= out", "use --steps 0"),
    (r"expected_score= needs score=", "--expected needs a score"),
    (r"without reference= there", "without --reference there"),
    (r"\bscore= has to", "the score has to"),
]
_ARGUMENT = re.compile(
    r"\b(samples|batch_sizes|prior|tolerance|memory|method|keep|groups|exclude|steps|to)="
    r"('[^']*'|\[[^\]]*\]|[\w.]+)?"
)


def in_options(message: str) -> str:
    """Return what an error of the library says, in the options of the command line.

    >>> in_options("prior=3.0 needs method='adapt', and a number of samples")
    '--prior 3.0 needs --method adapt, and a number of samples'
    >>> in_options("use fewer samples=, or a smaller memory=")
    'use fewer --samples, or a smaller --memory'
    """
    for pattern, option in _IN_OPTIONS:
        message = re.sub(pattern, option, message)
    return _ARGUMENT.sub(_as_option, message)


def _as_option(found: re.Match[str]) -> str:
    value = found[2] or ""
    # A list keeps its quotes, which a shell takes off.
    value = shlex.quote(value.replace("'", '"')) if value[:1] == "[" else value.strip("'")
    return f"{_option(found[1])} {value}".rstrip()


def in_a_line(error: ArgumentError) -> str:
    """Return what an error says, in one line and in the words of a user.

    >>> in_a_line(ArgumentError(None, 'Parser key "dry_run": Expected a bool. Got value: x'))
    '--dry-run: takes bool, not x'
    >>> in_a_line(ArgumentError(None, "the following arguments are required: paths"))
    'the following arguments are required: paths'
    >>> in_a_line(ArgumentError(None, "the following arguments are required: model.config"))
    'missing: --model.config; give it, or name a function that needs no more'
    """
    text = " ".join(str(error).split())
    if found := _REQUIRED.fullmatch(text):
        names = ", ".join(f"--{name}" for name in found[1].split(", "))
        return f"missing: {names}; give it, or name a function that needs no more"
    text = _KEY.sub(lambda found: f"{_option(found[1])}: ", text)
    text = _TYPE.sub(r"\1", text)
    text = _CHOICE.sub(lambda found: "one of " + found[1].replace("'", ""), text)
    text = _EXPECTED.sub(r"takes \1, not \2", text)
    return _RESTRICTED.sub(lambda found: f"takes {_restricted(found[2])}, not {found[1]}", text)


@contextmanager
def failing_as(what: str) -> Iterator[None]:
    """Tell of an error in a user's code in one line; a script may even end the process.

    Raises:
        ConfigurationError: The block raised an exception.
    """
    try:
        yield
    except ConfigurationError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigurationError(f"{what} failed with {type(error).__name__}: {error}") from error


def _option(key: str) -> str:
    # The arguments of a class keep their own names.
    return f"--{key}" if "." in key else f"--{key.replace('_', '-')}"


def _restricted(restriction: str) -> str:
    words = {"v>=": "from ", "v<=": "up to ", "v>": "above ", "v<": "below "}
    for sign, word in words.items():
        restriction = restriction.replace(sign, word)
    return f"a number {restriction}"


# What a command prints: its own words on standard output, the user's code on standard error.


# Where there is no terminal, what is drawn is as wide as it needs to be.
UNLIMITED_WIDTH = 100_000

STANDARD_OUTPUT, STANDARD_ERROR = 1, 2


class _Output:
    """The stream that a command prints to; standard output where nobody has set it apart."""

    apart: TextIO | None = None


def output() -> TextIO:
    """Return the stream that a command prints its own words to."""
    return _Output.apart or sys.stdout


@contextmanager
def output_apart() -> Iterator[None]:
    """Keep standard output for what bnguard prints: all else goes to standard error.

    Also what libraries in C and child processes print, since the file descriptor itself leads
    there, as long as the process lives or this lasts.
    """
    before, stream = _Output.apart, sys.stdout
    is_of_process = stream is sys.__stdout__
    stream.flush()
    if not is_of_process:  # A notebook, or a test, that catches what is printed.
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
        # What could not be written must not be tried once more when the stream is closed.
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


def show_document(document: Mapping[str, object]) -> None:
    """Print a document as JSON."""
    say(json.dumps(document, indent=2))


def show(renderable: RenderableType) -> None:
    """Draw something, in which no name from a file can make the terminal do anything.

    As wide as the terminal is; where there is none, nothing is wrapped or padded.
    """
    from rich.console import Console

    stream = output()
    is_terminal = stream.isatty()
    console = Console(file=stream, width=None if is_terminal else UNLIMITED_WIDTH)
    with console.capture() as capture:
        console.print(_Printable(renderable))
    drawn = capture.get()
    if not is_terminal:
        drawn = "".join(f"{line.rstrip()}\n" for line in drawn.splitlines())
    stream.write(drawn)


@dataclass(frozen=True)
class _Printable:
    renderable: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.segment import Segment

        for text, style, control in console.render(self.renderable, options):
            lines = text.split("\n")
            yield Segment("\n".join(map(printable, lines)), style, control)
