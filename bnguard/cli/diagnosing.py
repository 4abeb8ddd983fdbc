"""The work of ``bnguard diagnose``: load, try other statistics, and tell."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from dataclasses import replace

import rich
import torch
from jsonargparse import ArgumentParser, Namespace
from torch import nn

from bnguard.cli.devices import usable_device
from bnguard.cli.loading import requested
from bnguard.cli.scoring import (
    Scorer,
    forward_of,
    has_validation,
    is_lower_better,
    shared_out,
)
from bnguard.cli.subjects import Data
from bnguard.errors import ConfigurationError
from bnguard.whatif.diagnose import diagnose
from bnguard.whatif.diagnosis import Cause


def diagnose_checkpoint(parser: ArgumentParser, arguments: list[str]) -> int:
    """Do what the arguments say; the exit status is 1 where there is a fault."""
    request = requested(parser, arguments, "diagnose")
    values = request.values
    device = usable_device(values.device)
    model, stored = request.model()
    data = request.data(model)
    # A loader that shuffles gives the same samples each time.
    torch.manual_seed(0)
    model = model.eval().to(device)
    loader = shared_out(data.loader(values.split), values.samples, None).calibration
    scorer = _scorer(model, data, loader, device, values)
    reference, notes = _reference(data)
    diagnosis = diagnose(
        model,
        loader,
        reference,
        scorer,
        samples=values.samples,
        forward=forward_of(model),
        batch_sizes=values.batch_sizes,
        expected_score=_expected(model, scorer, values),
        progress=not values.json,
    )
    named = shlex.join([str(request.checkpoint.path), *_subject_arguments(arguments)])
    diagnosis = replace(
        diagnosis,
        cause=_with_command(diagnosis.cause, named, values.split if data.is_module else None),
        notes=(*_score_notes(scorer), *request.notes, *notes, *diagnosis.notes),
    )
    if values.json:
        document = {
            "action": "diagnose",
            "checkpoint": str(request.checkpoint.path),
            "weights": stored.name,
            "data": data.path,
            "split": values.split,
            "metric": None if scorer is None else scorer.metric,
        }
        print(json.dumps(diagnosis.to_dict() | document, indent=2))
    else:
        rich.print(diagnosis)
    return 1 if diagnosis.cause.is_fault else 0


def _scorer(
    model: nn.Module,
    data: Data,
    loader: Iterable[object],
    device: torch.device,
    values: Namespace,
) -> Scorer | None:
    """Return what scores the model on the evaluation samples; None where nothing can."""
    if data.is_module and has_validation(model):
        return Scorer(loader, device, "32-true", values.metric)
    if values.metric is not None or values.expected is not None:
        raise ConfigurationError(
            "--metric and --expected need a LightningModule with a validation_step"
        )
    return None


def _reference(data: Data) -> tuple[Iterable[object] | None, list[str]]:
    """Return the training data in their own batches, or why there are none."""
    if not data.has("train"):
        return None, []
    try:
        return data.loader("train"), []
    except ConfigurationError as error:
        return None, [f"no training data: {error}"]


def _expected(model: nn.Module, scorer: Scorer | None, values: Namespace) -> float | None:
    """Return the score that is expected, with its sign turned where lower is better."""
    expected: float | None = values.expected
    if expected is None or scorer is None:
        return None
    scorer(model)  # The metric is chosen when it is first measured.
    return -expected if is_lower_better(scorer.metric or "") else expected


def _score_notes(scorer: Scorer | None) -> tuple[str, ...]:
    if scorer is None:
        return ("not scored: that takes a validation_step, and a data module",)
    metric = scorer.metric or ""
    is_turned = is_lower_better(metric)
    return (f"the score is {'minus ' if is_turned else ''}{metric}, on the evaluation samples",)


def _with_command(cause: Cause, named: str, split: str | None) -> Cause:
    """Return the cause with a command as the next step, where a command does it.

    Args:
        cause: The cause.
        named: The checkpoint, and what names model and data.
        split: The evaluation data; None where a function gives the only loader there is.
    """
    if split is None:
        if not cause.is_fault:
            return cause
        function = "--data takes a function that gives the training loader, too"
        advice = f"{cause.advice} ({function})"
        return replace(cause, advice=advice, next_step=f"bnguard recalibrate {named}")
    recalibrate = f"bnguard recalibrate {named} --split"
    if cause.name == "correlated-batches":
        return cause
    if cause.name == "unfit-statistics":
        advice = "recalibrate on these data; data with a training split would tell why"
        return replace(cause, advice=advice, next_step=f"{recalibrate} {split}")
    if cause.cured_by is not None:
        on = "train" if cause.cured_by == "reference" else split
        return replace(cause, next_step=f"{recalibrate} {on}")
    if cause.name == "weights":
        return replace(cause, next_step=f"bnguard diagnose {named} --split train")
    return cause


def _subject_arguments(arguments: list[str]) -> list[str]:
    """Return those of the arguments that name the model and the data."""
    chosen, is_value = [], False
    for argument in arguments:
        is_option = argument.startswith("--")
        if is_option:
            name = argument.removeprefix("--").partition("=")[0].partition(".")[0]
            is_value = name in ("model", "data", "config", "weights")
        if is_value:
            chosen.append(argument)
            # One value an option; what follows is the next option, or the checkpoint.
            is_value = is_option and "=" not in argument
    return chosen
