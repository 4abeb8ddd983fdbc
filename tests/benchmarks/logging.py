"""What a logged step costs, beside plain scalars of the same writer.

python -m tests.benchmarks.logging

53 layers and 8 metrics, the median of 1000 steps: all of them in the event of bnguard, against one
scalar each for 8 metrics of a single layer.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from bnguard.tensorboard.metadata import standard_metrics
from bnguard.tensorboard.writer import BatchNormLog

STEPS = 1000
LAYERS, METRICS = 53, 8


def main() -> None:
    values = np.random.default_rng(0).normal(size=(METRICS, LAYERS))
    with tempfile.TemporaryDirectory() as folder:
        writer = SummaryWriter(folder)
        log = BatchNormLog(
            writer, [f"layer{index}" for index in range(LAYERS)], standard_metrics()[:METRICS]
        )
        own = median_ms(lambda step: log.add_stats(values, step))
        plain = median_ms(
            lambda step: [
                writer.add_scalar(f"{row}", values[row, 0], step) for row in range(METRICS)
            ]
        )
        writer.close()
    print(f"{LAYERS} layers x {METRICS} metrics: {own:.2f} ms a logged step")
    print(f"{METRICS} scalars of one layer: {plain:.2f} ms; ratio {own / plain:.2f}")


def median_ms(write: Callable[[int], object]) -> float:
    seconds = []
    for step in range(STEPS):
        start = time.perf_counter()
        write(step)
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


if __name__ == "__main__":
    main()
