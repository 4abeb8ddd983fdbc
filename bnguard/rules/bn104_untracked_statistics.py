"""BN104 untracked-statistics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped
from bnguard.observe.history import LayerHistory
from bnguard.rules.base import Rule


@dataclass(frozen=True, kw_only=True)
class UntrackedStatistics(Rule):
    """A layer keeps no running statistics, or no longer updates those that eval mode uses.

    Why it matters:
        Without running statistics, eval mode normalises with the batch too: the prediction for a
        sample depends on the samples next to it. If tracking is switched off *after* the layer was
        built, training uses the batch and evaluation the old statistics, and the two drift apart.
        Lightning's ``BaseFinetuning.freeze(train_bn=False)`` does this.

    What you see:
        Scores change with the batch size of the test loader, and single samples are predicted
        badly. Or validation gets worse while the training loss falls.

    Example:
        A layer frozen by switching off tracking::

            # Fault
            layer.track_running_stats = False
            # Fix: eval mode, after each model.train()
            layer.track_running_stats = True
            layer.eval()

    Fix:
        Build the layer with ``track_running_stats=True``, or use GroupNorm or InstanceNorm if each
        sample should be normalised by itself. A network trained without statistics needs buffers
        and one ``bnguard.recalibrate``.

    What it does not mean:
        A layer in eval mode on purpose, with statistics, is not meant: it is frozen, not untracked.
        Test-time adaptation normalises with the batches of the test on purpose, and is ``info``:
        statistics were removed from a layer that had them; or, as long as no call is in eval mode,
        an optimizer has gammas and betas alone, or nothing is trained.

    Evidence:
        Calls in train mode while ``track_running_stats`` is False.

    Limits:
        max_untracked_calls: 0 calls in training; before training, the setting alone counts.

    References:
        torch.nn.BatchNorm2d, on ``track_running_stats``.
        Lightning-AI/pytorch-lightning#15063, "Implement freeze batchnorm with freezing track
            running stats".
        tristandeleu/pytorch-maml#7, results that depend on the batch size at inference.
        DequanWang/tent#3, adaptation to the data of the test.
    """

    code: ClassVar[str] = "BN104"
    name: ClassVar[str] = "untracked-statistics"
    is_static: ClassVar[bool] = True
    explains: ClassVar[tuple[str, ...]] = ("BN301", "BN302")
    acts_by_statistics: ClassVar[bool] = True

    max_untracked_calls: int = 0

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Look for layers that normalise in training with statistics that they do not keep."""
        if 0 < layer.calls.in_training <= self.max_untracked_calls:
            return
        evidence = Evidence(
            "untracked calls in training",
            max(layer.calls.in_training, self.max_untracked_calls + 1),
            self.max_untracked_calls,
        )
        has_no_values_yet = layer.channels == 0 or layer.statistics_dtype is not None
        if layer.running is None and has_no_values_yet:
            yield self.skip(layer, "the running statistics have no values yet")
        elif layer.running is None:
            yield self.make_finding(
                layer,
                Severity.INFO if layer.is_dropped or _is_adapted(layer) else Severity.WARNING,
                "the layer has no running statistics: in eval mode too, the output for a sample "
                "depends on the rest of its batch",
                evidence,
                Fix("use track_running_stats=True, or GroupNorm, which needs no batch"),
            )
        elif not layer.is_updating and (layer.training or layer.calls.in_training):
            yield self.make_finding(
                layer,
                Severity.INFO if _is_adapted(layer) else Severity.WARNING,
                "tracking was switched off: training uses batch statistics, evaluation the old "
                "running statistics",
                evidence,
                Fix("set track_running_stats = True, and call eval() on layers to keep frozen"),
            )


def _is_adapted(layer: LayerHistory) -> bool:
    """Return whether a trained network is used on the batches of a test, and never in eval mode."""
    is_untrained = not layer.run.steps and layer.calls.are_without_grad
    return (layer.run.is_adaptation or is_untrained) and not layer.calls.is_in_eval_mode
