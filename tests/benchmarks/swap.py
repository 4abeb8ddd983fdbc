"""What a network is worth after BN was swapped: at once, and fine-tuned at batch size 2.

python -m tests.benchmarks.swap                                  a CPU minute or so each time
python -m tests.benchmarks.swap --networks DenseNet,Inception    some of them
python -m tests.benchmarks.swap --results swap.jsonl             go on where an earlier run ended

Every network is trained here with BN, at batch size 32 (the generator at 1). Figures are mean and
worst over seeds, in percent, on 597 digits that no training has seen: accuracy, Dice for the
U-Nets, and the share of the error that the generator removes. Its BN is measured with the
statistics of each batch, the mode that works. No swap is shown a label; "scratch" is, for about
the time of 200 steps. Then every contender is fine-tuned alike: one epoch on all labels at batch
size 2 (the generator at 1), with each of the same learning rates, of which the better one is
chosen on 200 digits kept for that. The last column is the CPU time of a swap with 200 steps over
that of 200 training steps of the swapped network, the median over seeds.

Opacus comes with the extra ``bench``; where it is missing, its column says so.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import bnguard
from bnguard.layers.bn_layer import find_layers
from tests.benchmarks.digit_tasks import SUBJECTS, TEST, VALIDATION, Task

LEARNING_RATES = (1e-4, 1e-3)
STEPS = 200
SAMPLES_PER_STEP = 32

# At once, and fine-tuned; None where a contender is not installed.
Scores = Sequence[float] | None
Contender = Callable[[nn.Module, Task], nn.Module | None]


def with_bn(model: nn.Module, task: Task) -> nn.Module:
    """The network as it was trained, in the mode that works."""
    twin = copy.deepcopy(model)
    if task.batch_size == 1:
        for layer in find_layers(twin):
            layer.module.running_mean = layer.module.running_var = None
    return twin


def naive(model: nn.Module, task: Task) -> nn.Module:
    """Group norm with the affine parameters of BN."""
    return bnguard.swap(model, "group", sample=task.unlabelled()[0]).model


def opacus(model: nn.Module, task: Task) -> nn.Module | None:
    """``ModuleValidator.fix`` of Opacus: group norm with affine parameters of its own."""
    try:
        from opacus.validators import ModuleValidator
    except ImportError:
        return None
    return ModuleValidator.fix(copy.deepcopy(model))


@torch.no_grad()
def moments(model: nn.Module, task: Task) -> nn.Module:
    """Group norm whose gamma and beta, layer by layer, give every channel the moments it had."""
    inputs = torch.cat(task.unlabelled())[:512]
    swapped = naive(model, task).eval()
    for layer in find_layers(model):
        norm = swapped.get_submodule(layer.name)
        std, mean = _moments(model, layer.module, inputs)
        std_now, mean_now = _moments(swapped, norm, inputs)
        gain = std / std_now.clamp(min=1e-6)
        norm.weight.mul_(gain)
        norm.bias.copy_((norm.bias - mean_now) * gain + mean)
    return swapped


def scratch(model: nn.Module, task: Task) -> nn.Module:
    """Group norm, trained anew with labels for about the time of 200 steps."""
    new = naive(model, task)
    for module in new.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return task.train(new, epochs=10, batch_size=task.batch_size, lr=3e-3)


def distilled(model: nn.Module, task: Task, *, steps: int) -> nn.Module:
    """Group norm, fitted and then taught without labels."""
    data = task.unlabelled()
    return bnguard.swap(
        model, "group", teacher_data=data, steps=steps, keep="always", progress=False
    ).model


CONTENDERS: Mapping[str, Contender] = {
    "BN": with_bn,
    "naive": naive,
    "Opacus": opacus,
    "moments": moments,
    "scratch": scratch,
    "0 steps": partial(distilled, steps=0),
    "50 steps": partial(distilled, steps=50),
    "200 steps": partial(distilled, steps=STEPS),
}


def run(name: str, seed: int) -> dict[str, Scores]:
    """Train a network with BN, and score what each contender makes of it."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    subject = SUBJECTS[name]
    task = subject.task()
    model = subject.make()
    model = task.train(model, epochs=subject.epochs, batch_size=task.batch_size, lr=3e-3).eval()
    scores: dict[str, Scores] = {}
    for contender, make in CONTENDERS.items():
        torch.manual_seed(seed)
        made = make(model, task)
        scores[contender] = None if made is None else (task.measure(made, TEST), tuned(made, task))
    scores["time"] = [relative_time(model, task)]
    return scores


def tuned(model: nn.Module, task: Task) -> float:
    """Return the score after an epoch at batch size 2, at the learning rate that suits better."""
    found = []
    for lr in LEARNING_RATES:
        torch.manual_seed(0)
        variant = task.train(
            copy.deepcopy(model), epochs=1, batch_size=min(2, task.batch_size), lr=lr
        )
        found.append((task.measure(variant, VALIDATION), task.measure(variant, TEST)))
    return max(found)[1]


def relative_time(model: nn.Module, task: Task) -> float:
    """Return the CPU time of a swap with 200 steps over that of 200 training steps."""
    plain = copy.deepcopy(distilled(model, task, steps=0)).train()
    optimizer = torch.optim.Adam(plain.parameters(), 1e-4)
    pairs = list(zip(task.inputs[:1000].split(1), task.targets[:1000].split(1), strict=True))
    calls = SAMPLES_PER_STEP // task.batch_size

    def train() -> None:
        for step in range(STEPS):
            optimizer.zero_grad()
            for call in range(calls):
                first = (step * SAMPLES_PER_STEP + call * task.batch_size) % 960
                part = pairs[first : first + task.batch_size]
                inputs, targets = (torch.cat(column) for column in zip(*part, strict=True))
                (task.loss(plain(inputs), targets) / calls).backward()
            optimizer.step()

    start = time.process_time()
    train()
    between = time.process_time()
    distilled(model, task, steps=STEPS)
    return (time.process_time() - between) / (between - start)


def table(results: Mapping[str, Sequence[Mapping[str, Scores]]]) -> Table:
    """Return two lines a network: at once, and fine-tuned."""
    drawn = Table("network", "", *CONTENDERS, "time")
    for name, runs in results.items():
        for index, when in enumerate(("at once", "tuned")):
            cells = [_cell([each[contender] for each in runs], index) for contender in CONTENDERS]
            ratio = statistics.median(each["time"][0] for each in runs if each["time"])
            drawn.add_row(
                *(("", when) if index else (name, when)), *cells, "" if index else f"{ratio:.2f}"
            )
        drawn.add_section()
    return drawn


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", default=",".join(SUBJECTS), help="names, with commas between")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--results", type=Path, help="file to keep results in, and to go on from")
    options = parser.parse_args()
    names = options.networks.split(",")
    done: dict[tuple[str, int], dict[str, Scores]] = {}
    if options.results and options.results.exists():
        for line in options.results.read_text().splitlines():
            name, seed, scores = json.loads(line)
            done[name, seed] = scores
    # The long ones first, so that the processes end together.
    jobs = [(name, seed) for name in reversed(names) for seed in range(options.seeds)]
    missing = [job for job in jobs if job not in done]
    started = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for job, scores in pool.imap_unordered(_run, missing):
            done[job] = scores
            seconds = time.perf_counter() - started
            print(f"{seconds:.0f} s: {' '.join(map(str, job))}  {_line(scores)}", flush=True)
            if options.results:
                with options.results.open("a") as file:
                    file.write(json.dumps([*job, scores]) + "\n")
    by_name = {name: [done[name, seed] for seed in range(options.seeds)] for name in names}
    Console(width=150).print(table(by_name))


def _run(job: tuple[str, int]) -> tuple[tuple[str, int], dict[str, Scores]]:
    return job, run(*job)


def _line(scores: Mapping[str, Scores]) -> str:
    known = {name: found for name, found in scores.items() if found is not None}
    return "  ".join(
        f"{name} {' '.join(f'{each:.4g}' for each in found)}" for name, found in known.items()
    )


def _cell(scores: Iterable[Scores], index: int) -> str:
    """Return the mean and the worst over seeds."""
    known = [each[index] for each in scores if each is not None]
    return f"{statistics.mean(known):.1f} {min(known):.1f}" if known else "not installed"


def _moments(model: nn.Module, module: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return standard deviation and mean of each channel of what a module gives."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda *call: outputs.append(call[2].clone()))
    model(inputs)
    handle.remove()
    values = torch.cat(outputs).transpose(0, 1).flatten(1)
    std, mean = torch.std_mean(values, dim=1)
    return std, mean


if __name__ == "__main__":
    main()
