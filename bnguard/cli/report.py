"""``bnguard report``."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser

from bnguard.cli.output import add_json_option, command_parser, say, show, show_json
from bnguard.report.json_document import add_version

_EXAMPLES = """
examples:
  bnguard report lightning_logs/
  bnguard report lightning_logs/ --html batchnorm.html
"""


def run(arguments: list[str]) -> int:
    """Print the last report of each run in a log directory, or write all of it as one page."""
    values = make_parser().parse_args(arguments)
    # TensorBoard, which takes a second to import, is not needed to say what this does.
    from bnguard.tensorboard.log_report import logged_runs, write_page

    folder = Path(values.logdir)
    if values.html is not None:
        write_page(folder, Path(values.html))
        say(f"written: {values.html}")
        return 0
    runs = logged_runs(folder)
    if values.json:
        show_json(add_version({"runs": [run.to_dict() for run in runs]}))
        return 0
    for logged in runs:
        show(logged)
    return 0


def make_parser() -> ArgumentParser:
    """Return the parser of the command."""
    parser = command_parser(
        "report",
        "Print what the event files of a log directory say of BN layers, or write the "
        "TensorBoard tab as one self-contained page.",
        _EXAMPLES,
    )
    parser.add_argument("logdir", type=str, help="folder with event files")
    shown_as = parser.add_mutually_exclusive_group()
    shown_as.add_argument("--html", type=str, help="file to write the page to")
    add_json_option(shown_as)
    return parser
