"""``bnguard diagnose``."""

from __future__ import annotations

from typing import Literal

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt

from bnguard.cli.output import command_parser
from bnguard.cli.request import SUBJECTS_HELP, SUBJECTS_USAGE, WEIGHTS_HELP, asks_for_help

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
    from bnguard.cli.diagnosing import diagnose_checkpoint
    from bnguard.lightning.scoring import quiet_lightning

    with quiet_lightning():
        return diagnose_checkpoint(make_parser(), arguments)


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
