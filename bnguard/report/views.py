"""Draws results: as text, and as HTML in notebooks."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_WIDTH = 100
# Colours that have a contrast of 4 on white and on the black of dark themes; text has the theme's.
_GREY, _RED, _GREEN, _YELLOW = (117, 117, 117), (220, 50, 47), (0, 135, 70), (155, 115, 0)
_BLUE, _MAGENTA, _CYAN = (60, 120, 220), (190, 70, 170), (0, 130, 150)
_COLOURS = [_GREY, _RED, _GREEN, _YELLOW, _BLUE, _MAGENTA, _CYAN, _GREY]


@contextmanager
def importing_rich() -> Iterator[None]:
    """Restore Python's random numbers, which are the user's: rich draws one when it is imported."""
    state = random.getstate()
    yield
    random.setstate(state)


class ResultView:
    """Adds views as text and as HTML to results that rich can print."""

    def __rich__(self) -> RenderableType:
        """Return the terminal view."""
        raise NotImplementedError

    def __str__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(self)


def as_text(renderable: RenderableType, width: int = 80) -> str:
    """Return what rich would print, without colour or trailing spaces."""
    with importing_rich():
        from rich.console import Console

    return capture_text(
        renderable,
        Console(file=io.StringIO(), width=width, color_system=None, highlight=False),
    )


def capture_text(renderable: RenderableType, console: Console) -> str:
    """Return what a console would print, without trailing spaces."""
    with console.capture() as capture:
        console.print(renderable, crop=False)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def as_html(renderable: RenderableType) -> str:
    """Return what rich would print as HTML, readable on a light and on a dark page."""
    with importing_rich():
        from rich.console import Console
        from rich.terminal_theme import TerminalTheme

    console = Console(file=io.StringIO(), record=True, width=_WIDTH, force_jupyter=False)
    console.print(renderable, crop=False)
    return console.export_html(
        theme=TerminalTheme(_GREY, _GREY, _COLOURS),
        code_format='<pre style="line-height:1.3;overflow-x:auto;white-space:pre">{code}</pre>',
        inline_styles=True,
    )
