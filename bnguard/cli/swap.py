"""``bnguard swap``."""

from __future__ import annotations

from typing import Literal

from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt, PositiveInt

from bnguard.cli.output import command_parser
from bnguard.cli.request import SUBJECTS_HELP, SUBJECTS_USAGE, WEIGHTS_HELP, asks_for_help

_EXAMPLES = """
examples:
  bnguard swap last.ckpt --to group --model my.LitModel --data my.DataModule
  bnguard swap lightning_logs/version_0/checkpoints/last.ckpt --to batch-renorm
"""
# Named here once more, because to ask for help must not import torch.
_TARGETS = "one of group, layer, instance, batch-renorm, frozen, sync"


def run(arguments: list[str]) -> int:
    """Write a checkpoint of the model with another norm, and print the lines that build it."""
    if asks_for_help(arguments):
        make_parser().parse_args(["--help"])
    # torch is imported from here on.
    from bnguard.cli.swapping import swap_checkpoint
    from bnguard.lightning.scoring import quiet_lightning

    with quiet_lightning():
        return swap_checkpoint(make_parser(), arguments)


def make_parser() -> ArgumentParser:
    """Return the parser of the command."""
    parser = command_parser(
        "swap",
        "Swap BN for another norm, let the network learn what it knew, and write a "
        "checkpoint of the swapped model beside the one given.",
        SUBJECTS_HELP + _EXAMPLES,
        SUBJECTS_USAGE,
    )
    parser.add_argument("checkpoint", type=str, help="checkpoint to read; it stays as it is")
    parser.add_argument("--weights", type=str, help=WEIGHTS_HELP)
    parser.add_argument("--to", type=str, default="group", help=_TARGETS)
    parser.add_argument("--groups", type=PositiveInt, default=32, help="groups of a layer, at most")
    parser.add_argument("--exclude", type=list[str], default=[], help="layers to leave")
    parser.add_argument(
        "--steps", type=NonNegativeInt, default=200, help="steps to learn at most; 0 only swaps"
    )
    parser.add_argument("--split", type=str, default="train", help="data to learn on")
    parser.add_argument("--device", type=str, default="cpu", help="cpu, cuda, cuda:1, mps, …")
    parser.add_argument(
        "--precision",
        type=Literal["32-true", "16-mixed", "bf16-mixed"],
        default="32-true",
        help="as the Trainer names it",
    )
    parser.add_argument("--metric", type=str, help="validation metric to show")
    parser.add_argument("--output", type=str, help="where to write; NAME-swapped by default")
    parser.add_argument("--force", action="store_true", help="write over an existing file")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser
