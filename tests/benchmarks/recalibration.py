"""Recalibration against its peers: ``python -m tests.benchmarks.recalibration``.

Error is the distance from float64 statistics of the whole set in eval mode: the largest shift of
a mean in standard deviations, and the largest log-variance ratio, over all channels. Time is that
of a call by that of a plain eval-mode forward over the same batches, the median over rounds in
which all take turns. Memory is what the process holds at most beyond what it held before.

The first network runs in every setting; the others at the largest batch size, in random order,
where time is of interest and a setting takes several rounds.

fvcore is ``pip install fvcore``; its column is left out where it is missing. On a machine that
does other things at the same time, ``--busy`` runs on one thread and counts processor time.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import bnguard
from bnguard.layers.bn_layer import find_layers
from tests.benchmarks.networks import mobilenet_v2, resnet18, resnet50
from tests.benchmarks.truth import Truth, distance

Method = Callable[[nn.Module, Sequence[Tensor]], object]

NETWORKS: Mapping[str, Callable[[], nn.Module]] = {
    "ResNet-18": resnet18,
    "ResNet-50": resnet50,
    "MobileNetV2": mobilenet_v2,
}
LOADERS = ("random", "sorted")
BATCH_SIZES = (1, 2, 8, 32)
_CLASSES = 10


def plain_forward(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """What every time is divided by."""
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(batch)


def exact(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """The default method."""
    samples = sum(map(len, batches))
    bnguard.recalibrate(model.eval(), batches, samples=samples, progress=False)


def precise(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """The method that holds one batch at a time."""
    samples = sum(map(len, batches))
    bnguard.recalibrate(model.eval(), batches, samples=samples, method="precise", progress=False)


def swa_update(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """``torch.optim.swa_utils.update_bn``."""
    update_bn(batches, model)


METHODS: dict[str, Method] = {"exact": exact, "precise": precise, "update_bn": swa_update}

with suppress(ImportError):
    from fvcore.nn.precise_bn import update_bn_stats

    def fvcore(model: nn.Module, batches: Sequence[Tensor]) -> None:
        """``fvcore.nn.precise_bn.update_bn_stats``."""
        update_bn_stats(model.train(), batches, num_iters=len(batches))

    METHODS["fvcore"] = fvcore


def images(samples: int, size: int) -> tuple[Tensor, Tensor]:
    """Return coloured noise in an order that is random, and its classes.

    Classes differ in brightness, contrast and colour, as classes of photographs do.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(_CLASSES, (samples,), generator=generator)
    offsets = torch.randn(_CLASSES, 3, 1, 1, generator=generator)
    contrasts = torch.rand(_CLASSES, 1, 1, 1, generator=generator) + 0.5
    coarse = torch.randn(samples, 3, size // 4, size // 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    return smooth * contrasts[labels] + offsets[labels], labels


def true_statistics(model: nn.Module, values: Tensor) -> Truth:
    """Return what each layer's statistics should be, from one giant batch in float64."""
    model = copy.deepcopy(model).double().eval()
    truth: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for layer in find_layers(model):

        def settle(module: nn.Module, args: tuple[Tensor], layer=layer) -> None:
            var, mean = torch.var_mean(args[0], (0, 2, 3))
            truth[layer.name] = mean.numpy(), var.numpy()
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(var)

        layer.module.register_forward_pre_hook(settle)
    with torch.no_grad():
        model(values.double())
    return truth


def measured(
    network: str,
    loader: str,
    batch_size: int,
    rounds: int,
    subject: Subject,
    options: argparse.Namespace,
) -> Iterator[tuple[str, ...]]:
    """Yield a row for each method."""
    model, values = subject.model, subject.values
    if loader == "sorted":
        values = values[subject.labels.argsort(stable=True)]
    batches = values.split(batch_size)
    clock = time.process_time if options.busy else time.perf_counter
    ratios: dict[str, list[float]] = {name: [] for name in METHODS}
    peaks, models = dict.fromkeys(METHODS, 0.0), {}
    plain_forward(model, batches[: len(batches) // 4])  # To warm up.
    for _ in range(rounds):
        begin = clock()
        plain_forward(model, batches)
        plain = clock() - begin
        for name, method in METHODS.items():
            models[name] = copy.deepcopy(model)
            with peak_memory() as peak:
                begin = clock()
                method(models[name], batches)
                ratios[name].append((clock() - begin) / plain)
            peaks[name] = max(peaks[name], peak[0])
    for name in METHODS:
        found = {
            layer.name: (layer.running_mean.double().numpy(), layer.running_var.double().numpy())
            for layer in find_layers(models[name])
        }
        shift, ratio = distance(found, subject.truth)
        yield (
            network,
            loader,
            str(batch_size),
            name,
            f"{shift:.2g}",
            f"{ratio:.2g}",
            f"{statistics.median(ratios[name]):.2f}",
            f"{peaks[name]:,.0f}",
        )


@dataclass(frozen=True, eq=False)
class Subject:
    """A network, what it is calibrated on, and what should come of it in whatever order."""

    model: nn.Module
    values: Tensor
    labels: Tensor
    truth: Truth


def subject_of(network: str, options: argparse.Namespace) -> Subject:
    """Return a network with random weights, and its truth."""
    torch.manual_seed(0)
    model = trained_looking(NETWORKS[network]())
    values, labels = images(options.samples, options.size)
    return Subject(model, values, labels, true_statistics(model, values))


def trained_looking(model: nn.Module) -> nn.Module:
    """Give BN layers affine parameters that are not all alike."""
    for layer in find_layers(model):
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.normal_(layer.bias, 0.0, 0.3)
    return model


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Measure how many MiB the process holds at most beyond what it held before (Linux)."""
    peak = [0.0]
    Path("/proc/self/clear_refs").write_text("5")  # Begin a new peak.
    before = _held("VmRSS")
    yield peak
    peak[0] = (_held("VmHWM") - before) / 1024


def _held(what: str) -> int:
    match = re.search(rf"{what}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(match[1]) if match else 0


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--loaders", nargs="+", default=LOADERS, choices=LOADERS)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=BATCH_SIZES)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--size", type=int, default=96, help="height and width in pixels")
    parser.add_argument("--rounds", type=int, default=3, help="at the largest batch size")
    parser.add_argument("--busy", action="store_true", help="one thread, processor time")
    options = parser.parse_args()
    if options.busy:
        torch.set_num_threads(1)
    table = Table(box=None, pad_edge=False)
    for heading in ("network", "loader", "batch", "method"):
        table.add_column(heading)
    for heading in ("shift, σ", "log var ratio", "time", "MiB"):
        table.add_column(heading, justify="right")
    first, largest = options.networks[0], max(options.batch_sizes)
    for network in options.networks:
        subject = subject_of(network, options)
        for loader, batch_size in itertools.product(options.loaders, options.batch_sizes):
            is_timed = batch_size == largest and loader == options.loaders[0]
            if network != first and not is_timed:
                continue
            rounds = options.rounds if is_timed else 1
            for row in measured(network, loader, batch_size, rounds, subject, options):
                table.add_row(*row)
            table.add_section()
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
