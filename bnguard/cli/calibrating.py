"""The work of ``bnguard recalibrate``: load, calibrate, score, write, and tell."""

from __future__ import annotations

from pathlib import Path

import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor, nn

from bnguard.checkpoint import (
    Checkpoint,
    CheckpointModel,
    check_backup,
    check_output,
    name_beside,
    original_of,
    replace_statistics,
    write_statistics,
)
from bnguard.cli.devices import is_first_rank, share_of_rank, usable_device
from bnguard.cli.model_and_data import Data
from bnguard.cli.output import say, show, show_document
from bnguard.cli.request import Request, requested
from bnguard.cli.scoring import NOT_SCORED, forward_of, has_validation, trainer_score
from bnguard.cli.sharing import Samples, shared_out
from bnguard.errors import ConfigurationError
from bnguard.layers.bn_layer import BatchNormLayer, find_layers
from bnguard.lightning.scoring import ValidationScore
from bnguard.recalibration.api import recalibrate
from bnguard.recalibration.result import Recalibration
from bnguard.report.json_document import recalibration_document

_AUTOCAST = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


def recalibrate_checkpoint(parser: ArgumentParser, arguments: list[str]) -> int:
    """Do what the arguments say; the exit status is 1 where the statistics are no better."""
    request = requested(parser, arguments, "recalibrate")
    checkpoint, values = request.checkpoint, request.values
    output = _output(checkpoint.path, values)
    device = usable_device(values.device)
    model, stored = request.model()
    data = request.data(model)
    # A loader that shuffles gives the same samples each time.
    torch.manual_seed(0)
    samples = _samples(data, values)
    scorer = _scorer(model, samples, device, request)
    result = _recalibrated(model.eval(), samples, scorer, device, values)
    status = 0 if result.is_kept else 1
    if not is_first_rank():
        return status

    document = _document(result, stored, data, scorer, values)
    notes = [*request.notes, *_notes(samples, scorer)]
    others = checkpoint.shared_with(stored)
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        named = ", ".join(map(repr, others[:3])) + more
        notes.append(f"changing {stored.name!r} also changes {named} (they share storage)")
    if not data.is_module and values.split != parser.get_default("split"):
        notes.append(f"--split {values.split} was left out: {data.path} is a function")
    written, said = None, f"not written (--dry-run): {output}"
    if not result.is_kept:
        said = "not written: the score got worse (--keep always writes it all the same)"
    elif not values.dry_run:
        statistics = _statistics(model, stored)
        written, said = _written(checkpoint, output, statistics, document, values)
    if values.json:
        show_document(recalibration_document(result, document, notes, written))
    else:
        show(result)
        for line in (*notes, said):
            say(line)
    return status


def _recalibrated(
    model: nn.Module,
    samples: Samples,
    scorer: ValidationScore | None,
    device: torch.device,
    values: Namespace,
) -> Recalibration:
    dtype = _AUTOCAST.get(values.precision)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        return recalibrate(
            model.to(device),
            share_of_rank(samples.calibration),
            method=values.method,
            samples=values.samples,
            forward=forward_of(model),
            score=scorer,
            keep=values.keep,
            prior=values.prior,
            memory=values.memory,
            tolerance=values.tolerance,
            progress=not values.json,
        )


def _document(
    result: Recalibration,
    stored: CheckpointModel,
    data: Data,
    scorer: ValidationScore | None,
    values: Namespace,
) -> dict[str, object]:
    """Return what was done, as the checkpoint that is written keeps it and ``--json`` prints it."""
    return {
        "action": "recalibrate",
        "method": result.method,
        "prior": values.prior,
        "weights": stored.name,
        "data": data.path,
        "split": values.split if data.is_module else None,
        "samples": result.samples,
        "batches": result.batches,
        "metric": None if scorer is None else scorer.name,
        "score_before": result.score_before,
        "score_after": result.score_after,
    }


def _output(source: Path, values: Namespace) -> Path:
    """Return where the result goes; what stands there already is found out before the work."""
    if values.output is not None and values.in_place:
        raise ConfigurationError("--output and --in-place exclude each other: leave one out")
    if values.in_place:
        if not values.dry_run:
            check_backup(original_of(source), force=values.force)
        return source
    output = name_beside(source, "recalibrated") if values.output is None else Path(values.output)
    if not values.dry_run:
        check_output(output, source, is_folder=source.is_dir(), force=values.force)
    return output


def _written(
    checkpoint: Checkpoint,
    output: Path,
    statistics: dict[str, Tensor],
    document: dict[str, object],
    values: Namespace,
) -> tuple[Path, str]:
    """Write the checkpoint, and return where, and what to tell."""
    if values.in_place:
        backup = replace_statistics(output, statistics, document, force=values.force)
        return output, f"written: {output}, with the original as {backup}"
    write_statistics(checkpoint.path, output, statistics, document, force=values.force)
    return output, f"written: {output}"


def _samples(data: Data, values: Namespace) -> Samples:
    """Return what calibrates and what scores: the validation split, as far as it is not used."""
    loader = data.loader(values.split)
    if not data.is_module:
        if values.holdout is not None:
            raise ConfigurationError("--holdout needs a data module: a bare loader does not score")
        return Samples(loader, None, is_shared=False)
    if values.split == "val":
        return shared_out(loader, values.samples, values.holdout)
    if values.holdout is not None:
        raise ConfigurationError("--holdout is for --split val; other splits score on val anyway")
    return Samples(loader, data.loader("val") if data.has("val") else None, is_shared=False)


def _scorer(
    model: nn.Module, samples: Samples, device: torch.device, request: Request
) -> ValidationScore | None:
    values = request.values
    if samples.scoring is None or not has_validation(model):
        if values.metric is not None:
            raise ConfigurationError(
                "--metric needs a LightningModule with a validation_step, and validation data"
            )
        return None
    return trainer_score(
        samples.scoring, device, values.precision, values.metric, request.checkpoint
    )


def _notes(samples: Samples, scorer: ValidationScore | None) -> list[str]:
    if scorer is None:
        return [NOT_SCORED]
    on = "the samples that calibrated" if samples.is_shared else "samples that did not calibrate"
    return [f"the score is {scorer.meaning}, on {on}"]


def _statistics(model: nn.Module, stored: CheckpointModel) -> dict[str, Tensor]:
    """Return the BN statistics of a model by the names of their entries in the checkpoint."""
    layers = {layer.name: layer for layer in find_layers(model)}
    return {
        layer.key(attribute): tensor
        for layer in stored.layers
        if layer.name in layers
        for attribute, tensor in _named_statistics(layers[layer.name]).items()
    }


def _named_statistics(layer: BatchNormLayer) -> dict[str, Tensor]:
    statistics = {
        layer.adapter.mean: layer.running_mean,
        layer.adapter.var: layer.running_var,
        layer.adapter.counter: layer.counter,
    }
    return {name: tensor for name, tensor in statistics.items() if name and tensor is not None}
