"""``bnguard recalibrate``: load, recalibrate, score, write, and report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeFloat, OpenUnitInterval, PositiveFloat, PositiveInt

from bnguard.checkpoint import (
    CheckpointModel,
    check_backup,
    check_output,
    file_states,
    name_beside,
    original_of,
    replace_statistics,
    write_statistics,
)
from bnguard.cli.model_and_data import Data
from bnguard.cli.output import say, show, show_json
from bnguard.cli.request import Request, add_writing_options, model_command_parser, run_request
from bnguard.errors import CheckpointError, ConfigurationError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from bnguard.cli.scoring import SampleSplit
    from bnguard.lightning.scoring import ValidationScore
    from bnguard.recalibration.result import Recalibration

_SPLIT = "val"
_EXAMPLES = """
examples:
  bnguard recalibrate last.ckpt --model my.LitModel --data my.DataModule
  bnguard recalibrate lightning_logs/version_0/checkpoints/last.ckpt --dry-run
  torchrun --nproc_per_node 2 -m bnguard recalibrate last.ckpt --dry-run
                          shares the samples out among processes
"""


def run(arguments: list[str]) -> int:
    """Write a checkpoint with new running statistics; status 1 if they are not better."""
    return run_request(make_parser(), arguments, _recalibrate_checkpoint)


def make_parser() -> ArgumentParser:
    """Return the parser of the command."""
    parser = model_command_parser(
        "recalibrate",
        "Write a checkpoint with new running statistics next to the one given.",
        _EXAMPLES,
    )
    parser.add_argument(
        "--split", type=Literal["train", "val", "test"], default=_SPLIT, help="data to use"
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
        "--keep",
        type=Literal["if-better", "always"],
        default="if-better",
        help="what to do when the score gets worse",
    )
    parser.add_argument(
        "--in-place", action="store_true", help="replace the file, with the original as NAME.bak"
    )
    parser.add_argument("--dry-run", action="store_true", help="compute and score, write nothing")
    add_writing_options(parser, "recalibrated")
    return parser


@contextmanager
def _join_launched_ranks() -> Iterator[None]:
    """Join the other processes if a launcher such as torchrun started this one."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_torchelastic_launched()) or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo")  # The statistics are small, and in host memory.
    try:
        yield
    finally:
        dist.destroy_process_group()


@_join_launched_ranks()
def _recalibrate_checkpoint(request: Request) -> int:
    """Recalibrate; return 1 if the new statistics are not better."""
    import torch

    from bnguard.cli.scoring import NOT_SCORED, usable_device, validation_score
    from bnguard.distributed import Ranks

    checkpoint, values = request.checkpoint, request.values
    output = _output(checkpoint.path, values)
    device = usable_device(values.device)
    model, stored = request.model()
    if not values.dry_run and not all(layer.is_writable for layer in stored.layers):
        raise CheckpointError(
            f"{checkpoint.path}: its statistics are NumPy arrays, which bnguard reads but does not "
            "change; save {k: torch.as_tensor(v) for k, v in state.items()} by torch.save"
        )
    data = request.data(model)
    torch.manual_seed(0)  # so that a shuffling loader gives the same samples each time
    samples = _samples(data, values)
    scorer = validation_score(request, model, samples.scoring, device)
    result = _recalibrate_model(model.eval(), samples, scorer, device, values)
    status = 0 if result.is_kept else 1
    if Ranks().rank > 0:  # The first rank prints and writes.
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
    if not data.is_module and values.split != _SPLIT:
        notes.append(f"--split {values.split} was ignored: {data.path} has no splits")
    written, said = None, f"not written (--dry-run): {output}"
    if not result.is_kept:
        said = "not written: the score got worse (use --keep always to write it anyway)"
    elif not values.dry_run:
        if file_states(checkpoint.path) != request.states:
            raise CheckpointError(
                f"{checkpoint.path}: was saved again meanwhile, so the new statistics are not "
                "those of its weights; nothing was written: run the command again"
            )
        written = output
        statistics = _statistics(model, stored)
        if values.in_place:
            backup = replace_statistics(output, statistics, document, force=values.force)
            said = f"written: {output}, with the original as {backup}"
        else:
            write_statistics(checkpoint.path, output, statistics, document, force=values.force)
            said = f"written: {output}"
    if values.json:
        show_json(
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


def _recalibrate_model(
    model: nn.Module,
    samples: SampleSplit,
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
    """Return what was done, for the provenance of the new checkpoint and for ``--json``."""
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
    """Return where the result goes; fail before the work if it cannot be written there."""
    if values.output is not None and values.in_place:
        raise ConfigurationError("--output and --in-place exclude each other: remove one")
    if values.in_place:
        if not values.dry_run:
            check_backup(original_of(source), force=values.force)
        return source
    output = name_beside(source, "recalibrated") if values.output is None else Path(values.output)
    if not values.dry_run:
        check_output(output, source, is_folder=source.is_dir(), force=values.force)
    return output


def _samples(data: Data, values: Namespace) -> SampleSplit:
    """Return what calibrates and what scores: the validation samples that do not calibrate."""
    from bnguard.cli.scoring import SampleSplit, split_samples

    loader = data.loader(values.split)
    if not data.is_module:
        if values.holdout is not None:
            raise ConfigurationError("--holdout needs a data module: a bare loader does not score")
        return SampleSplit(loader, None, is_shared=False)
    if values.split == "val":
        return split_samples(loader, values.samples, values.holdout)
    if values.holdout is not None:
        raise ConfigurationError("--holdout is for --split val; other splits score on val anyway")
    return SampleSplit(loader, data.loader("val") if data.has("val") else None, is_shared=False)


def _statistics(model: nn.Module, stored: CheckpointModel) -> dict[str, Tensor]:
    """Return the BN statistics of a model by the names of their entries in the checkpoint."""
    from bnguard.layers.bn_layer import find_layers

    statistics: dict[str, Tensor] = {}
    layers = {layer.name: layer for layer in find_layers(model)}
    for entry in stored.layers:
        if entry.name not in layers:
            continue
        layer = layers[entry.name]
        names = layer.adapter.mean, layer.adapter.var, layer.adapter.counter
        tensors = layer.running_mean, layer.running_var, layer.counter
        for name, tensor in zip(names, tensors, strict=True):
            if name and tensor is not None:
                statistics[entry.key(name)] = tensor
    return statistics


def _share_of_rank(loader: Iterable[object]) -> Iterable[object]:
    """Return this rank's share of a loader: random samples if it has a data set, else batches.

    The random order is the same on all ranks, so no sample is in two shares.
    """
    from bnguard.distributed import Ranks
    from bnguard.recalibration.batches import can_draw, load_samples, shuffle_indices

    ranks = Ranks()
    if ranks.size == 1:
        return loader
    if not can_draw(loader):
        return islice(loader, ranks.rank, None, ranks.size)
    order = shuffle_indices(len(loader.dataset))  # type: ignore[arg-type]
    return load_samples(loader, order[ranks.rank :: ranks.size])
