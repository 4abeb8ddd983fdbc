"""BN203 correlated-batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped
from bnguard.layers.distances import FloatArray
from bnguard.observe.history import History, InputWindow, LayerHistory
from bnguard.rules.base import ModelRule
from bnguard.rules.measurements import is_harmful, is_lasting


@dataclass(frozen=True, kw_only=True)
class CorrelatedBatches(ModelRule):
    """The samples of one batch are more alike than those of different batches.

    Why it matters:
        Batches sorted by class, grouped by patient or cut from one video each have statistics of
        their own. BN subtracts what the samples of a batch share, which may be the very thing to
        learn, and the running statistics describe no batch that ever was.

    What you see:
        Training looks better than evaluation with mixed batches or single samples. A score per
        sorted batch is good, the same samples shuffled are not.

    Example:
        A dataset that lies in folders of classes::

            # Fault
            loader = DataLoader(dataset, batch_size=64, shuffle=False)
            # Fix
            loader = DataLoader(dataset, batch_size=64, shuffle=True)

    Fix:
        Shuffle what is sorted, or draw each batch from several groups; an ``IterableDataset`` needs
        a shuffle buffer. If batches have to be grouped (episodes, contrastive pairs), use GroupNorm
        or batch renormalisation; BN202 says which norm for whom.

    What it does not mean:
        An augmentation drawn once per batch (brightness, scale) makes batches differ too, mostly
        without harm. So it is a ``warning`` only if the batches show an order (neighbours are
        alike, or two kinds take turns), if a mode gap lasts (BN302), or if, at the end of training,
        evaluation mixes what batches hold one at a time. Otherwise it is ``info``. A missing mode
        gap does not disprove it: both modes agree on such a batch.

    Evidence:
        The F ratio of an analysis of variance: the variance between batch means, times the samples
        per batch, over the variance between the samples of a batch, the median over some numbers of
        each sample; 1 for independent samples. It is measured at the input of the model, since
        deeper layers re-centre each batch. From 16 batches on a slow trend is left out. If the
        model is called several times per step, each call is compared with the same call of other
        steps, and the one whose batches differ least counts.

        Runs longer than a window (40 batches of each class) show between windows: half the mean
        squared difference of neighbouring windows, as a share of the variance between samples. A
        ``DataLoader`` that does not shuffle a dataset with runs of labels shows before the first
        step.

    Limits:
        min_variance_ratio: 2, below which it does no harm.
        max_excess_std: 5 standard deviations of what K batches of independent samples give, 1 + 5
            sqrt(2 / (K - 1)): 3.4 for 10 batches, 2.0 for 50. 95 % of the healthy runs of the
            zoo stay below 1.2; batches sorted by class have 3.9, batches of one scanner each 52 and
            more, and those with one brightness each 26 to 62 (``info``).
        max_neighbour_std: 4 standard deviations of von Neumann's ratio, the change from batch to
            batch over the variance of the batch means, for the principal components of the first
            batches of a run. It is 1 in random order, 0.3 for digits sorted by class, 2 for two
            domains in turn.
        min_between_within: 0.5, the variance between batches over that within, and
        min_mixed_share: 0.3, the share of it that evaluation adds to the variance within batches at
            the first BN layer: the median over channels, each weighted by how much the batches
            differ in it. Scanners that evaluation mixes have 0.5 and more; brightness drawn per
            batch at most 0.03.
        min_batches: 8 batches in the window before they are judged.
        max_between_windows: 0.015 of the variance between samples is between windows, the median
            over numbers of a sample, and 5 standard deviations beyond chance, 1 + 5 sqrt(3 / K)
            times it for K windows. Digits sorted by class have 0.09 and more, shuffled ones 0.
        max_label_run: 4 times the samples of one label in a row that a random order has, and at
            least a quarter of a batch.

    References:
        Ioffe, "Batch Renormalization" (2017), on non-i.i.d. minibatches, arXiv:1702.03275.
        Wu & Johnson, "Rethinking 'Batch' in BatchNorm" (2021), section 6, arXiv:2105.07576.
        pytorch/pytorch#4741, where batches of one recording are one of the causes.
        xuyxu/Deep-Clustering-Network#2 and jiecaoyu/XNOR-Net-PyTorch#38, not shuffled.
        SimonVandenhende/Multi-Task-Learning-PyTorch#28, one dataset per batch.
    """

    code: ClassVar[str] = "BN203"
    name: ClassVar[str] = "correlated-batches"
    explains: ClassVar[tuple[str, ...]] = ("BN201", "BN202", "BN301", "BN302", "BN305", "BN403")

    min_variance_ratio: float = 2.0
    max_excess_std: float = 5.0
    max_neighbour_std: float = 4.0
    min_between_within: float = 0.5
    min_mixed_share: float = 0.3
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
                yield self.make_finding(
                    layer,
                    Severity.WARNING,
                    f"the loader does not shuffle: {plan.label_run:,.0f} samples of one label "
                    "follow each other in the dataset",
                    Evidence("run of a label, relative to random order", run, self.max_label_run),
                    _SHUFFLE,
                )
                return
        if not layer.calls.in_training:
            return
        inputs = history.run.inputs
        ratio = np.empty(0) if inputs is None else inputs.variance_ratio
        ratio = ratio[np.isfinite(ratio)]
        if inputs is None or not ratio.size:
            yield self.skip(
                layer, "no input of the model has a row of numbers per sample (as with graphs)"
            )
            return
        if inputs.batches < self.min_batches:
            yield self.skip(layer, f"fewer than {self.min_batches} batches in the window")
            return
        value = float(np.median(ratio))
        limit = self.limit_of(inputs.batches)
        share = float(np.median(inputs.between_windows)) if inputs.between_windows.size else 0.0
        if value > limit:
            yield self._unlike(layer, inputs, Evidence(_RATIO, value, limit))
        elif share > self.max_between_windows:
            yield self.make_finding(
                layer,
                Severity.WARNING,
                f"the data of {inputs.windows} windows of training differ by {share:.0%} of the "
                "variance between samples: they are sorted or grouped in long runs",
                Evidence(
                    "variance between windows", 100 * share, 100 * self.max_between_windows, "%"
                ),
                _SHUFFLE,
            )

    def limit_of(self, batches: int) -> float:
        """Return the limit of the F ratio of some batches: few differ more by chance."""
        by_chance = 1.0 + self.max_excess_std * math.sqrt(2.0 / (batches - 1))
        return max(self.min_variance_ratio, by_chance)

    def _unlike(self, layer: LayerHistory, inputs: InputWindow, evidence: Evidence) -> Finding:
        """Return why batches differ: an order, groups that do harm, or augmentation per batch."""
        change, gap = inputs.neighbour_change, layer.run.mode_gap
        has_order = inputs.neighbour_excess_std > self.max_neighbour_std
        is_harm = gap is not None and is_harmful(gap) and is_lasting(layer.run)
        is_shown = is_harm or self._is_mixed(layer, evidence.value)
        ratio = f"batches differ {evidence.value:.2g} times as much as independent samples would"
        if has_order and change < 1.0:
            why = f"the data are sorted or grouped: neighbouring batches are alike, and {ratio}"
        elif has_order:
            why = f"kinds of data take turns from batch to batch: {ratio}"
        else:
            why = f"each batch holds one group, or one draw of an augmentation: {ratio}"
        if not (has_order or is_shown):
            why += "; evaluation shows no harm" if gap else "; no evaluation shows harm so far"
        return self.make_finding(
            layer,
            Severity.WARNING if has_order or is_shown else Severity.INFO,
            why,
            evidence,
            _SHUFFLE if has_order else _MIX,
        )

    def _is_mixed(self, layer: LayerHistory, ratio: float) -> bool:
        """Return whether evaluation mixes the groups that training batches hold one at a time.

        Then the variance between training batches adds to the variance in evaluation.
        """
        window, seen, samples = layer.window, layer.evaluated, layer.samples
        # While weights move, the window is too far from the evaluation.
        if window is None or seen is None or not samples or not layer.run.is_settled:
            return False
        if ratio - 1.0 < self.min_between_within * samples:
            return False
        with np.errstate(all="ignore"):
            share = (seen.var_unbiased - window.var_unbiased) / window.var_of_means_successive
            weight = window.var_of_means_successive / window.var_unbiased
        return _weighted_median(share, weight) > self.min_mixed_share


def _weighted_median(values: FloatArray, weights: FloatArray) -> float:
    """Return the value with half of the weight below it; NaN if no value is finite."""
    known = np.isfinite(values) & np.isfinite(weights)
    order = np.argsort(values[known])
    below = np.cumsum(weights[known][order])
    if not below.size:
        return math.nan
    return float(values[known][order][np.searchsorted(below, below[-1] / 2)])


_RATIO = "variance of batch means, relative to independent samples"
_SHUFFLE = Fix("use DataLoader(..., shuffle=True), or draw each batch from several groups")
_MIX = Fix("draw each batch from several groups, and the augmentation for each sample")
