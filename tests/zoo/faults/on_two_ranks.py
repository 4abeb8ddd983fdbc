"""Two processes: few samples on each, and statistics that are each process's own."""

from __future__ import annotations

from tests.zoo.fault import Fault
from tests.zoo.ranks import RANKS, ddp, on_two_ranks
from tests.zoo.trainer import Classifier, fit


def fit_small(architecture, batch_size):
    return fit(
        Classifier(architecture),
        batch_size=batch_size,
        limit_train_batches=37,
        limit_val_batches=1,
        max_epochs=1,
        devices=RANKS,
        strategy=ddp(),
    )


def small(is_faulty, architecture):
    return on_two_ranks(fit_small, architecture, 4 if is_faulty else 16)


class OfTwoScanners(Classifier):
    """Reads brighter images on rank 1, as where data are sharded by their source."""

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return super().training_step((images + 0.4 * self.global_rank, labels), batch_idx)


def fit_apart(architecture, is_faulty):
    module = OfTwoScanners(architecture) if is_faulty else Classifier(architecture)
    return fit(
        module,
        limit_val_batches=1,
        max_epochs=2,
        devices=RANKS,
        strategy=ddp(broadcast_buffers=False),
    )


def apart(is_faulty, architecture):
    return on_two_ranks(fit_apart, architecture, is_faulty)


SMALL = Fault("BN106", "batches of four on each rank", small, ("mlp",))
APART = Fault("BN210", "each rank has statistics of its own", apart, ("mlp",), False)
