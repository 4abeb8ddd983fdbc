"""``bnguard recalibrate``: load, recalibrate, score, write, and tell."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeFloat, OpenUnitInterval, PositiveFloat, PositiveInt

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
from bnguard.cli.model_and_data import Data
from bnguard.cli.output import command_parser, say, show, show_document
from bnguard.cli.request import (
    SUBJECTS_HELP,
    SUBJECTS_USAGE,
    WEIGHTS_HELP,
    asks_for_help,
    requested,
)
from bnguard.errors import ConfigurationError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from bnguard.cli.scoring import Samples
    from bnguard.layers.bn_layer import BatchNormLayer
    from bnguard.lightning.scoring import ValidationScore
    from bnguard.recalibration.result import Recalibration

_EXAMPLES = """
examples:
  bnguard recalibrate last.ckpt --model my.LitModel --data my.DataModule
  bnguard recalibrate lightning_logs/version_0/checkpoints/last.ckpt --dry-run
  torchrun --nproc_per_node 2 -m bnguard recalibrate last.ckpt --dry-run
                          shares the samples out among processes
"""


def run(arguments: list[str]) -> int:
    """Write a checkpoint with new running statistics; status 1 where they are no better."""
    if asks_for_help(arguments):
        make_parser().parse_args(["--help"])
    # torch is imported from here on.
    from bnguard.lightning.scoring import quiet_lightning

    with _launched_ranks(), quiet_lightning():
        return _recalibrate_checkpoint(make_parser(), arguments)


def make_parser() -> ArgumentParser:
    """Return the parser of the command."""
    parser = command_parser(
        "recalibrate",
        "Write a checkpoint with new running statistics beside the one given.",
        SUBJECTS_HELP + _EXAMPLES,
        SUBJECTS_USAGE,
    )
    parser.add_argument("checkpoint", type=str, help="checkpoint to read")
    parser.add_argument("--weights", type=str, help=WEIGHTS_HELP)
    parser.add_argument(
        "--split", type=Literal["train", "val", "test"], default="val", help="data to use"
    )
    parser.add_argument("--samples", type=PositiveInt, default=1024, help="samples to use at most")
    parser.add_argument(
        "--method",
        type=Literal["exact", "precise", "adapt"],
        default="exact",
        help="exact: as one giant batch gives them; adapt: mixed with those from before by "
        "--prior; precise: each batch normalised by its own",
    )
    parser.add_argument(
        "--prior",
        type=NonNegativeFloat,
        default=0.0,
        help="for --method adapt: as how many samples the statistics from before count",
    )
    parser.add_argument(
        "--tolerance",
        type=PositiveFloat,
        help="stop when the standard errors are below this share of a standard deviation",
    )
    parser.add_argument(
        "--memory",
        type=OpenUnitInterval | str,
        default=0.5,
        help="2GiB, or a share of what is free",
    )
    parser.add_argument(
        "--holdout",
        type=OpenUnitInterval,
        help="share of the split that scores and does not calibrate",
    )
    parser.add_argument(
        "--metric",
        type=str,
        help="validation metric that decides; by default what the training's checkpoint callback "
        "monitored, else one named like an accuracy, else the loss",
    )
    parser.add_argument(
        "--keep",
        type=Literal["if-better", "always"],
        default="if-better",
        help="what to do when the score gets worse",
    )
    parser.add_argument("--device", type=str, default="cpu", help="cpu, cuda, cuda:1, mps, …")
    parser.add_argument(
        "--precision",
        type=Literal["32-true", "16-mixed", "bf16-mixed"],
        default="32-true",
        help="as the Trainer names it",
    )
    parser.add_argument("--output", type=str, help="where to write; NAME-recalibrated by default")
    parser.add_argument(
        "--in-place", action="store_true", help="replace the file, with the original as NAME.bak"
    )
    parser.add_argument("--dry-run", action="store_true", help="compute and score, write nothing")
    parser.add_argument("--force", action="store_true", help="write over an existing file")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def _recalibrate_checkpoint(parser: ArgumentParser, arguments: list[str]) -> int:
    """Do what the arguments say; the exit status is 1 where the statistics are no better."""
    import torch

    from bnguard.cli.devices import usable_device
    from bnguard.cli.scoring import NOT_SCORED, validation_score
    from bnguard.distributed import current_ranks

    request = requested(parser, arguments, "recalibrate")
    checkpoint, values = request.checkpoint, request.values
    output = _output(checkpoint.path, values)
    device = usable_device(values.device)
    model, stored = request.model()
    data = request.data(model)
    # A loader that shuffles gives the same samples each time.
    torch.manual_seed(0)
    samples = _samples(data, values)
    scorer = validation_score(request, model, samples.scoring, device)
    result = _recalibrated(model.eval(), samples, scorer, device, values)
    status = 0 if result.is_kept else 1
    if current_ranks().rank > 0:  # The first rank prints and writes.
        return status

    document = _document(result, stored, data, scorer, values)
    if scorer is None:
        meaning = NOT_SCORED
    else:
        others = "samples that did not calibrate"
        on = "the samples that calibrated" if samples.is_shared else others
        meaning = f"the score is {scorer.meaning}, on {on}"
    notes = [*request.notes, meaning]
    shared = checkpoint.shared_with(stored)
    if shared:
        more = f" and {len(shared) - 3} more" if len(shared) > 3 else ""
        listed = ", ".join(map(repr, shared[:3])) + more
        notes.append(f"changing {stored.name!r} also changes {listed} (they share storage)")
    if not data.is_module and values.split != parser.get_default("split"):
        notes.append(f"--split {values.split} was left out: {data.path} is a function")
    written, said = None, f"not written (--dry-run): {output}"
    if not result.is_kept:
        said = "not written: the score got worse (use --keep always to write it anyway)"
    elif not values.dry_run:
        statistics = _statistics(model, stored)
        written, said = _written(checkpoint, output, statistics, document, values)
    if values.json:
        show_document(
            {
                **document,
                **result.to_dict(),
                "written": None if written is None else str(written),
                "notes": [*result.notes, *notes],
            }
        )
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
    import torch

    from bnguard.cli.scoring import forward_of
    from bnguard.recalibration.api import recalibrate

    autocast = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
    dtype = autocast.get(values.precision)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        return recalibrate(
            model.to(device),
            _share_of_rank(samples.calibration),
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
    from bnguard.cli.scoring import Samples, split_samples

    loader = data.loader(values.split)
    if not data.is_module:
        if values.holdout is not None:
            raise ConfigurationError("--holdout needs a data module: a bare loader does not score")
        return Samples(loader, None, is_shared=False)
    if values.split == "val":
        return split_samples(loader, values.samples, values.holdout)
    if values.holdout is not None:
        raise ConfigurationError("--holdout is for --split val; other splits score on val anyway")
    return Samples(loader, data.loader("val") if data.has("val") else None, is_shared=False)


def _statistics(model: nn.Module, stored: CheckpointModel) -> dict[str, Tensor]:
    """Return the BN statistics of a model by the names of their entries in the checkpoint."""
    from bnguard.layers.bn_layer import find_layers

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


# Under a launcher such as torchrun each process has a share of the data, and one writes.


@contextmanager
def _launched_ranks() -> Iterator[None]:
    """Join the processes that a launcher started, for as long as this lasts; or run alone."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_torchelastic_launched()) or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo")  # What is exchanged is small, and in the memory of the host.
    try:
        yield
    finally:
        dist.destroy_process_group()


def _share_of_rank(loader: Iterable[object]) -> Iterable[object]:
    """Return this rank's share of a loader: samples drawn at random where they can be, or batches.

    The random order is the same on all ranks, so no sample is in two shares.
    """
    from bnguard.cli.scoring import has_samples, loader_over, shuffled_indices
    from bnguard.distributed import current_ranks

    ranks = current_ranks()
    if ranks.size == 1:
        return loader
    if not has_samples(loader):
        return islice(loader, ranks.rank, None, ranks.size)
    return loader_over(loader, shuffled_indices(loader)[ranks.rank :: ranks.size])
