"""BN203 correlated-batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped
from bnguard.observe.history import History, LayerHistory
from bnguard.rules.base import ModelRule


@dataclass(frozen=True, kw_only=True)
class CorrelatedBatches(ModelRule):
    """The samples of a batch are more alike than those of different batches.

    Why it matters:
        Batches sorted by class, grouped by patient or cut from one video are each a world of
        their own. BN subtracts what its samples share, which may be the very thing to learn; the
        running statistics describe no batch that ever was; and evaluation, with mixed batches or
        one sample, is worse than training suggests. Both modes agree on such a batch, so that the
        mode gap does not show it.

    Evidence:
        The variance between batch means, times the samples of a batch, over the variance between
        the samples of a batch (the F ratio of an analysis of variance), the median over some
        numbers of each sample. Independent samples give 1. From 16 batches on a slow trend is left
        out, as where a discriminator is fed by a generator that learns. It is taken at the input of
        the model, before the first BN layer: deeper down the layers before re-centre each batch, so
        that healthy ones swing, and weights that change make batches differ. Where the model is
        called several times a step, real and generated images in turn, batches are compared with
        those of the same call in other steps, and the call whose batches differ least counts.
        Runs that are longer than a window (40 batches of each class) show between windows: half the
        mean square difference of neighbours, as a share of the variance between samples. And before
        the first step, where a ``DataLoader`` draws samples in the order of a dataset whose labels
        come in runs.

    Limits:
        min_variance_ratio: 2, below which no harm is to be expected.
        max_excess_std: 5 standard deviations of what K batches of independent samples give,
            1 + 5 sqrt(2 / (K - 1)): 3.4 for 10 batches, 2.0 for 50. Healthy runs of
            the zoo stay below 2.8 (95 % of them below 1.2); batches sorted by class have 3.9,
            batches of one scanner each more than 100.
        min_batches: Batches in the window before they are judged: 8.
        max_between_windows: Share of the variance between samples that lies between windows, the
            median over numbers of a sample: 0.015, and twice what chance explains. Digits sorted by
            class have 0.09 and more, shuffled ones 0.
        max_label_run: Samples of one label in a row, in those of a random order: 4; and a quarter
            of a batch at least.

    Fix:
        Shuffle what is sorted, or draw each batch from several groups::

            DataLoader(dataset, batch_size=64, shuffle=True)

        An ``IterableDataset`` needs a shuffle buffer; a sampler of one's own has to mix classes.

    Which norm:
        GroupNorm; or, to keep running statistics, batch renormalisation, which was made for such
        batches. BN202 has the figures of BN, GroupNorm and batch renormalisation (Wu & He, table
        2).

    Fix safety:
        Safe. Where batches have to be grouped (episodes, contrastive pairs), GroupNorm in place
        of BN takes the dependence away.

    References:
        Ioffe, "Batch Renormalization" (2017), on non-i.i.d. minibatches.
        Wu & Johnson, "Rethinking 'Batch' in BatchNorm" (2021), section 6.
    """

    code: ClassVar[str] = "BN203"
    name: ClassVar[str] = "correlated-batches"
    explains: ClassVar[tuple[str, ...]] = ("BN201", "BN202", "BN301", "BN302", "BN305")

    min_variance_ratio: float = 2.0
    max_excess_std: float = 5.0
    min_batches: int = 8
    max_between_windows: float = 0.015
    max_label_run: float = 4.0

    def check_model(self, history: History) -> Iterator[Finding | Skipped]:
        """Compare the batches that the model was given with those of independent samples."""
        layer = history.first_trained
        if layer is None:
            return
        plan = history.run.plan
        if plan.label_run is not None and plan.shuffled_label_run:
            run = plan.label_run / plan.shuffled_label_run
            if run > self.max_label_run and 4 * plan.label_run >= (plan.batch_size or 0):
                yield self._in_order(layer, plan.label_run, run)
                return
        if not layer.calls.in_training:
            return
        inputs = history.run.inputs
        ratio = np.empty(0) if inputs is None else inputs.variance_ratio
        ratio = ratio[np.isfinite(ratio)]
        if inputs is None or not ratio.size:
            yield self._skipped(
                layer, "no input of the model has a row of numbers per sample (as with graphs)"
            )
            return
        if inputs.batches < self.min_batches:
            yield self._skipped(layer, f"fewer than {self.min_batches} batches in the window")
            return
        value = float(np.median(ratio))
        by_chance = 1.0 + self.max_excess_std * math.sqrt(2.0 / (inputs.batches - 1))
        limit = max(self.min_variance_ratio, by_chance)
        between = inputs.between_windows
        share = float(np.median(between)) if between.size else 0.0
        if value <= limit and share > self.max_between_windows:
            yield self._finding(
                layer,
                Severity.WARNING,
                f"the data of {inputs.windows} windows of training differ by {share:.0%} of the "
                "variance between samples: they are sorted or grouped in long runs",
                Evidence(
                    "variance between windows", 100 * share, 100 * self.max_between_windows, "%"
                ),
                _SHUFFLE,
            )
        if value <= limit:
            return
        yield self._finding(
            layer,
            Severity.WARNING,
            f"the batches differ {value:.2g} times as much as independent samples explain: they "
            "are sorted, grouped, or neighbours, or the data change as training goes on",
            Evidence("variance of batch means over the expected", value, limit),
            _SHUFFLE,
        )

    def _in_order(self, layer: LayerHistory, samples: float, run: float) -> Finding:
        return self._finding(
            layer,
            Severity.WARNING,
            f"the loader draws samples in the order of the dataset, where {samples:,.0f} of one "
            "label follow each other: it does not shuffle",
            Evidence("run of a label over that of a random order", run, self.max_label_run),
            _SHUFFLE,
        )


_SHUFFLE = Fix("DataLoader(..., shuffle=True), or draw each batch from several groups")
