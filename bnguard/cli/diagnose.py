"""``bnguard diagnose``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import rich
import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt
from torch import nn

from bnguard.checkpoint import load_state_dict, read_checkpoint
from bnguard.cli.loading import add_subjects, checkpoint_named, load_weights
from bnguard.cli.scoring import Scorer, has_validation, is_lower_better, shared_out
from bnguard.cli.subjects import (
    Data,
    built_data,
    built_model,
    configuration_beside,
    named_subjects,
)
from bnguard.errors import CheckpointError, ConfigurationError
from bnguard.whatif.diagnose import diagnose
from bnguard.whatif.diagnosis import Cause

_EPILOG = """
the model and its data:
  --model PACKAGE.Class   class or function that makes the model; its own arguments
                          follow as --model.NAME, and start from the hyper-parameters
                          that the checkpoint holds
  --data PACKAGE.Class    class of a data module, or function that gives a loader; its
                          own arguments follow as --data.NAME; a training split tells
                          statistics that are stale from data that differ
  --config FILE           both of them, as LightningCLI saved them

examples:
  bnguard diagnose last.ckpt --model my.LitModel --data my.DataModule
  bnguard diagnose last.ckpt --config lightning_logs/version_0/config.yaml --json
"""


def run(arguments: list[str]) -> int:
    """Show what other statistics would do for a checkpoint; status 1 where there is a fault."""
    subjects, rest = named_subjects(arguments)
    parser = _parser()
    if {"-h", "--help"} & set(rest):
        parser.parse_args(rest)
    source = checkpoint_named(rest, "diagnose")
    checkpoint = read_checkpoint(source)
    if not checkpoint.layers:
        raise CheckpointError(f"{source}: has no BN layers, so there is nothing to diagnose")
    if not subjects and (config := configuration_beside(source)) is not None:
        subjects, rest = named_subjects([*rest, "--config", str(config)])
    add_subjects(parser, subjects, checkpoint)
    values = parser.parse_args(rest)

    # Loaders that shuffle give the same samples each time.
    torch.manual_seed(0)
    model = built_model(subjects["model"], parser, values)
    load_weights(model, load_state_dict(source), source)
    model = model.eval().to("cuda" if values.device == "gpu" else values.device)
    data = built_data(subjects["data"], parser, values)
    loader = shared_out(data.loader(values.split), values.samples, None).calibration
    scorer = _scorer(model, data, loader, values)
    reference, notes = _reference(data)
    diagnosis = diagnose(
        model,
        loader,
        reference,
        scorer,
        samples=values.samples,
        batch_sizes=values.batch_sizes,
        expected_score=_expected(model, scorer, values),
        progress=not values.json,
    )
    named = shlex.join([str(source), *_subject_arguments(arguments)])
    diagnosis = replace(
        diagnosis,
        cause=_with_command(diagnosis.cause, named, values.split),
        notes=(*_score_notes(scorer), *notes, *diagnosis.notes),
    )
    if values.json:
        document = {
            "action": "diagnose",
            "checkpoint": str(source),
            "data": subjects["data"].path,
            "split": values.split,
            "metric": None if scorer is None else scorer.metric,
        }
        print(json.dumps(diagnosis.to_dict() | document, indent=2))
    else:
        rich.print(diagnosis)
    return 1 if diagnosis.cause.is_fault else 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "bnguard diagnose",
        description="Try a checkpoint with other BN statistics: recalibrated on training and on "
        "evaluation data, and those of each batch. Name the cause and the layers to blame. "
        "Nothing is written.",
        epilog=_EPILOG,
        exit_on_error=False,
    )
    parser.add_argument("checkpoint", type=str, help="checkpoint to read")
    parser.add_argument(
        "--split", type=Literal["train", "val", "test"], default="val", help="evaluation data"
    )
    parser.add_argument(
        "--samples", type=PositiveInt, default=1024, help="samples to use at most, of each split"
    )
    parser.add_argument(
        "--batch-sizes",
        type=list[PositiveInt],
        default=[2, 8, 32],
        help="sizes at which batches are normalised by their own statistics",
    )
    parser.add_argument("--metric", type=str, help="validation metric that is the score")
    parser.add_argument(
        "--expected", type=float, help="what the metric should be, as in training perhaps"
    )
    parser.add_argument("--device", type=Literal["cpu", "gpu"], default="cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def _scorer(
    model: nn.Module, data: Data, loader: Iterable[object], values: Namespace
) -> Scorer | None:
    """Return what scores the model on the evaluation samples; None where nothing can."""
    if data.is_module and has_validation(model):
        return Scorer(loader, values.device, "32-true", values.metric)
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


def _with_command(cause: Cause, named: str, split: str) -> Cause:
    """Return the cause with a command as the next step, where a command does it."""
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
            is_value = name in ("model", "data", "config")
        if is_value:
            chosen.append(argument)
            # One value an option; what follows is the next option, or the checkpoint.
            is_value = is_option and "=" not in argument
    return chosen
