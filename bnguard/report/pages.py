"""The pages of the rules, as rich draws them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bnguard.rules import Rule

# Sections in which every line that is not indented further begins an entry of its own.
_LISTS = ("Limits", "References")


def rules_view(rules: Iterable[Rule]) -> RenderableType:
    """Return a line a rule: code, name, fault."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for rule in rules:
        table.add_row(rule.code, rule.name, rule.headline())
    return Group(table, Text("\nbnguard explain CODE shows a rule's page.", style="dim"))


def page_view(rule: Rule) -> RenderableType:
    """Return the page of a rule under its code and name."""
    headline, *sections = re.split(r"^(\w[\w ]*):\n", rule.page(), flags=re.MULTILINE)
    parts: list[RenderableType] = [
        Text(f"{rule.code} {rule.name}", style="bold"),
        Text(headline.strip()),
    ]
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        parts.append(Text(f"\n{title}", style="bold"))
        for text, indent in _paragraphs(body, is_list=title in _LISTS):
            parts.append(Padding(Text(text), (0, 0, 0, indent)))
    return Group(*parts)


def _paragraphs(body: str, *, is_list: bool) -> Iterator[tuple[str, int]]:
    """Yield the paragraphs of a section, unwrapped, with their indentation; code unchanged."""
    paragraph: list[str] = []
    is_code = False
    for line in body.rstrip().splitlines():
        indent = len(line) - len(line.lstrip())
        is_code = is_code and (indent > 4 or not line)
        starts_anew = not line or is_code or (is_list and indent == 4)
        if paragraph and starts_anew:
            text = " ".join(paragraph)
            yield text.replace("``", "`").replace("::", ":"), 4
            is_code = is_code or text.endswith("::")
            paragraph = []
        if is_code:
            yield line.strip() and line[4:], 4
        elif line:
            paragraph.append(line.strip())
        else:
            yield "", 0
    if paragraph:
        yield " ".join(paragraph).replace("``", "`"), 4
