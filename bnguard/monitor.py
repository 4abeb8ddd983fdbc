"""Watches the BN layers of a model while it trains: runs the rules on what is observed."""

from __future__ import annotations

import atexit
import dataclasses
import itertools
import logging
import sys
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from bnguard.configuration import Configuration, read_configuration
from bnguard.distributed import Exchange, number_of_ranks
from bnguard.errors import ConfigurationError, Guard
from bnguard.findings import Finding, FindingGroup, Severity, above_bars, one_line
from bnguard.layers.bn_layer import explain_missing_layers, require_module
from bnguard.observe.budget import Budget, own_time
from bnguard.observe.history import BatchWindow, History, Run
from bnguard.observe.hooks import pause_hooks
from bnguard.observe.loop import LoopProbe, NoticedEvaluations
from bnguard.observe.observer import Observer
from bnguard.observe.training_plan import Plan, plan_training
from bnguard.observe.training_views import TrainingViews, ViewProbe
from bnguard.report import Report
from bnguard.report.all_ranks import merge_findings, merge_reports
from bnguard.report.picture import Course, measure
from bnguard.rules import Rule
from bnguard.rules.engine import Announcements, run_rules

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

logger = logging.getLogger("bnguard")

# The ranks of a training make the same monitors, one after another.
_numbers = itertools.count()

# Monitors that have not been closed, and those that notice steps by themselves.
_open: weakref.WeakSet[Monitor] = weakref.WeakSet()
_silent: weakref.WeakSet[Monitor] = weakref.WeakSet()
# Reports of monitors whose model is gone, as when the function that trained it returned.
_last_reports: list[Report] = []


def log_findings(group: FindingGroup) -> None:
    """Log findings in one line, through the logger ``bnguard``."""
    level = logging.ERROR if group.worst.severity is Severity.ERROR else logging.WARNING
    with above_bars(sys.stderr):
        logger.log(level, "%s", one_line(group))


def _log_failure(line: str) -> None:
    with above_bars(sys.stderr):
        logger.warning("%s", line.removeprefix("bnguard: "))


def watch(
    model: nn.Module,
    *,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    every_n_steps: int = 50,
    eval_batches: int = 8,
    planned_steps: int | None = None,
    loader: object | None = None,
    accumulated_batches: int = 1,
    rules: Iterable[Rule] | None = None,
    select: Collection[str] | None = None,
    ignore: Collection[str] | None = None,
    per_layer_ignores: Mapping[str, Collection[str]] | None = None,
    limits: Mapping[str, Mapping[str, float]] | None = None,
    restore_poisoned: bool = False,
    max_overhead: float = 0.02,
    on_findings: Callable[[FindingGroup], None] = log_findings,
    views: TrainingViews | None = None,
    strict: bool = False,
) -> Monitor:
    """Watch the BN layers of a model while it trains.

    With ``optimizer`` this is the only line needed: steps are noticed through the optimizer's own
    hook, and evaluations by the forwards in eval mode: those without gradients, and those of a
    model whose training steps are in train mode. If no report was asked for, it is printed when the
    process ends. A loop can also be explicit, without ``optimizer`` it has to be: call
    :meth:`Monitor.step` after each optimizer step, and run validation inside
    :meth:`Monitor.evaluation`. Nothing is counted twice.

    The model gets hooks, which :meth:`Monitor.close` removes, and stays as it is otherwise.

    If several processes train, each watches its own batches: :meth:`Monitor.report` covers this
    process, and :meth:`Monitor.report_of_all_ranks` all of them.

    Args:
        model: The model; a model without BN layers gets a warning, and nothing is watched.
        optimizer: What trains the model, one or several; their steps are noticed. A layer whose
            parameters none of them owns, and do not change, counts as frozen.
        every_n_steps: How often the rules run, in steps.
        eval_batches: First batches that are read in each evaluation; of the rest ever fewer are.
            As many batches of fewer than 32 samples count as one as have 32 together.
        planned_steps: Steps that training will take in all; lets rules report ahead what its end
            will be like.
        loader: The training loader; its batch sizes show a last batch of one before it comes. No
            batch is drawn.
        accumulated_batches: Batches whose gradients are added before a step of the optimizer.
        rules: The rules to run; all that are installed by default.
        select: Those of them that run, by code, name or prefix of a code (``"BN3"``). This and
            the next three override ``[tool.bnguard]`` in ``pyproject.toml``.
        ignore: Those that do not run, even if selected.
        per_layer_ignores: Those that ignore some layers, by glob of the layers' names.
        limits: Limits that differ from those of the rules, by rule, then by name.
        restore_poisoned: Put the last finite statistics back in the step that poisons them.
        max_overhead: Time that watching may take, as a share of the training's own. The first 200
            steps and the evaluations among them are always read, so that short runs do not depend
            on the clock, and so are the last of the steps that are planned. In between, if
            watching costs more, ``every_n_steps`` steps are read, the rules run, and the next
            steps are passed over until the share is kept again: their updates are counted, and on
            the CPU poisoned statistics are still found in their step, but their batches and inputs
            are not read. Evaluations are passed over likewise. 0 reads everything; with
            ``restore_poisoned`` every step is read.
        on_findings: Called once with new findings of severity ``warning`` or ``error``, those of
            one rule together; logs them through the logger ``bnguard`` by default. What it raises
            passes through :meth:`Monitor.step`: so a loop can be stopped.
        views: Measure now and then what BN does to training itself; costs further passes.
        strict: Raise errors inside bnguard. By default the first is logged, and nothing is watched
            from then on: the training goes on.

    Raises:
        ConfigurationError: The model or the optimizer cannot be read, or a rule or a limit does
            not exist; the message has the nearest name.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> monitor = watch(model, optimizer=optimizer)
        >>> for _ in range(30):
        ...     model(torch.randn(16, 4)).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> monitor.report()
        Report(1 BN layer, 30 steps, no findings)
    """
    require_module(model, "watch")
    if isinstance(model, torch.jit.ScriptModule):
        raise ConfigurationError(f"{explain_missing_layers(model)}: nothing to watch")
    if not isinstance(views, TrainingViews | None):
        raise ConfigurationError(
            f"views takes bnguard.TrainingViews(loss), where loss(model) returns the loss of a "
            f"fixed batch, not {views!r}"
        )
    configuration = read_configuration().changed(
        select=select, ignore=ignore, per_layer_ignores=per_layer_ignores, limits=limits
    )
    monitor = Monitor(
        model,
        optimizer=optimizer,
        every_n_steps=every_n_steps,
        eval_batches=eval_batches,
        planned_steps=planned_steps,
        plan=plan_training(
            loader, ranks=number_of_ranks(), accumulated_batches=accumulated_batches
        ),
        rules=rules,
        configuration=configuration,
        restore_poisoned=restore_poisoned,
        max_overhead=max_overhead,
        on_findings=on_findings,
        views=views,
        strict=strict,
    )
    if not monitor.has_layers:
        warnings.warn(
            f"bnguard: {explain_missing_layers(model)}, so there is nothing to watch",
            stacklevel=2,
        )
    elif any(layer.is_sharded for layer in monitor._observer.layers):
        warnings.warn(
            "bnguard: each rank has a part of gamma and beta alone, so that the rules on them are "
            "silent; the statistics are watched",
            stacklevel=2,
        )
    return monitor


class Monitor:
    """What :func:`watch` returns: runs the rules on what is observed, and announces what is new."""

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: Optimizer | Iterable[Optimizer] | None,
        every_n_steps: int,
        eval_batches: int,
        planned_steps: int | None,
        plan: Plan,
        rules: Iterable[Rule] | None,
        configuration: Configuration,
        restore_poisoned: bool,
        max_overhead: float,
        on_findings: Callable[[FindingGroup], None],
        views: TrainingViews | None,
        strict: bool,
    ) -> None:
        if not (isinstance(max_overhead, (int, float)) and max_overhead >= 0.0):
            raise ConfigurationError(
                f"max_overhead={max_overhead!r} is not a share of the training's time: give 0 for "
                "no limit, or a number such as 0.02"
            )
        self._guard = Guard(
            strict=strict,
            let_go=self.close,
            tell=_log_failure,
            consequence="it watches no longer, and the training goes on",
        )
        self._every_n_steps = max(1, every_n_steps)
        self._configuration = configuration
        self._rules = configuration.rules(rules)
        self._on_findings = on_findings
        self._exchange = Exchange(f"monitor {next(_numbers)}")
        self._step = 0
        self._is_evaluating = False
        self._is_led = False
        self._has_begun = False
        self._announcements = Announcements()
        self._course = Course()
        self._checked: Report | None = None
        self._on_checked: Callable[[Report, int], None] | None = None
        self._on_collected: Callable[[Report], None] = _last_reports.append
        optimizers = _optimizers(optimizer)
        self._observer = Observer(
            model,
            optimizers=optimizers,
            eval_batches=eval_batches,
            planned_steps=planned_steps,
            plan=plan,
            restore_poisoned=restore_poisoned,
            on_batch_of_one=self._announce_batch_of_one,
            views=None if views is None else ViewProbe(model, views, self._pause),
        )
        self._budget = Budget(
            step_share=0.0 if restore_poisoned else max_overhead / 2,
            evaluation_share=max_overhead / 2,
            every_n_steps=self._every_n_steps,
            planned_steps=planned_steps,
        )
        self._evaluations = NoticedEvaluations(
            self._observer, self._every_n_steps, self._watch_evaluation
        )
        self._loop = LoopProbe(
            model,
            self._observer.layers,
            optimizers,
            on_step=self._note_step,
            on_evaluation=self._evaluations.note_forward,
            on_training=self._evaluations.note_training,
        )
        _open.add(self)
        self._is_asked = False
        if optimizers:
            _silent.add(self)

    def __del__(self) -> None:
        # The model is gone after this, and with it what the report at exit would be made from.
        with suppress(Exception):
            if self._loop.has_steps and not self._is_asked:
                self._on_collected(self._known())

    # A module may hold its monitor: an averaged copy of it shares the one that watches, and where
    # it is saved or sent to another process, nothing is watched.
    def __deepcopy__(self, memo: dict[int, Any]) -> Monitor:
        return self

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def has_layers(self) -> bool:
        """Whether there is anything to watch."""
        return bool(self._observer.layers)

    @property
    def model(self) -> nn.Module:
        """The model that is watched."""
        return self._observer.model

    @property
    def rank(self) -> int:
        """The number of this process among those that train together."""
        return self._exchange.rank

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules that run, with the limits in force."""
        return self._rules

    def step(self, step: int | None = None) -> None:
        """Read what the training step just taken left in the buffers.

        A loop that calls this reports all of its steps: they are no longer noticed.

        Args:
            step: Number of the optimizer step, for findings; counted from 1 by default. Batches
                that are accumulated may each be reported, under the number of their step.
        """
        self._evaluations.end()
        is_counted = self._loop.take_over()
        if not self._evaluations.is_on:
            self._loop.close()
        if is_counted:
            self._step = self._step if step is None else step
        else:
            self._read_step(self._step + 1 if step is None else step)

    def _read_step(self, step: int) -> None:
        with own_time:
            self._step = step
            steps = self._observer.steps
            if not self._budget.reads_step(steps):
                self._guard(self._observer.pass_over, step)
                return
            self._checked = None
            self._guard(self._observer.step, step)
            if self._observer.steps == steps:
                return
            is_end_of_window = self._budget.count_step()
            # Whether a noticed step is all of it, with several optimizers, is known after the next.
            early = 2 if self._loop.has_steps else 1
            if self._observer.steps >= early and not self._has_begun:
                self._has_begun = True
                self.check()
            if is_end_of_window:
                self.check()
                self._guard(self._observer.start_window)
                self._budget.end_window()

    @contextmanager
    def _watch_evaluation(self) -> Iterator[bool]:
        """Read an evaluation, or pass it over if the one before cost too much; yield which."""
        observer, observed = self._observer, ExitStack()
        with own_time, pause_hooks(self._loop.hooks):
            is_read = self._budget.reads_evaluation(observer.steps)
            if is_read:
                self._checked = None
            enter = observer.evaluation if is_read else observer.pass_over_evaluation
            self._guard(observed.enter_context, enter())
        try:
            yield is_read
        except BaseException as error:
            self._guard(observed.__exit__, type(error), error, error.__traceback__)
            raise
        with own_time:
            with pause_hooks(self._loop.hooks):
                self._guard(observed.close)
            if is_read:
                # Exchanging weights may go on: update_bn begins with a reset.
                if not observer.evaluations.has_exchanged_weights:
                    self.check()
                self._budget.end_evaluation()

    def _note_step(self) -> None:
        self._guard(self._loop.hooks.raise_error)
        if not self._observer.steps:
            with own_time:
                self._guard(self._observer.find_loader)
        self._read_step(self._step + 1)

    def _follow_script(
        self,
        on_checked: Callable[[Report, int], None],
        on_collected: Callable[[Report], None],
    ) -> None:
        """Pass on what is checked, and the last report when the model is gone."""
        self._on_checked = on_checked
        self._on_collected = on_collected

    def _follow_optimizer(self, optimizer: Optimizer) -> None:
        """Notice the steps of an optimizer that trains the model from now on."""
        self._observer.follow_optimizer(optimizer)
        self._loop.follow(optimizer)

    def _expect_calls(self) -> None:
        """Notice nothing: the caller reports all steps and evaluations."""
        self._is_led = True
        self._evaluations.stop()
        self._loop.take_over()
        self._loop.close()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Read the inputs of the layers in eval mode; put the validation loop inside.

        The model's mode is the caller's business. Whatever changes the buffers in here does not
        count as training.
        """
        if self._is_evaluating:
            yield
            return
        self._evaluations.stop()
        self._loop.flush()
        self._is_evaluating = True
        try:
            with self._watch_evaluation():
                yield
        finally:
            self._is_evaluating = False

    @contextmanager
    def _pause(self) -> Iterator[None]:
        """Ignore what runs inside: a repair, which is neither training nor evaluation.

        Training goes on from the running statistics that it leaves behind.
        """
        observer = ExitStack()
        self._guard(observer.enter_context, self._observer.pause())
        try:
            with pause_hooks(self._loop.hooks):
                yield
        finally:
            self._checked = None
            self._guard(observer.close)

    def forget_changes(self) -> None:
        """Take the running statistics as they are now, whatever changed them since the last step.

        Call it after a loop of your own loads, exchanges or restores statistics.
        """
        self._checked = None
        self._guard(self._observer.batches.forget_changes)

    def check(self) -> Report:
        """Run the rules unless nothing has happened since they last ran; announce what is new.

        Done by itself every ``every_n_steps`` and after each evaluation.

        Returns:
            What is known so far, for training that goes on; whoever shows it needs no other.
        """
        # A loop that reports no step may have done anything since.
        if self._checked is None or not self._observer.steps:
            self._checked = self._known(final=False)
            if self._guard.failure is None:
                self._announcements.note(self._checked.findings, self._step)
                self._course.note(self._checked.history, self._checked.findings, self._step)
                for group in self._announcements.new(self._checked.findings):
                    self._on_findings(group)
            if self._on_checked is not None:
                self._on_checked(self._checked, self._step)
        return self._checked

    def report(self, *, final: bool = True) -> Report:
        """Return what is known so far.

        Args:
            final: Judge the running statistics as they are now, as if training ended here; else
                what the updates still to come will mend is not held against them.
        """
        self._is_asked = self._is_asked or final
        return self._known(final=final)

    def _known(self, *, final: bool = True) -> Report:
        self._evaluations.end()
        self._loop.flush()
        try:
            # Also after an error, which leaves what was observed before it.
            with own_time:
                known = self._judge(final=final)
        except Exception as error:
            self._guard.turn_off(error)
            known = Report(History(layers=(), run=Run()), (), ())
        return dataclasses.replace(known, failure=self._guard.failure)

    def report_of_all_ranks(self) -> Report:
        """Return what is known so far with what the other processes found, labelled as theirs.

        Each rank has to call it, as often as the others; one that has left is not waited for. All
        of them are given the same findings. With one process it is :meth:`report`.
        """
        return merge_reports(
            self.report(), self._exchange, self._rules, self._configuration.is_wanted
        )

    def _findings_of_all_ranks(self, mine: Collection[Finding]) -> tuple[Finding, ...]:
        """Return the findings of all ranks, each once, labelled if not all ranks have it.

        Call it on all ranks, as :meth:`report_of_all_ranks`.
        """
        return self._exchange.merge(tuple(mine), merge_findings)

    def _leave(self) -> None:
        """Let the other ranks bring together what they have without this one, from now on."""
        self._exchange.leave()

    def state_dict(self) -> dict[str, Any]:
        """Return what lets a run that is resumed go on as one, as a checkpoint can hold it.

        These are the findings so far, the steps that they date from and whether they were
        announced, and the windows of batch statistics; numbers, strings, lists and tensors,
        nothing else.
        """
        return {
            "step": self._step,
            "findings": self._announcements.state(),
            "announced": self._announcements.records,
            "windows": {
                name: {
                    name: torch.from_numpy(values).float() for name, values in vars(window).items()
                }
                for name, window in (self._guard(self._observer.batches.windows) or {}).items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from what :meth:`state_dict` returned."""
        self._step = state["step"]
        self._announcements.resume(state["findings"], state.get("announced", ()))
        self._observer.batches.resume(
            {name: _window_of(window) for name, window in state["windows"].items()}
        )

    def _repr_html_(self) -> str:
        return self.report(final=False)._repr_html_()

    def close(self) -> None:
        """Take the hooks off; what was seen can still be reported."""
        self._evaluations.end()
        self._loop.flush()
        _open.discard(self)
        self._loop.close()
        self._observer.close()

    def _judge(self, *, final: bool) -> Report:
        """Run the rules, and date each finding to the step at which it first showed."""
        overhead = self._budget.overhead(self._observer.steps)
        history = self._observer.history(is_settled=final, overhead=overhead)
        conclusions = run_rules(history, self._rules, self._configuration.is_wanted)
        findings = conclusions.findings
        if self._observer.steps:
            findings = self._announcements.date(findings, self._step)
        course = self._course.moments
        if final:
            course = self._course.until(measure(history, findings, self._step))
        over = self._announcements.over(findings)
        return Report(history, findings, conclusions.skipped, over=over, course=course)

    def _announce_batch_of_one(self) -> None:
        """Run the rules in the middle of a step: PyTorch is about to refuse the batch."""
        self._checked = None
        self.check()


def open_monitors() -> Iterator[Monitor]:
    """Yield the monitors that have not been closed."""
    yield from tuple(_open)


@atexit.register
def _print_reports() -> None:
    """Print the reports that nobody asked for, on standard error."""
    from bnguard.report.terminal import as_terminal_text

    unasked = [m for m in _silent if m._loop.has_steps and not m._is_asked]
    for report in [*_last_reports, *(monitor.report() for monitor in unasked)]:
        with suppress(OSError, ValueError):
            print(as_terminal_text(report), file=sys.stderr)


def _window_of(state: dict[str, Any]) -> BatchWindow:
    # A checkpoint of an earlier version may hold more.
    known = (field.name for field in dataclasses.fields(BatchWindow))
    return BatchWindow(**{name: state[name].double().numpy() for name in known})


def _optimizers(given: Optimizer | Iterable[Optimizer] | None) -> tuple[Optimizer, ...]:
    if given is None:
        return ()
    optimizers = tuple(given) if isinstance(given, Iterable) else (given,)
    for optimizer in optimizers:
        if not hasattr(optimizer, "param_groups"):
            raise ConfigurationError(
                "optimizer must be a torch.optim.Optimizer or several of them, not "
                f"{type(optimizer).__name__}"
            )
    return optimizers
