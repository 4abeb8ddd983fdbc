"""Formats reports for a terminal: they fit 80 columns and stay readable without colour."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from bnguard.findings import (
    Finding,
    FindingGroup,
    Fix,
    PastFinding,
    Severity,
    by_root_cause,
    counted,
    factor,
    group_findings,
    notice,
)
from bnguard.layers.names import layer_label
from bnguard.observe.history import LayerHistory
from bnguard.observe.windows import LayerView
from bnguard.report.views import capture_text, importing_rich
from bnguard.rules.measurements import Distance, distance_of

with importing_rich():
    import rich
    from rich.console import Console, Group, RenderableType
    from rich.padding import Padding
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table
    from rich.text import Text

if TYPE_CHECKING:
    from bnguard.report import Report

_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "bold yellow", Severity.INFO: "cyan"}
_MOST_LAYERS_SHOWN = 4
# A redundant setting is harmless: it is a line at the end.
_HABITS = "BN109"
# Without a terminal, lines are as long as they need to be.
UNWRAPPED = 100_000
# Shorter work shows no progress bar.
_LONG_SECONDS = 1.0


def report_view(report: Report) -> RenderableType:
    """Return a report: a heading, a block per root cause, the layers that drift most, notes."""
    parts: list[RenderableType] = [heading(report)]
    habits = [group for group in report.groups if group.worst.code == _HABITS]
    findings = tuple(group for group in report.groups if group not in habits)
    if findings:
        parts.append(findings_view(by_root_cause(findings), partial(_repair, report)))
    if any(
        distance is not None and distance.measured for distance in map(distance_of, report.layers)
    ):
        parts.append(_layers_view(report.layers))
    if any(layer.view is not None for layer in report.layers):
        parts.append(_training_view(report.history.layers_in_order))
    # A rule that raises fails at each layer; report it once.
    failures = {
        skip.code: f"{skip.code}: {skip.reason}" for skip in report.skipped if skip.is_failure
    }
    settings = (
        f"{group.worst.code} {group.worst.name}, {group.where}: {group.worst.message}"
        for group in habits
    )
    notes = (*past_findings(report), *failures.values(), *report.notes, *settings)
    parts += [Text(f"note: {note}", style="dim") for note in notes]
    return Group(*parts)


def past_findings(report: Report) -> Iterator[str]:
    """Yield a line per rule whose findings were announced and are gone.

    >>> from bnguard.report import Report
    >>> from bnguard.observe.history import History, Run
    >>> past = PastFinding(
    ...     code="BN302", name="mode-gap", severity="warning", layer=None, message="", evidence="",
    ...     first_step=30, last_step=80,
    ... )
    >>> list(past_findings(Report(History(layers=(), run=Run()), (), (), over=(past,))))
    ['BN302 mode-gap (warning) at the model, steps 30–80, gone since']
    """
    for past, layers, steps in by_rule(report.over):
        where = layer_label(past.layer) if layers == 1 else counted(layers, "layer")
        yield f"{past.code} {past.name} ({past.severity}) at {where}, {steps}, gone since"


def by_rule(past: Iterable[PastFinding]) -> Iterator[tuple[PastFinding, int, str]]:
    """Yield the first finding of each rule and severity, how many there are, and their steps."""
    groups: dict[tuple[str, str], list[PastFinding]] = {}
    for each in past:
        groups.setdefault((each.code, each.severity), []).append(each)
    for group in groups.values():
        first, last = min(p.first_step for p in group), max(p.last_step for p in group)
        steps = f"step {first}" if first == last else f"steps {first}–{last}"
        yield group[0], len(group), steps


def findings_view(
    causes: Mapping[FindingGroup, Sequence[FindingGroup]], repair_of: Callable[[Fix], str]
) -> RenderableType:
    """Return a block per root cause: number and limit, where and what, the fix, what it leads to.

    One fix mends the whole block, so the block has the worst severity in it. The fix is followed by
    the command or call that does it, if there is one, in one line to be copied.
    """
    severities = {
        root: max(group.worst.severity for group in (root, *effects))
        for root, effects in causes.items()
    }
    indent = 2 + max((len(str(severity)) for severity in severities.values()), default=0)
    parts: list[RenderableType] = []
    for root, consequences in causes.items():
        block = Table.grid(padding=(0, 2, 0, 0))
        block.add_column(no_wrap=True, min_width=indent - 2)
        block.add_column(overflow="fold")
        block.add_row(Text(str(severities[root]), _STYLES[severities[root]]), root_view(root))
        parts.append(block)
        repair = repair_of(root.worst.fix)
        parts += [copyable(f"{' ' * indent}  {repair}", "bold")] if repair else []
        if consequences:
            parts.append(Padding(_consequences_view(consequences), (0, 0, 0, indent)))
    return Group(*parts)


def copyable(line: str, style: str = "") -> RenderableType:
    """Return a command or code in one line, however long: a break would be copied with it."""
    # rich ignores no_wrap on a bare Text.
    return Group(Text(line, style, no_wrap=True, overflow="ignore"))


def root_view(group: FindingGroup) -> Text:
    """Return a root cause in three lines: number and limit, where and what, the fix."""
    finding = group.worst
    since = "" if group.step is None else f", since step {group.step}"
    return Text.assemble(
        (f"{finding.code} {finding.name}", "bold"),
        f": {finding.evidence}\nat {group.where}{since}: {finding.message}",
        f"\n→ {finding.fix.summary}",
    )


def heading(report: Report) -> Text:
    """Return the first line: what was watched, and the number of root causes and layers."""
    layers, steps = len(report.layers), report.history.run.steps
    parts = ["bnguard", counted(layers, "BN layer")]
    if steps:
        parts.append(counted(steps, "step"))
    parts += count_causes(report.findings)
    if report.history.run.unknown and not report.findings:
        parts.append("no problems found in these, but not all that normalises was watched")
    elif report.failure is None and report.history.run.steps and not _has_problems(report):
        parts.append("no problems found")
    elif not report.findings and report.failure is None:
        what = "checkpoint" if _is_checkpoint(report) else "model"
        parts.append(f"no problems found in what a {what} shows; training was not looked at")
    elif not report.findings:
        parts.append("nothing found, but not all was watched")
    return Text(" · ".join(parts), style="bold")


def _repair(report: Report, fix: Fix) -> str:
    if report.checkpoint is not None:
        return fix.command(str(report.checkpoint))
    return "" if _is_checkpoint(report) else fix.call


def _is_checkpoint(report: Report) -> bool:
    return all(layer.training is None for layer in report.layers)


def notice_view(group: FindingGroup) -> RenderableType:
    """Return findings in two lines in the colours of a report, without wrapping."""
    heading, explanation = notice(group).split("\n", 1)
    lines = Text(no_wrap=True, overflow="ignore")
    lines.append(heading, _STYLES[group.worst.severity])
    return Group(lines.append(f"\n{explanation}"))


def as_terminal_text(renderable: RenderableType) -> str:
    """Return what rich would print: in colour on a terminal, unwrapped in a file."""
    terminal = rich.get_console()
    # Not by the terminal's own console, which would draw a progress bar of rich along with it.
    console = Console(
        file=io.StringIO(),
        width=terminal.width if terminal.is_terminal or terminal.is_jupyter else UNWRAPPED,
        force_terminal=terminal.is_terminal,
        force_jupyter=False,
    )
    return capture_text(renderable, console)


class CalibrationBar:
    """Shows which layer the samples have reached, and the time left, while long work runs.

    A context manager; the bar disappears afterwards.
    """

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._progress = Progress(
            TextColumn("recalibrating"),
            BarColumn(),
            TextColumn("{task.fields[samples]:,} samples {task.fields[layer]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task("", total=None, samples=0, layer="")
        self._samples = self._layers = 1

    def __enter__(self) -> CalibrationBar:
        self._begin = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress.live.is_started:
            self._progress.stop()

    def start(self, samples: int, layers: int) -> None:
        """Start over with this number of samples and layers."""
        self._samples, self._layers = max(1, samples), max(1, layers)
        total = self._samples * self._layers
        self._progress.reset(self._task, total=total, samples=samples, layer=self._layer(0))

    def advance(self, samples: int) -> None:
        """Record that these samples passed one more layer; callable from any thread."""
        if time.monotonic() - self._begin >= _LONG_SECONDS:
            self._progress.start()  # Does nothing if the bar is visible already.
        self._progress.advance(self._task, samples)
        done = int(self._progress.tasks[0].completed) // self._samples
        self._progress.update(self._task, layer=self._layer(done))

    def _layer(self, done: int) -> str:
        """Return the current layer; empty if the samples pass all layers at once."""
        return f"layer {min(done + 1, self._layers)}/{self._layers}" if self._layers > 1 else ""


def _consequences_view(groups: Sequence[FindingGroup]) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for group in groups:
        finding = group.worst
        text = f"{finding.code} {finding.name}: {finding.evidence} at {group.where}"
        if len(group.causes) > 1:
            text += f"; because of {' and '.join(group.causes)}"
        grid.add_row(Text("leads to", "dim"), Text(text, "dim"))
    return grid


def count_causes(findings: Sequence[Finding]) -> Iterator[str]:
    """Yield the number of root causes and their layers, then the number of infos."""
    accused = [finding for finding in findings if finding.severity > Severity.INFO]
    if accused:
        layers = {finding.layer for finding in accused} - {None}
        where = f" in {counted(len(layers), 'layer')}" if layers else ""
        yield f"{counted(len(by_root_cause(group_findings(accused))), 'root cause')}{where}"
    infos = sum(group.worst.severity is Severity.INFO for group in group_findings(findings))
    if infos:
        yield counted(infos, "info", "info")


def _has_problems(report: Report) -> bool:
    return any(finding.severity > Severity.INFO for finding in report.findings)


def _layers_view(layers: tuple[LayerHistory, ...]) -> RenderableType:
    def row(layer: LayerHistory, distance: Distance | None) -> list[str]:
        known = None if distance is None else distance.measured
        drift = (
            ("–", "–") if known is None else (number_text(known[0].value), factor(known[1].value))
        )
        return [
            layer.name,
            number_text(layer.typical_values_per_channel),
            number_text(None if layer.running is None else layer.running.updates),
            *drift,
        ]

    measured = [(layer, distance_of(layer)) for layer in layers]
    measured.sort(key=lambda pair: 0.0 if pair[1] is None else pair[1].excess, reverse=True)
    title = Text("Eval mode against the running statistics, largest drift first", style="bold")
    headings = ("layer", "n", "updates", "shift, σ", "variance off by")
    rows = (row(*pair) for pair in measured[:_MOST_LAYERS_SHOWN])
    return Group(title, layer_table(headings, rows, len(layers) - _MOST_LAYERS_SHOWN))


def layer_table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], left_out: int = 0
) -> RenderableType:
    """Return a table of layers, each a name and numbers, and how many more there are."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(headings[0], overflow="fold")
    rows = list(rows)
    for column, heading in enumerate(headings[1:], start=1):
        # A number that is cut off would be another number.
        widest = max((len(row[column]) for row in rows), default=0)
        table.add_column(heading, justify="right", overflow="fold", min_width=widest)
    for name, *numbers in rows:
        table.add_row(Text(name), *numbers)
    more = [Text(f"and {counted(left_out, 'more layer')}", style="dim")] if left_out > 0 else []
    return Group(table, *more)


def _training_view(layers: tuple[LayerHistory, ...]) -> RenderableType:
    """Return what BN does to training: shares with and without it, noise, and gradients."""

    def row(name: str, view: LayerView) -> list[str]:
        shares = (
            view.saturated_share,
            view.saturated_share_without,
            view.dead_share,
            view.dead_share_without,
        )
        numbers = (view.noise_std, view.gradient_cosine, view.gradient_change)
        return [name, *(f"{share:.1%}" for share in shares), *map(number_text, numbers)]

    headings = ("beyond ±2", "without", "dead", "without", "noise, σ", "grad. cosine", "change")
    rows = (row(layer.name, layer.view) for layer in layers if layer.view is not None)
    title = "What BN does to training: activations with and without it, noise, gradients"
    return Group(Text(title, style="bold"), layer_table(("layer", *headings), rows))


def moved_text(shift_std: float | None, log_variance_ratio: float | None) -> tuple[str, str]:
    """Return how far statistics moved, in σ and as a factor; None was not finite before."""
    unknown = "was not finite"
    return (
        unknown if shift_std is None else number_text(shift_std),
        unknown if log_variance_ratio is None else factor(log_variance_ratio),
    )


def number_text(value: float | None) -> str:
    """Return a count, or a number in three figures; a dash for None."""
    return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else f"{value:,}"
