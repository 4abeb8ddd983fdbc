"""What a command prints: its own words on standard output, the user's code on standard error.

rich is imported when something is drawn, since it is not needed to give help.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from bnguard.cli.output import printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

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
