"""``bnguard swap``."""

from __future__ import annotations

from pathlib import Path

import rich
import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import nn

from bnguard.checkpoint import Checkpoint, name_beside, publishing
from bnguard.cli.devices import usable_device
from bnguard.cli.loading import SUBJECTS_HELP, WEIGHTS_HELP, asks_for_help, requested
from bnguard.cli.parsing import command_parser
from bnguard.cli.scoring import Scorer, has_validation
from bnguard.cli.subjects import Data
from bnguard.errors import CheckpointError, ConfigurationError
from bnguard.fixes.swap import swap
from bnguard.fixes.swapped import Swap
from bnguard.fixes.targets import DEFAULT_GROUPS, TARGETS
from bnguard.version import __version__

_EXAMPLES = """
examples:
  bnguard swap last.ckpt --to group --model my.LitModel --data my.DataModule
  bnguard swap lightning_logs/version_0/checkpoints/last.ckpt --to batch-renorm
"""


def run(arguments: list[str]) -> int:
    """Write a checkpoint of the model with another norm, and print the lines that build it."""
    parser = _parser()
    if asks_for_help(arguments):
        parser.parse_args(["--help"])
    request = requested(parser, arguments, "swap")
    checkpoint, values = request.checkpoint, request.values
    source = checkpoint.path
    output = _output(source, values)
    device = usable_device(values.device)
    model, _ = request.model()
    data = request.data(model)
    result = _swapped(model, data, device, values)
    scores = _scores(model, result.model, data, device, values)
    _write(result, checkpoint, source, output, force=values.force)

    rich.print(result)
    if scores is not None:
        print(scores)
    print(f"written: {output}, without optimizer states; the model that it fits:\n")
    print(_recipe(result, request.subjects["model"].path, output))
    return 0


def _parser() -> ArgumentParser:
    parser = command_parser(
        "swap",
        "Swap BN for another norm, let the network learn what it knew, and write a "
        "checkpoint of the swapped model beside the one given.",
        SUBJECTS_HELP + _EXAMPLES,
    )
    parser.add_argument("checkpoint", type=str, help="checkpoint to read; it stays as it is")
    parser.add_argument("--weights", type=str, help=WEIGHTS_HELP)
    parser.add_argument("--to", type=str, default="group", help=f"one of {', '.join(TARGETS)}")
    parser.add_argument("--groups", type=PositiveInt, default=DEFAULT_GROUPS, help="at most")
    parser.add_argument("--exclude", type=list[str], default=[], help="layers to leave")
    parser.add_argument(
        "--steps", type=NonNegativeInt, default=200, help="steps to learn at most; 0 only swaps"
    )
    parser.add_argument("--split", type=str, default="train", help="data to learn on")
    parser.add_argument("--device", type=str, default="cpu", help="cpu, cuda, …")
    parser.add_argument("--metric", type=str, help="validation metric to show")
    parser.add_argument("--output", type=str, help="where to write; NAME-swapped by default")
    parser.add_argument("--force", action="store_true", help="write over an existing file")
    return parser


def _output(source: Path, values: Namespace) -> Path:
    """Return where the result goes; what stands there already is found out before the work."""
    beside = name_beside(source, "swapped").with_suffix(".ckpt")
    output = beside if values.output is None else Path(values.output)
    if output.exists() and output.samefile(source):
        raise CheckpointError(f"{output}: is the original; choose another --output")
    if output.exists() and not values.force:
        raise CheckpointError(f"{output} exists already: choose another --output, or use --force")
    return output


def _swapped(model: nn.Module, data: Data, device: torch.device, values: Namespace) -> Swap:
    loader = data.loader(values.split)
    first = next(iter(loader), None)
    if first is None:
        raise ConfigurationError(f"--data {data.path}: the {values.split} split has no batches")
    return swap(
        model.to(device).eval(),
        values.to,
        groups=values.groups,
        exclude=values.exclude,
        sample=first,
        teacher_data=loader if values.steps else None,
        steps=max(values.steps, 1),
    )


def _scores(
    before: nn.Module, after: nn.Module, data: Data, device: torch.device, values: Namespace
) -> str | None:
    """Return what a validation says of both models; None where there is none to run."""
    if not (has_validation(before) and data.has("val")):
        if values.metric is not None:
            raise ConfigurationError("--metric needs a validation_step, and validation data")
        return None
    scorer = Scorer(data.loader("val"), device, "32-true", values.metric)
    old, new = (scorer.metrics(model)[scorer.metric or ""] for model in (before, after))
    return f"{scorer.metric} {old:.4g} with BN, {new:.4g} swapped"


def _write(
    result: Swap, checkpoint: Checkpoint, source: Path, output: Path, *, force: bool
) -> None:
    """Write the weights and the hyper-parameters under their name, whole or not at all."""
    content = {
        "state_dict": {name: t.cpu() for name, t in result.model.state_dict().items()},
        "hyper_parameters": dict(checkpoint.hyper_parameters),
        "bnguard": {
            "action": "swap",
            "bnguard_version": __version__,
            "original": source.name,
            "to": result.to,
            "groups": result.groups,
        },
    }
    with publishing.write_errors(output), publishing.temporary_beside(output, like=output) as copy:
        torch.save(content, copy)
        publishing.settle(copy, source)
        if output.exists() and force:
            publishing.replace(copy, output)
        else:
            publishing.publish(copy, output)


def _recipe(result: Swap, model: str, output: Path) -> str:
    """Return the lines of code that build the swapped model and load its weights."""
    options = [repr(result.to)]
    if result.groups:
        options.append(f"groups={_condensed(result.groups)}")
    if result.skipped:
        options.append(f"exclude={[layer.name for layer in result.skipped]}")
    name = model.rpartition(".")[2]
    return (
        f"model = {name}(…)  # {model}, with the arguments it had\n"
        f"model = bnguard.swap(model, {', '.join(options)}).model\n"
        f'model.load_state_dict(torch.load("{output}", weights_only=True)["state_dict"])'
    )


def _condensed(groups: dict[str, int]) -> dict[str, int]:
    """Return the groups with the most frequent number last, under one pattern.

    >>> _condensed({"a": 32, "b": 8, "c": 32})
    {'b': 8, '*': 32}
    """
    numbers = list(groups.values())
    usual = max(numbers, key=numbers.count)
    return {name: n for name, n in groups.items() if n != usual} | {"*": usual}
