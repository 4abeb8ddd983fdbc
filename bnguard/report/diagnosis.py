"""Diagnoses as rich draws them: they fit 80 columns, and stay readable without colour."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bnguard.report.lines import counted

if TYPE_CHECKING:
    from bnguard.whatif.result import Cause, Diagnosis, LayerShare, Row

_MOST_LAYERS_SHOWN = 5
_VERDICTS = {"none": "no fault found", "harmless": "no harm on these data"}


def diagnosis_view(diagnosis: Diagnosis) -> RenderableType:
    """Return a heading, the table, the cause with its evidence, the layers, and the next step."""
    parts: list[RenderableType] = [
        _heading(diagnosis),
        _rows_view(diagnosis.rows),
        _cause_view(diagnosis.cause),
    ]
    if diagnosis.layers:
        parts.append(_layers_view(diagnosis.layers))
    parts += [
        Text(f"skipped: {layer.name or '(the model)'} {layer.reason}", style="yellow")
        for layer in diagnosis.skipped
    ]
    parts += [Text(f"note: {note}", style="dim") for note in diagnosis.notes]
    return Group(*parts, *_next_step(diagnosis.cause))


def _heading(diagnosis: Diagnosis) -> Text:
    numbers = {"evaluation": diagnosis.samples, "training": diagnosis.reference_samples}
    parts = ["bnguard"]
    parts += [f"{n:,} {name} sample{'s' * (n != 1)}" for name, n in numbers.items() if n]
    return Text(" · ".join(parts), style="bold")


def _rows_view(rows: tuple[Row, ...]) -> RenderableType:
    has_score = any(row.score is not None for row in rows)
    has_flips = any(row.flipped_share is not None for row in rows)
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("statistics", overflow="fold")
    headings = ["score"] * has_score + ["flips"] * has_flips
    headings += ["change", "gap", "drift", "first"]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        numbers = [_score(row.score)] * has_score + [_share(row.flipped_share)] * has_flips
        numbers += [_distance(value) for value in (row.change, row.gap, row.drift, row.input_drift)]
        table.add_row(row.label, *numbers)
    return Group(
        table,
        Text(
            f"{'flips, ' * has_flips}change (σ): against the statistics of the evaluation data; "
            "gap (σ): against those of each batch; drift: of the evaluation data from these "
            "statistics, in σ or |log variance ratio|, at the worst layer, and at the first",
            style="dim",
        ),
    )


def _cause_view(cause: Cause) -> RenderableType:
    style = "bold yellow" if cause.is_fault else "bold"
    lines = Text()
    verdict = cause.name if cause.is_fault else _VERDICTS.get(cause.name, cause.name)
    lines.append(f"{verdict}: ", style=style)
    lines.append(cause.message)
    evidence = [Padding(Text(line, style="dim"), (0, 0, 0, 2)) for line in cause.evidence]
    return Group(lines, *evidence)


def _layers_view(layers: tuple[LayerShare, ...]) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("layers to blame", overflow="fold")
    for heading in ("share of the harm", "shift, σ", "log var ratio"):
        table.add_column(heading, justify="right")
    for layer in layers[:_MOST_LAYERS_SHOWN]:
        table.add_row(
            layer.name or "(the model)",
            _share(layer.share, digits=0),
            _moved(layer.shift_std),
            _moved(layer.log_variance_ratio),
        )
    rest = len(layers) - _MOST_LAYERS_SHOWN
    more = [Text(f"and {counted(rest, 'more layer')}", style="dim")]
    return Group(table, *(more if rest > 0 else []))


def _next_step(cause: Cause) -> list[RenderableType]:
    return [Text(f"→ {cause.advice}:"), _Command(cause.next_step)]


@dataclass(frozen=True)
class _Command:
    code: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(_in_lines(self.code, options.max_width), style="bold")


def _in_lines(code: str, width: int) -> str:
    """Return a command that is wider with an option a line, which a shell takes as it is."""
    if len(code) <= width or not code.startswith("bnguard "):
        return code
    words = [shlex.quote(word) for word in shlex.split(code)]
    return " ".join(f"\\\n  {word}" if word.startswith("--") else word for word in words)


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _distance(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if value < 100 else f"{value:.2g}"


def _share(value: float | None, digits: int = 1) -> str:
    # What rounds to nothing has no sign.
    return "–" if value is None else f"{round(value, digits + 2) + 0.0:.{digits}%}"


def _moved(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"
