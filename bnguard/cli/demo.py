"""``bnguard demo``."""

from __future__ import annotations

from contextlib import redirect_stdout
from pathlib import Path

from jsonargparse import ArgumentParser

from bnguard.cli.output import command_parser, output
from bnguard.errors import ConfigurationError

_EXAMPLES = """
examples:
  bnguard demo
  bnguard demo --output digits --seed 1
"""


def run(arguments: list[str]) -> int:
    """Train a small network into a BN fault, name it, repair the checkpoint, and measure both."""
    values = make_parser().parse_args(arguments)
    folder = Path(values.output)
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"--output {folder} is a file: name a folder")
    # torch and Lightning are imported from here on.
    from bnguard.cli.demonstrating import tell_story
    from bnguard.lightning.scoring import quiet_lightning

    # All of it is bnguard's own: what its Trainers print belongs to the story.
    with redirect_stdout(output()), quiet_lightning():
        tell_story(folder, values.seed)
    return 0


def make_parser() -> ArgumentParser:
    """Return the parser of the command."""
    parser = command_parser(
        "demo",
        "Train a small network on handwritten digits into a BN fault, name it, "
        "repair the checkpoint, and measure both. Takes some seconds.",
        _EXAMPLES,
    )
    parser.add_argument("--output", type=str, default="bnguard-demo", help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and shuffling")
    return parser
