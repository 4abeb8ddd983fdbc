"""``bnguard diff``."""

from __future__ import annotations

from jsonargparse import ArgumentParser

from bnguard.checkpoint import Checkpoint, read_checkpoint
from bnguard.checkpoint.comparing import compare
from bnguard.cli.output import command_parser
from bnguard.cli.showing import show, show_document
from bnguard.errors import ConfigurationError
from bnguard.report.difference import difference_document, difference_view

_EXAMPLES = """
examples:
  bnguard diff last.ckpt last-recalibrated.ckpt
  bnguard diff last.pth.tar --weights state_dict state_dict_ema
"""


def run(arguments: list[str]) -> int:
    """Compare two checkpoints; status 1 where anything but running statistics differs."""
    values = make_parser().parse_args(arguments)

    names = values.weights or [None]
    if len(names) > 2:
        raise ConfigurationError("--weights takes one name, or one for each checkpoint")
    if values.after is None and len(names) < 2:
        raise ConfigurationError(
            "one checkpoint is named: name a second, or two models of this with --weights A B"
        )
    before = _read(values.before, names[0])
    after = _read(values.after or values.before, names[-1])
    difference = compare(before, after)
    if values.json:
        show_document(difference_document(difference))
    else:
        show(difference_view(difference, is_verbose=values.verbose))
    return int(bool(difference.entries))


def make_parser() -> ArgumentParser:
    """Return the parser of the command."""
    parser = command_parser(
        "diff",
        "Compare two checkpoints: BN layers in standard deviations and log-variance "
        "ratio, everything else bit by bit. Status 1 where anything else differs.",
        _EXAMPLES,
    )
    parser.add_argument("before", type=str, help="the first checkpoint")
    parser.add_argument(
        "after", type=str, nargs="?", help="the second; the first again where it is left out"
    )
    parser.add_argument("--verbose", action="store_true", help="show every layer and entry")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument(
        "--weights",
        type=str,
        nargs="+",
        help="which models of files that hold several: the first's, and the second's if another",
    )
    return parser


def _read(path: str, model: str | None) -> Checkpoint:
    checkpoint = read_checkpoint(path)
    return checkpoint if model is None else checkpoint.only(checkpoint.model_named(model).prefix)
