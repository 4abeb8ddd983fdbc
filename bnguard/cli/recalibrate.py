"""``bnguard recalibrate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import rich
import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import OpenUnitInterval, PositiveInt
from torch import Tensor, nn

from bnguard.checkpoint import (
    Checkpoint,
    load_state_dict,
    read_checkpoint,
    replace_statistics,
    write_statistics,
)
from bnguard.cli.loading import add_subjects, checkpoint_named, load_weights
from bnguard.cli.ranks import is_first_rank, launched_ranks, share_of_rank
from bnguard.cli.scoring import Samples, Scorer, has_validation, is_lower_better, shared_out
from bnguard.cli.subjects import (
    Subject,
    built_data,
    built_model,
    configuration_beside,
    named_subjects,
)
from bnguard.errors import CheckpointError, ConfigurationError
from bnguard.fixes.recalibrate import recalibrate
from bnguard.fixes.recalibration import Recalibration
from bnguard.layers import BatchNormLayer, find_layers
from bnguard.report.document import recalibration_document

_EPILOG = """
the model and its data:
  --model PACKAGE.Class   class or function that makes the model; its own arguments
                          follow as --model.NAME, and start from the hyper-parameters
                          that the checkpoint holds
  --data PACKAGE.Class    class of a data module, or function that gives a loader; its
                          own arguments follow as --data.NAME
  --config FILE           both of them, as LightningCLI saved them

examples:
  bnguard recalibrate last.ckpt --model my.LitModel --data my.DataModule --split train
  bnguard recalibrate last.ckpt --config lightning_logs/version_0/config.yaml
  torchrun --nproc_per_node 2 -m bnguard recalibrate last.ckpt --config config.yaml
                          shares the samples out among processes
"""


def run(arguments: list[str]) -> int:
    """Write a checkpoint with new running statistics; status 1 where they are no better."""
    with launched_ranks():
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    subjects, rest = named_subjects(arguments)
    parser = _parser()
    if {"-h", "--help"} & set(rest):
        parser.parse_args(rest)
    source = checkpoint_named(rest, "recalibrate")
    checkpoint = read_checkpoint(source)
    if not checkpoint.layers:
        raise CheckpointError(f"{source}: has no BN layers, so there is nothing to recalibrate")
    if not subjects and (config := configuration_beside(source)) is not None:
        subjects, rest = named_subjects([*rest, "--config", str(config)])
    add_subjects(parser, subjects, checkpoint)
    values = parser.parse_args(rest)

    output = _output(source, values)
    model = built_model(subjects["model"], parser, values)
    load_weights(model, load_state_dict(source), source)
    samples = _samples(subjects["data"], parser, values)
    scorer = _scorer(model, samples, values)
    result = _recalibrated(model.eval(), samples, scorer, values)
    status = 0 if result.is_kept else 1
    if not is_first_rank():
        return status

    document = {
        "action": "recalibrate",
        "method": result.method,
        "data": subjects["data"].path,
        "split": values.split,
        "samples": result.samples,
        "batches": result.batches,
        "metric": None if scorer is None else scorer.metric,
        "score_before": result.score_before,
        "score_after": result.score_after,
    }
    notes = _notes(samples, scorer)
    if not result.is_kept:
        written, said = (
            None,
            "not written: the score got worse (--keep always writes it all the same)",
        )
    elif values.dry_run:
        written, said = None, f"not written (--dry-run): {output}"
    else:
        statistics = _statistics(model, checkpoint)
        if values.in_place:
            backup = replace_statistics(source, statistics, document, force=values.force)
            written, said = source, f"written: {source}, with the original as {backup}"
        else:
            written = write_statistics(source, output, statistics, document, force=values.force)
            said = f"written: {written}"
    if values.json:
        print(json.dumps(recalibration_document(result, document, notes, written), indent=2))
    else:
        rich.print(result)
        for line in (*notes, said):
            print(line)
    return status


def _recalibrated(
    model: nn.Module, samples: Samples, scorer: Scorer | None, values: Namespace
) -> Recalibration:
    device = torch.device("cuda" if values.device == "gpu" else values.device)
    dtype = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(values.precision)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        return recalibrate(
            model.to(device),
            share_of_rank(samples.calibration),
            method=values.method,
            samples=values.samples,
            score=scorer,
            keep=values.keep,
            progress=not values.json,
        )


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "bnguard recalibrate",
        description="Write a checkpoint with new running statistics beside the one given.",
        epilog=_EPILOG,
        exit_on_error=False,
    )
    parser.add_argument("checkpoint", type=str, help="checkpoint to read; it stays as it is")
    parser.add_argument(
        "--split", type=Literal["train", "val", "test"], default="val", help="data to use"
    )
    parser.add_argument("--samples", type=PositiveInt, default=1024, help="samples to use at most")
    parser.add_argument("--method", type=Literal["exact", "precise"], default="exact")
    parser.add_argument(
        "--holdout",
        type=OpenUnitInterval,
        help="share of the split that scores and does not calibrate",
    )
    parser.add_argument("--metric", type=str, help="validation metric that decides")
    parser.add_argument(
        "--keep",
        type=Literal["if-better", "always"],
        default="if-better",
        help="what to do when the score gets worse",
    )
    parser.add_argument("--device", type=Literal["cpu", "gpu"], default="cpu")
    parser.add_argument(
        "--precision", type=Literal["32-true", "16-mixed", "bf16-mixed"], default="32-true"
    )
    parser.add_argument("--output", type=str, help="where to write; NAME-recalibrated by default")
    parser.add_argument(
        "--in-place", action="store_true", help="replace the file, with the original as NAME.bak"
    )
    parser.add_argument("--dry-run", action="store_true", help="compute and score, write nothing")
    parser.add_argument("--force", action="store_true", help="write over an existing file")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def _output(source: Path, values: Namespace) -> Path:
    """Return where the result goes; what stands there already is found out before the work."""
    if values.output is not None and values.in_place:
        raise ConfigurationError("--output and --in-place exclude each other: leave one out")
    beside = source.with_name(f"{source.stem}-recalibrated{source.suffix}")
    output = beside if values.output is None else Path(values.output)
    taken = source.with_name(f"{source.name}.bak") if values.in_place else output
    if taken.exists() and not (values.force or values.dry_run):
        raise CheckpointError(f"{taken} exists already: choose another --output, or use --force")
    return output


def _samples(subject: Subject, parser: ArgumentParser, values: Namespace) -> Samples:
    """Return what calibrates and what scores: the validation split, as far as it is not used."""
    data = built_data(subject, parser, values)
    loader = data.loader(values.split)
    if not data.is_module:
        return Samples(loader, None, is_shared=False)
    if values.split == "val":
        return shared_out(loader, values.samples, values.holdout)
    if values.holdout is not None:
        raise ConfigurationError("--holdout is for --split val; other splits score on val anyway")
    return Samples(loader, data.loader("val") if data.has("val") else None, is_shared=False)


def _scorer(model: nn.Module, samples: Samples, values: Namespace) -> Scorer | None:
    if samples.scoring is None or not has_validation(model):
        if values.metric is not None:
            raise ConfigurationError("--metric needs a LightningModule with a validation_step")
        return None
    return Scorer(samples.scoring, values.device, values.precision, values.metric)


def _notes(samples: Samples, scorer: Scorer | None) -> list[str]:
    if scorer is None:
        return ["not scored: that takes a validation_step, and validation data"]
    metric = scorer.metric or ""
    sign = f"minus {metric}, which is better when lower" if is_lower_better(metric) else metric
    on = "the samples that calibrated" if samples.is_shared else "samples that did not calibrate"
    return [f"the score is {sign}, on {on}"]


def _statistics(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the BN statistics of a model by the names of their entries in the checkpoint."""
    layers = {layer.name: layer for layer in find_layers(model)}
    # Of several models in a file, averaged weights perhaps, the one whose weights were loaded.
    lightning = [stored for stored in checkpoint.models if stored.prefix == "state_dict."]
    (loaded, *_) = lightning or checkpoint.models
    return {
        stored.key(attribute): tensor
        for stored in loaded.layers
        if stored.name in layers
        for attribute, tensor in _named_statistics(layers[stored.name]).items()
    }


def _named_statistics(layer: BatchNormLayer) -> dict[str, Tensor]:
    statistics = {
        layer.adapter.mean: layer.running_mean,
        layer.adapter.var: layer.running_var,
        layer.adapter.counter: layer.counter,
    }
    return {name: tensor for name, tensor in statistics.items() if name and tensor is not None}
