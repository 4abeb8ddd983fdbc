"""``bnguard recalibrate``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal

import rich
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn

from bnguard.checkpoint import Checkpoint, load_state_dict, read_checkpoint, write_statistics
from bnguard.cli.subjects import Subject, built_loader, built_model, named_subjects
from bnguard.errors import CheckpointError, ConfigurationError
from bnguard.fixes.recalibrate import recalibrate
from bnguard.layers import BatchNormLayer, find_layers
from bnguard.version import __version__

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
"""


def run(arguments: list[str]) -> int:
    """Write a checkpoint with new running statistics beside the one given."""
    subjects, rest = named_subjects(arguments)
    parser = _parser()
    if {"-h", "--help"} & set(rest):
        parser.parse_args(rest)
    source = Path(_checkpoint_named(rest))
    checkpoint = read_checkpoint(source)
    if not checkpoint.layers:
        raise CheckpointError(f"{source}: has no BN layers, so there is nothing to recalibrate")
    _add_subjects(parser, subjects, checkpoint)
    values = parser.parse_args(rest)

    output = _output(source) if values.output is None else Path(values.output)
    if output.exists() and not values.force:
        raise CheckpointError(f"{output} exists already: choose another --output, or use --force")
    state = load_state_dict(source)
    model = built_model(subjects["model"], parser, values)
    _load(model, state, source)
    loader = built_loader(subjects["data"], parser, values)

    result = recalibrate(model.eval(), loader, method=values.method, samples=values.samples)
    rich.print(result)
    provenance = {
        "version": __version__,
        "action": "recalibrate",
        "method": result.method,
        "data": subjects["data"].path,
        "split": values.split,
        "samples": result.samples,
        "batches": result.batches,
    }
    statistics = _statistics(model, checkpoint)
    write_statistics(source, output, statistics, provenance, force=values.force)
    print(f"written: {output}")
    return 0


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
    parser.add_argument("--method", type=str, default="exact", help="how to compute them")
    parser.add_argument("--output", type=str, help="where to write; NAME-recalibrated by default")
    parser.add_argument("--force", action="store_true", help="write over an existing file")
    return parser


def _checkpoint_named(arguments: list[str]) -> str:
    """Return the checkpoint, which is read before the arguments of the model are known."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("checkpoint", nargs="?")
    named: str | None = first.parse_known_args(arguments)[0].checkpoint
    if named is None:
        raise ConfigurationError("no checkpoint is named: bnguard recalibrate CKPT --model …")
    return named


def _add_subjects(
    parser: ArgumentParser, subjects: dict[str, Subject], checkpoint: Checkpoint
) -> None:
    """Add the arguments of model and data; the model's start from the checkpoint's own."""
    for option in ("model", "data"):
        if option not in subjects:
            raise ConfigurationError(
                f"--{option} is missing: name it as --{option} package.module.Class"
            )
    subjects["model"].add_arguments(parser, checkpoint.hyper_parameters)
    subjects["data"].add_arguments(parser, {})


def _output(source: Path) -> Path:
    return source.with_name(f"{source.stem}-recalibrated{source.suffix}")


def _load(model: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Load the weights, or say in one line why they are not this model's."""
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{source} does not fit {type(model).__name__}: {reason}") from error
    wrong = [f"lacks {name}" for name in missing] + [f"has {name} too much" for name in unexpected]
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise CheckpointError(f"{source} does not fit {type(model).__name__}: it {wrong[0]}{more}")


def _statistics(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the BN statistics of a model by the names of their entries in the checkpoint."""
    layers = {layer.name: layer for layer in find_layers(model)}
    return {
        stored.key(attribute): tensor
        for stored in checkpoint.layers
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
