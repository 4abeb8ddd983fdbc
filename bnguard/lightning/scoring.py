"""How good a module is, by what its own validation logs: one score, with one choice of metric."""

from __future__ import annotations

import copy
import importlib
import inspect
import logging
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import SequentialSampler

from bnguard.distributed import number_of_ranks
from bnguard.errors import ConfigurationError, in_one_line, nearest_name, user_code
from bnguard.lightning.framework import CombinedLoader, LightningModule, Trainer, package_of
from bnguard.lightning.trainer import Split, datamodule_of, most_batches, validation_mode
from bnguard.recalibration.batches import can_draw, load_samples, shuffle_indices

# What the name of a metric says that is better when it is lower; rates of word and character
# errors only as words, since "answer" and "cancer" hold them too.
_LOWER_IS_BETTER = re.compile(
    r"loss|error|mae|mse|perplexity|(?<![a-z])[wc]er(?![a-z])", re.IGNORECASE
)
_LIKE_ACCURACY = ("acc", "f1", "dice", "iou", "auc", "map")
_RETURNED = "the loss returned"

# By the name of a metric, whether more of it is better: "max", or "min".
Monitored = Mapping[str, str]


class ValidationScore:
    """Scores a module by its own ``validation_step``; the higher, the better.

    The score is the metric that is named; else what a checkpoint callback or early stopping
    monitors; else what is named like an accuracy (acc, f1, dice, iou, auc, map); else the loss
    that is logged, or returned; else what is logged first. A metric that is better when lower
    counts negative.

    The loop of a running ``Trainer`` cannot run a second time: a copy of the module runs the hooks
    and steps of a validation, and what it logs is averaged as the ``Trainer`` does it. Metrics,
    lists and loggers of the run are not touched.

    Args:
        trainer: The trainer.
        batches: The batches to score on, as the step takes them; not more than the trainer
            validates on, since a step may look something up by the number of its batch.
        metric: Name of the metric; None chooses it at the first call.

    Raises:
        UserCodeError: The loader, or later the step, raised an exception.

    Attributes:
        name: The metric, after the first call.
        sign: 1 if higher is better, else -1.
    """

    # What to do if nothing is logged or returned that could be the score.
    _way_out: ClassVar[str] = "pass score=, or keep='always'"

    def __init__(
        self, trainer: Trainer | None, batches: Iterable[object], metric: str | None = None
    ) -> None:
        self.name = metric or ""
        self.sign = -1.0
        self._trainer: Any = trainer
        with user_code("validation loader"):
            self._batches = tuple(batches)

    def __call__(self, module: nn.Module) -> float:
        """Return the score of a module; raises as :meth:`value` does."""
        value = self.value(module)  # Sets the sign.
        return self.sign * value

    def value(self, module: nn.Module) -> float:
        """Return the metric, which is chosen at the first call.

        Raises:
            ConfigurationError: The validation logs no metric, or none of that name.
        """
        metrics = self._validate(module)
        monitored = self._read_monitored()
        self.name = self.name or _choose_metric(metrics, monitored)
        if not self.name:
            raise ConfigurationError(
                "validation_step logs no metric and returns no loss, so nothing shows whether "
                f"new statistics are better: {self._way_out}"
            )
        if self.name not in metrics:
            known = [name for name in metrics if name != _RETURNED]
            near = nearest_name(self.name, known)
            hint = f"did you mean {near!r}?" if near else f"it logs {', '.join(known) or 'none'}"
            raise ConfigurationError(f"validation logs no metric {self.name!r}: {hint}")
        by_name = -1.0 if _is_lower_better(self.name) else 1.0
        self.sign = {"min": -1.0, "max": 1.0}.get(monitored.get(self.name, ""), by_name)
        return metrics[self.name]

    @property
    def meaning(self) -> str:
        """What the score is, in words."""
        is_turned = self.sign < 0
        return f"minus {self.name}, which is better when lower" if is_turned else self.name

    def _read_monitored(self) -> Monitored:
        """Return what the callbacks of the trainer monitor, those that save checkpoints first."""
        callbacks = sorted(self._trainer.callbacks, key=lambda one: not hasattr(one, "save_top_k"))
        monitors = [one for one in callbacks if isinstance(getattr(one, "monitor", None), str)]
        return {one.monitor: getattr(one, "mode", "min") for one in reversed(monitors)}

    def _validate(self, module: nn.Module) -> Mapping[str, float]:
        """Return what the module logs in a validation, and the loss that its step returns."""
        if not self._batches:
            raise ConfigurationError(
                "the trainer has no validation batches, so nothing shows whether new statistics "
                f"are better: {self._way_out}"
            )
        twin: Any = twin_of(module, self._trainer).eval()
        for part in twin.modules():
            if _is_metric(part):
                part.reset()
        logged = _Logged()
        twin.log = logged.log
        with _loggers_replaced(self._trainer, twin), user_code("validation_step"):
            twin.on_validation_start()
            twin.on_validation_epoch_start()
            for index, batch in enumerate(self._batches):
                logged.batch_size = _size_of(batch)
                twin.on_validation_batch_start(batch, index)
                with self._trainer.precision_plugin.val_step_context():
                    output = twin.validation_step(*_step_arguments(twin, batch, index))
                twin.on_validation_batch_end(output, batch, index)
                logged.note_output(output)
            twin.on_validation_epoch_end()
        return logged.metrics()


def twin_of(module: nn.Module, trainer: Trainer) -> LightningModule:
    """Return a copy with the same trainer; raise ConfigurationError if that is not possible."""
    try:
        twin: LightningModule = copy.deepcopy(module)  # type: ignore[assignment]
    except Exception as error:
        raise ConfigurationError(
            f"{type(module).__name__} cannot be copied ({in_one_line(error)}): pass score=, or "
            "keep='always', and when= other than 'checkpoint'"
        ) from error
    twin.trainer = trainer
    return twin


class TrainerScore(ValidationScore):
    """Computes the same score without a running ``Trainer``: it creates one.

    Args:
        batches: The loader to validate on.
        device: Where the module is afterwards.
        metric: Name of the metric; None chooses it at the first call.
        monitored: What the callbacks of the training monitored.
        options: Options of the ``Trainer``: accelerator, devices, precision.
    """

    _way_out = "--keep always does not compare"

    def __init__(
        self,
        batches: Iterable[object],
        *,
        device: torch.device,
        metric: str | None,
        monitored: Monitored,
        **options: Any,
    ) -> None:
        super().__init__(None, (), metric)
        self._loader = batches
        self._device = device
        self._options = options
        self._of_training = monitored

    def _read_monitored(self) -> Monitored:
        # Those of the module's own configure_callbacks are known by now.
        return {**super()._read_monitored(), **self._of_training}

    def _validate(self, module: nn.Module) -> Mapping[str, float]:
        package = package_of(module)
        returned = _Logged()

        class Listener(package.Callback):  # type: ignore[misc, name-defined]
            def on_validation_batch_end(
                self, trainer: Any, module: Any, outputs: object, batch: object, *_: object
            ) -> None:
                returned.batch_size = _size_of(batch)
                returned.note_output(outputs)

        with quiet_lightning():
            self._trainer = package.Trainer(
                **self._options,
                callbacks=[Listener()],
                # For steps that log pictures.
                logger=_dummy_logger(package.__name__),
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            try:
                (metrics,) = self._trainer.validate(module, self._loader, verbose=False)
            except Exception as error:
                raise ConfigurationError(
                    f"the model's validation fails on these data with {in_one_line(error)}"
                ) from error
            finally:
                # The Trainer leaves it on the CPU, with a reference to itself.
                module.to(self._device).trainer = None  # type: ignore[assignment]
        # Plain names too: a metric that is logged for steps and epochs has suffixes.
        plain = {name: float(value) for name, value in self._trainer.callback_metrics.items()}
        return {**plain, **metrics, **returned.metrics()}


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's remarks on workers and accelerators; import Lightning before."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning.pytorch")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="pytorch_lightning|lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class _Logged:
    """Collects what a validation logs, each value with the size of its batch."""

    def __init__(self) -> None:
        self.batch_size = 1
        self._values: dict[str, list[tuple[object, int]]] = defaultdict(list)
        self._reductions: dict[str, object] = {}
        self._losses: list[tuple[object, int]] = []
        self._is_loss = True

    def log(
        self,
        name: str,
        value: object,
        *_: object,
        batch_size: int | None = None,
        reduce_fx: object = "mean",
        **__: object,
    ) -> None:
        """Replace the module's ``log``."""
        alone = value.detach() if isinstance(value, Tensor) else value
        self._values[name].append((alone, batch_size or self.batch_size))
        self._reductions[name] = reduce_fx

    def note_output(self, output: object) -> None:
        """Collect what the step returned, if it is a loss or has one."""
        loss = output.get("loss") if isinstance(output, Mapping) else output
        is_loss = isinstance(loss, Tensor) and loss.numel() == 1
        self._is_loss &= is_loss
        if is_loss:
            self._losses.append((loss.detach(), self.batch_size))  # type: ignore[union-attr]

    def metrics(self) -> dict[str, float]:
        """Return each metric over all batches."""
        metrics = {
            name: _reduce(values, self._reductions[name]) for name, values in self._values.items()
        }
        if self._losses and self._is_loss:
            metrics[_RETURNED] = _reduce(self._losses, "mean")
        return metrics


def _reduce(values: Sequence[tuple[object, int]], reduction: object) -> float:
    """Return the mean over the samples, or the reduction asked for; a metric has its own."""
    last: Any = values[-1][0]
    if _is_metric(last):
        return float(last.compute())
    numbers = torch.tensor([float(value) for value, _ in values], dtype=torch.float64)  # type: ignore[arg-type]
    if callable(reduction):
        return float(reduction(numbers))
    if reduction in ("min", "max", "sum"):
        return float(getattr(numbers, str(reduction))())
    sizes = torch.tensor([size for _, size in values], dtype=torch.float64)
    return float((numbers * sizes).sum() / sizes.sum())


def _choose_metric(metrics: Mapping[str, float], monitored: Monitored) -> str:
    """Return the metric to count if none is named; ``""`` if there is none."""
    logged = [name for name in metrics if name != _RETURNED]
    of_run = [name for name in reversed(list(monitored)) if name in metrics]
    accuracies = [name for word in _LIKE_ACCURACY for name in logged if word in name.lower()]
    losses = [name for name in logged if "loss" in name.lower()]
    returned = [_RETURNED] if _RETURNED in metrics else []
    return next(iter([*of_run, *accuracies, *losses, *returned, *logged]), "")


def _is_lower_better(metric: str) -> bool:
    """Return whether a metric is better when it is lower, from the words in its name.

    >>> [_is_lower_better(name) for name in ("val_loss", "test/WER", "cancer_recall")]
    [True, True, False]
    """
    return _LOWER_IS_BETTER.search(metric) is not None


def _step_arguments(module: Any, batch: object, index: int) -> tuple[object, ...]:
    """Return what a validation step takes: the batch, and the numbers that it has names for."""
    parameters = inspect.signature(module.validation_step).parameters
    several = len(parameters) > 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    loader = (0,) if "dataloader_idx" in parameters else ()
    return (batch, *((index,) if several else ()), *loader)


@contextmanager
def _loggers_replaced(trainer: Any, module: object) -> Iterator[None]:
    """Give the run loggers that keep nothing, for what a step logs by itself."""
    loggers = trainer.loggers
    trainer.loggers = [_dummy_logger(package_of(module).__name__) for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers


def _dummy_logger(package: str) -> object:
    return importlib.import_module(f"{package}.loggers.logger").DummyLogger()


def _size_of(batch: object) -> int:
    """Return the number of samples in a batch, as Lightning counts them."""
    sizes = (len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim)
    return next(sizes, 1)


def _is_metric(candidate: object) -> bool:
    return hasattr(candidate, "compute") and hasattr(candidate, "reset")


_BATCH_SIZE = 32


def draw_from_split(
    trainer: Trainer, split: Split, samples: int, *, instead: str
) -> Iterable[object]:
    """Return batches of samples of a split, draw as :func:`draw_samples` does.

    Of several validation loaders only the first is used, unless the trainer combines their batches.

    Args:
        trainer: The trainer, whose limits on batches apply.
        split: Which split.
        samples: Maximum number of samples, on all ranks together.
        instead: What to do without a loader.

    Raises:
        ConfigurationError: The loader is missing, or there are several for training.
    """
    loaders: Any = trainer.train_dataloader if split == "train" else trainer.val_dataloaders
    source = datamodule_of(trainer)
    mode: Any = "sequential" if split == "train" else validation_mode(trainer)
    if loaders is None and source is not None:
        loaders = source.train_dataloader() if split == "train" else source.val_dataloader()
    if hasattr(loaders, "iterables"):  # A CombinedLoader, of either package.
        loaders, mode = loaders.iterables, getattr(loaders, "_mode", mode)
    several = [] if loaders is None else tree_leaves(loaders)
    if not several or (split == "train" and several[0] is not loaders):
        found = "several" if several else "no"
        raise ConfigurationError(f"the trainer has {found} {split} loaders: {instead}")

    def draw(loader: Iterable[object]) -> Iterable[object]:
        return draw_samples(
            loader, samples, trainer.global_rank, most_batches(trainer, split, loader)
        )

    if mode == "sequential":
        return draw(several[0])
    return (batch for batch, *_ in CombinedLoader(tree_map(draw, loaders), mode))


def draw_samples(
    loader: Iterable[object], samples: int, rank: int, most_batches: float = math.inf
) -> Iterable[object]:
    """Return batches of samples draw at random, the same each time; each rank gets a share.

    A ``DataLoader`` over a data set with indices is not iterated itself: that would change its
    random state, and with persistent workers end the current epoch. Other loaders are.

    Args:
        loader: The loader.
        samples: Maximum number of samples, on all ranks together.
        rank: Number of this process.
        most_batches: Maximum number of batches; of a loader that does not shuffle, the samples are
            draw from its first batches.
    """
    batch_size = getattr(loader, "batch_size", None)
    if not can_draw(loader):
        return _FirstBatches(loader, int(min(most_batches, math.ceil(samples / (batch_size or 1)))))
    size, ranks = batch_size or _BATCH_SIZE, number_of_ranks()
    population = getattr(loader.sampler, "indices", range(len(loader.dataset)))  # type: ignore[arg-type]
    most = min(most_batches * size * ranks, len(population))
    if isinstance(loader.sampler, SequentialSampler):
        population = population[: int(most)]
    order = shuffle_indices(len(population))[: int(min(samples, most))]
    share = [int(population[i]) for i in order][rank::ranks]
    return load_samples(
        loader,
        share,
        batch_size=size,
        num_workers=0,
        pin_memory=False,
        # A validation step may rely on full batches.
        drop_last=loader.drop_last and len(share) >= size,
        generator=torch.Generator(),
    )


@dataclass(frozen=True)
class _FirstBatches:
    """The first batches of a loader, each time it is iterated."""

    loader: Iterable[object]
    number: int

    def __iter__(self) -> Iterator[object]:
        return islice(self.loader, self.number)


def transfer_batches(
    batches: Iterable[object], trainer: Trainer, module: LightningModule
) -> Iterator[Any]:
    """Yield batches as the module's steps get them, after its transfer hooks."""
    for batch in batches:
        converted = trainer.precision_plugin.convert_input(batch)
        before = module.on_before_batch_transfer(converted, 0)
        yield trainer.strategy.batch_to_device(before, dataloader_idx=0)


def plain_forward(module: nn.Module, batch: object) -> object:
    """Call a module on a batch: a tensor, keyword arguments, or inputs followed by targets."""
    if isinstance(batch, Mapping):
        return module(**batch)
    return module(batch[0] if isinstance(batch, (tuple, list)) else batch)
