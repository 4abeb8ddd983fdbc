"""Batches of training sorted by class, as those of evaluation are; healthy: evaluation alone."""

from __future__ import annotations

import itertools

from tests.networks import digits
from tests.zoo.architectures import build
from tests.zoo.fault import Fault
from tests.zoo.faults.sorted_by_class import sorted_by_class
from tests.zoo.training import EVALUATE, shuffled, train


def run(is_faulty, architecture):
    images, labels = (values[EVALUATE] for values in digits())
    batches = itertools.cycle(images[sorted_by_class(labels)].split(24))
    return train(
        build(architecture),
        order=sorted_by_class if is_faulty else shuffled,
        # In place of each batch of evaluation, one that is sorted.
        prepare_evaluation=lambda part: next(batches),
    )


FAULT = Fault(
    "BN203",
    "batches sorted by class in training too",
    run,
    ("conv", "mlp", "depthwise"),
    is_cause=True,
)
