"""What is read off a Trainer; the few names that are private to Lightning stand here alone."""

from __future__ import annotations

import io
import math
import sys
from pathlib import Path
from typing import Any

import rich
from rich.console import Console, RenderableType

from bnguard.lightning.framework import Trainer


def planned_batches(trainer: Trainer) -> int | None:
    """Return how many training batches are still to come; None where nobody can know."""
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if is_rehearsal(trainer) or math.isinf(batches):
        return None
    by_epochs = math.inf
    if epochs is not None and epochs >= 0:
        by_epochs = max(0, epochs - trainer.current_epoch) * batches
    by_steps = math.inf
    if trainer.max_steps >= 0:
        remaining = max(0, trainer.max_steps - trainer.global_step)
        by_steps = remaining * trainer.accumulate_grad_batches
    planned = min(by_epochs, by_steps)
    return None if math.isinf(planned) else int(planned)


def logged_step(trainer: Trainer) -> int:
    """Return the number under which ``self.log`` writes now.

    It is not ``global_step``, which is one ahead, and counts every optimizer.
    """
    loop = getattr(trainer.fit_loop, "epoch_loop", None)
    return int(getattr(loop, "_batches_that_stepped", trainer.global_step))


def is_logging_step(trainer: Trainer) -> bool:
    """Return whether the trainer logs the training batch that just ended."""
    every = getattr(trainer, "log_every_n_steps", 0)
    return bool(every) and (logged_step(trainer) + 1) % every == 0


def is_fitting(trainer: Trainer) -> bool:
    """Return whether ``fit`` runs, be it in its validation."""
    return bool(trainer.state.fn == "fit")


def is_rehearsal(trainer: Trainer) -> bool:
    """Return whether this is a ``fast_dev_run``, of which nothing is kept."""
    return bool(getattr(trainer, "fast_dev_run", False))


def is_last_batch(trainer: Trainer, batch_idx: int, dataloader_idx: int) -> bool:
    """Return whether an evaluation ends with this batch; False where nobody can know."""
    if trainer.predicting:
        counts = trainer.num_predict_batches
    else:
        counts = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
    return dataloader_idx == len(counts) - 1 and batch_idx == counts[-1] - 1


def log_folder(trainer: Trainer) -> Path | None:
    """Return the folder of the first logger that has one; to be asked on rank zero only.

    ``trainer.log_dir`` looks at the first logger alone, and waits for the other ranks.
    """
    for logger in trainer.loggers:
        folder = getattr(logger, "log_dir", None)
        if isinstance(folder, (str, Path)) and Path(folder).is_dir():
            return Path(folder)
    return None


def show(text: str) -> None:
    """Print lines without breaking a progress bar, of tqdm or rich, or none.

    Not by the trainer's own bar, which prints nothing before it has begun and after it has ended.
    """
    tqdm = sys.modules.get("tqdm")
    # Where output goes to a file, the console of Windows has no Greek letters, and no arrows.
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    printable = text.encode(encoding, "replace").decode(encoding)
    # What rich draws makes way for everything that is printed.
    (print if tqdm is None else tqdm.tqdm.write)(printable)


def drawn(renderable: RenderableType) -> str:
    """Return what rich would print, in colour where the terminal has any."""
    terminal = rich.get_console()
    # Not by the terminal's own console, which would draw a progress bar of rich along with it.
    console = Console(file=io.StringIO(), width=terminal.width, force_terminal=terminal.is_terminal)
    with console.capture() as capture:
        console.print(renderable)
    lines = capture.get().rstrip("\n").splitlines()
    # What fills a terminal's lines is nothing but padding in a file.
    return "\n".join(lines if terminal.is_terminal else map(str.rstrip, lines))


def datamodule_of(trainer: Trainer) -> Any:
    """Return the data module that the trainer was given; None without one."""
    return getattr(trainer, "datamodule", None)
