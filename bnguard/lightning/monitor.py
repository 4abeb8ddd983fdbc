"""The callback that watches BN layers: a thin adapter over :mod:`bnguard.monitor`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

from bnguard.configuration import read_configuration
from bnguard.distributed import number_of_ranks
from bnguard.errors import ConfigurationError, path_from_here
from bnguard.findings import Finding, FindingGroup, Severity, counted, show
from bnguard.layers.bn_layer import find_layers
from bnguard.lightning.framework import LightningModule, Trainer
from bnguard.lightning.trainer import (
    CHECKPOINT_ENTRY,
    GuardedCallback,
    commands,
    guarded,
    is_fitting,
    is_last_batch,
    is_logging_step,
    is_rehearsal,
    log_folder,
    logged_step,
    mute_logging,
    newest_checkpoint,
    planned_steps,
    subject_options,
)
from bnguard.loggers import JSON, REPORT_FILE, Console, Reporter, RunLog, Scalars
from bnguard.loggers.trainer_loggers import reporters_of_lightning
from bnguard.observe.training_views import TrainingViews
from bnguard.report import Report
from bnguard.rules import Rule
from bnguard.rules.engine import Announcements

if TYPE_CHECKING:  # What watches is imported when a run begins.
    from bnguard.monitor import Monitor

StopOn = Literal["error", "warning"]
Destination = Literal["terminal", "file", "both", "none"]


class BatchNormMonitor(GuardedCallback):
    """Watches the BN layers during ``fit``, and says what is wrong with them.

    Each finding is printed when it first appears. When ``fit`` ends the report is printed, and
    written as ``bnguard-report.json`` into the first folder that a logger has. ``validate``,
    ``test`` and ``predict`` are watched as well.

    The loggers of the trainer get at most five scalars at its logging steps. The first four are
    relative to the limit of a rule, at the worst layer: above 1 is beyond the limit.

    * ``zz_bnguard/shift``: shift of the mean in eval mode (BN301)
    * ``zz_bnguard/variance``: log-variance ratio in eval mode (BN301)
    * ``zz_bnguard/mode_gap``: change of the outputs between train and eval mode (BN302)
    * ``zz_bnguard/values_per_channel``: values per channel, too few above 1 (BN201)
    * ``zz_bnguard/findings``: number of warnings and errors

    ``scalars="all"`` adds ``zz_bnguard/METRIC/p05``, ``p50``, ``p95`` and ``max`` (or ``min``),
    quantiles over the layers; METRIC is ``eval_shift_std``, ``eval_log_variance_ratio``,
    ``batch_shift_std``, ``batch_log_variance_ratio``, ``variance_kept``, ``values_per_channel``,
    ``gain`` or ``dead_channel_share``.

    The findings go to TensorBoard (a tab, and text), to Weights & Biases (the table
    ``zz_bnguard/table``, alerts for errors, the report as a file) and to MLflow (artifacts
    ``bnguard-findings.txt``, ``bnguard-report.txt`` and ``bnguard-report.json``).

    Where several processes train, each watches its own batches. Findings of all ranks are merged
    every ``every_n_steps`` batches and at the end; rank zero prints and logs them. A rank that has
    ended or failed is not waited for.

    An error inside bnguard does not end the run: it is printed, and the callback turns off.

    Args:
        every_n_steps: How often the rules run, in training batches. They also run after the first
            batch and after each validation.
        eval_batches: Validation batches to read in each validation; more if they are small.
        rules: The rules to run; all by default.
        select: Those of them that run, by code, name or prefix of a code (``"BN3"``). This and the
            next three override ``[tool.bnguard]`` of ``pyproject.toml``.
        ignore: Those that do not run, even if they are selected.
        per_layer_ignores: Those that do not run for some layers, by glob of the layers' names.
        limits: Limits that differ from those of the rules, by rule, then by name.
        restore_poisoned: Restore the last finite statistics in the step that poisons them.
        max_overhead: Time that watching the steps may take, as a share of the training's own;
            see :func:`bnguard.watch`. 0 reads every step.
        views: Measure now and then what BN does to training itself; costs further passes.
        stop_on: Stop the trainer when a finding of this severity appears. The rules notice it when
            they run: ``every_n_steps=1, max_overhead=0`` stops it after the very batch, at a price.
        report: Where the report goes when ``fit`` ends: printed, written, both or neither.
        scalars: ``"summary"`` for the five above, ``"all"``, or ``"none"``.
        reporters: Further :class:`bnguard.loggers.Reporter` objects, for rank zero.
        strict: Raise errors inside bnguard; for tests.

    Attributes:
        report: The report of the last run that ended; None before.

    Raises:
        ConfigurationError: An option, a rule or a limit does not exist.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[BatchNormMonitor()], logger=False)
    """

    def __init__(
        self,
        *,
        every_n_steps: int = 50,
        eval_batches: int = 8,
        rules: Iterable[Rule] | None = None,
        select: Collection[str] | None = None,
        ignore: Collection[str] | None = None,
        per_layer_ignores: Mapping[str, Collection[str]] | None = None,
        limits: Mapping[str, Mapping[str, float]] | None = None,
        restore_poisoned: bool = False,
        max_overhead: float = 0.02,
        views: TrainingViews | None = None,
        stop_on: StopOn | None = None,
        report: Destination = "both",
        scalars: Scalars = "summary",
        reporters: Iterable[Reporter] = (),
        strict: bool = False,
    ) -> None:
        super().__init__(strict=strict)
        choices: dict[str, Any] = {
            "select": select,
            "ignore": ignore,
            "per_layer_ignores": per_layer_ignores,
            "limits": limits,
        }
        self._options = {
            **choices,
            "rules": None if rules is None else tuple(rules),
            "eval_batches": eval_batches,
            "restore_poisoned": restore_poisoned,
            "max_overhead": max_overhead,
            "views": views,
        }
        # Errors in these should appear before the run, not when it starts.
        read_configuration().changed(**choices)
        _check("stop_on", stop_on, (None, *get_args(StopOn)))
        _check("report", report, get_args(Destination))
        _check("scalars", scalars, get_args(Scalars))
        self.report: Report | None = None
        self._every_n_steps = max(1, every_n_steps)
        self._stop_level = None if stop_on is None else Severity[stop_on.upper()]
        self._is_printed = report in ("terminal", "both")
        self._is_written = report in ("file", "both")
        self._scalars = scalars
        self._reporters = tuple(reporters)
        self._console = Console()
        self._monitor: Monitor | None = None
        self._evaluation = ExitStack()
        self._has_evaluated = False
        self._batches = 0
        self._unannounced: list[Finding] = []
        # For all ranks; the monitor announces those of its own rank.
        self._announcements = Announcements()
        self._log = RunLog((), ())
        self._last_logged_step: int | None = None
        self._momenta: dict[str, float | None] = {}
        self._eps: dict[str, float] = {}
        # State of the monitor in the run that is resumed, and in the last run that ended.
        self._resumed: dict[str, Any] | None = None
        self._ended: dict[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to the current run: a copy watches from its own next run on."""
        return {
            **vars(self),
            "_monitor": None,
            "_evaluation": ExitStack(),
            "_log": RunLog((), ()),
        }

    @guarded
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save momentum and eps of each layer, the findings, and what a resumed run needs."""
        state = self._ended
        if self._monitor is not None:
            state = self._monitor.state_dict()
            self._announcements.note(self._monitor.check().findings, state["step"])
        checkpoint.setdefault(CHECKPOINT_ENTRY, {})["monitor"] = {
            "momentum": self._momenta,
            "eps": self._eps,
            "findings": self._announcements.records,
            "state": state,
        }

    @guarded
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Load what an interrupted run knew, for when training starts."""
        saved = checkpoint.get(CHECKPOINT_ENTRY, {}).get("monitor", {})
        self._resumed = saved.get("state")
        self._announcements = Announcements(saved.get("findings", ()))

    @guarded
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch, with weights restored and moved, and after the sanity check."""
        resumed, self._resumed = self._resumed, None
        self._announcements = Announcements(() if resumed is None else self._announcements.records)
        self._batches, self._unannounced = 0, []
        monitor = self._watch(trainer, pl_module, planned_steps(trainer))
        if monitor is None:
            return
        if resumed is not None:
            monitor.load_state_dict(resumed)
        if trainer.is_global_zero:
            chosen = reporters_of_lightning(
                trainer.loggers,
                monitor.rules,
                subject_options(trainer),
                lambda: newest_checkpoint(trainer),
            )
            self._log = RunLog((*chosen, *self._reporters), monitor.rules, self._scalars)
        if self._is_printed and trainer.is_global_zero and not is_rehearsal(trainer):
            show(self._greeting(trainer))

    @guarded
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Ignore what an evaluation did to the statistics."""
        if self._has_evaluated:
            self._has_evaluated = False
            self.forget_changes()

    @guarded
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Read what the batch left in the buffers, and log at the trainer's logging steps."""
        if self._monitor is None:
            return
        step = logged_step(trainer)
        self._monitor.step(step + 1)
        # With gradient accumulation several batches belong to one step.
        if is_logging_step(trainer) and step != self._last_logged_step:
            self._write(self._monitor, step)
        self._batches += 1
        if self._batches % self._every_n_steps == 0:
            self._exchange(trainer)

    @guarded
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to read the inputs in eval mode."""
        if trainer.sanity_checking:
            return
        if self._monitor is None and not is_fitting(trainer):
            self._watch(trainer, pl_module, None)
        if self._monitor is not None:
            self._evaluation.enter_context(_watch_evaluation(self._monitor, pl_module))
            self._has_evaluated = True

    on_test_start = on_predict_start = on_validation_start

    @guarded
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop reading after the last batch, while averaged weights are still in place."""
        if is_last_batch(trainer, batch_idx, dataloader_idx):
            self._evaluation.close()

    @guarded
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the inputs in eval mode with the running statistics."""
        if trainer.sanity_checking or self._monitor is None:
            return
        self._evaluation.close()
        if is_fitting(trainer):
            self._write(self._monitor, logged_step(trainer))
            self._exchange(trainer)
        else:
            self._conclude(trainer, self._monitor)

    on_test_end = on_predict_end = on_validation_end

    @guarded
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print and write the report."""
        if self._monitor is not None:
            self._conclude(trainer, self._monitor)

    @guarded
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Print and write the report of a run that ends early, Ctrl-C included.

        Each rank prints its own findings: the others may never get here.
        """
        if self._monitor is None:
            return
        self._monitor._leave()
        self._announce(trainer, self._unannounced, rank=trainer.global_rank)
        self._unannounced = []
        # Unlike at the end of an evaluation, the module is not run again.
        self._evaluation.__exit__(type(exception), exception, exception.__traceback__)
        self._end(trainer, self._monitor, self._monitor.report())

    @guarded
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the model as it was found."""
        self.let_go()

    def let_go(self) -> None:
        """Remove the hooks, and let the other ranks continue without this one."""
        monitor, self._monitor = self._monitor, None
        try:
            self._evaluation.close()
        finally:
            if monitor is not None:
                monitor._leave()
                monitor.close()

    @guarded
    def forget_changes(self) -> None:
        """Ignore what changed the running statistics since the last step."""
        if self._monitor is not None:
            self._monitor.forget_changes()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Watch nothing that runs inside: it is a repair, not the user's training."""
        with ExitStack() as stack:
            if self._monitor is not None:
                stack.enter_context(self._monitor._pause())
            yield

    def _watch(
        self, trainer: Trainer, pl_module: LightningModule, planned_steps: int | None
    ) -> Monitor | None:
        """Begin to watch; of a module without BN layers, only say that it has none."""

        def collect(group: FindingGroup) -> None:
            self._unannounced.extend(group.findings)
            if number_of_ranks() == 1:
                self._exchange(trainer)

        layers = find_layers(pl_module)
        self._momenta = {layer.name: layer.momentum for layer in layers}
        self._eps = {layer.name: layer.eps for layer in layers}
        if not layers:
            if trainer.is_global_zero:
                name = type(pl_module).__name__
                show(f"bnguard: {name} has no BN layers, so there is nothing to watch")
            return None
        from bnguard.monitor import watch

        self._monitor = watch(
            pl_module,
            optimizer=trainer.optimizers,
            every_n_steps=self._every_n_steps,
            planned_steps=planned_steps,
            loader=trainer.train_dataloader,
            accumulated_batches=trainer.accumulate_grad_batches,
            on_findings=collect,
            strict=True,  # The guard of the callback handles errors.
            **self._options,
        )
        self._monitor._expect_calls()
        return self._monitor

    def _write(self, monitor: Monitor, step: int) -> None:
        self._last_logged_step = step
        if self._log.has_reporters:
            self._log.write(monitor.check(), step)

    def _conclude(self, trainer: Trainer, monitor: Monitor) -> None:
        self._exchange(trainer)
        self._end(trainer, monitor, monitor.report_of_all_ranks())

    def _end(self, trainer: Trainer, monitor: Monitor, report: Report) -> None:
        """Stop watching, then log, print and write the report."""
        # Checkpoints that are saved after fit need it.
        self._ended = monitor.state_dict()
        self._announcements.note(report.findings, self._ended["step"])
        log, self._log = self._log, RunLog((), ())
        self.let_go()
        log.conclude(report, logged_step(trainer))
        self.report = report
        if not trainer.is_global_zero or is_rehearsal(trainer):
            return
        if self._is_printed:
            self._console.log_report(report, logged_step(trainer))
            for line in commands(trainer, report):
                show(line)
        folder = log_folder(trainer) if self._is_written else None
        # A later ``validate`` must not replace the report of ``fit``.
        if folder is not None and (is_fitting(trainer) or not (folder / REPORT_FILE).exists()):
            RunLog([JSON(folder)], (), "none").conclude(report, logged_step(trainer))

    def _exchange(self, trainer: Trainer) -> None:
        """Announce what is new on all ranks: each gets here as often as the others."""
        mine, self._unannounced = self._unannounced, []
        if self._monitor is not None:
            self._announce(trainer, self._monitor._findings_of_all_ranks(mine))

    def _announce(self, trainer: Trainer, findings: Iterable[Finding], rank: int = 0) -> None:
        step = logged_step(trainer) + 1
        groups = self._announcements.new(findings)
        for group in groups:
            self._announcements.note(group.findings, step)
        if trainer.global_rank == rank:
            self._console.log_findings(groups, step)
        self._log.announce(groups, step)
        if self._stop_level is None or trainer.should_stop:
            return
        reason = next((g.worst for g in groups if g.worst.severity >= self._stop_level), None)
        if reason is not None:
            trainer.should_stop = True
            if trainer.is_global_zero:
                show(f"bnguard: stopping the trainer because of {reason.code}")

    def _greeting(self, trainer: Trainer) -> str:
        folder = log_folder(trainer) if self._is_written else None
        where = "" if folder is None else f", and in {path_from_here(folder / REPORT_FILE)}"
        ranks = number_of_ranks()
        who = "" if ranks == 1 else f" on each of {ranks} ranks"
        return (
            f"bnguard · watching {counted(len(self._momenta), 'BN layer')}{who} · findings appear "
            f"here, the report at the end{where}"
        )


@contextmanager
def _watch_evaluation(monitor: Monitor, module: LightningModule) -> Iterator[None]:
    """Watch an evaluation; when it ends the module is run again, and must not log anything."""
    with ExitStack() as at_end, monitor.evaluation():
        yield
        at_end.enter_context(mute_logging(module))


def _check(option: str, value: object, known: Collection[object]) -> None:
    if value not in known:
        raise ConfigurationError(f"{option}={value!r} is unknown: use one of {known}")
