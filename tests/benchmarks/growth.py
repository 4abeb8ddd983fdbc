"""How the cost of watching grows: ``python -m tests.benchmarks.growth``, about three minutes.

Measures processor time against layers, channels, ranks and samples, fits a line to each, and says
what a model of 10,000 layers and a training on 512 ranks would cost.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import multiprocessing, nn

import bnguard
from bnguard.distributed import Exchange
from bnguard.layers.bn_layer import find_layers
from bnguard.observe.batch_statistics import BatchProbe
from tests.benchmarks.overhead import held_bytes

LAYERS = (10, 50, 200, 500, 1000, 2000)
CHANNELS = (16, 64, 256, 512, 1024, 4096)
RANKS = (1, 2, 4, 8)
SAMPLES = (1_000, 10_000, 100_000)


def main() -> None:
    """Print the tables and the fits."""
    parser = argparse.ArgumentParser(description=__doc__)
    tables: dict[str, Callable[[], None]] = {
        "layers": layers_table,
        "channels": channels_table,
        "ranks": ranks_table,
        "samples": samples_table,
    }
    parser.add_argument("--table", choices=list(tables), action="append", help="all by default")
    chosen = parser.parse_args().table or list(tables)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    for name in chosen:
        tables[name]()


def layers_table() -> None:
    """Print the cost of a step and of the rules over the number of layers."""
    print("\nLayers of 64 channels: µs a step to read, ms to run the rules")
    reads, checks = [], []
    for layers in LAYERS:
        reads.append(1e6 * seconds_of_a_read(layers, 64))
        checks.append(1e3 * seconds_of_a_check(layers))
        print(f"{layers:8} {reads[-1]:12.0f} {checks[-1]:12.1f}", flush=True)
    read, check = Line(LAYERS, reads), Line(LAYERS, checks)
    print(f"a step:    {read.text('µs', 'layer')}")
    print(f"the rules: {check.text('ms', 'layer')}")
    print(
        f"10,000 layers would cost {read(10_000) / 1e3:.0f} ms a step, and "
        f"{check(10_000) / 1e3:.1f} s for each run of the rules"
    )


def channels_table() -> None:
    """Print the cost of a step over the number of channels."""
    print("\nChannels of 20 layers: µs a step to read")
    reads = []
    for channels in CHANNELS:
        reads.append(1e6 * seconds_of_a_read(20, channels))
        print(f"{channels:8} {reads[-1]:12.0f}", flush=True)
    print(f"a step: {Line([20 * channels for channels in CHANNELS], reads).text('µs', 'channel')}")


def ranks_table() -> None:
    """Print what the ranks exchange when the reports are merged at the end."""
    print("\nRanks (gloo): collectives in 20 steps, ms to merge the reports, bytes of a rank")
    merges, sizes = [], []
    for ranks in RANKS:
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(_train_on_rank, (ranks, folder), nprocs=ranks)
            collectives, seconds, size = map(
                float, Path(folder, str(ranks - 1)).read_text().split()
            )
        merges.append(1e3 * seconds)
        sizes.append(size)
        print(f"{ranks:8} {collectives:12.0f} {merges[-1]:12.1f} {size:12.0f}", flush=True)
    merge = Line(RANKS, merges)
    print(f"the merge: {merge.text('ms', 'rank')}")
    print(
        f"512 ranks would take {merge(512) / 1e3:.1f} s at the end, and bring "
        f"{512 * max(sizes) / 2**20:.2f} MiB to each rank; nothing in a step"
    )


def samples_table() -> None:
    """Print the memory that a monitor holds over the number of samples, in batches of 10."""
    print("\nSamples in batches of 10: KiB of tensors held, KiB of Python objects, µs a step")
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 1))
    batch, done = torch.randn(10, 4), 0
    tracemalloc.start()
    with bnguard.watch(model, max_overhead=0.0, on_findings=lambda group: None) as monitor:
        held = []
        for samples in SAMPLES:
            begin = time.process_time()
            steps = (samples - done) // 10
            for _ in range(steps):
                model(batch)
                monitor.step()
            spent, done = time.process_time() - begin, samples
            objects = tracemalloc.get_traced_memory()[0]
            held.append(held_bytes(monitor) + objects)
            cells = held_bytes(monitor) / 2**10, objects / 2**10, 1e6 * spent / steps
            print(f"{samples:8} " + " ".join(f"{cell:12.0f}" for cell in cells), flush=True)
    tracemalloc.stop()
    print(f"100 times the samples hold {held[-1] / held[0]:.2f} times the memory")


class Line:
    """A line through measurements, by least squares of the relative errors."""

    def __init__(self, sizes: Sequence[float], costs: Sequence[float]) -> None:
        weights = 1.0 / np.array(costs)
        self._slope, self._start = np.polyfit(np.array(sizes, float), np.array(costs), 1, w=weights)
        errors = np.abs(self._slope * np.array(sizes) + self._start - costs) * weights
        self._error = float(errors.max())

    def __call__(self, size: float) -> float:
        return float(self._slope * size + self._start)

    def text(self, unit: str, what: str) -> str:
        return (
            f"{self._start:.2g} {unit} and {self._slope:.2g} {unit} a {what}, within "
            f"{self._error:.0%} of what was measured"
        )


def seconds_of_a_read(layers: int, channels: int) -> float:
    """Return the processor time of reading the buffers after a step, a mean over whole turns."""
    model = nn.ModuleList([nn.BatchNorm1d(channels) for _ in range(layers)])
    probe, times = BatchProbe(find_layers(model)), []
    for step in range(3 * 32):
        for module in model:
            module.num_batches_tracked += 1
            module.running_mean.add_(0.01)
        begin = time.thread_time()
        probe.read(step)
        times.append(time.thread_time() - begin)
    return statistics.mean(times[32:])


def seconds_of_a_check(layers: int) -> float:
    """Return the processor time of a run of all rules."""
    model = nn.Sequential(*[nn.BatchNorm1d(64) for _ in range(layers)])
    times = []
    with bnguard.watch(model, on_findings=lambda group: None) as monitor:
        for _ in range(3):
            model(torch.randn(4, 64))
            monitor.step()
            begin = time.thread_time()
            monitor.report(final=False)
            times.append(time.thread_time() - begin)
    return statistics.median(times)


def _train_on_rank(rank: int, ranks: int, folder: str) -> None:
    """Train for 20 steps with a backend that counts its collectives, and merge the reports."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sent = 0
    lay_out = Exchange._set

    def count(exchange: Exchange, key: str, value: bytes) -> None:
        nonlocal sent
        sent += len(value)
        lay_out(exchange, key, value)

    Exchange._set = count
    store = dist.FileStore(str(Path(folder, "store")), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    with bnguard.watch(model, on_findings=lambda group: None) as monitor:
        group = dist.distributed_c10d._get_default_group()
        before = group._get_sequence_number_for_group()
        for _ in range(20):
            model(torch.randn(8, 4))
            monitor.step()
        collectives = group._get_sequence_number_for_group() - before
        monitor.report()
        begin = time.perf_counter()
        monitor.report_of_all_ranks()
        seconds = time.perf_counter() - begin
    Path(folder, str(rank)).write_text(f"{collectives} {seconds} {sent}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
