"""``bnguard swap``."""

from __future__ import annotations

from pathlib import Path

import rich
import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import nn

from bnguard.checkpoint import Checkpoint, load_state_dict, publishing, read_checkpoint
from bnguard.cli.loading import add_subjects, checkpoint_named, load_weights
from bnguard.cli.scoring import Scorer, has_validation
from bnguard.cli.subjects import (
    Data,
    built_data,
    built_model,
    configuration_beside,
    named_subjects,
)
from bnguard.errors import CheckpointError, ConfigurationError
from bnguard.fixes.swap import swap
from bnguard.fixes.swapped import Swap
from bnguard.fixes.targets import DEFAULT_GROUPS, TARGETS
from bnguard.version import __version__

_EPILOG = """
the model and its data:
  --model PACKAGE.Class   class or function that makes the model; its own arguments
                          follow as --model.NAME, and start from the hyper-parameters
                          that the checkpoint holds
  --data PACKAGE.Class    class of a data module, or function that gives a loader; its
                          own arguments follow as --data.NAME; labels are not used to learn
  --config FILE           both of them, as LightningCLI saved them

example:
  bnguard swap last.ckpt --to group --model my.LitModel --data my.DataModule
"""


def run(arguments: list[str]) -> int:
    """Write a checkpoint of the model with another norm, and print the lines that build it."""
    subjects, rest = named_subjects(arguments)
    parser = _parser()
    if {"-h", "--help"} & set(rest):
        parser.parse_args(rest)
    source = checkpoint_named(rest, "swap")
    checkpoint = read_checkpoint(source)
    if not checkpoint.layers:
        raise CheckpointError(f"{source}: has no BN layers, so there is nothing to swap")
    if not subjects and (config := configuration_beside(source)) is not None:
        subjects, rest = named_subjects([*rest, "--config", str(config)])
    add_subjects(parser, subjects, checkpoint)
    values = parser.parse_args(rest)

    output = _output(source, values)
    model = built_model(subjects["model"], parser, values)
    load_weights(model, load_state_dict(source), source)
    data = built_data(subjects["data"], parser, values)
    result = _swapped(model, data, values)
    scores = _scores(model, result.model, data, values)
    _write(result, checkpoint, source, output, force=values.force)

    rich.print(result)
    if scores is not None:
        print(scores)
    print(f"written: {output}, without optimizer states; the model that it fits:\n")
    print(_recipe(result, subjects["model"].path, output))
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "bnguard swap",
        description="Swap BN for another norm, let the network learn what it knew, and write a "
        "checkpoint of the swapped model beside the one given.",
        epilog=_EPILOG,
        exit_on_error=False,
    )
    parser.add_argument("checkpoint", type=str, help="checkpoint to read; it stays as it is")
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
    beside = source.with_name(f"{source.stem}-swapped.ckpt")
    output = beside if values.output is None else Path(values.output)
    if output.exists() and output.samefile(source):
        raise CheckpointError(f"{output}: is the original; choose another --output")
    if output.exists() and not values.force:
        raise CheckpointError(f"{output} exists already: choose another --output, or use --force")
    return output


def _swapped(model: nn.Module, data: Data, values: Namespace) -> Swap:
    loader = data.loader(values.split)
    first = next(iter(loader), None)
    if first is None:
        raise ConfigurationError(f"--data {data.path}: the {values.split} split has no batches")
    try:
        model.to(values.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"--device {values.device} cannot be used: {reason}") from error
    return swap(
        model.eval(),
        values.to,
        groups=values.groups,
        exclude=values.exclude,
        sample=first,
        teacher_data=loader if values.steps else None,
        steps=max(values.steps, 1),
    )


def _scores(before: nn.Module, after: nn.Module, data: Data, values: Namespace) -> str | None:
    """Return what a validation says of both models; None where there is none to run."""
    if not (has_validation(before) and data.has("val")):
        if values.metric is not None:
            raise ConfigurationError("--metric needs a validation_step, and validation data")
        return None
    accelerator = "cpu" if values.device == "cpu" else "gpu"
    scorer = Scorer(data.loader("val"), accelerator, "32-true", values.metric)
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
