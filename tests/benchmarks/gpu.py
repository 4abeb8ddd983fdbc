"""What bnguard costs on a GPU: ``python -m tests.benchmarks.gpu``, under ten minutes.

Runs the tests for CUDA first, then measures a watched step of ResNet-50 in several settings, looks
for synchronisation in a step, times exact recalibration against a plain forward and fvcore, and
restores poisoned statistics under ``GradScaler``. Needs a CUDA device.
"""

from __future__ import annotations

import copy
import logging
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

import bnguard
from tests.benchmarks.networks import resnet50
from tests.benchmarks.recalibration import METHODS, plain_forward

Step = Callable[[], object]


def main() -> None:
    """Print the tables; one line if there is no CUDA device."""
    if not torch.cuda.is_available():
        sys.exit("tests.benchmarks.gpu needs a CUDA device, and torch sees none here")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "tests/observe/test_cuda.py"]
    print(f"tests for CUDA: exit status {subprocess.run(command, check=False).returncode}")
    images = torch.randn(64, 3, 224, 224, device="cuda")
    for name, setting in SETTINGS.items():
        print(f"{name:34} {setting(resnet50().cuda(), images)}", flush=True)
    print(f"synchronisation in a step: {synchronisation(resnet50().cuda(), images)}", flush=True)
    recalibration_table(resnet50().cuda(), samples=4096)
    print(f"poisoned under GradScaler: {restored_channels(images)}")


def watched_ratio(
    model: nn.Module,
    images: Tensor,
    *,
    dtype: torch.dtype | None = None,
    compiles: bool = False,
    rounds: int = 15,
) -> str:
    """Return the time of a watched step over that of an unwatched one, and of a second unwatched.

    Args:
        model: The model.
        images: The batch.
        dtype: The type of autocast; None without.
        compiles: Whether the models are compiled.
        rounds: Rounds of three steps each, in turns.
    """

    def step_of(subject: nn.Module, monitor: bnguard.Monitor | None) -> Step:
        run = torch.compile(subject) if compiles else subject
        optimizer = torch.optim.SGD(subject.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler("cuda", enabled=dtype is torch.float16)

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype) if dtype else nullcontext():
                loss = run(images).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if monitor is not None:
                monitor.step()

        return step

    watched = copy.deepcopy(model)
    monitor = bnguard.watch(watched, max_overhead=0.0, on_findings=lambda group: None)
    steps = [step_of(copy.deepcopy(model), None), step_of(model, None), step_of(watched, monitor)]
    times = [seconds_of(steps, repeats=3) for _ in range(rounds + 3)][3:]
    monitor.close()
    base = statistics.median(first for first, _, _ in times)
    ratios = [statistics.median(row[place] / row[0] for row in times) for place in (1, 2)]
    return f"{1e3 * base:.1f} ms, again {ratios[0]:.3f}, bnguard {ratios[1]:.3f}"


def graphed_ratio(model: nn.Module, images: Tensor, rounds: int = 15) -> str:
    """Return the time of a replayed CUDA graph of a forward, with and without reading it."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(images)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(images)
    monitor = bnguard.watch(model, max_overhead=0.0, on_findings=lambda group: None)

    def watched() -> None:
        graph.replay()
        monitor.step()

    times = [seconds_of([graph.replay, watched], repeats=3) for _ in range(rounds + 3)][3:]
    seen = {layer.updates_seen for layer in monitor.report().layers}
    monitor.close()
    ratio = statistics.median(with_ / without for without, with_ in times)
    return f"bnguard {ratio:.3f}, updates seen {seen}"


SETTINGS: dict[str, Callable[[nn.Module, Tensor], str]] = {
    "float32": watched_ratio,
    "float16": lambda model, images: watched_ratio(model, images, dtype=torch.float16),
    "bfloat16": lambda model, images: watched_ratio(model, images, dtype=torch.bfloat16),
    "bfloat16, channels_last": lambda model, images: watched_ratio(
        model.to(memory_format=torch.channels_last),
        images.contiguous(memory_format=torch.channels_last),
        dtype=torch.bfloat16,
    ),
    "bfloat16, torch.compile": lambda model, images: watched_ratio(
        model, images, dtype=torch.bfloat16, compiles=True
    ),
    "CUDA graph of a forward": graphed_ratio,
}


def seconds_of(steps: list[Step], repeats: int) -> list[float]:
    """Return the seconds of some runs of each step, the device's work included."""
    seconds = []
    for step in steps:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - begin) / repeats)
    return seconds


def synchronisation(model: nn.Module, images: Tensor) -> str:
    """Return what waited for the device in 40 watched steps between two runs of the rules."""
    with bnguard.watch(
        model, every_n_steps=1000, max_overhead=0.0, on_findings=lambda group: None
    ) as monitor:
        for _ in range(3):
            model(images).sum().backward()
            monitor.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(40):
                model(images).sum().backward()
                monitor.step()
        except RuntimeError as error:
            return f"FOUND: {error}"
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return "none in 40 steps"


def recalibration_table(model: nn.Module, samples: int) -> None:
    """Print the time of each method by that of a plain forward, the median of three."""
    batches = [torch.randn(64, 3, 224, 224, device="cuda") for _ in range(samples // 64)]
    print(f"recalibration of {samples} images, time over a plain forward:")
    subjects = {"plain": plain_forward, **METHODS}
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(4):
        for name, method in subjects.items():
            subject = copy.deepcopy(model)
            run = seconds_of([lambda: method(subject, batches)], repeats=1)  # noqa: B023
            times[name] += run
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds[1:], times["plain"][1:], strict=True)]
        print(f"  {name:12} {statistics.median(ratios):.2f}  ({seconds[-1]:.2f} s)", flush=True)


def restored_channels(images: Tensor) -> str:
    """Return what became of the statistics after a batch with NaN under a gradient scaler."""
    model = resnet50().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    scaler = torch.amp.GradScaler("cuda")
    with bnguard.watch(model, restore_poisoned=True, on_findings=lambda group: None) as monitor:
        for step in range(6):
            batch = images.clone()
            if step == 3:
                batch[0] = torch.nan
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.float16):
                loss = model(batch).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            monitor.step()
        layers = monitor.report().layers
    bad = sum(bool(layer.running and layer.running.bad_channels) for layer in layers)
    restored = sum(layer.restored_updates > 0 for layer in layers)
    steps = {layer.poisoned_step for layer in layers}
    return f"{restored} of {len(layers)} layers restored at step {steps}, {bad} still not finite"


if __name__ == "__main__":
    main()
