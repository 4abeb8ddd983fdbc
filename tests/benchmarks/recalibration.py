"""Recalibration against its peers: ``python -m tests.benchmarks.recalibration``.

Time is that of a call by that of a plain eval-mode forward over the same batches, the median over
rounds in which all take turns. `recalibrate` also measures the mode gap on 32 to 64 samples before
and after; its time without that stands in a row of its own. Memory is what the process holds at
most beyond what it held before, by that of one plain forward over all samples joined. Error is the
distance from float64 statistics of the whole set in eval mode: the largest shift of a mean in
standard deviations, and the largest log-variance ratio, over all channels.

In the last rows every image has another size, so that nothing can be joined; memory is by that of
the plain forwards.

fvcore is ``pip install fvcore``; its rows are left out where it is missing. On a machine that does
other things at the same time, ``--busy`` runs on one thread and counts processor time.
"""

from __future__ import annotations

import argparse
import copy
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import bnguard
from bnguard.layers.bn_layer import find_layers
from bnguard.recalibration import api
from tests.benchmarks.networks import mobilenet_v2, resnet18, resnet50
from tests.benchmarks.truth import Truth, distance

Method = Callable[[nn.Module, Sequence[Tensor]], object]

NETWORKS: Mapping[str, Callable[[], nn.Module]] = {
    "ResNet-18": resnet18,
    "ResNet-50": resnet50,
    "MobileNetV2": mobilenet_v2,
}
# Number of images, and height and width in pixels.
SETS = ((128, 96), (1024, 32))
BATCH_SIZES = (32, 2)
_IMAGES_OF_ANY_SIZE = 256
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


def swa_update(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """``torch.optim.swa_utils.update_bn``."""
    update_bn(batches, model)


METHODS: dict[str, Method] = {"recalibrate": exact, "update_bn": swa_update}

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


def images_of_any_size() -> list[Tensor]:
    """Return single images, each of another size, from 36 × 36 to 96 × 96 pixels."""
    values, _ = images(_IMAGES_OF_ANY_SIZE, 96)
    return [
        values[index : index + 1, :, : 36 + 4 * (index // 16), : 36 + 4 * (index % 16)].contiguous()
        for index in range(_IMAGES_OF_ANY_SIZE)
    ]


def true_statistics(model: nn.Module, values: Tensor) -> Truth:
    """Return what each layer's statistics should be, from one giant batch in float64."""
    model = copy.deepcopy(model).double().eval()
    truth = {}
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


@dataclass
class Figures:
    """What the rounds of a method gave: times by that of a plain forward, and MiB."""

    times: list[float] = field(default_factory=list)
    without_gap: list[float] = field(default_factory=list)
    peak: float = 0.0


def measure(
    model: nn.Module, batches: Sequence[Tensor], options: argparse.Namespace
) -> tuple[dict[str, Figures], dict[str, nn.Module]]:
    """Return the figures of each method in turn, and its model in the end."""
    clock = time.process_time if options.busy else time.perf_counter
    figures, models = {name: Figures() for name in METHODS}, {}
    plain_forward(model, batches[: 1 + len(batches) // 4])  # To warm up.
    for _ in range(options.rounds):
        begin = clock()
        plain_forward(model, batches)
        plain = clock() - begin
        for name, method in METHODS.items():
            models[name], gap = copy.deepcopy(model), 0.0

            def measure_gap(*args: object, original=api._measure_mode_gap) -> object:
                nonlocal gap
                begin = clock()
                try:
                    return original(*args)
                finally:
                    gap += clock() - begin

            with patch.object(api, "_measure_mode_gap", measure_gap), peak_memory() as peak:
                begin = clock()
                method(models[name], batches)
                seconds = clock() - begin
            figures[name].times.append(seconds / plain)
            figures[name].without_gap.append((seconds - gap) / plain)
            figures[name].peak = max(figures[name].peak, peak[0])
    return figures, models


def rows_of(
    network: str, samples: int, batch_size: int, options: argparse.Namespace
) -> Iterator[tuple[str, ...]]:
    """Yield the rows of a setting; a size of 0 stands for images of any size."""
    torch.manual_seed(0)
    model = trained_looking(NETWORKS[network]())
    truth = None
    if batch_size:
        values, _ = images(samples, dict(SETS)[samples])
        batches: Sequence[Tensor] = values.split(batch_size)
        truth = true_statistics(model, values)
        with peak_memory() as plain_peak:
            plain_forward(model, [values])
    else:
        batches = images_of_any_size()
    figures, models = measure(model, batches, options)
    for name, found in figures.items():
        row = (
            network,
            str(samples),
            str(batch_size or "any size"),
            name,
            f"{median(found.times):.2f}",
            f"{found.peak:,.0f}",
        )
        if truth is None:
            yield row
        else:
            errors = distance(statistics(models[name]), truth)
            yield (*row, f"{found.peak / plain_peak[0]:.2f}", *(f"{error:.2g}" for error in errors))
        if median(found.without_gap) < median(found.times):
            yield ("", "", "", "  without the gap", f"{median(found.without_gap):.2f}")


def statistics(model: nn.Module) -> Truth:
    """Return the running statistics of each layer in float64."""
    return {
        layer.name: (layer.running_mean.double().numpy(), layer.running_var.double().numpy())
        for layer in find_layers(model)
    }


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
    parser.add_argument("--samples", nargs="+", type=int, default=[count for count, _ in SETS])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=BATCH_SIZES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy", action="store_true", help="one thread, processor time")
    options = parser.parse_args()
    if options.busy:
        torch.set_num_threads(1)
    table = Table(box=None, pad_edge=False)
    for heading in ("network", "samples", "batch", "method"):
        table.add_column(heading)
    for heading in ("time", "MiB", "by plain", "shift, σ", "log var ratio"):
        table.add_column(heading, justify="right")
    settings = [
        (network, samples, batch_size)
        for network in options.networks
        for samples in options.samples
        for batch_size in options.batch_sizes
    ]
    for setting in [*settings, (options.networks[0], _IMAGES_OF_ANY_SIZE, 0)]:
        for row in rows_of(*setting, options):
            table.add_row(*row)
        table.add_section()
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
