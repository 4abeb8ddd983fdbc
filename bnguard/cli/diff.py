"""``bnguard diff``."""

from __future__ import annotations

import json

import rich

from bnguard.checkpoint import read_checkpoint
from bnguard.checkpoint.comparing import compare
from bnguard.cli.parsing import command_parser
from bnguard.report.difference import difference_document, difference_view

_EXAMPLES = """
examples:
  bnguard diff last.ckpt last-recalibrated.ckpt
  bnguard diff weights.pt weights-ema.pt --json
"""


def run(arguments: list[str]) -> int:
    """Compare two checkpoints; status 1 where anything but running statistics differs."""
    parser = command_parser(
        "diff",
        "Compare two checkpoints: BN layers in standard deviations and log-variance "
        "ratio, everything else bit by bit. Status 1 where anything else differs.",
        _EXAMPLES,
    )
    parser.add_argument("before", type=str, help="the first checkpoint")
    parser.add_argument("after", type=str, help="the second")
    parser.add_argument("--verbose", action="store_true", help="show every layer and entry")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    values = parser.parse_args(arguments)

    difference = compare(read_checkpoint(values.before), read_checkpoint(values.after))
    if values.json:
        print(json.dumps(difference_document(difference), indent=2))
    else:
        rich.print(difference_view(difference, is_verbose=values.verbose))
    return int(bool(difference.entries))
