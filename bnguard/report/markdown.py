"""Findings as a Markdown table, for viewers of TensorBoard that lack the plugin."""

from __future__ import annotations

from collections.abc import Iterable

from bnguard.findings import FindingGroup

_HEADING = "| | code | where | what | evidence | next step |\n|---|---|---|---|---|---|"


def findings_markdown(groups: Iterable[FindingGroup]) -> str:
    r"""Return a table with a row a group, or a sentence where there is none.

    >>> findings_markdown([])
    'Nothing is wrong so far.'
    """
    rows = [_row(group) for group in groups]
    return "\n".join([_HEADING, *rows]) if rows else "Nothing is wrong so far."


def _row(group: FindingGroup) -> str:
    worst = group.worst
    since = "" if worst.step is None else f", since step {worst.step}"
    cells = (
        str(worst.severity),
        f"{worst.code} {worst.name}",
        group.where + since,
        worst.message,
        str(worst.evidence),
        worst.fix.summary,
    )
    return "| " + " | ".join(map(_escaped, cells)) + " |"


def _escaped(text: str) -> str:
    r"""Return text that ends no cell and no row.

    >>> _escaped("|log ratio|")
    '\\|log ratio\\|'
    """
    return text.replace("|", r"\|").replace("\n", " ")
