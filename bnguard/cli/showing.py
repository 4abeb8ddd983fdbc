"""Printing what rich draws; apart from the parsers, since rich is not needed to give help."""

from __future__ import annotations

from dataclasses import dataclass

import rich
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment

from bnguard.cli.parsing import printable


def show(renderable: RenderableType) -> None:
    """Print something, in which no name from a file can make the terminal do anything."""
    rich.print(_Printable(renderable))


@dataclass(frozen=True)
class _Printable:
    renderable: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for text, style, control in console.render(self.renderable, options):
            lines = text.split("\n")
            yield Segment("\n".join(map(printable, lines)), style, control)
