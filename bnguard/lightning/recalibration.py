"""Recalibrate in a Trainer: a thin callback over :mod:`bnguard.recalibration.api`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from bnguard.errors import ConfigurationError, user_code
from bnguard.findings import counted, show
from bnguard.layers.bn_layer import find_layers
from bnguard.layers.preserve import (
    SavedStatistics,
    has_statistics,
    preserve_random_states,
    restore_statistics,
    save_statistics,
)
from bnguard.lightning.framework import LightningModule, Trainer
from bnguard.lightning.monitor import BatchNormMonitor
from bnguard.lightning.scoring import (
    ValidationScore,
    draw_from_split,
    draw_samples,
    plain_forward,
    transfer_batches,
    twin_of,
)
from bnguard.lightning.trainer import (
    CHECKPOINT_ENTRY,
    GuardedCallback,
    Split,
    guarded,
    is_fitting,
    mute_logging,
)
from bnguard.recalibration.api import Method, check_options, recalibrate
from bnguard.recalibration.options import Keep, patterns_of
from bnguard.recalibration.result import Recalibration
from bnguard.recalibration.statistics import OnNonfinite

When = Literal["validation", "checkpoint", "fit-end", "test"]

# Number of the batch, and the norm of each weight: identifies the weights of a checkpoint.
_Content = tuple[int, list[float]]


@dataclass(frozen=True)
class _ForCheckpoint:
    """New statistics for all checkpoints of the same weights, and those of training."""

    content: _Content
    statistics: dict[str, Tensor]
    before: SavedStatistics
    after: SavedStatistics


class BatchNormRecalibration(GuardedCallback):
    """Recompute the running statistics from data before they are used, and keep the better ones.

    Training continues with its own statistics, which are restored before the next training batch:
    a checkpoint that is saved for a validation holds what the validation used. Averaged weights
    that a callback evaluates get statistics of their own. Layers that are in eval mode during
    training stay as they are.

    Args:
        when: ``"validation"``, before each validation of ``fit``; ``"checkpoint"``, before a
            checkpoint is saved, which alone gets the new statistics (with ``save_weights_only``
            Lightning calls no callback; averaging callbacks come before this one);
            ``"fit-end"``, once after the last epoch, and for good, but in the model alone: the
            checkpoints and the report of ``fit`` are written by then, and
            ``trainer.save_checkpoint`` after it writes one with the new statistics; ``"test"``,
            before ``test`` and ``predict``.
        data: ``"train"`` or ``"validation"``, the loader to draw samples from; or batches.
        every_n_epochs: In which epochs; for ``when="validation"``.
        samples: Samples to use at most, on all ranks together.
        method: As in :func:`bnguard.recalibrate`, like the next four.
        layers: Names or patterns (``"backbone.*"``) of the layers to compute; all by default.
        prior: For ``"adapt"``: how many samples the statistics from before count as.
        memory: What may be held at once: ``"2GiB"``, or a share of what is free.
        on_nonfinite: What to do about batches with NaN or Inf at a layer: ``"skip"`` or
            ``"error"``.
        keep: ``"if-better"`` rolls back if the module is worse with the new statistics.
            ``"always"`` does not compare, which saves two passes over as many validation samples.
        score: ``score(module)`` returns how good the module is, the higher the better. By default
            that is what a copy of the module logs in a validation: what a checkpoint callback
            monitors, else what is named like an accuracy, else the loss.
        forward: ``forward(module, batch)`` calls the module; by default its ``forward`` is given
            the batch, or what comes before the targets.
        strict: Raise errors; by default they are printed, and the callback turns off.

    Attributes:
        result: What the newest recalibration did; None before.

    Raises:
        ConfigurationError: An option is unknown or does not fit.

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
        method: Method = "exact",
        layers: str | Iterable[str] | None = None,
        prior: float = 0.0,
        memory: str | float = 0.5,
        on_nonfinite: OnNonfinite = "skip",
        keep: Keep = "if-better",
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
        self._options: dict[str, Any] = {
            "method": method,
            "samples": samples,
            "keep": keep,
            "on_nonfinite": on_nonfinite,
            "prior": prior,
            "memory": memory,
        }
        check_options(**self._options, score=score)
        self.result: Recalibration | None = None
        self._when = when
        self._data = data
        self._every_n_epochs = max(1, every_n_epochs)
        self._samples = samples
        patterns = "*" if layers is None else layers
        self._layers = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        self._keep = keep
        self._score = score
        self._forward = forward
        self._frozen: frozenset[str] = frozenset()
        self._knows_frozen = False
        self._before: SavedStatistics = {}
        self._after: SavedStatistics = {}
        self._newest: _ForCheckpoint | None = None
        # Moment and verdict of each recalibration of the run.
        self._verdicts: list[tuple[str, bool]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the run before."""
        super().setup(trainer, pl_module, stage)
        self._verdicts = []

    @guarded
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the statistics of training, to be restored before the next batch.

        With ``when="checkpoint"``, recalibrate a copy that has the weights of the checkpoint.
        """
        before, after = self._before, self._after
        if self._when == "checkpoint" and is_fitting(trainer):
            saved = checkpoint["state_dict"]
            content = _content(trainer, pl_module, saved)
            if self._newest is None or self._newest.content != content:
                self._newest = self._recalibrate_copy(trainer, pl_module, saved, content)
            saved.update(self._newest.statistics)
            before, after = self._newest.before, self._newest.after
        states = checkpoint.setdefault(CHECKPOINT_ENTRY, {}).setdefault("recalibration", {})
        states[self._when] = {"before": before, "after": after}

    @guarded
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Load the statistics of training."""
        states = checkpoint.get(CHECKPOINT_ENTRY, {}).get("recalibration", {})
        if self._when in states:
            self._before, self._after = states[self._when]["before"], states[self._when]["after"]

    @guarded
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Restore the statistics of training, and see which layers are frozen."""
        if self._before:
            self._restore(trainer, pl_module)
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
        """Recalibrate before the first batch, with averaged weights in place if there are any."""
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
            moment = "before predict" if trainer.predicting else "before test"
            self._recalibrate(trainer, pl_module, moment)

    on_predict_batch_start = on_test_batch_start

    @guarded
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the statistics from before."""
        self._restore(trainer, pl_module)

    on_predict_end = on_test_end

    @guarded
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Recalibrate the weights that training ends with, for good."""
        if self._when == "fit-end":
            self._recalibrate(trainer, pl_module, "at the end of fit")
            if self._before and trainer.is_global_zero:
                show(
                    "bnguard: no checkpoint that fit saved has these statistics: "
                    "trainer.save_checkpoint(path) writes one, or use when='checkpoint'"
                )
        verdicts = self._verdicts
        if len(verdicts) > 1 and trainer.is_global_zero:
            kept = sum(is_kept for _, is_kept in verdicts)
            show(
                f"bnguard: BN layers recalibrated {len(verdicts)} times {verdicts[0][0]}, new "
                f"statistics kept {counted(kept, 'time')}"
            )
        self._before, self._after = {}, {}

    def _recalibrate_copy(
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
        newest = _ForCheckpoint(content, statistics, self._before, self._after)
        self._before, self._after = {}, {}
        return newest

    def _recalibrate(self, trainer: Trainer, module: LightningModule, moment: str) -> None:
        found = find_layers(module)
        patterns = patterns_of("layers", self._layers, found) if found else ()
        layers = [
            layer
            for layer in found
            if layer.name not in self._frozen
            and any(fnmatchcase(layer.name, pattern) for pattern in patterns)
        ]
        if not layers:
            return
        with (
            preserve_random_states(module),
            torch.inference_mode(False),
            torch.no_grad(),
            mute_logging(module),
            ExitStack() as stack,
        ):
            for monitor in _monitors(trainer):
                stack.enter_context(monitor.pause())
            score = self._make_score(trainer, module)
            before = save_statistics(layers)
            result = recalibrate(
                module,
                transfer_batches(self._batches(trainer), trainer, module),
                **self._options,
                forward=self._make_forward(trainer),
                layers=[layer.name for layer in layers] if len(layers) < len(found) else None,
                score=score,
                progress=False,
            )
            changed = [layer for layer in layers if result.is_kept and layer.name in result.after]
            self._before = {layer.name: before[layer.name] for layer in changed}
            self._after = save_statistics(changed)
        self.result = result
        verdict = (moment, result.is_kept)
        # A line an epoch would be too many.
        if trainer.is_global_zero and verdict not in self._verdicts[-1:]:
            show(f"bnguard: {_describe(result, score, moment)}")
        self._verdicts.append(verdict)

    def _batches(self, trainer: Trainer) -> Iterable[object]:
        data, samples = self._data, self._samples
        if data == "train" or data == "validation":
            return draw_from_split(trainer, data, samples, instead="pass data=loader")
        return draw_samples(data, samples, trainer.global_rank)

    def _make_score(
        self, trainer: Trainer, module: LightningModule
    ) -> Callable[[nn.Module], float] | None:
        """Return the function that scores the module; None if scores are not compared."""
        if self._keep == "always":
            return None
        if self._score is None:
            way_out = "pass score=, or keep='always'"
            batches = draw_from_split(trainer, "validation", self._samples, instead=way_out)
            return ValidationScore(trainer, transfer_batches(batches, trainer, module))
        score = self._score

        def call_score(module: nn.Module) -> float:
            with user_code("score"):
                return score(module)

        return call_score

    def _make_forward(self, trainer: Trainer) -> Callable[[nn.Module, Any], object]:
        def forward(module: nn.Module, batch: object) -> object:
            # Entered at each call, since autocast holds for one thread.
            with trainer.precision_plugin.forward_context():
                return self._forward(module, batch)

        return forward

    def _restore(self, trainer: Trainer, module: LightningModule) -> None:
        """Restore statistics of layers that still have the new ones; averaged weights are gone."""
        restore_statistics(
            [layer for layer in find_layers(module) if has_statistics(layer, self._after)],
            self._before,
        )
        self._before, self._after = {}, {}
        for monitor in _monitors(trainer):
            monitor.forget_changes()


def _content(trainer: Trainer, module: LightningModule, saved: dict[str, Any]) -> _Content:
    """Return what identifies a checkpoint, from parameters only, which all ranks share."""
    weights = [saved[name] for name, _ in module.named_parameters() if name in saved]
    return trainer.fit_loop.total_batch_idx, [part.float().norm().item() for part in weights]


def _monitors(trainer: Trainer) -> list[BatchNormMonitor]:
    callbacks: list[object] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, BatchNormMonitor)]


def _describe(result: Recalibration, score: object, moment: str) -> str:
    layers, samples = counted(len(result.layers), "BN layer"), counted(result.samples, "sample")
    what = f"{layers} recalibrated on {samples} {moment}"
    if result.score_before is None or result.score_after is None:
        return what
    name, sign = "score", 1.0
    if isinstance(score, ValidationScore):
        name, sign = score.name, score.sign
    verdict = "kept" if result.is_kept else "no better, so rolled back"
    before, after = sign * result.score_before, sign * result.score_after
    return f"{what}: {name} {before:.4g} → {after:.4g}, {verdict}"
