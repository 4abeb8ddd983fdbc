"""Reads a Trainer's state, names the commands for its checkpoint, and guards the user's run.

Only here private names of Lightning are used.
"""

from __future__ import annotations

import functools
import math
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

from torch import nn

from bnguard.errors import Guard, path_from_here
from bnguard.findings import Fix, show
from bnguard.lightning.framework import Callback, LightningModule, Trainer
from bnguard.report import Report

Split = Literal["train", "validation"]

# Entry of a checkpoint. If callbacks had a ``state_dict``, Lightning would warn in a run that is
# resumed without them.
CHECKPOINT_ENTRY = "bnguard"

_Arguments = ParamSpec("_Arguments")
_Self = TypeVar("_Self", bound="GuardedCallback")
_Result = TypeVar("_Result")


def planned_steps(trainer: Trainer) -> int | None:
    """Return how many optimizer steps are still to come; None if that is unknown."""
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if is_rehearsal(trainer) or math.isinf(batches):
        return None
    by_epochs = math.inf
    if epochs is not None and epochs >= 0:
        steps = math.ceil(batches / trainer.accumulate_grad_batches)
        by_epochs = max(0, epochs - trainer.current_epoch) * steps
    by_steps = math.inf
    if trainer.max_steps >= 0:
        by_steps = max(0, trainer.max_steps - trainer.global_step)
    planned = min(by_epochs, by_steps)
    return None if math.isinf(planned) else int(planned)


def logged_step(trainer: Trainer) -> int:
    """Return the step of ``self.log``; ``global_step`` is one ahead and counts all optimizers."""
    loop = getattr(trainer.fit_loop, "epoch_loop", None)
    return int(getattr(loop, "_batches_that_stepped", trainer.global_step))


def is_logging_step(trainer: Trainer) -> bool:
    """Return whether the trainer logs the training batch that just ended."""
    every = getattr(trainer, "log_every_n_steps", 0)
    return bool(every) and (logged_step(trainer) + 1) % every == 0


def is_fitting(trainer: Trainer) -> bool:
    """Return whether ``fit`` runs, including its validation."""
    return bool(trainer.state.fn == "fit")


def is_rehearsal(trainer: Trainer) -> bool:
    """Return whether this is a ``fast_dev_run``, which keeps nothing."""
    return bool(getattr(trainer, "fast_dev_run", False))


def is_last_batch(trainer: Trainer, batch_idx: int, dataloader_idx: int) -> bool:
    """Return whether an evaluation ends with this batch; False if that is unknown."""
    if trainer.predicting:
        counts = trainer.num_predict_batches
    else:
        counts = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
    return dataloader_idx == len(counts) - 1 and batch_idx == counts[-1] - 1


def most_batches(trainer: Trainer, split: Split, loader: object) -> float:
    """Return how many batches of a loader the trainer's limits allow; infinite if unknown."""
    limit = trainer.limit_train_batches if split == "train" else trainer.limit_val_batches
    try:
        length: float = len(loader)  # type: ignore[arg-type]
    except TypeError:
        length = math.inf
    if isinstance(limit, int):
        return min(length, limit)
    return length if limit is None or math.isinf(length) else int(length * limit)


def validation_mode(trainer: Trainer) -> str:
    """Return the mode in which the trainer combines several validation loaders."""
    for loop in (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop):
        combined = getattr(loop, "_combined_loader", None)
        if combined is not None:
            return str(getattr(combined, "_mode", "sequential"))
    return "sequential"


def log_folder(trainer: Trainer) -> Path | None:
    """Return the folder of the first logger that has one; call on rank zero only.

    ``trainer.log_dir`` uses only the first logger, and waits for the other ranks.
    """
    for logger in trainer.loggers:
        folder = getattr(logger, "log_dir", None)
        if isinstance(folder, (str, Path)) and Path(folder).is_dir():
            return Path(folder)
    return None


def datamodule_of(trainer: Trainer) -> Any:
    """Return the data module of the trainer; None if it has none."""
    return getattr(trainer, "datamodule", None)


def commands(trainer: Trainer, report: Report) -> Iterator[str]:
    """Yield the commands to inspect and repair the checkpoint of the run."""
    path = newest_checkpoint(trainer) if is_fitting(trainer) else None
    if path is None or not report.findings:
        return
    name = str(path_from_here(Path(path)))
    yield f"The checkpoint saved: bnguard inspect {shlex.quote(name)}"
    if any(finding.fix.repair == "recalibrate" for finding in report.findings):
        yield f"Its repair: {Fix('', 'recalibrate').command(name, subject_options(trainer))}"


def newest_checkpoint(trainer: Trainer) -> str | None:
    """Return the path of the best checkpoint, else of the last; None if none was saved."""
    for callback in trainer.checkpoint_callbacks:
        for attribute in ("best_model_path", "last_model_path"):
            path = getattr(callback, attribute, "")
            if path:
                return str(path)
    return None


def subject_options(trainer: Trainer) -> str:
    """Return the options that name the model and its training data on the command line.

    Loaders and local classes cannot be imported by name: a placeholder names a function to write.
    """
    module, data = trainer.lightning_module, datamodule_of(trainer)
    options = ["--model", class_path(module) or _function_in(module, "that_makes_the_model")]
    if data is not None:
        options += ["--data", class_path(data) or _function_in(data, "that_makes_the_data_module")]
    elif not _has_loader(module):
        loader = _function_in(module, "that_gives_the_training_loader")
        return shlex.join([*options, "--data", loader])
    return shlex.join([*options, "--split", "train"])


def class_path(instance: object) -> str | None:
    """Return where the class of an instance can be imported from; None for a local class."""
    kind = type(instance)
    return None if "<locals>" in kind.__qualname__ else f"{_module_name(kind)}.{kind.__qualname__}"


def _function_in(instance: object, what_it_does: str) -> str:
    return f"{_module_name(type(instance))}:function_{what_it_does}"


def _has_loader(module: LightningModule) -> bool:
    """Return whether a module has a training loader; Lightning's default only raises."""
    method = getattr(module.train_dataloader, "__qualname__", "")
    return not method.startswith("DataHooks.")


def _module_name(kind: type) -> str:
    """Return the module of a class, of a running script by its file; ``my`` in a notebook."""
    if kind.__module__ != "__main__":
        return kind.__module__
    script = sys.modules["__main__"]
    if script.__spec__ is not None:
        return script.__spec__.name
    path = getattr(script, "__file__", None)
    return "my" if path is None else Path(path).stem


class GuardedCallback(Callback):
    """A callback that turns itself off at its first error, and lets the run go on.

    After an error in the user's own code it is on again in the next run.

    Args:
        strict: Raise errors instead; for tests.
    """

    def __init__(self, *, strict: bool) -> None:
        super().__init__()
        self._guard = Guard(
            strict=strict,
            let_go=self.let_go,
            tell=show,
            consequence=f"{type(self).__name__} is off from here, and the run goes on",
        )

    @property
    def is_off(self) -> bool:
        """Whether it has turned itself off."""
        return self._guard.failure is not None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Turn on again, unless an error inside bnguard turned the callback off."""
        self._guard.begin_anew()

    def let_go(self) -> None:
        """Leave the model as it was found; callable at any time."""


def guarded(
    method: Callable[Concatenate[_Self, _Arguments], _Result],
) -> Callable[Concatenate[_Self, _Arguments], _Result | None]:
    """Make a method return None after an error, which must not end the user's run."""

    @functools.wraps(method)
    def wrapper(
        self: _Self, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> _Result | None:
        return self._guard(method, self, *args, **kwargs)

    return wrapper


@contextmanager
def mute_logging(module: nn.Module) -> Iterator[None]:
    """Make ``self.log`` do nothing, in a module and in the Lightning modules inside it.

    A forward may call it: Lightning would average that with what the user's steps log, or raise
    outside of a step.
    """
    # The LightningModule classes of the two packages have no common base.
    attributes = [vars(part) for part in module.modules() if hasattr(type(part), "log_dict")]
    before = [own.get("log") for own in attributes]
    for own in attributes:
        own["log"] = _log_nothing
    try:
        yield
    finally:
        for own, log in zip(attributes, before, strict=True):
            del own["log"]
            if log is not None:
                own["log"] = log


def _log_nothing(*_: object, **__: object) -> None:
    return None
