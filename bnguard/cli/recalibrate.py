"""``bnguard recalibrate``."""

from __future__ import annotations

from typing import Literal

from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeFloat, OpenUnitInterval, PositiveFloat, PositiveInt

from bnguard.cli.output import command_parser
from bnguard.cli.request import SUBJECTS_HELP, SUBJECTS_USAGE, WEIGHTS_HELP, asks_for_help

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
    from bnguard.cli.calibrating import recalibrate_checkpoint
    from bnguard.cli.devices import launched_ranks
    from bnguard.lightning.scoring import quiet_lightning

    with launched_ranks(), quiet_lightning():
        return recalibrate_checkpoint(make_parser(), arguments)


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
