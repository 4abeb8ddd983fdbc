"""``bnguard swap``: load, swap, let the network learn, score, write, and tell."""

from __future__ import annotations

import ast
import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt

from bnguard.checkpoint import check_output, loading_code, name_beside, write_model
from bnguard.cli.model_and_data import Data, Subject
from bnguard.cli.output import command_parser, say, show, show_document
from bnguard.cli.request import (
    SUBJECTS_HELP,
    SUBJECTS_USAGE,
    WEIGHTS_HELP,
    asks_for_help,
    requested,
)
from bnguard.errors import ConfigurationError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bnguard.lightning.scoring import ValidationScore
    from bnguard.swapping.result import Swap

_EXAMPLES = """
examples:
  bnguard swap last.ckpt --to group --model my.LitModel --data my.DataModule
  bnguard swap lightning_logs/version_0/checkpoints/last.ckpt --to batch-renorm
"""
# Named here once more, because to ask for help must not import torch.
_TARGETS = "one of group, layer, instance, batch-renorm, frozen, sync"


def run(arguments: list[str]) -> int:
    """Write a checkpoint of the model with another norm, and print the lines that build it."""
    if asks_for_help(arguments):
        make_parser().parse_args(["--help"])
    # torch is imported from here on.
    from bnguard.lightning.scoring import quiet_lightning

    with quiet_lightning():
        return _swap_checkpoint(make_parser(), arguments)


def make_parser() -> ArgumentParser:
    """Return the parser of the command."""
    parser = command_parser(
        "swap",
        "Swap BN for another norm, let the network learn what it knew, and write a "
        "checkpoint of the swapped model beside the one given.",
        SUBJECTS_HELP + _EXAMPLES,
        SUBJECTS_USAGE,
    )
    parser.add_argument("checkpoint", type=str, help="checkpoint to read; it stays as it is")
    parser.add_argument("--weights", type=str, help=WEIGHTS_HELP)
    parser.add_argument("--to", type=str, default="group", help=_TARGETS)
    parser.add_argument(
        "--groups",
        type=Optional[PositiveInt],  # noqa: UP045 - PositiveInt is not a type to join with |
        help="groups of a layer, at most; by default those that fit each layer best",
    )
    parser.add_argument("--exclude", type=list[str], default=[], help="layers to leave")
    parser.add_argument(
        "--steps", type=NonNegativeInt, default=200, help="steps to learn at most; 0 only swaps"
    )
    parser.add_argument("--split", type=str, default="train", help="data to learn on")
    parser.add_argument("--device", type=str, default="cpu", help="cpu, cuda, cuda:1, mps, …")
    parser.add_argument(
        "--precision",
        type=Literal["32-true", "16-mixed", "bf16-mixed"],
        default="32-true",
        help="as the Trainer names it",
    )
    parser.add_argument("--metric", type=str, help="validation metric that decides")
    parser.add_argument(
        "--keep",
        type=Literal["if-better", "always"],
        default="if-better",
        help="if-better writes nothing if the swapped model is clearly worse",
    )
    parser.add_argument("--output", type=str, help="where to write; NAME-swapped by default")
    parser.add_argument("--force", action="store_true", help="write over an existing file")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def _swap_checkpoint(parser: ArgumentParser, arguments: list[str]) -> int:
    """Do what the arguments say, and print the lines that build the model."""
    import torch

    from bnguard.cli.devices import usable_device
    from bnguard.cli.scoring import NOT_SCORED, validation_score

    request = requested(parser, arguments, "swap")
    checkpoint, values = request.checkpoint, request.values
    output = _output(checkpoint.path, values)
    device = usable_device(values.device)
    model, _ = request.model()
    data = request.data(model)
    # A loader that shuffles gives the same samples each time.
    torch.manual_seed(0)
    fabric = _fabric(model, device, values)
    validation = data.loader("val") if data.has("val") else None
    scorer = validation_score(request, model, validation, device)
    result = _swapped(model, data, fabric, scorer, values)
    if not result.is_kept:
        if values.json:
            show_document({**result.to_dict(), "action": "swap", "written": None})
        else:
            show(result)
            say("not written: use --keep always to write it anyway")
        return 1
    provenance = {"action": "swap", "to": result.to, "groups": result.groups}
    state_dict = result.model.state_dict()
    write_model(checkpoint, output, state_dict, provenance, force=values.force)
    code = _recipe(result, request.subjects["model"], values, loading_code(checkpoint, output))

    if values.json:
        document = {
            **result.to_dict(),
            "action": "swap",
            "written": str(output),
            "code": code,
            "metric": None if scorer is None else scorer.meaning,
        }
        show_document(document)
        return 0
    show(result)
    say(NOT_SCORED if scorer is None else f"the score is {scorer.meaning}")
    say(f"written: {output}; weights alone, so begin a new training rather than resume the old")
    say(f"the model that it fits:\n\n{code}")
    return 0


def _output(source: Path, values: Namespace) -> Path:
    """Return where the result goes; what stands there already is found out before the work."""
    beside = name_beside(source, "swapped")
    if source.is_dir():
        # One file: what else is in the folder describes the network with BN.
        suffix = ".safetensors" if any(source.glob("*.safetensors")) else ".ckpt"
        beside = beside.with_name(f"{beside.name}{suffix}")
    output = beside if values.output is None else Path(values.output)
    check_output(output, source, is_folder=False, force=values.force)
    return output


def _swapped(
    model: nn.Module, data: Data, fabric: Any, scorer: ValidationScore | None, values: Namespace
) -> Swap:
    from bnguard.cli.scoring import forward_of
    from bnguard.swapping.api import swap

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
        forward=forward_of(model),
        # A copy, since a Trainer leaves itself in the module, which then cannot be copied.
        score=None if scorer is None else lambda module: scorer(copy.deepcopy(module)),
        keep=values.keep,
        fabric=fabric if values.steps else None,
        progress=not values.json,
    )


def _fabric(model: nn.Module, device: torch.device, values: Namespace) -> Any:
    from bnguard.cli.devices import lightning_device
    from bnguard.lightning.framework import fabric_of

    accelerator, devices = lightning_device(device)
    try:
        return fabric_of(model).Fabric(
            accelerator=accelerator, devices=devices, precision=values.precision
        )
    except Exception as error:
        raise ConfigurationError(
            f"--device {device} --precision {values.precision} cannot be used: {error}"
        ) from error


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
    given = subject.arguments(values.get(subject.option) or Namespace())  # type: ignore[no-untyped-call]
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
