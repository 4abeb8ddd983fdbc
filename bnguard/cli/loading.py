"""What commands that repair a checkpoint begin with: its name, its model and data, its weights."""

from __future__ import annotations

import argparse
from pathlib import Path

from jsonargparse import ArgumentParser
from torch import Tensor, nn

from bnguard.checkpoint import Checkpoint
from bnguard.cli.subjects import Subject
from bnguard.errors import CheckpointError, ConfigurationError


def checkpoint_named(arguments: list[str], command: str) -> Path:
    """Return the checkpoint, which is read before the arguments of the model are known.

    Raises:
        ConfigurationError: There is none among the arguments.
    """
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("checkpoint", nargs="?")
    named: str | None = first.parse_known_args(arguments)[0].checkpoint
    if named is None:
        raise ConfigurationError(f"no checkpoint is named: bnguard {command} CKPT --model …")
    return Path(named)


def add_subjects(
    parser: ArgumentParser, subjects: dict[str, Subject], checkpoint: Checkpoint
) -> None:
    """Add the arguments of model and data; the model's start from the checkpoint's own.

    Raises:
        ConfigurationError: The model or the data are not named.
    """
    for option in ("model", "data"):
        if option not in subjects:
            raise ConfigurationError(
                f"--{option} is missing: name it as --{option} package.module.Class"
            )
    subjects["model"].add_arguments(parser, checkpoint.hyper_parameters)
    subjects["data"].add_arguments(parser, {})


def load_weights(model: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Load the weights, or say in one line why they are not this model's.

    Raises:
        CheckpointError: They do not fit.
    """
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{source} does not fit {type(model).__name__}: {reason}") from error
    wrong = [f"lacks {name}" for name in missing] + [f"has {name} too much" for name in unexpected]
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise CheckpointError(f"{source} does not fit {type(model).__name__}: it {wrong[0]}{more}")
