"""``bnguard swap``."""

from __future__ import annotations

import ast
import copy
import json
from pathlib import Path
from typing import Literal

import rich
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning_fabric import Fabric
from torch import nn

from bnguard.checkpoint import load_state_dict, loading_code, read_checkpoint, write_model
from bnguard.cli.loading import add_subjects, checkpoint_named, load_weights
from bnguard.cli.scoring import Scorer, has_validation
from bnguard.cli.subjects import (
    Data,
    Subject,
    built_data,
    built_model,
    configuration_beside,
    named_subjects,
)
from bnguard.errors import CheckpointError, ConfigurationError
from bnguard.fixes.swap import swap
from bnguard.fixes.swapped import Swap
from bnguard.fixes.targets import DEFAULT_GROUPS, TARGETS
from bnguard.report.document import swap_document

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
    fabric = _fabric(values)
    scorer = _scorer(model, data, values)
    # Before the work: a metric that does not exist must not cost its result.
    before = _score(scorer, model)
    result = _swapped(model, data, fabric, values)
    provenance = {"action": "swap", "to": result.to, "groups": result.groups}
    state_dict = result.model.state_dict()
    write_model(checkpoint, output, state_dict, provenance, force=values.force)
    code = _recipe(result, subjects["model"], values, loading_code(checkpoint, output))
    after = _score(scorer, result.model)

    if values.json:
        document = {
            "action": "swap",
            "metric": None if scorer is None else scorer.metric,
            "score_before": before,
            "score_after": after,
        }
        print(json.dumps(swap_document(result, document, output, code), indent=2))
        return 0
    rich.print(result)
    if scorer is None:
        print("not scored: that takes a validation_step, and validation data")
    else:
        print(f"{scorer.metric} {before:.4g} with BN, {after:.4g} swapped")
    print(f"written: {output}; weights alone, so begin a new training rather than resume the old")
    print(f"the model that it fits:\n\n{code}")
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
    parser.add_argument("--device", type=Literal["cpu", "gpu"], default="cpu")
    parser.add_argument(
        "--precision", type=Literal["32-true", "16-mixed", "bf16-mixed"], default="32-true"
    )
    parser.add_argument(
        "--state", type=str, help="file from which the same command goes on if it was interrupted"
    )
    parser.add_argument("--metric", type=str, help="validation metric to show")
    parser.add_argument("--output", type=str, help="where to write; NAME-swapped by default")
    parser.add_argument("--force", action="store_true", help="write over an existing file")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def _output(source: Path, values: Namespace) -> Path:
    """Return where the result goes; what stands there already is found out before the work."""
    suffix = source.suffix if source.is_file() else ".ckpt"
    beside = source.with_name(f"{source.stem}-swapped{suffix}")
    output = beside if values.output is None else Path(values.output)
    if output.is_dir() or not output.parent.is_dir():
        raise CheckpointError(f"{output}: is a folder, or in none; give the name of a file")
    if output.exists() and output.samefile(source):
        raise CheckpointError(f"{output}: is the original; choose another --output")
    if output.exists() and not values.force:
        raise CheckpointError(f"{output} exists already: choose another --output, or use --force")
    return output


def _swapped(model: nn.Module, data: Data, fabric: Fabric, values: Namespace) -> Swap:
    loader = data.loader(values.split)
    first = next(iter(loader), None)
    if first is None:
        raise ConfigurationError(f"--data {data.path}: the {values.split} split has no batches")
    return swap(
        model.eval(),
        values.to,
        groups=values.groups,
        exclude=values.exclude,
        sample=first,
        teacher_data=loader if values.steps else None,
        steps=max(values.steps, 1),
        fabric=fabric if values.steps else None,
        state_file=values.state if values.steps else None,
        progress=not values.json,
    )


def _fabric(values: Namespace) -> Fabric:
    try:
        return Fabric(accelerator=values.device, devices=1, precision=values.precision)
    except Exception as error:
        raise ConfigurationError(
            f"--device {values.device} --precision {values.precision} cannot be used: {error}"
        ) from error


def _scorer(model: nn.Module, data: Data, values: Namespace) -> Scorer | None:
    if has_validation(model) and data.has("val"):
        return Scorer(data.loader("val"), values.device, values.precision, values.metric)
    if values.metric is not None:
        raise ConfigurationError("--metric needs a validation_step, and validation data")
    return None


def _score(scorer: Scorer | None, model: nn.Module) -> float | None:
    # A copy, since a Trainer leaves itself in the module, which then cannot be copied.
    return None if scorer is None else scorer.metrics(copy.deepcopy(model))[scorer.metric or ""]


def _recipe(result: Swap, subject: Subject, values: Namespace, weights: str) -> str:
    """Return the lines of code that build the swapped model and load its weights."""
    if result.groups:
        # Layer and instance norm too: data chose the groups, and are not there to choose again.
        options = ["'group'", f"groups={_condensed(result.groups)}"]
    else:
        options = [repr(result.to)]
    if result.skipped:
        options.append(f"exclude={[layer.name for layer in result.skipped]}")
    module, _, name = subject.path.rpartition(".")
    libraries = ["bnguard", weights.partition(".load")[0]]
    given = vars(values.get(subject.option) or Namespace())  # type: ignore[no-untyped-call]
    arguments = ", ".join(f"{key}={_literal(value)}" for key, value in given.items())
    return (
        f"import {', '.join(libraries)}\n"
        f"from {module} import {name}\n\n"
        f"model = {name}({arguments})\n"
        f"model = bnguard.swap(model, {', '.join(options)}).model\n"
        f"model.load_state_dict({weights})"
    )


def _literal(value: object) -> str:
    """Return how a value is written in Python; an ellipsis where it is no plain data.

    >>> _literal([1, "a"]), _literal(object())
    ("[1, 'a']", '...')
    """
    try:
        is_plain = ast.literal_eval(repr(value)) == value
    except (ValueError, SyntaxError):
        is_plain = False
    return repr(value) if is_plain else "..."


def _condensed(groups: dict[str, int]) -> dict[str, int]:
    """Return the groups with the most frequent number last, under one pattern.

    >>> _condensed({"a": 32, "b": 8, "c": 32})
    {'b': 8, '*': 32}
    """
    numbers = list(groups.values())
    usual = max(numbers, key=numbers.count)
    return {name: n for name, n in groups.items() if n != usual} | {"*": usual}
