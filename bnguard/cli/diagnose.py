"""``bnguard diagnose``: load, try other statistics, and report."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt

from bnguard.cli.model_and_data import Data
from bnguard.cli.output import show, show_json
from bnguard.cli.request import Request, model_command_parser, run_request
from bnguard.errors import ConfigurationError

if TYPE_CHECKING:
    from bnguard.lightning.scoring import ValidationScore
    from bnguard.whatif.result import Verdict

_REFERENCE = """\
  --reference PACKAGE:function
                          function that returns the training loader, if
                          --data returns the evaluation loader
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
        "--expected", type=float, help="what the metric should be, such as its value in training"
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
        # Its sign is known once the scorer has chosen a metric.
        expected_score=None
        if scorer is None or values.expected is None
        else lambda: scorer.sign * values.expected,
        progress=not values.json,
    )
    diagnosis = replace(
        diagnosis,
        cause=_propose_command(diagnosis.cause, request, is_module=data.is_module),
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


def _score_notes(scorer: ValidationScore | None) -> tuple[str, ...]:
    from bnguard.cli.scoring import NOT_SCORED

    if scorer is None:
        return (NOT_SCORED,)
    return (f"the score is {scorer.meaning}, on the evaluation samples",)


def _propose_command(cause: Verdict, request: Request, *, is_module: bool) -> Verdict:
    """Return the cause with a command in place of the code that it proposes, if one does it.

    With ``is_module`` the data have splits; else each loader has a function of its own.
    """
    split = request.values.split
    match cause.name, cause.cured_by:
        case "unfit-statistics", _ if is_module:
            advice = "recalibrate on these data; data with a training split would tell why"
            step = _command("recalibrate", request, "--split", split)
        case "unfit-statistics", _:
            advice = "pass the training data to tell the two apart"
            step = _command("diagnose", request, "--reference", "PACKAGE:function")
        case "weights", _ if is_module:
            advice, step = cause.advice, _command("diagnose", request, "--split", "train")
        case ("correlated-batches", _) | (_, None):
            return cause
        case _, cured_by if is_module:
            on = "train" if cured_by == "reference" else split
            advice, step = cause.advice, _command("recalibrate", request, "--split", on)
        case _, "reference":
            advice, step = cause.advice, _command("recalibrate", request, data="reference")
        case _, _ if "reference" in request.factories:
            advice, step = cause.advice, _command("recalibrate", request)
        case _:
            advice = f"{cause.advice} (PACKAGE:function gives the training loader)"
            step = _command("recalibrate", request, "--data", "PACKAGE:function", data="reference")
    return replace(cause, advice=advice, next_step=step)


def _command(name: str, request: Request, *more: str, data: str = "data") -> str:
    """Return a command on the same checkpoint and model, with the data that an option names."""
    words = ["bnguard", name, str(request.checkpoint.path)]
    for option in request.options:
        if option.name.partition(".")[0] in {"model", "config", "weights", data}:
            first, *value = option.words
            words += [re.sub(rf"^--{data}(?=$|[.=])", "--data", first), *value]
    return shlex.join([*words, *more])
