"""``bnguard diff``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from jsonargparse import ArgumentParser
from rich.console import Group, RenderableType
from rich.text import Text

from bnguard.checkpoint import Checkpoint, read_checkpoint
from bnguard.checkpoint.comparing import compare
from bnguard.cli.output import add_json_option, command_parser, show, show_json
from bnguard.errors import ConfigurationError
from bnguard.findings import counted
from bnguard.layers.distances import largest
from bnguard.report.json_document import add_version
from bnguard.report.terminal import layer_table, moved_text, number_text

if TYPE_CHECKING:
    from bnguard.checkpoint.comparing import CheckpointDifference, LayerDifference

_MOST_SHOWN = 10
_EXAMPLES = """
examples:
  bnguard diff last.ckpt last-recalibrated.ckpt
  bnguard diff last.pth.tar --weights state_dict state_dict_ema
"""


def run(arguments: list[str]) -> int:
    """Compare two checkpoints; status 1 if anything but running statistics differs."""
    values = make_parser().parse_args(arguments)

    names = values.weights or [None]
    if len(names) > 2:
        raise ConfigurationError("--weights takes one name, or one for each checkpoint")
    if values.after is None and len(names) < 2:
        raise ConfigurationError(
            "diff needs two checkpoints, or one and --weights A B for two of its models"
        )
    before = _read(values.before, names[0])
    after = _read(values.after or values.before, names[-1])
    difference = compare(before, after)
    if values.json:
        show_json(difference_document(difference))
    else:
        show(difference_view(difference, is_verbose=values.verbose))
    return int(bool(difference.entries))


def make_parser() -> ArgumentParser:
    """Return the parser of the command."""
    parser = command_parser(
        "diff",
        "Compare two checkpoints: BN layers in standard deviations and factors of the "
        "variance, everything else bit by bit. Status 1 if anything else differs.",
        _EXAMPLES,
    )
    parser.add_argument("before", type=str, help="the first checkpoint")
    parser.add_argument("after", type=str, nargs="?", help="the second; by default the first again")
    parser.add_argument("--verbose", action="store_true", help="show every layer and entry")
    add_json_option(parser)
    parser.add_argument(
        "--weights",
        type=str,
        nargs="+",
        help="which models of files that hold several: the first's, and the second's if another",
    )
    return parser


def difference_view(difference: CheckpointDifference, *, is_verbose: bool) -> RenderableType:
    """Return the layers, the furthest moved first, and what else differs."""
    layers, entries = difference.layers, difference.entries
    moved = [layer for layer in layers if not layer.is_identical]
    moved.sort(key=_distance, reverse=True)
    most = None if is_verbose else _MOST_SHOWN
    differ = "entry differs" if len(entries) == 1 else "entries differ"
    heading = (
        f"{len(moved)} of {len(layers)} BN layers have other statistics · "
        f"{len(entries) or 'no'} other {differ}"
    )
    parts: list[RenderableType] = [Text(heading, style="bold")]
    if moved:
        parts.append(_layers_view(moved[:most]))
    lines = []
    if len(moved[:most]) < len(moved):
        more = counted(len(moved) - _MOST_SHOWN, "more layer")
        lines.append(f"and {more} (--verbose shows all)")
    if layers and not moved and entries:
        lines.append("the statistics are the same and other entries are not: do they fit?")
    if not layers:
        lines.append("no BN layer is in both, by name and channels: are they the same network?")
    lines += [f"{entry.key}: {entry.detail}" for entry in entries[:most]]
    if len(entries[:most]) < len(entries):
        more = counted(len(entries) - _MOST_SHOWN, "more entry", "more entries")
        lines.append(f"and {more} (--verbose shows all)")
    return Group(*parts, *map(Text, lines))


def difference_document(difference: CheckpointDifference) -> dict[str, Any]:
    """Return a comparison as plain data; numbers are absolute, null if not finite."""
    content = {
        "before": str(difference.before),
        "after": str(difference.after),
        "layers": [
            {
                "name": layer.name,
                "identical": layer.is_identical,
                "max_shift_std": largest(layer.shift_std),
                "max_log_variance_ratio": largest(layer.log_variance_ratio),
            }
            for layer in difference.layers
        ],
        "entries": [{"key": entry.key, "detail": entry.detail} for entry in difference.entries],
    }
    return add_version(content)


def _layers_view(layers: list[LayerDifference]) -> RenderableType:
    headings = ("layer", "updates before", "after", "shift, σ", "variance off by")
    rows = (
        (
            layer.name,
            number_text(layer.before.counter),
            number_text(layer.after.counter),
            *moved_text(largest(layer.shift_std), largest(layer.log_variance_ratio)),
        )
        for layer in layers
    )
    return layer_table(headings, rows)


def _distance(layer: LayerDifference) -> float:
    numbers = (layer.shift_std, np.abs(layer.log_variance_ratio))
    if not all(np.isfinite(values).all() for values in numbers):
        return float("inf")
    return max(largest(values) or 0.0 for values in numbers)


def _read(path: str, model: str | None) -> Checkpoint:
    checkpoint = read_checkpoint(path)
    return checkpoint if model is None else checkpoint.only(model)
