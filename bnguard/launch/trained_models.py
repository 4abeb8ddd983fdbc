"""Finds the models that a script trains, by its optimizers, and watches each."""

from __future__ import annotations

import os
import sys
import weakref
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import filterfalse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from bnguard.errors import Guard
from bnguard.findings import FindingGroup, above_bars, notice
from bnguard.layers.bn_layer import explain_missing_layers, find_layers, is_wrapper
from bnguard.loggers import RunLog, TensorBoard
from bnguard.monitor import Monitor, open_monitors, watch
from bnguard.observe.live_objects import find_alive
from bnguard.observe.trained_parameters import parameters_of
from bnguard.report import Report
from bnguard.rules import RULES


class Watching:
    """Watches all models whose optimizers take a step, from the first step on.

    Args:
        folder: Where reports and logs go; made when there is something to write.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._models: list[_WatchedModel] = []
        self._copies: weakref.WeakKeyDictionary[nn.Module, Tensor] = weakref.WeakKeyDictionary()
        self._steps = 0
        self._next_look = 1
        self._is_watched_by_script = False
        self._obstacle = "no optimizer took a step"
        self._guard = Guard(
            strict=False,
            let_go=self._stop,
            tell=tell_user,
            consequence="no further model is watched, and the script goes on",
        )
        self._handle = register_optimizer_step_post_hook(self._note)

    @property
    def is_first_rank(self) -> bool:
        """Whether this process speaks for those that torchrun started with it."""
        return os.environ.get("RANK", "0") == "0"

    @property
    def why_nothing(self) -> str:
        """Why there is no report."""
        if self._is_watched_by_script:
            return "the script watches its model itself, and asks for the report"
        return f"{self._obstacle}, so nothing was watched"

    def conclude(self, *, is_complete: bool) -> Iterator[Result]:
        """Stop, and yield the result of each model.

        Args:
            is_complete: Whether the script ended as it should; if not, other ranks may never come
                here, and are not waited for.
        """
        self._stop()
        for model in self._models:
            result = model.conclude(is_complete=is_complete)
            if result is not None:
                yield result

    def _stop(self) -> None:
        self._handle.remove()

    def _note(self, optimizer: Optimizer, *_: object) -> None:
        if optimizer not in self._seen:
            self._seen.add(optimizer)
            self._guard(self._watch, optimizer)
        self._steps += 1
        # After 1, 4, 16, … steps: averaging may begin at any time, and to look takes 0.1 s.
        if self._steps == self._next_look:
            self._next_look *= 4
            self._guard(self._watch_followers, optimizer)

    def _watch_followers(self, optimizer: Optimizer) -> None:
        """Watch copies of the models that something writes to, as an average of weights."""
        monitors = [model.monitor() for model in self._models]
        watched = [monitor.model for monitor in monitors if monitor is not None]
        for copy in find_copies(watched):
            newest = list(copy.parameters())[-1].detach()
            if copy not in self._copies:
                self._copies[copy] = newest.clone()
            elif not torch.equal(newest, self._copies[copy]):
                model = _WatchedModel.begin(copy, optimizer, self._folder, len(self._models) + 1)
                model.name += ", a copy that no optimizer trains"
                self._models.append(model)

    def _watch(self, optimizer: Optimizer) -> None:
        owned = parameters_of(optimizer)
        for model in self._models:
            monitor = model.monitor()
            if monitor is not None and _ids_of(monitor.model) & owned:
                monitor._follow_optimizer(optimizer)
                return
        for monitor in open_monitors():
            if _ids_of(monitor.model) & owned:
                self._is_watched_by_script = True
                # A callback reports by itself.
                if not monitor._is_led:
                    number = len(self._models) + 1
                    self._models.append(
                        _WatchedModel.adopt(monitor, self._folder, number, is_of_script=True)
                    )
                return
        roots = find_roots(owned)
        self._obstacle = (
            explain_missing_layers(roots[0])
            if roots
            else "the optimizer's weights belong to no model, as with torch.func, which takes "
            "monitor = bnguard.watch(model), and monitor.step() after each step"
        )
        for root in roots:
            if find_layers(root):
                self._models.append(
                    _WatchedModel.begin(root, optimizer, self._folder, len(self._models) + 1)
                )


@dataclass(frozen=True)
class Result:
    """The report of a model.

    Attributes:
        name: Class of the model.
        folder: Where the report and the log go.
        report: The report.
        is_shown: Whether the script asked for it, and shows it as it likes.
    """

    name: str
    folder: Path
    report: Report
    is_shown: bool


@dataclass
class _WatchedModel:
    """A model of the script; it is not kept alive, and leaves its report when it is gone."""

    name: str
    folder: Path
    monitor: weakref.ref[Monitor]
    log: _Log
    is_of_script: bool
    report: Report | None = None

    @classmethod
    def begin(
        cls, root: nn.Module, optimizer: Optimizer, folder: Path, number: int
    ) -> _WatchedModel:
        """Begin to watch a model, the ``number``-th of the script, after its first step."""

        def tell(group: FindingGroup) -> None:
            if monitor.rank == 0:
                tell_user(notice(group))

        monitor = watch(root, optimizer=_optimizers_of(root, optimizer), on_findings=tell)
        monitor._step = 1  # the step that has just been taken
        return cls.adopt(monitor, folder, number, is_of_script=False)

    @classmethod
    def adopt(
        cls, monitor: Monitor, folder: Path, number: int, *, is_of_script: bool
    ) -> _WatchedModel:
        """Take over the results of a monitor, perhaps one that the script made."""
        root = monitor.model
        name = type(next((part for part in root.modules() if not is_wrapper(part)), root)).__name__
        if number > 1:
            folder = folder / f"{name}-{number}"
        log = _Log(folder if monitor.rank == 0 else None)
        model = cls(name, folder, weakref.ref(monitor), log, is_of_script)
        monitor._follow_script(log.add, model._keep)
        return model

    def conclude(self, *, is_complete: bool) -> Result | None:
        """Return the result; None on ranks whose report another rank shows."""
        monitor = self.monitor()
        is_shown = self.is_of_script and monitor is not None and monitor._is_asked
        if monitor is not None:
            self.report = monitor.report_of_all_ranks() if is_complete else monitor.report()
            monitor._leave()
            monitor.close()
            if monitor.rank > 0 and is_complete:
                return None
        if self.report is None:
            return None
        self.log.conclude(self.report)
        return Result(self.name, self.folder, self.report, is_shown)

    def _keep(self, report: Report) -> None:
        self.report = report


class _Log:
    """The TensorBoard log of one model, begun with its first report; None writes nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._writer: Any = None
        self._log = RunLog((), ())
        self._step = 0

    def add(self, report: Report, step: int) -> None:
        """Write a report."""
        self._step = step
        if self._folder is not None and self._writer is None:
            self._begin(self._folder)
        self._log.write(report, step)

    def conclude(self, report: Report) -> None:
        """Write the last report, down to each channel, and close the log."""
        self.add(report, self._step)
        self._log.conclude(report, self._step)
        if self._writer is not None:
            self._writer.close()

    def _begin(self, folder: Path) -> None:
        try:
            # Importing it takes a second.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder))
        except Exception as error:
            tell_user(f"bnguard: no TensorBoard log is written: {error}")
            self._folder = None
        else:
            self._log = RunLog([TensorBoard(self._writer)], RULES)


def find_roots(parameters: set[int]) -> list[nn.Module]:
    """Return the outermost modules alive that hold these parameters, named by identity.

    Of several that hold the same, as a model and what wraps it in another way, one is returned.
    """
    # One that is being made has no parts yet.
    modules = [module for module in find_alive(nn.Module) if "_modules" in vars(module)]
    parents: dict[int, list[nn.Module]] = defaultdict(list)
    for module in modules:
        for child in module._modules.values():
            parents[id(child)].append(module)
    waiting = [
        module
        for module in modules
        if any(id(part) in parameters for part in module._parameters.values())
    ]
    climbed: set[int] = set()
    roots: list[nn.Module] = []
    while waiting:
        module = waiting.pop()
        if id(module) in climbed:
            continue
        climbed.add(id(module))
        waiting.extend(parents[id(module)])
        if not parents[id(module)]:
            roots.append(module)
    found: list[nn.Module] = []
    missing = set(parameters)
    for root in sorted(roots, key=lambda root: -len(_ids_of(root) & parameters)):
        if _ids_of(root) & missing:
            missing -= _ids_of(root)
            found.append(root)
    return found


def find_copies(models: list[nn.Module]) -> list[nn.Module]:
    """Return modules that are built like one of these models, and that nothing trains or watches.

    A copy may be a part of another module, as in ``AveragedModel``.
    """
    watched = [*models, *(monitor.model for monitor in open_monitors())]
    known = {id(part) for model in watched for part in model.modules()}
    built = {_plan_of(next(filterfalse(is_wrapper, model.modules()), model)) for model in models}
    trained = {
        parameter
        for optimizer in find_alive(Optimizer)
        if "param_groups" in vars(optimizer)
        for parameter in parameters_of(optimizer)
    }
    return [
        module
        for kind in {kind for kind, _ in built}
        for module in find_alive(kind)
        if id(module) not in known
        and "_modules" in vars(module)
        and _plan_of(module) in built
        and not _ids_of(module) & trained
    ]


def _plan_of(module: nn.Module) -> tuple[type[nn.Module], tuple[object, ...]]:
    """Return the class of a module with the names and shapes of its parameters."""
    named = (
        (name, None if is_lazy(values) else tuple(values.shape))
        for name, values in module.named_parameters()
    )
    return type(module), tuple(named)


def _ids_of(module: nn.Module) -> set[int]:
    return {id(parameter) for parameter in module.parameters()}


def _optimizers_of(model: nn.Module, optimizer: Optimizer) -> list[Optimizer]:
    """Return the optimizer and those of the model's other parameters.

    Optimizers that wrap another own the same parameters, and are left out.
    """
    found, missing = [optimizer], _ids_of(model) - parameters_of(optimizer)
    for other in find_alive(Optimizer):
        if "param_groups" in vars(other):
            own = parameters_of(other)
            if own & missing:
                missing -= own
                found.append(other)
    return found


def tell_user(text: str) -> None:
    """Print lines on standard error; standard output is the script's."""
    if sys.stderr is not None:
        with above_bars(sys.stderr):
            print(text, file=sys.stderr)
