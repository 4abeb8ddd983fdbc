"""The callback that repairs: a thin adapter over :mod:`bnguard.recalibration.api`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from bnguard.errors import ConfigurationError, user_code
from bnguard.findings import counted, show
from bnguard.layers.bn_layer import BatchNormLayer, find_layers
from bnguard.lightning.framework import LightningModule, Trainer, isolate_rng
from bnguard.lightning.monitor import BatchNormMonitor
from bnguard.lightning.scoring import (
    ValidationScore,
    drawn_samples,
    plain_forward,
    split_samples,
    transferred,
    twin_of,
)
from bnguard.lightning.trainer import GuardedCallback, Split, guarded, is_fitting, unlogged
from bnguard.observe.history import RunningStatistics
from bnguard.recalibration.api import recalibrate
from bnguard.recalibration.result import Recalibration

When = Literal["validation", "checkpoint", "fit-end", "test"]

# Running statistics before and after, by the name of the layer.
_Change = tuple[RunningStatistics, RunningStatistics]

# Number of the batch, and the norm of each weight: what a checkpoint holds, at no memory.
_Content = tuple[int, list[float]]


@dataclass(frozen=True)
class _ForCheckpoint:
    """What a checkpoint is given, and the next ones of the same weights: the best, and the last."""

    content: _Content
    statistics: dict[str, Tensor]
    state: dict[str, Any]


class BatchNormRecalibration(GuardedCallback):
    """Computes the running statistics anew from data before they are used, and keeps the better.

    Training goes on with its own statistics: these are put back before the next training batch.
    Until then the model has the new ones, so that the checkpoint that is saved for a validation
    holds what the validation used. Averaged weights that a callback evaluates get statistics of
    their own, and keep them. Layers that are held in eval mode in training stay as they are.

    Args:
        when: ``"validation"``, before each validation of ``fit``; ``"checkpoint"``, before a
            checkpoint is saved, which alone gets the new statistics (not one of weights alone,
            of which Lightning tells no callback; averaging callbacks come before this one);
            ``"fit-end"``, once after the last epoch, and for good, but in the model alone: the
            checkpoints and the report of ``fit`` are written by then, and
            ``trainer.save_checkpoint`` after it writes one with the new statistics; ``"test"``,
            before ``test`` and ``predict``.
        data: ``"train"`` or ``"validation"``, of which samples are drawn; or batches.
        every_n_epochs: In which epochs; for ``when="validation"``.
        samples: Samples to use at most, on all ranks together.
        method: As in :func:`bnguard.recalibrate`.
        keep: ``"if-better"`` takes the new statistics back where the module is worse with them.
            ``"always"`` does not compare, which saves two passes over as many validation samples.
        score: ``score(module)`` says how good the module is, the higher the better. By default
            a copy of the module runs its ``validation_step`` on validation samples, and what
            it logs is caught: what a checkpoint callback monitors counts, else what is named
            like an accuracy, else the loss.
        forward: ``forward(module, batch)`` calls the module; by default its ``forward`` is given
            the batch, or what comes before the targets.
        strict: Raise errors; by default they are printed, and the callback turns off.

    Attributes:
        result: What the newest recalibration did; None before.

    Raises:
        ConfigurationError: An option is unknown.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[BatchNormRecalibration()], logger=False)
    """

    def __init__(
        self,
        *,
        when: When = "validation",
        data: Split | Iterable[object] = "train",
        every_n_epochs: int = 1,
        samples: int = 1024,
        method: str = "exact",
        keep: Literal["if-better", "always"] = "if-better",
        score: Callable[[nn.Module], float] | None = None,
        forward: Callable[[nn.Module, Any], object] = plain_forward,
        strict: bool = False,
    ) -> None:
        super().__init__(strict=strict)
        if when not in get_args(When):
            known = ", ".join(map(repr, get_args(When)))
            raise ConfigurationError(f"when={when!r} is unknown: use one of {known}")
        if isinstance(data, str) and data not in ("train", "validation"):
            raise ConfigurationError(f"data={data!r} is unknown: use 'train' or 'validation'")
        self.result: Recalibration | None = None
        self._when = when
        self._data = data
        self._every_n_epochs = max(1, every_n_epochs)
        self._samples = samples
        self._method = method
        self._keep = keep
        self._score = score
        self._forward = forward
        self._frozen: frozenset[str] = frozenset()
        self._knows_frozen = False
        self._changes: dict[str, _Change] = {}
        self._newest: _ForCheckpoint | None = None

    @property
    def state_key(self) -> str:
        """What tells this callback from others of its class, in a checkpoint."""
        return f"{type(self).__qualname__}[when={self._when!r}]"

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics of training, which the model does not have just then."""
        return self._state() or {}

    @guarded
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the statistics of training, to be put back before the next batch."""
        self._changes = {
            name: (_from_tensors(before), _from_tensors(after))
            for name, (before, after) in state_dict["changes"].items()
        }

    @guarded
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Recalibrate a copy that has the weights of the checkpoint, averaged ones perhaps."""
        if self._when != "checkpoint" or not is_fitting(trainer):
            return
        saved = checkpoint["state_dict"]
        content = _content(trainer, pl_module, saved)
        if self._newest is None or self._newest.content != content:
            self._newest = self._made_for_checkpoint(trainer, pl_module, saved, content)
        saved.update(self._newest.statistics)
        # A run that goes on from here goes on with its own.
        checkpoint.setdefault("callbacks", {})[self.state_key] = self._newest.state

    @guarded
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Put the statistics of training back, and see which layers are frozen."""
        if self._changes:
            self._put_back(trainer, pl_module)
        if not self._knows_frozen:
            self._frozen = frozenset(
                layer.name for layer in find_layers(pl_module) if not layer.is_training
            )
            self._knows_frozen = True

    @guarded
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Recalibrate before the first batch, with averaged weights in place where there are."""
        is_due = (trainer.current_epoch + 1) % self._every_n_epochs == 0
        is_first = batch_idx == 0 and dataloader_idx == 0
        if self._when == "validation" and is_first and is_due:
            if is_fitting(trainer) and not trainer.sanity_checking:
                self._recalibrate(trainer, pl_module, "before validation")
            self._knows_frozen = False

    @guarded
    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Recalibrate before the first batch."""
        if self._when == "test" and batch_idx == 0 and dataloader_idx == 0:
            self._recalibrate(trainer, pl_module, "before test")

    @guarded
    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Recalibrate before the first batch."""
        if self._when == "test" and batch_idx == 0 and dataloader_idx == 0:
            self._recalibrate(trainer, pl_module, "before predict")

    @guarded
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the statistics from before back."""
        self._put_back(trainer, pl_module)

    @guarded
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the statistics from before back."""
        self._put_back(trainer, pl_module)

    @guarded
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Recalibrate the weights that training ends with, for good."""
        if self._when == "fit-end":
            self._recalibrate(trainer, pl_module, "at the end of fit")
            if self._changes and trainer.is_global_zero:
                show(
                    "bnguard: no checkpoint that fit saved has these statistics: "
                    "trainer.save_checkpoint(path) writes one, or use when='checkpoint'"
                )
        self._changes = {}

    @guarded
    def _state(self) -> dict[str, Any]:
        return {
            "changes": {
                name: [_as_tensors(before), _as_tensors(after)]
                for name, (before, after) in self._changes.items()
            }
        }

    def _made_for_checkpoint(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        saved: dict[str, Any],
        content: _Content,
    ) -> _ForCheckpoint:
        twin = twin_of(pl_module, trainer)
        twin.load_state_dict(saved, strict=False)
        self._recalibrate(trainer, twin, "for the checkpoint")
        statistics = {
            key: buffer
            for key, buffer in twin.named_buffers(remove_duplicate=False)
            if key in saved and not torch.equal(buffer, saved[key].to(buffer.device))
        }
        state, self._changes = self._state() or {}, {}
        return _ForCheckpoint(content, statistics, state)

    def _recalibrate(self, trainer: Trainer, module: LightningModule, moment: str) -> None:
        names = [layer.name for layer in find_layers(module) if layer.name not in self._frozen]
        if not names:
            return
        with ExitStack() as stack:
            stack.enter_context(isolate_rng())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(unlogged(module))
            for monitor in _monitors(trainer):
                stack.enter_context(monitor.paused())
            score = self._scored(trainer, module)
            result = recalibrate(
                module,
                transferred(self._batches(trainer), trainer, module),
                method=self._method,
                samples=self._samples,
                forward=self._called(trainer),
                layers=names if self._frozen else None,
                score=score,
                keep=self._keep,
                progress=False,
            )
        self.result = result
        self._changes = (
            {name: (result.before[name], result.after[name]) for name in result.after}
            if result.is_kept
            else {}
        )
        if trainer.is_global_zero:
            show(f"bnguard: {_told(result, score, moment)}")

    def _batches(self, trainer: Trainer) -> Iterable[object]:
        data, samples = self._data, self._samples
        if data == "train" or data == "validation":
            return split_samples(trainer, data, samples, instead="pass data=loader")
        return drawn_samples(data, samples, trainer.global_rank)

    def _scored(
        self, trainer: Trainer, module: LightningModule
    ) -> Callable[[nn.Module], float] | None:
        """Return what says how good the module is, if that is compared."""
        if self._keep == "always":
            return None
        if self._score is None:
            way_out = "pass score=, or keep='always'"
            batches = split_samples(trainer, "validation", self._samples, instead=way_out)
            return ValidationScore(trainer, transferred(batches, trainer, module))
        score = self._score

        def scored(module: nn.Module) -> float:
            with user_code("score"):
                return score(module)

        return scored

    def _called(self, trainer: Trainer) -> Callable[[nn.Module, Any], object]:
        def forward(module: nn.Module, batch: object) -> object:
            # Entered at each call, since autocast holds for one thread.
            with trainer.precision_plugin.forward_context():
                return self._forward(module, batch)

        return forward

    def _put_back(self, trainer: Trainer, module: LightningModule) -> None:
        """Put statistics back where the model still has the new ones; averaged weights are gone."""
        for layer in find_layers(module):
            before, after = self._changes.get(layer.name, (None, None))
            if before is not None and after is not None and _holds(layer, after):
                _write(layer, before)
        self._changes = {}
        for monitor in _monitors(trainer):
            monitor.forget_changes()


def _content(trainer: Trainer, module: LightningModule, saved: dict[str, Any]) -> _Content:
    """Return what tells a checkpoint from others; of parameters alone, which all ranks share."""
    weights = [saved[name] for name, _ in module.named_parameters() if name in saved]
    return trainer.fit_loop.total_batch_idx, [part.float().norm().item() for part in weights]


def _monitors(trainer: Trainer) -> list[BatchNormMonitor]:
    callbacks: list[object] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, BatchNormMonitor)]


def _told(result: Recalibration, score: object, moment: str) -> str:
    layers, samples = counted(len(result.layers), "BN layer"), counted(result.samples, "sample")
    what = f"{layers} recalibrated on {samples} {moment}"
    if result.score_before is None or result.score_after is None:
        return what
    name, sign = "score", 1.0
    if isinstance(score, ValidationScore):
        name, sign = score.name, score.sign
    verdict = "kept" if result.is_kept else "no better, so taken back"
    before, after = sign * result.score_before, sign * result.score_after
    return f"{what}: {name} {before:.4g} → {after:.4g}, {verdict}"


def _holds(layer: BatchNormLayer, statistics: RunningStatistics) -> bool:
    mean, var = layer.running_mean, layer.running_var
    return (
        mean is not None
        and var is not None
        and np.array_equal(mean.cpu().double().numpy(), statistics.mean)
        and np.array_equal(var.cpu().double().numpy(), statistics.var)
    )


@torch.no_grad()
def _write(layer: BatchNormLayer, statistics: RunningStatistics) -> None:
    for buffer, value in (
        (layer.running_mean, torch.from_numpy(statistics.mean)),
        (layer.running_var, torch.from_numpy(statistics.var)),
        (layer.counter, statistics.updates),
    ):
        if buffer is not None and value is not None:
            buffer.copy_(torch.as_tensor(value))


def _as_tensors(statistics: RunningStatistics) -> dict[str, Any]:
    return {
        "mean": torch.from_numpy(statistics.mean),
        "var": torch.from_numpy(statistics.var),
        "updates": statistics.updates,
    }


def _from_tensors(state: dict[str, Any]) -> RunningStatistics:
    return RunningStatistics(
        mean=state["mean"].numpy(), var=state["var"].numpy(), updates=state["updates"]
    )
