"""Writes to the event file of a summary writer: scalars, and what the tab reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bnguard.findings import Finding, PastFinding
from bnguard.loggers.reporter import Reporter
from bnguard.observe.history import EvalWindow, LayerHistory
from bnguard.report import Report
from bnguard.rules import RULES, Rule
from bnguard.tensorboard.measures import compute_metrics, dead_channels
from bnguard.tensorboard.metadata import standard_metrics
from bnguard.tensorboard.records import Record, finding_record
from bnguard.tensorboard.writer import BatchNormLog, ChannelSnapshot


class TensorBoard(Reporter):
    """Writes scalars, the statistics of each layer and its channels, and the findings.

    The layers are those of the first report; one that joins later is not shown.

    Args:
        writer: A ``SummaryWriter`` of torch or tensorboardX.
        rules: The rules in force, whose limits the colours of the tab are anchored at.
        subjects: What names the model and its data in the commands that are proposed; without it
            calls are proposed.
        checkpoint: Returns the path of the newest checkpoint, for the same commands; None before
            one is saved.

    Example:
        A plain loop writes the tab with ``reporter = TensorBoard(writer)`` and, now and then,
        ``reporter.log_layers(monitor.report(final=False), step)``.
    """

    def __init__(
        self,
        writer: Any,
        rules: Iterable[Rule] = RULES,
        subjects: str = "",
        checkpoint: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._writer = writer
        self._subjects = subjects
        self._checkpoint = checkpoint
        self._metrics = standard_metrics(rules)
        self._names: tuple[str, ...] = ()
        self._log: BatchNormLog | None = None
        self._shown: dict[str, EvalWindow | None] = {}

    def log_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        """Write the scalars."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def log_layers(self, report: Report, step: int) -> None:
        """Write statistics and findings, and the channels of layers that were evaluated since.

        A step that was already written gets new findings only.
        """
        layers = self._layers(report)
        if self._log is None:
            return
        self._log.add_stats(compute_metrics(layers, self._metrics), step)
        records = [*map(self._record, report.findings), *map(_past_record, report.over)]
        self._log.add_findings(records, step)
        for layer in layers:
            if layer.evaluated is not self._shown.get(layer.name):
                self._add_channels(layer, step)

    def log_report(self, report: Report, step: int) -> None:
        """Write the last evaluation, other layers' channels, and all that is buffered."""
        layers = self._layers(report)
        if self._log is not None:
            self._log.replace_stats(compute_metrics(layers, self._metrics), step)
        for layer in layers:
            if layer.name not in self._shown:
                self._add_channels(layer, step)
        self._writer.flush()

    def _add_channels(self, layer: LayerHistory, step: int) -> None:
        if self._log is None or layer.running is None or layer.running.mean.size == 0:
            return
        self._shown[layer.name] = layer.evaluated
        window, evaluated = layer.window, layer.evaluated
        snapshot = ChannelSnapshot(
            running_mean=layer.running.mean,
            running_var=layer.running.var,
            batch_mean=None if window is None else window.mean,
            batch_var=None if window is None else window.var_unbiased,
            eval_mean=None if evaluated is None else evaluated.mean,
            eval_var=None if evaluated is None else evaluated.var_unbiased,
            gamma=layer.gamma,
            beta=layer.beta,
            is_dead=dead_channels(layer),
            eps=layer.eps,
        )
        self._log.add_channels(layer.name, snapshot, step)

    def _record(self, finding: Finding) -> Record:
        raw, command = finding.to_dict(), finding.fix.call
        if self._subjects:
            command = finding.fix.command(self._checkpoint() or "CKPT", self._subjects)
        return finding_record({**raw, "fix": {**raw["fix"], "command": command}})

    def _layers(self, report: Report) -> Sequence[LayerHistory]:
        """Return the layers in the order of the columns, which the first report sets."""
        if self._log is None and report.layers:
            last = len(report.layers)
            layers = sorted(
                report.layers, key=lambda one: last if one.position is None else one.position
            )
            self._names = tuple(layer.name for layer in layers)
            kinds = [layer.kind for layer in layers]
            self._log = BatchNormLog(self._writer, self._names, self._metrics, kinds)
        by_name = {layer.name: layer for layer in report.layers}
        return [by_name.get(name, LayerHistory(name=name, channels=0)) for name in self._names]


def _past_record(past: PastFinding) -> Record:
    """Return what was announced and is over, as a finding that is only good to know."""
    first, last = past.first_step, past.last_step
    steps = f"step {first}" if first == last else f"steps {first}–{last}"
    return finding_record(
        {
            "code": past.code,
            "name": past.name,
            "severity": "info",
            "layer": past.layer,
            "step": first,
            "message": f"{past.severity} at {steps}, gone since: {past.message} ({past.evidence})",
            "evidence": {"measure": "last step with it", "value": last},
        }
    )
