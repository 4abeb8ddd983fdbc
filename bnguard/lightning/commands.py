"""The commands for the checkpoint that a run saved, with its model and data."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from bnguard.lightning.framework import LightningModule, Trainer
from bnguard.lightning.trainer import datamodule_of, is_fitting
from bnguard.report import Report


def commands(trainer: Trainer, report: Report) -> Iterator[str]:
    """Yield the commands to inspect and repair the checkpoint of the run."""
    path = newest_checkpoint(trainer) if is_fitting(trainer) else None
    if path is None or not report.findings:
        return
    yield f"The checkpoint saved: bnguard inspect {shlex.quote(path)}"
    if any(finding.fix.repair == "recalibrate" for finding in report.findings):
        yield f"Its repair: bnguard recalibrate {shlex.quote(path)} {subject_options(trainer)}"


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
    return _name_of_script() if kind.__module__ == "__main__" else kind.__module__


def _name_of_script() -> str:
    """Return the importable name of the running script; ``my`` in a notebook."""
    script = sys.modules["__main__"]
    if script.__spec__ is not None:
        return script.__spec__.name
    path = getattr(script, "__file__", None)
    return "my" if path is None else Path(path).stem
