"""The work of ``bnguard swap``: load, swap, let it learn, score, write, and tell."""

from __future__ import annotations

import ast
import copy
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from torch import nn

from bnguard.checkpoint import check_output, loading_code, name_beside, write_model
from bnguard.cli.devices import lightning_device, usable_device
from bnguard.cli.model_and_data import Data, Subject
from bnguard.cli.output import say, show, show_document
from bnguard.cli.request import Request, requested
from bnguard.cli.scoring import NOT_SCORED, forward_of, has_validation, trainer_score
from bnguard.errors import ConfigurationError
from bnguard.lightning.framework import fabric_of
from bnguard.lightning.scoring import ValidationScore
from bnguard.swapping.api import swap
from bnguard.swapping.result import Swap


def swap_checkpoint(parser: ArgumentParser, arguments: list[str]) -> int:
    """Do what the arguments say, and print the lines that build the model."""
    request = requested(parser, arguments, "swap")
    checkpoint, values = request.checkpoint, request.values
    output = _output(checkpoint.path, values)
    device = usable_device(values.device)
    model, _ = request.model()
    data = request.data(model)
    # A loader that shuffles gives the same samples each time.
    torch.manual_seed(0)
    fabric = _fabric(model, device, values)
    scorer = _scorer(model, data, device, request)
    # Before the work: a metric that does not exist must not cost its result.
    before = _score(scorer, model)
    result = _swapped(model, data, fabric, values)
    provenance = {"action": "swap", "to": result.to, "groups": result.groups}
    state_dict = result.model.state_dict()
    write_model(checkpoint, output, state_dict, provenance, force=values.force)
    code = _recipe(result, request.subjects["model"], values, loading_code(checkpoint, output))
    after = _score(scorer, result.model)

    if values.json:
        document = {
            **result.to_dict(),
            "action": "swap",
            "written": str(output),
            "code": code,
            "metric": None if scorer is None else scorer.name,
            "score_before": before,
            "score_after": after,
        }
        show_document(document)
        return 0
    show(result)
    if scorer is None:
        say(NOT_SCORED)
    else:
        say(f"{scorer.name} {before:.4g} with BN, {after:.4g} swapped")
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


def _swapped(model: nn.Module, data: Data, fabric: Any, values: Namespace) -> Swap:
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
        fabric=fabric if values.steps else None,
        progress=not values.json,
    )


def _fabric(model: nn.Module, device: torch.device, values: Namespace) -> Any:
    accelerator, devices = lightning_device(device)
    try:
        return fabric_of(model).Fabric(
            accelerator=accelerator, devices=devices, precision=values.precision
        )
    except Exception as error:
        raise ConfigurationError(
            f"--device {device} --precision {values.precision} cannot be used: {error}"
        ) from error


def _scorer(
    model: nn.Module, data: Data, device: torch.device, request: Request
) -> ValidationScore | None:
    values = request.values
    if has_validation(model) and data.has("val"):
        loader = data.loader("val")
        return trainer_score(loader, device, values.precision, values.metric, request.checkpoint)
    if values.metric is not None:
        raise ConfigurationError("--metric needs a validation_step, and validation data")
    return None


def _score(scorer: ValidationScore | None, model: nn.Module) -> float | None:
    # A copy, since a Trainer leaves itself in the module, which then cannot be copied.
    return None if scorer is None else scorer.value(copy.deepcopy(model))


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
