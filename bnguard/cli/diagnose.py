"""``bnguard diagnose``: load, try other statistics, and report."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from bnguard.cli.model_and_data import Data
from bnguard.cli.output import show, show_json
from bnguard.cli.request import Option, Request, model_command_parser, run_request
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
    """Show what other statistics would do for a checkpoint; status 1 if there is a fault."""
    sections = ("model", "data", "reference")
    return run_request(make_parser(), arguments, _diagnose_checkpoint, sections)


def make_parser() -> ArgumentParser:
    """Return the parser of the command."""
    parser = model_command_parser(
        "diagnose",
        "Try a checkpoint with other BN statistics: recalibrated on training and on "
        "evaluation data, and those of each batch. Name the cause and the layers to blame. "
        "Nothing is written.",
        _REFERENCE + _EXAMPLES,
        "\n           [--reference PACKAGE:function [--reference.NAME VALUE ...]]",
    )
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
    parser.add_argument(
        "--expected", type=float, help="what the metric should be, as in training perhaps"
    )
    return parser


def _diagnose_checkpoint(request: Request) -> int:
    """Diagnose; return 1 if there is a fault."""
    import torch

    from bnguard.cli.scoring import forward_of, split_samples, usable_device, validation_score
    from bnguard.whatif.api import diagnose

    values = request.values
    device = usable_device(values.device)
    model, stored = request.model()
    data = request.data(model)
    torch.manual_seed(0)  # so that a shuffling loader gives the same samples each time
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
    commands = _Commands(str(request.checkpoint.path), request.options)
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
        document = {
            "action": "diagnose",
            "checkpoint": str(request.checkpoint.path),
            "weights": stored.name,
            "data": data.path,
            "split": values.split,
            "metric": None if scorer is None else scorer.name,
        }
        show_json(diagnosis.to_dict() | document)
    else:
        show(diagnosis)
    return 1 if diagnosis.cause.is_fault else 0


def _reference(request: Request, data: Data) -> tuple[Iterable[object] | None, list[str]]:
    """Return the training data in their own batches, and a note if they cannot be loaded."""
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
    """Return the expected score, negative if lower is better."""
    expected: float | None = values.expected
    if expected is None or scorer is None:
        return None
    scorer(model)  # chooses the metric, and so the sign
    return -expected if scorer.sign < 0 else expected


def _score_notes(scorer: ValidationScore | None) -> tuple[str, ...]:
    if scorer is None:
        return ("not scored: that takes a validation_step, and a data module",)
    return (f"the score is {scorer.meaning}, on the evaluation samples",)


@dataclass(frozen=True)
class _Commands:
    """Replaces the code that a cause proposes by commands, if one does it.

    Attributes:
        checkpoint: The checkpoint.
        options: Those of the command that found the cause.
    """

    checkpoint: str
    options: Sequence[Option]

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
        if not any(option.section == "reference" for option in self.options):
            advice += " (--data takes a function that gives the training loader, too)"
        step = f"bnguard recalibrate {self._named('data')}"
        return replace(cause, advice=advice, next_step=step)

    def _named(self, data: str) -> str:
        """Return the words that name the checkpoint and its model, and an option as ``--data``."""
        words = [self.checkpoint]
        for option in self.options:
            if option.section in {"model", "config", "weights", data}:
                first, *value = option.words
                in_place = re.sub(rf"^--{data}(?=$|[.=])", "--data", first)
                words += [in_place, *value]
        return shlex.join(words)
