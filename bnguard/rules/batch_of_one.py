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
    """A layer in train mode met a batch with one value per channel, which has no variance.

    Why it matters:
        One value minus its own mean is zero: the layer's output is beta, whatever its input.
        PyTorch refuses such a batch ("Expected more than 1 value per channel when training") and
        the run ends, often at the last, smaller batch of the first epoch. The message does not
        name the layer.

    Evidence:
        The smallest number of values per channel, n = samples times positions, that the layer was
        asked to normalise in train mode; or that it will be, by what the loader says of its last
        batch (length of the sampler, that is the share of this rank, batch size, ``drop_last``)
        and by the positions that a sample had so far. The latter is reported before the epoch
        reaches the batch, where ``watch`` was given the loader.

    Limits:
        min_values_per_channel: The fewest that have a variance: 2.

    Fix:
        Leave the last, smaller batch out::

            DataLoader(dataset, batch_size=8, drop_last=True)

        Where positions have shrunk to 1x1 (after global pooling) and the batch is one sample,
        remove the BN layer there, or put a LayerNorm in its place.

    Fix safety:
        ``drop_last`` leaves out at most one batch an epoch, another one each time when the loader
        shuffles.

    References:
        PyTorch issue 4534, "nn.BatchNorm1d fails with batch size 1 on the new PyTorch 0.3".
    """

    code: ClassVar[str] = "BN102"
    name: ClassVar[str] = "batch-of-one"
    is_static: ClassVar[bool] = True

    min_values_per_channel: int = 2

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Look for the smallest batch that the layer normalised with its own statistics."""
        if layer.training is None:
            yield self._skipped(layer, "a checkpoint does not say what batches the layer met")
            return
        if not layer.values_per_channel:
            yield self._skipped(layer, "no batch has reached the layer in train mode yet")
            return
        seen, coming = min(layer.values_per_channel), _smallest_to_come(layer)
        smallest = seen if coming is None else min(seen, coming)
        if smallest >= self.min_values_per_channel:
            return
        verb = "has" if seen == smallest else "will have, at the end of the epoch,"
        yield self._finding(
            layer,
            Severity.ERROR,
            f"a batch in train mode {verb} one value per channel here: it has no variance, and "
            "PyTorch refuses it",
            Evidence("values per channel", smallest, self.min_values_per_channel, is_minimum=True),
            Fix("DataLoader(..., drop_last=True); no BN where a sample has one position"),
            step=layer.batch_of_one_step,
        )


def _smallest_to_come(layer: LayerHistory) -> int | None:
    """Return the values per channel in the smallest batch of the loader; None if not known."""
    samples = layer.run.plan.smallest_batch_size
    n = layer.typical_values_per_channel
    if samples is None or n is None or not layer.samples or layer.calls.most_per_forward > 1:
        return None
    return samples * (n // layer.samples)
