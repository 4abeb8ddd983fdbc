"""``bnguard diagnose``: load, try other statistics, and tell."""

from __future__ import annotations

import re
import shlex
from collections.abc import Container, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from bnguard.checkpoint import CheckpointModel
from bnguard.cli.model_and_data import OPTIONS, Data
from bnguard.cli.output import command_parser, show, show_document
from bnguard.cli.request import (
    SUBJECTS_HELP,
    SUBJECTS_USAGE,
    WEIGHTS_HELP,
    Request,
    asks_for_help,
    requested,
)
from bnguard.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import nn

    from bnguard.lightning.scoring import ValidationScore
    from bnguard.whatif.result import Verdict

_REFERENCE = """\
  --reference PACKAGE:function
                          function that gives the training loader, where
                          --data is one that gives the evaluation loader
"""
_EXAMPLES = """
examples:
  bnguard diagnose last.ckpt --model my.LitModel --data my.DataModule
  bnguard diagnose lightning_logs/version_0/checkpoints/last.ckpt --json
  bnguard diagnose best.pt --model my:build --data my:val --reference my:train
"""


def run(arguments: list[str]) -> int:
    """Show what other statistics would do for a checkpoint; status 1 where there is a fault."""
    if asks_for_help(arguments):
        make_parser().parse_args(["--help"])
    # torch is imported from here on.
    from bnguard.lightning.scoring import quiet_lightning

    with quiet_lightning():
        return _diagnose_checkpoint(make_parser(), arguments)


def make_parser() -> ArgumentParser:
    """Return the parser of the command."""
    parser = command_parser(
        "diagnose",
        "Try a checkpoint with other BN statistics: recalibrated on training and on "
        "evaluation data, and those of each batch. Name the cause and the layers to blame. "
        "Nothing is written.",
        SUBJECTS_HELP + _REFERENCE + _EXAMPLES,
        f"{SUBJECTS_USAGE}\n           [--reference PACKAGE:function [--reference.NAME VALUE ...]]",
    )
    parser.add_argument("checkpoint", type=str, help="checkpoint to read")
    parser.add_argument("--weights", type=str, help=WEIGHTS_HELP)
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
    parser.add_argument("--device", type=str, default="cpu", help="cpu, cuda, cuda:1, mps, …")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def _diagnose_checkpoint(parser: ArgumentParser, arguments: list[str]) -> int:
    """Do what the arguments say; the exit status is 1 where there is a fault."""
    import torch

    from bnguard.cli.devices import usable_device
    from bnguard.cli.scoring import forward_of, split_samples, validation_score
    from bnguard.whatif.api import diagnose

    request = requested(parser, arguments, "diagnose", (*OPTIONS, "reference"))
    values = request.values
    device = usable_device(values.device)
    model, stored = request.model()
    data = request.data(model)
    # A loader that shuffles gives the same samples each time.
    torch.manual_seed(0)
    model = model.eval().to(device)
    loader = split_samples(data.loader(values.split), values.samples, None).calibration
    scorer = validation_score(request, model, loader if data.is_module else None, device)
    reference, notes = _reference(request, data)
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
    commands = _Commands(str(request.checkpoint.path), tuple(arguments))
    cause = (
        commands.of_module(diagnosis.cause, values.split)
        if data.is_module
        else commands.of_functions(diagnosis.cause)
    )
    diagnosis = replace(
        diagnosis,
        cause=cause,
        notes=(*_score_notes(scorer), *request.notes, *notes, *diagnosis.notes),
    )
    if values.json:
        document = diagnosis.to_dict() | _document(request, stored, data, scorer)
        show_document(document)
    else:
        show(diagnosis)
    return 1 if diagnosis.cause.is_fault else 0


def _reference(request: Request, data: Data) -> tuple[Iterable[object] | None, list[str]]:
    """Return the training data in their own batches, or why there are none."""
    named = request.reference()
    if named is not None:
        return named.loader("train"), []
    if not data.has("train"):
        return None, []
    try:
        return data.loader("train"), []
    except ConfigurationError as error:
        return None, [f"no training data: {error}"]


def _expected(model: nn.Module, scorer: ValidationScore | None, values: Namespace) -> float | None:
    """Return the score that is expected, with its sign turned where lower is better."""
    expected: float | None = values.expected
    if expected is None or scorer is None:
        return None
    scorer(model)  # The metric is chosen when it is first measured.
    return -expected if scorer.sign < 0 else expected


def _score_notes(scorer: ValidationScore | None) -> tuple[str, ...]:
    if scorer is None:
        return ("not scored: that takes a validation_step, and a data module",)
    return (f"the score is {scorer.meaning}, on the evaluation samples",)


def _document(
    request: Request, stored: CheckpointModel, data: Data, scorer: ValidationScore | None
) -> dict[str, object]:
    """Return what was diagnosed, which ``--json`` prints beside the diagnosis."""
    return {
        "action": "diagnose",
        "checkpoint": str(request.checkpoint.path),
        "weights": stored.name,
        "data": data.path,
        "split": request.values.split,
        "metric": None if scorer is None else scorer.name,
    }


@dataclass(frozen=True)
class _Commands:
    """Commands in place of the code that a cause proposes, where a command does it.

    Attributes:
        checkpoint: The checkpoint.
        arguments: Those of the command that found the cause.
    """

    checkpoint: str
    arguments: tuple[str, ...]

    def of_module(self, cause: Verdict, split: str) -> Verdict:
        """Return the cause with a command for the splits of a data module."""
        recalibrate = f"bnguard recalibrate {self._named('data')} --split"
        if cause.name == "correlated-batches":
            return cause
        if cause.name == "unfit-statistics":
            advice = "recalibrate on these data; data with a training split would tell why"
            return replace(cause, advice=advice, next_step=f"{recalibrate} {split}")
        if cause.cured_by is not None:
            on = "train" if cause.cured_by == "reference" else split
            return replace(cause, next_step=f"{recalibrate} {on}")
        if cause.name == "weights":
            step = f"bnguard diagnose {self._named('data')} --split train"
            return replace(cause, next_step=step)
        return cause

    def of_functions(self, cause: Verdict) -> Verdict:
        """Return the cause with a command for functions that give a loader each."""
        if cause.name == "unfit-statistics":
            advice = "give the training data, which tells the two apart"
            step = f"bnguard diagnose {self._named('data')} --reference PACKAGE:function"
            return replace(cause, advice=advice, next_step=step)
        if cause.cured_by is None or cause.name == "correlated-batches":
            return cause
        if cause.cured_by == "reference":
            return replace(cause, next_step=f"bnguard recalibrate {self._named('reference')}")
        advice = cause.advice
        if not _naming(self.arguments, {"reference"}):
            advice += " (--data takes a function that gives the training loader, too)"
        step = f"bnguard recalibrate {self._named('data')}"
        return replace(cause, advice=advice, next_step=step)

    def _named(self, data: str) -> str:
        """Return the checkpoint, its model, and as its data those of an option."""
        words = _naming(self.arguments, {"model", "config", "weights", data})
        in_place = [re.sub(rf"^--{data}(?=$|[.=])", "--data", word) for word in words]
        return shlex.join([self.checkpoint, *in_place])


def _naming(arguments: Iterable[str], options: Container[str]) -> list[str]:
    """Return those of the arguments that belong to some options."""
    chosen, is_value = [], False
    for argument in arguments:
        is_option = argument.startswith("--")
        if is_option:
            name = argument.removeprefix("--").partition("=")[0].partition(".")[0]
            is_value = name in options
        if is_value:
            chosen.append(argument)
            # One value an option; what follows is the next option, or the checkpoint.
            is_value = is_option and "=" not in argument
    return chosen
