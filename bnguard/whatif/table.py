"""The rows of the table: each way to normalise, measured on the same samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bnguard.whatif.bench import Bench, Drift, Measured, drifts
from bnguard.whatif.model_outputs import Outputs
from bnguard.whatif.result import Row
from bnguard.whatif.statistics import Statistics

_LABELS = {
    "stored": "as they are",
    "reference": "recalibrated on training data",
    "averaged": "averaged over training batches",
    "evaluation": "recalibrated on evaluation data",
}


@dataclass(frozen=True, eq=False)
class Table:
    """The rows, and what they were measured from.

    Attributes:
        rows: The rows by name, the stored statistics first.
        measured: What each row, but that of shuffled batches, was measured from.
        notes: Rows that could not be measured, and why.
    """

    rows: Mapping[str, Row]
    measured: Mapping[str, Measured]
    notes: tuple[str, ...]


def measured_table(
    bench: Bench, stored: Statistics, cures: Mapping[str, Statistics], batch_sizes: Iterable[int]
) -> Table:
    """Measure the model as it is, with other statistics, and with those of its batches.

    Args:
        bench: The model on its samples.
        stored: The statistics that it has.
        cures: Others by the name of their row, ``"evaluation"`` among them.
        batch_sizes: Sizes at which batches are normalised by their own statistics.

    Raises:
        CalibrationError: The model fails, or returns what cannot be compared.
    """
    measured = {"stored": bench.with_statistics({})}
    measured |= {name: bench.with_statistics(statistics) for name, statistics in cures.items()}
    labels = {name: _LABELS[name] for name in measured}
    own, notes = bench.samples.batch_size, []
    for size in (own, *sorted(set(batch_sizes) - {own})):
        reason = bench.why_not_in_batches(size)
        if reason is not None:
            notes.append(f"no row for batches of {size}: {reason}")
        elif size == own:
            measured["batches"] = bench.with_batches(None)
            labels["batches"] = f"of each batch, as they come ({own})"
        else:
            measured[f"batches of {size}"] = bench.with_batches(size)
            labels[f"batches of {size}"] = f"of each batch of {size}"
    outputs = {name: each.outputs for name, each in measured.items()}
    if "batches" in measured and (shuffled := bench.outputs_in_shuffled_batches()) is not None:
        outputs["shuffled batches"] = shuffled
        labels["shuffled batches"] = f"of each batch of {own}, shuffled"
    drifting = {
        name: drifts(bench.layers, measured[name].arrived, statistics)
        for name, statistics in {"stored": stored, **cures}.items()
    }
    rows = {
        name: _row(
            name,
            labels[name],
            each,
            outputs,
            score=measured[name].score if name in measured else None,
            drifting=drifting.get(name, ()),
        )
        for name, each in outputs.items()
    }
    return Table(rows, measured, tuple(notes))


def _row(
    name: str,
    label: str,
    outputs: Outputs,
    others: Mapping[str, Outputs],
    *,
    score: float | None,
    drifting: Sequence[Drift],
) -> Row:
    expected, batches = others["evaluation"], others.get("batches")
    drift = max(drifting, key=_largest_or_bad, default=None)
    return Row(
        name=name,
        label=label,
        score=score,
        change=outputs.change_from(expected),
        flipped_share=outputs.flipped_share(expected),
        gap=None if batches is None else outputs.change_from(batches),
        drift_std=None if drift is None else drift.shift_std,
        drift_log_variance=None if drift is None else drift.log_variance_ratio,
        drift_layer=None if drift is None else drift.layer,
        input_drift=drifting[0].largest if drifting else None,
    )


def _largest_or_bad(drift: Drift) -> float:
    return math.inf if math.isnan(drift.largest) else drift.largest
