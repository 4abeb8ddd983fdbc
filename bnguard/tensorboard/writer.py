"""Writes the reports of a monitor into event files, for the tab and for viewers without it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bnguard.findings import Finding
from bnguard.observe.history import LayerHistory
from bnguard.report import Report
from bnguard.rules import RULES, Rule
from bnguard.tensorboard.lean import lean_scalars
from bnguard.tensorboard.measures import dead_channels, measured
from bnguard.tensorboard.metadata import standard_metrics
from bnguard.tensorboard.records import SUBJECTS, Record, finding_record, repair_command
from bnguard.tensorboard.summary import BatchNormLog, ChannelSnapshot


class ReportLog:
    """Writes what a monitor observed, and what it found, through summary writers.

    The layers are those of the first report; one that joins later is not shown.

    Args:
        writers: ``SummaryWriter`` objects of torch or tensorboardX; none is fine.
        rules: The rules in force, whose limits the colours are anchored at.
        subjects: What names the model and its data in the commands that are proposed.

    Example:
        A plain loop writes the tab with ``log = ReportLog([writer])`` and, now and then,
        ``log.add(monitor.report(final=False), step)``.
    """

    def __init__(
        self,
        writers: Iterable[object],
        rules: Iterable[Rule] = RULES,
        subjects: str = SUBJECTS,
    ) -> None:
        self._writers = tuple(writers)
        self._subjects = subjects
        self._metrics = standard_metrics(rules)
        self._names: tuple[str, ...] = ()
        self._logs: list[BatchNormLog] = []

    def add(self, report: Report, step: int) -> None:
        """Write statistics and findings; those of a step that was written are passed over."""
        layers = self._layers(report)
        for log in self._logs:
            log.add_stats(measured(layers, self._metrics), step)
            log.add_findings(map(self._record, report.findings), step)

    def add_channels(self, report: Report, step: int) -> None:
        """Write what is known of each channel; worth it once an evaluation, not every step."""
        layers = self._layers(report)
        for log in self._logs:
            for layer in layers:
                snapshot = _snapshot(layer)
                if snapshot is not None:
                    log.add_channels(layer.name, snapshot, step)

    def scalars(self, report: Report) -> dict[str, float]:
        """Return a few quantiles over the layers of each metric, name to number, for any logger."""
        return lean_scalars(self._metrics, measured(report.layers, self._metrics))

    def _record(self, finding: Finding) -> Record:
        command = repair_command(finding.fix.repair, self._subjects)
        raw = finding.to_dict()
        return finding_record({**raw, "fix": {**raw["fix"], "command": command}})

    def _layers(self, report: Report) -> Sequence[LayerHistory]:
        """Return the layers in the order of the columns, which the first report sets."""
        if not self._names and report.layers:
            in_order = sorted(
                report.layers,
                key=lambda layer: len(report.layers) if layer.position is None else layer.position,
            )
            self._names = tuple(layer.name for layer in in_order)
            kinds = [layer.kind for layer in in_order]
            self._logs = [
                BatchNormLog(writer, self._names, self._metrics, kinds) for writer in self._writers
            ]
        by_name = {layer.name: layer for layer in report.layers}
        return [by_name.get(name, LayerHistory(name=name, channels=0)) for name in self._names]


def _snapshot(layer: LayerHistory) -> ChannelSnapshot | None:
    if layer.running is None or layer.running.mean.size == 0:
        return None
    window, evaluated = layer.window, layer.evaluated
    return ChannelSnapshot(
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
