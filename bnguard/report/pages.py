"""The pages of the rules, for a terminal and as HTML."""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bnguard import __version__
from bnguard.report.json_document import add_version
from bnguard.report.terminal import copyable
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


def rules_document(rules: Iterable[Rule], *, with_pages: bool = False) -> dict[str, Any]:
    """Return rules as plain data: ``code``, ``name``, ``fault``, ``is_static``, ``limits``.

    Also the ``page`` as text, if it is asked for.
    """
    listed = [
        {
            "code": rule.code,
            "name": rule.name,
            "fault": rule.headline(),
            "is_static": rule.is_static,
            "limits": dict(vars(rule)),
            **({"page": rule.page()} if with_pages else {}),
        }
        for rule in rules
    ]
    return add_version({"rules": listed})


def page_view(rule: Rule) -> RenderableType:
    """Return the page of a rule under its code and name."""
    headline, sections = sections_of(rule)
    parts: list[RenderableType] = [Text(f"{rule.code} {rule.name}", style="bold"), Text(headline)]
    for title, paragraphs in sections:
        parts.append(Text(f"\n{title}", style="bold"))
        for index, (text, code) in enumerate(paragraphs):
            if index and title not in _LISTS:
                parts.append(Text())
            parts.append(Padding(Text(text), (0, 0, 0, 4)))
            if code:
                parts += [Text(), *map(copyable, textwrap.indent(code, " " * 8).splitlines())]
    return Group(*parts)


def pages_html(rules: Iterable[Rule]) -> str:
    """Return the pages of rules as one HTML page, each under its code as an anchor."""
    rules = tuple(rules)
    index = "".join(f"<li>{rule.code} {rule.name}: {_html(rule.headline())}</li>" for rule in rules)
    pages = "\n".join(map(_page_html, rules))
    # Codes link to their page, once all pages are there.
    body = re.sub(r"\bBN\d{3}\b(?!\")", r'<a href="#\g<0>">\g<0></a>', f"<ul>{index}</ul>{pages}")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>The rules of bnguard</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>The rules of bnguard {__version__}</h1>
{body}
</body>
</html>
"""


_STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46em; margin: 2em auto; padding: 0 1em }
h2 { margin-top: 3em; break-after: avoid }
h3 { margin-bottom: 0; break-after: avoid }
h3 + p, h3 + ul { margin-top: 0 }
pre { padding: .5em 1em; background: #8881; overflow-x: auto; break-inside: avoid }
ul { list-style: none; padding: 0 }
"""


def _page_html(rule: Rule) -> str:
    headline, sections = sections_of(rule)
    parts = [f'<h2 id="{rule.code}">{rule.code} {rule.name}</h2><p><b>{_html(headline)}</b></p>']
    for title, paragraphs in sections:
        parts.append(f"<h3>{title}</h3>")
        if title in _LISTS:
            items = "".join(f"<li>{_html(text)}</li>" for text, _ in paragraphs)
            parts.append(f"<ul>{items}</ul>")
            continue
        for text, code in paragraphs:
            parts.append(f"<p>{_html(text)}</p>")
            if code:
                parts.append(f"<pre>{html.escape(code)}</pre>")
    return "\n".join(parts)


def _html(text: str) -> str:
    """Return text as HTML, in which papers and public reports are links."""
    text = re.sub(r"`(.+?)`", r"<code>\1</code>", html.escape(text))
    text = re.sub(r"arXiv:([\d.]+\d)", r'<a href="https://arxiv.org/abs/\1">\g<0></a>', text)
    return re.sub(
        r"([\w.-]+/[\w.-]+)#(\d+)", r'<a href="https://github.com/\1/issues/\2">\g<0></a>', text
    )


def sections_of(rule: Rule) -> tuple[str, list[tuple[str, list[tuple[str, str]]]]]:
    """Return the headline of a page, and its sections: title, and paragraphs with their code."""
    headline, *rest = re.split(r"^(\w[\w ]*):\n", rule.page(), flags=re.MULTILINE)
    return headline.strip(), [
        (title, list(_paragraphs(body, is_list=title in _LISTS)))
        for title, body in zip(rest[::2], rest[1::2], strict=True)
    ]


def _paragraphs(body: str, *, is_list: bool) -> Iterator[tuple[str, str]]:
    """Yield the paragraphs of a section without line breaks, each with its code or an empty str."""
    for paragraph in re.split(r"\n+(?= {4}\S)" if is_list else r"\n\n(?= {4}\S)", body.rstrip()):
        text, is_followed, code = paragraph.partition("::\n\n")
        text = " ".join(text.split()).replace("``", "`")
        yield f"{text}:" if is_followed else text, textwrap.dedent(code)
