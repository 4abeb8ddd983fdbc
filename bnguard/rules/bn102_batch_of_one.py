"""BN102 batch-of-one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped
from bnguard.observe.history import LayerHistory
from bnguard.rules.base import Rule


@dataclass(frozen=True, kw_only=True)
class BatchOfOne(Rule):
    """A batch in train mode has one value per channel, and one value has no variance.

    Why it matters:
        One value minus its own mean is zero, so the output is beta for every input. PyTorch refuses
        such a batch, and its message does not name the layer.

    What you see:
        "Expected more than 1 value per channel when training", often at the end of the first epoch,
        when the loader gives its last, smaller batch.

    Example:
        1,025 samples in batches of 8 leave a last batch of 1::

            # Fault
            loader = DataLoader(dataset, batch_size=8)
            # Fix
            loader = DataLoader(dataset, batch_size=8, drop_last=True)

    Fix:
        Drop the last batch; with a shuffling loader, each epoch drops other samples. If global
        pooling leaves one position per sample and batches hold one sample, remove that BN layer or
        use LayerNorm there.

    What it does not mean:
        Evaluation with one sample is fine: eval mode needs no batch.

    Evidence:
        The smallest n, samples times positions, that the layer normalised in train mode. If
        ``watch`` knows the loader, also the n of its last batch, before the epoch gets there: from
        the length of the sampler (the share of this rank), the batch size and ``drop_last``.

    Limits:
        min_values_per_channel: 2, the fewest values that have a variance.

    References:
        pytorch/pytorch#4534, "nn.BatchNorm1d fails with batch size 1 on the new PyTorch 0.3".
        VainF/DeepLabV3Plus-Pytorch#27, BN after global pooling.
        facebookresearch/SparseConvNet#190, where such a batch made running_var NaN.
    """

    code: ClassVar[str] = "BN102"
    name: ClassVar[str] = "batch-of-one"
    is_static: ClassVar[bool] = True

    min_values_per_channel: int = 2

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Look for the smallest batch that the layer normalised with its own statistics."""
        if layer.training is None:
            yield self.skip(layer, "a checkpoint does not record batch sizes")
            return
        if not layer.values_per_channel:
            yield self.skip(layer, "no batch has reached the layer in train mode yet")
            return
        seen, coming = min(layer.values_per_channel), _smallest_to_come(layer)
        smallest = seen if coming is None else min(seen, coming)
        if smallest >= self.min_values_per_channel:
            return
        verb = "has" if seen == smallest else "will have, at the end of the epoch,"
        yield self.make_finding(
            layer,
            Severity.ERROR,
            f"a batch in train mode {verb} one value per channel here: it has no variance, and "
            "PyTorch refuses it",
            Evidence("values per channel", smallest, self.min_values_per_channel, is_minimum=True),
            Fix("use DataLoader(..., drop_last=True), or no BN at one position per sample"),
            step=layer.batch_of_one_step,
        )


def _smallest_to_come(layer: LayerHistory) -> int | None:
    """Return the values per channel in the smallest batch of the loader; None if unknown."""
    samples = layer.run.plan.smallest_batch_size
    n = layer.typical_values_per_channel
    if samples is None or n is None or not layer.samples or layer.calls.most_per_forward > 1:
        return None
    return samples * (n // layer.samples)
