"""What watching costs: ``python -m tests.benchmarks.overhead``, about fifteen minutes.

Every column trains a copy of its own, the copies take turns step by step in an order that is drawn
for each round, and a cell is the median over the rounds of the time of a watched step by that of
the unwatched step of the same round. The column "again" is a second unwatched copy: how far it is
from 1 is what the machine adds. The table ``runs`` has whole trainings instead, with validation,
all checks and the report: ``--table runs`` takes five minutes. On a machine that does other things
at the same time, ``--busy`` runs on one thread and counts its processor time instead of the time on
the clock.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import itertools
import logging
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import bnguard
from bnguard.layers.bn_layer import find_layers
from bnguard.observe.batch_statistics import BatchProbe
from tests.benchmarks.networks import perceptron, resnet18, resnet50, volumetric

Step = Callable[[], object]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Setting:
    """A network and the batch that it trains on."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    steps_a_round: int = 1


SETTINGS = (
    Setting("ResNet-18, 16×3×64×64", resnet18, (16, 3, 64, 64)),
    Setting("ResNet-50, 8×3×64×64", resnet50, (8, 3, 64, 64)),
    Setting("3-D blocks, 2×1×32×32×32", volumetric, (2, 1, 32, 32, 32)),
    Setting("MLP, 128×320", perceptron, (128, 320), steps_a_round=5),
)


class Training:
    """A model, its optimizer, and one batch that it is trained on again and again."""

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        self.inputs = inputs

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.model(self.inputs).square().mean().backward()
        self.optimizer.step()


@contextmanager
def unwatched(training: Training) -> Iterator[Step]:
    yield training.step


@contextmanager
def with_bnguard(training: Training) -> Iterator[Step]:
    def step() -> None:
        training.step()
        monitor.step()

    with bnguard.watch(training.model, max_overhead=0.0, on_findings=lambda group: None) as monitor:
        yield step


@contextmanager
def with_naive_hooks(training: Training) -> Iterator[Step]:
    """Mean, variance and a finite check of every input, as tutorials do it."""
    seen: dict[nn.Module, tuple[Tensor, Tensor, bool]] = {}

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        values = args[0].detach()
        dims = [0, *range(2, values.dim())]
        seen[module] = (*torch.var_mean(values, dims), bool(values.isfinite().all()))

    with hooked(training.model, lambda module: module.register_forward_pre_hook(look)):
        yield training.step


@contextmanager
def with_autograd_nodes(training: Training) -> Iterator[Step]:
    """What the autograd node saved of every batch, and a finite check of that."""
    seen: dict[nn.Module, tuple[Tensor, Tensor, bool]] = {}

    def look(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        mean, deviation = output.grad_fn._saved_result1, output.grad_fn._saved_result2
        seen[module] = (mean, deviation, bool((mean + deviation).isfinite().all()))

    with hooked(training.model, lambda module: module.register_forward_hook(look)):
        yield training.step


@contextmanager
def with_detect_anomaly(training: Training) -> Iterator[Step]:
    def step() -> None:
        with torch.autograd.detect_anomaly():
            training.step()

    yield step


@contextmanager
def with_torch_audit(training: Training, **options: int) -> Iterator[Step]:
    from torch_audit import audit_dynamic

    def step() -> None:
        training.optimizer.zero_grad(set_to_none=True)
        auditor.backward(auditor.forward(training.inputs).square().mean())
        auditor.optimizer_step()

    with audit_dynamic(training.model, optimizer=training.optimizer, **options) as auditor:
        yield step


@contextmanager
def with_torch_audit_every_step(training: Training) -> Iterator[Step]:
    with with_torch_audit(training, every_n_steps=1) as step:
        yield step


@contextmanager
def hooked(model: nn.Module, register: Callable[[nn.Module], object]) -> Iterator[None]:
    handles = [register(layer.module) for layer in find_layers(model)]
    yield
    for handle in handles:
        handle.remove()


Watcher = Callable[[Training], AbstractContextManager[Step]]
ALONE: dict[str, Watcher] = {"unwatched": unwatched, "again": unwatched, "bnguard": with_bnguard}
PEERS: dict[str, Watcher] = {
    "naive hooks": with_naive_hooks,
    "autograd node": with_autograd_nodes,
    "detect_anomaly": with_detect_anomaly,
}
AUDIT: dict[str, Watcher] = {
    "torch-audit": with_torch_audit,
    "… every step": with_torch_audit_every_step,
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="rounds a table, 40 by default")
    parser.add_argument("--only", default="", help="the settings whose name contains this")
    parser.add_argument("--alone", action="store_true", help="bnguard alone, without its peers")
    parser.add_argument(
        "--table",
        choices=["steps", "runs", "rules", "compiled", "validation", "growth", "memory"],
        action="append",
        help="a table to print; all by default",
    )
    parser.add_argument("--busy", action="store_true", help="one thread, in processor time")
    options = parser.parse_args()
    clock: Clock = time.perf_counter
    if options.busy:
        torch.set_num_threads(1)
        clock = time.thread_time
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    chosen = [setting for setting in SETTINGS if options.only in setting.name]
    columns = ALONE if options.alone else {**ALONE, **PEERS, **_installed(AUDIT)}
    tables = {
        "steps": lambda: steps_table("A training step", chosen, columns, options.rounds, clock),
        "runs": runs_table,
        "rules": lambda: rules_table(chosen, clock),
        "compiled": lambda: steps_table(
            "A training step under torch.compile",
            chosen,
            ALONE,
            options.rounds,
            clock,
            torch.compile,
        ),
        "validation": lambda: validation_table(chosen[:1], 200, clock),
        "growth": lambda: growth_table(options.rounds, clock),
        "memory": lambda: memory_table(chosen),
    }
    for name in options.table or tables:
        tables[name]()


def steps_table(
    title: str,
    settings: list[Setting],
    watchers: Mapping[str, Watcher],
    rounds: int,
    clock: Clock,
    compiled: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> None:
    """Print the ratios of a watched step to an unwatched one."""
    names = [name for name in watchers if name != "unwatched"]
    print(f"\n{title}: ratio to the same step unwatched, medians of {rounds} rounds")
    print(_row("", ["unwatched", *names]))
    for setting in settings:
        model = setting.build()
        inputs = torch.randn(setting.shape)
        with ExitStack() as stack:
            steps = {
                name: stack.enter_context(watcher(Training(compiled(copy.deepcopy(model)), inputs)))
                for name, watcher in watchers.items()
            }
            times = interleaved(steps, rounds, setting.steps_a_round, clock)
        base = times["unwatched"]
        cells = [f"{statistics.median(base) * 1e3:.2f} ms"]
        for name in names:
            ratios = [watched / plain for watched, plain in zip(times[name], base, strict=True)]
            cells.append(f"{statistics.median(ratios):.3f}")
        print(_row(setting.name, cells), flush=True)


def interleaved(
    steps: Mapping[str, Step], rounds: int, steps_a_round: int, clock: Clock
) -> dict[str, list[float]]:
    """Return the seconds of a step, a value a round."""
    names = list(steps)
    draw = random.Random(0)
    for name in names:
        for _ in range(3):
            steps[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in draw.sample(names, len(names)):
            begin = clock()
            for _ in range(steps_a_round):
                steps[name]()
            times[name].append((clock() - begin) / steps_a_round)
    return times


def small_network(width: int) -> nn.Module:
    """Return six convolutions with BN, whose training step takes one to three milliseconds."""
    layers: list[nn.Module] = []
    for channels in (1, *[width] * 5):
        layers += [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)]
        layers += [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


STEPS_OF_EPOCH, VALIDATION_BATCHES = 50, 10


def plain_run(width: int, batch: int, steps: int, *, is_watched: bool) -> None:
    """Train in a loop, with validation after each epoch."""
    model, inputs = small_network(width), torch.randn(batch, 1, 8, 8)
    training = Training(model, inputs)
    monitor = None
    if is_watched:
        monitor = bnguard.watch(model, optimizer=training.optimizer, on_findings=lambda group: None)
    for step in range(1, steps + 1):
        training.step()
        if step % STEPS_OF_EPOCH == 0:
            model.eval()
            with torch.no_grad():
                for _ in range(VALIDATION_BATCHES):
                    model(inputs)
            model.train()
    if monitor is not None:
        monitor.report()
        monitor.close()


def lightning_run(width: int, batch: int, steps: int, *, is_watched: bool) -> None:
    """Train with Lightning, with validation after each epoch."""
    from pytorch_lightning import LightningModule, Trainer
    from torch.utils.data import DataLoader

    from bnguard.lightning import BatchNormMonitor

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = small_network(width)

        def training_step(self, images: Tensor) -> Tensor:
            return self.network(images).square().mean()

        def validation_step(self, images: Tensor) -> None:
            self.network(images)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)

    trainer = Trainer(
        max_epochs=steps // STEPS_OF_EPOCH,
        accelerator="cpu",
        callbacks=[BatchNormMonitor(report="none", strict=True)] if is_watched else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    images = torch.randn(batch * STEPS_OF_EPOCH, 1, 8, 8)
    trainer.fit(
        Module(),
        DataLoader(images, batch),
        DataLoader(images[: batch * VALIDATION_BATCHES], batch),
    )


def runs_table() -> None:
    """Print the ratios of whole trainings, as medians of more of the short ones."""
    print("\nA whole training: ratio to the same unwatched, processor time and time on the clock")
    print(_row("", ["unwatched", "again cpu", "again clock", "bnguard cpu", "bnguard clock"]))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for run in (plain_run, lightning_run):
            run(8, 2, STEPS_OF_EPOCH, is_watched=True)
    draw = random.Random(0)
    for name, run in (("plain", plain_run), ("Lightning", lightning_run)):
        for width, batch, steps in itertools.product((8, 32), (2, 64), (100, 600, 2400)):
            times: dict[str, list[tuple[float, float]]] = {}
            columns = ["unwatched", "again", "bnguard"]
            for _ in range(max(1, 800 // steps)):
                for column in draw.sample(columns, len(columns)):
                    cpu, clock = time.process_time(), time.perf_counter()
                    with contextlib.redirect_stdout(io.StringIO()):
                        run(width, batch, steps, is_watched=column == "bnguard")
                    spent = time.process_time() - cpu, time.perf_counter() - clock
                    times.setdefault(column, []).append(spent)
            base = times["unwatched"]
            cells = [f"{statistics.median(clock for _, clock in base):.2f} s"]
            for column in columns[1:]:
                for which in (0, 1):
                    ratios = [
                        spent[which] / plain[which]
                        for spent, plain in zip(times[column], base, strict=True)
                    ]
                    cells.append(f"{statistics.median(ratios):.3f}")
            print(_row(f"{name} {steps} × {batch}, width {width}", cells), flush=True)


def rules_table(settings: list[Setting], clock: Clock) -> None:
    """Print what a run of all rules costs, which is not in the median of the steps."""
    print("\nA run of all rules, by default after every 50 steps")
    print(_row("", ["one run", "of 50 steps"]))
    for setting in settings:
        training = Training(setting.build(), torch.randn(setting.shape))
        steps, runs = [], []
        with bnguard.watch(training.model, on_findings=lambda group: None) as monitor:
            for _ in range(10):
                begin = clock()
                training.step()
                middle = clock()
                monitor.step()
                before = clock()
                monitor.check()
                steps.append(middle - begin)
                runs.append(clock() - before)
        run, step = statistics.median(runs), statistics.median(steps)
        cells = [f"{run * 1e3:.1f} ms", f"{run / (50 * step):.2%}"]
        print(_row(setting.name, cells), flush=True)


def validation_table(settings: list[Setting], batches: int, clock: Clock) -> None:
    """Print the ratio of a watched validation pass to an unwatched one."""
    print(f"\nA validation pass of {batches} batches: ratio to the same pass unwatched")
    print(_row("", ["unwatched", "again", "bnguard"]))
    for setting in settings:
        model = setting.build().eval()
        inputs = torch.randn(setting.shape)

        @torch.no_grad()
        def pass_(model: nn.Module = model, inputs: Tensor = inputs) -> None:
            for _ in range(batches):
                model(inputs)

        def watched(model: nn.Module = model, run: Step = pass_) -> None:
            with (
                bnguard.watch(model, on_findings=lambda group: None) as monitor,
                monitor.evaluation(),
            ):
                run()

        passes = {"unwatched": pass_, "again": pass_, "bnguard": watched}
        times = {name: [] for name in passes}
        for _ in range(5):
            for name, run in passes.items():
                begin = clock()
                run()
                times[name].append(clock() - begin)
        base = times["unwatched"]
        cells = [f"{statistics.median(base):.2f} s"]
        for name in ("again", "bnguard"):
            ratios = [watched / plain for watched, plain in zip(times[name], base, strict=True)]
            cells.append(f"{statistics.median(ratios):.3f}")
        print(_row(setting.name, cells), flush=True)


def growth_table(rounds: int, clock: Clock) -> None:
    """Print what reading the buffers costs over numbers of layers and of channels."""
    print("\nReading the buffers of a step, µs, and the copy of the buffers alone")
    print(_row("layers × channels", ["read", "copy"]))
    for layers, channels in [
        *[(layers, 64) for layers in (10, 50, 200, 1000)],
        *[(20, channels) for channels in (16, 64, 256, 1024, 4096)],
    ]:
        model = nn.ModuleList([nn.BatchNorm1d(channels) for _ in range(layers)])
        probe = BatchProbe(find_layers(model))
        buffers = [b for module in model for b in (module.running_mean, module.running_var)]
        counters = [module.num_batches_tracked for module in model]
        reads, copies = [], []
        for round_ in range(rounds):
            for module in model:
                module.num_batches_tracked += 1
                module.running_mean.add_(0.01)
            begin = clock()
            # The arithmetic is done every third step: three reads hold a whole turn.
            for _ in range(3):
                probe.read(round_)
            middle = clock()
            for _ in range(3):
                torch.cat(buffers)
                torch.stack(counters)
            reads.append((middle - begin) / 3)
            copies.append((clock() - middle) / 3)
        cells = [f"{statistics.median(column) * 1e6:.0f}" for column in (reads, copies)]
        print(_row(f"{layers} × {channels}", cells), flush=True)


def memory_table(settings: list[Setting]) -> None:
    """Print the tensors that a monitor holds, in float32 vectors of all channels."""
    print("\nMemory of a monitor, in float32 vectors of the total channel count, the most seen")
    for setting in settings:
        training = Training(setting.build(), torch.randn(setting.shape))
        channels = sum(layer.channels for layer in find_layers(training.model))
        with bnguard.watch(training.model, on_findings=lambda group: None) as monitor:
            most = 0.0
            for _ in range(4):
                training.step()
                monitor.step()
                most = max(most, held_bytes(monitor) / (4 * channels))
        print(_row(setting.name, [f"{most:.1f}", f"{channels} channels"]), flush=True)


def held_bytes(monitor: bnguard.Monitor) -> int:
    """Return the bytes of the tensors that a monitor holds and the model does not."""
    model = monitor._observer.model
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    seen: set[int] = {id(model)}
    storages: dict[int, int] = {}
    waiting: list[object] = [monitor._observer]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, (nn.Module, torch.optim.Optimizer)):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, (list, tuple, set)):
            waiting.extend(value)
        elif type(value).__module__.startswith("bnguard.") and hasattr(value, "__dict__"):
            waiting.extend(vars(value).values())
    return sum(size for place, size in storages.items() if place not in own)


def _installed(watchers: dict[str, Watcher]) -> dict[str, Watcher]:
    try:
        import torch_audit  # noqa: F401
    except ImportError:
        print("torch-audit is not installed (extra `bench`): its columns are left out")
        return {}
    return watchers


def _row(name: str, cells: list[str]) -> str:
    return f"{name:32}" + "".join(f"{cell:>16}" for cell in cells)


if __name__ == "__main__":
    main()
