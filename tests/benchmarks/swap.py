"""What a network is worth after BN was swapped: at once, and fine-tuned at batch size 2.

python -m tests.benchmarks.swap                          about eight minutes on two cores
python -m tests.benchmarks.swap "ResNet-18" --seeds 3    one network, three times

Every network is trained here, with BN at batch size 32. Figures are accuracies on 597 digits that
no training has seen, Dice for the U-Nets, in percent, the mean over seeds. No swap is shown a
label; then every contender is fine-tuned alike: one epoch on all labels at batch size 2, with
each of the same learning rates, of which the better one is chosen on 200 digits kept for that.

Opacus comes with the extra ``bench``; where it is missing, its column says so.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import bnguard
from bnguard.layers.bn_layer import find_layers
from tests.benchmarks.digit_tasks import SUBJECTS, TEST, VALIDATION, Task

LEARNING_RATES = (1e-4, 1e-3)

# At once, and fine-tuned; None where a contender is not installed.
Scores = tuple[float, float] | None
Contender = Callable[[nn.Module, Task], nn.Module | None]


def with_bn(model: nn.Module, task: Task) -> nn.Module:
    """The network as it was trained."""
    return copy.deepcopy(model)


def naive(model: nn.Module, task: Task) -> nn.Module:
    """Group norm with the affine parameters of BN."""
    return bnguard.swap(model, "group", sample=task.unlabelled(64)[0]).model


def opacus(model: nn.Module, task: Task) -> nn.Module | None:
    """``ModuleValidator.fix`` of Opacus: group norm with affine parameters of its own."""
    try:
        from opacus.validators import ModuleValidator
    except ImportError:
        return None
    return ModuleValidator.fix(copy.deepcopy(model))


@torch.no_grad()
def matched(model: nn.Module, task: Task) -> nn.Module:
    """Group norm whose gamma and beta, layer by layer, give every channel the moments it had."""
    inputs = torch.cat(task.unlabelled()[:16])
    swapped = naive(model, task).eval()
    for layer in find_layers(model):
        norm = swapped.get_submodule(layer.name)
        std, mean = _moments(model, layer.module, inputs)
        std_now, mean_now = _moments(swapped, norm, inputs)
        gain = std / std_now.clamp(min=1e-6)
        norm.weight.mul_(gain)
        norm.bias.copy_((norm.bias - mean_now) * gain + mean)
    return swapped


def distilled(steps: int) -> Contender:
    """Group norm, taught without labels."""

    def swap(model: nn.Module, task: Task) -> nn.Module:
        data = task.unlabelled()
        return bnguard.swap(model, "group", teacher_data=data, steps=steps, progress=False).model

    return swap


CONTENDERS: Mapping[str, Contender] = {
    "BN": with_bn,
    "naive": naive,
    "Opacus": opacus,
    "moments": matched,
    "50 steps": distilled(50),
    "200 steps": distilled(200),
    "500 steps": distilled(500),
}


def run(name: str, seed: int) -> tuple[str, dict[str, Scores]]:
    """Train a network with BN, and score what each contender makes of it."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    subject = SUBJECTS[name]
    task = subject.task()
    model = task.train(subject.make(), epochs=subject.epochs, batch_size=32, lr=3e-3).eval()
    scores: dict[str, Scores] = {}
    for contender, make in CONTENDERS.items():
        torch.manual_seed(seed)
        made = make(model, task)
        scores[contender] = None if made is None else (task.measure(made, TEST), tuned(made, task))
    return name, scores


def tuned(model: nn.Module, task: Task) -> float:
    """Return the score after an epoch at batch size 2, at the learning rate that suits better."""
    found = []
    for lr in LEARNING_RATES:
        torch.manual_seed(0)
        variant = task.train(copy.deepcopy(model), epochs=1, batch_size=2, lr=lr)
        found.append((task.measure(variant, VALIDATION), task.measure(variant, TEST)))
    return max(found)[1]


def table(results: Mapping[str, Iterable[Mapping[str, Scores]]]) -> Table:
    """Return two lines a network: at once, and fine-tuned."""
    drawn = Table("network", "", *CONTENDERS)
    for name, runs in results.items():
        for index, when in enumerate(("at once", "tuned")):
            cells = [_mean([each[contender] for each in runs], index) for contender in CONTENDERS]
            drawn.add_row(name if index == 0 else "", when, *cells)
        drawn.add_section()
    return drawn


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", default=list(SUBJECTS), metavar="NETWORK")
    parser.add_argument("--seeds", type=int, default=1, help="the table shows the mean")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    console = Console(width=100)
    started = time.perf_counter()
    results: dict[str, list[dict[str, Scores]]] = defaultdict(list)
    # The long ones first, so that the processes end together.
    jobs = [(name, seed) for name in reversed(options.networks) for seed in range(options.seeds)]
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for name, scores in pool.imap_unordered(_run, jobs):
            results[name].append(scores)
            done = f"{sum(map(len, results.values()))} of {len(jobs)}"
            print(
                f"{done}, {time.perf_counter() - started:.0f} s: {name}  {_line(scores)}",
                flush=True,
            )
    console.print(table({name: results[name] for name in options.networks}))


def _run(job: tuple[str, int]) -> tuple[str, dict[str, Scores]]:
    return run(*job)


def _line(scores: Mapping[str, Scores]) -> str:
    known = {name: found for name, found in scores.items() if found is not None}
    return "  ".join(f"{name} {once:.1f} {tuned:.1f}" for name, (once, tuned) in known.items())


def _mean(scores: Iterable[Scores], index: int) -> str:
    known = [each[index] for each in scores if each is not None]
    return f"{statistics.mean(known):.1f}" if known else "not installed"


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
