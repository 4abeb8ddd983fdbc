"""``bnguard swap``: load, swap, distil, score, write, and report."""

from __future__ import annotations

import ast
import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt

from bnguard.checkpoint import check_output, loading_code, name_beside, write_model
from bnguard.cli.model_and_data import Data, Factory
from bnguard.cli.output import say, show, show_json
from bnguard.cli.request import Request, add_writing_options, model_command_parser, run_request
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
# Repeated here, since help must not import torch.
_TARGETS = "one of group, layer, instance, batch-renorm, frozen, sync"


def run(arguments: list[str]) -> int:
    """Write a checkpoint of the model with another norm, and print the lines that build it."""
    return run_request(make_parser(), arguments, _swap_checkpoint)


def make_parser() -> ArgumentParser:
    """Return the parser of the command."""
    parser = model_command_parser(
        "swap",
        "Replace BN by another norm, distil the original network into the result, and write "
        "its checkpoint next to the one given.",
        _EXAMPLES,
    )
    parser.add_argument("--to", type=str, default="group", help=_TARGETS)
    parser.add_argument(
        "--groups",
        type=PositiveInt,
        help="groups of a layer, at most; by default those that fit each layer best",
    )
    parser.add_argument("--exclude", type=list[str], default=[], help="layers to keep as they are")
    parser.add_argument(
        "--steps",
        type=NonNegativeInt,
        default=200,
        help="steps of distillation at most; 0 only swaps",
    )
    parser.add_argument("--split", type=str, default="train", help="data to distil on")
    parser.add_argument(
        "--keep",
        type=Literal["if-better", "always"],
        default="if-better",
        help="if-better writes nothing if the swapped model is clearly worse",
    )
    add_writing_options(parser, "swapped")
    return parser


def _swap_checkpoint(request: Request) -> int:
    """Swap, and print the lines that build the model."""
    import torch

    from bnguard.cli.scoring import NOT_SCORED, usable_device, validation_score

    checkpoint, values = request.checkpoint, request.values
    output = _output(checkpoint.path, values)
    device = usable_device(values.device)
    model, _ = request.model()
    data = request.data(model)
    torch.manual_seed(0)  # so that a shuffling loader gives the same samples each time
    fabric = _fabric(model, device, values)
    validation = data.loader("val") if data.has("val") else None
    scorer = validation_score(request, model, validation, device)
    result = _swap_model(model, data, fabric, scorer, values)
    code = None
    if result.is_kept:
        provenance = {"action": "swap", "to": result.to, "groups": result.groups}
        write_model(checkpoint, output, result.model.state_dict(), provenance, force=values.force)
        weights = loading_code(checkpoint, output)
        code = _building_code(result, request.factories["model"], values, weights)
    if values.json:
        document = {
            "action": "swap",
            "written": str(output) if result.is_kept else None,
            "code": code,
            "metric": None if scorer is None else scorer.meaning,
        }
        show_json(result.to_dict() | document)
        return 0 if result.is_kept else 1
    show(result)
    if not result.is_kept:
        say("not written: use --keep always to write it anyway")
        return 1
    say(NOT_SCORED if scorer is None else f"the score is {scorer.meaning}")
    say(f"written: {output}; without optimizer states, so fine-tune it in a new fit")
    say(f"the model that it fits:\n\n{code}")
    return 0


def _output(source: Path, values: Namespace) -> Path:
    """Return where the result goes; fail before the work if it cannot be written there."""
    default = name_beside(source, "swapped")
    if source.is_dir():
        # One file, since the rest of the folder describes the network with BN.
        suffix = ".safetensors" if any(source.glob("*.safetensors")) else ".ckpt"
        default = default.with_name(f"{default.name}{suffix}")
    output = default if values.output is None else Path(values.output)
    check_output(output, source, is_folder=False, force=values.force)
    return output


def _swap_model(
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
        in_place=True,
        progress=not values.json,
    )


def _fabric(model: nn.Module, device: torch.device, values: Namespace) -> Any:
    from bnguard.cli.scoring import lightning_device
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


def _building_code(result: Swap, factory: Factory, values: Namespace, weights: str) -> str:
    """Return the lines of code that build the swapped model and load its weights."""
    if result.groups:
        # Layer and instance norm too: the data that chose the groups are not there next time.
        options = ["'group'", f"groups={_condense(result.groups)}"]
    else:
        options = [repr(result.to)]
    if result.skipped:
        options.append(f"exclude={[layer.name for layer in result.skipped]}")
    module, _, name = factory.path.rpartition(".")
    libraries = ["bnguard", weights.partition(".load")[0]]
    given = factory.arguments(values.get(factory.option) or Namespace())  # type: ignore[no-untyped-call]
    arguments = ", ".join(f"{key}={_literal(value)}" for key, value in given.items())
    return (
        f"import {', '.join(libraries)}\n"
        f"from {module} import {name}\n\n"
        f"model = {name}({arguments})\n"
        f"model = bnguard.swap(model, {', '.join(options)}).model\n"
        f"model.load_state_dict({weights})"
    )


def _literal(value: object) -> str:
    """Return a value as Python code; an ellipsis if it is not plain data.

    >>> _literal([1, "a"]), _literal(object())
    ("[1, 'a']", '...')
    """
    try:
        is_plain = ast.literal_eval(repr(value)) == value
    except (ValueError, SyntaxError):
        is_plain = False
    return repr(value) if is_plain else "..."


def _condense(groups: dict[str, int]) -> dict[str, int]:
    """Return the groups with the most frequent number last, under one pattern.

    >>> _condense({"a": 32, "b": 8, "c": 32})
    {'b': 8, '*': 32}
    """
    numbers = list(groups.values())
    usual = max(numbers, key=numbers.count)
    return {name: n for name, n in groups.items() if n != usual} | {"*": usual}
