"""Recalibration of running statistics, as a transaction on the user's model."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from bnguard.errors import CalibrationError, ConfigurationError
from bnguard.fixes.calibration.batches import Batch, Forward, plain_forward, read_batches
from bnguard.fixes.calibration.exact import Lockstep
from bnguard.fixes.recalibration import LayerChange, Recalibration, SkippedLayer
from bnguard.fixes.calibration.working import fitted, working_statistics, write_statistics
from bnguard.history import RunningStatistics
from bnguard.layers import BatchNormLayer, find_layers, preserved_modes, preserved_random_state
from bnguard.moments import Moments
from bnguard.stats import updates_to_forget

Keep = Literal["if-better", "always"]
OnNonfinite = Literal["skip", "error"]
Score = Callable[[nn.Module], float]

# Below this weight the initial statistics count as forgotten, for every rule that asks.
_MAX_INITIAL_WEIGHT = 0.05


def recalibrate(
    model: nn.Module,
    loader: Iterable[object],
    *,
    method: str = "exact",
    samples: int = 1024,
    forward: Forward | None = None,
    layers: Iterable[str] | None = None,
    score: Score | None = None,
    keep: Keep = "if-better",
    on_nonfinite: OnNonfinite = "skip",
    progress: bool = True,
) -> Recalibration:
    """Compute the running statistics anew from data, and keep them if they prove better.

    Args:
        model: The model; its running statistics and counters change, and nothing else.
        loader: Yields batches: tensors, tuples or lists that begin with the input, or mappings.
        method: ``"exact"``.
        samples: How many samples to use at most.
        forward: ``forward(model, batch)`` calls the model, where the loader yields anything else.
        layers: Names or patterns (``"backbone.*"``) of the layers to compute; all by default.
        score: ``score(model)`` tells how good the model is, the higher the better; measured in
            eval mode, before and after.
        keep: ``"if-better"`` takes the new statistics back where the score is worse with them.
        on_nonfinite: What to do about a batch with NaN or Inf at a BN layer.
        progress: Show a progress bar, where there is a terminal.

    Returns:
        What moved, what was skipped, and the way back.

    Raises:
        CalibrationError: The statistics cannot be computed; the model is as it was.
        ConfigurationError: An option does not fit.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> result = recalibrate(model, [torch.randn(16, 4) for _ in range(4)])
        >>> result.samples, result.is_kept
        (64, True)
    """
    if method != "exact":
        raise ConfigurationError(f"method={method!r} is unknown: use 'exact'")
    plan = _plan(unwrapped(model), layers)
    snapshot = [_snapshot(layer) for layer in plan.layers]
    restore = partial(_restore, plan.layers, snapshot)

    score_before = None if score is None else _scored(model, score)
    batches = list(read_batches(loader, samples, _device_of(model)))
    if not batches:
        raise CalibrationError("the loader is empty: it yielded no samples to recalibrate on")
    merged = _computed(unwrapped(model), plan.layers, batches, forward or plain_forward)
    reached = [layer for layer in plan.layers if layer.name in merged]
    if not reached:
        raise CalibrationError("no batch reached a BN layer: check what forward= calls")

    score_after = None
    is_kept = True
    try:
        for layer in reached:
            _commit(layer, merged[layer.name], len(batches))
        after = {layer.name: _running(layer) for layer in reached}
        if score is not None:
            score_after = _scored(model, score)
            is_kept = keep == "always" or not _is_worse(score_after, score_before)
        if not is_kept:
            restore()
    except BaseException:
        restore()
        raise
    before = {
        layer.name: shot.statistics for layer, shot in zip(plan.layers, snapshot, strict=True)
    }
    return Recalibration(
        method=method,
        layers=tuple(
            LayerChange(
                name=layer.name,
                before=before[layer.name],
                after=after[layer.name],
                eps=layer.eps,
                values=merged[layer.name].count,
            )
            for layer in reached
        ),
        skipped=plan.skipped
        + tuple(
            SkippedLayer(layer.name, "no batch reached it")
            for layer in plan.layers
            if layer.name not in merged
        ),
        samples=sum(batch.size for batch in batches),
        batches=len(batches),
        is_kept=is_kept,
        score_before=score_before,
        score_after=score_after,
        restore=restore,
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DataParallel, DistributedDataParallel and ``torch.compile``."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


@dataclass(frozen=True)
class _Plan:
    layers: tuple[BatchNormLayer, ...]
    skipped: tuple[SkippedLayer, ...]


@dataclass(frozen=True, eq=False)
class _Snapshot:
    mean: Tensor
    var: Tensor
    counter: Tensor | None
    statistics: RunningStatistics


def _plan(model: nn.Module, names: Iterable[str] | None) -> _Plan:
    found = find_layers(model)
    if not found:
        raise CalibrationError(
            f"{type(model).__name__} has no BN layers, so nothing to recalibrate"
        )
    chosen, skipped = [], []
    patterns = None if names is None else tuple(names)
    for pattern in patterns or ():
        if not any(fnmatch.fnmatchcase(layer.name, pattern) for layer in found):
            raise ConfigurationError(f"layers={pattern!r} matches no BN layer of the model")
    for layer in found:
        reason = _reason_to_skip(layer, model, patterns)
        if reason is None:
            chosen.append(layer)
        else:
            skipped.append(SkippedLayer(layer.name, reason))
    if not chosen:
        raise CalibrationError(
            f"every BN layer is to stay as it is: {skipped[0].name} {skipped[0].reason}"
        )
    return _Plan(tuple(chosen), tuple(skipped))


def _reason_to_skip(
    layer: BatchNormLayer, model: nn.Module, patterns: Sequence[str] | None
) -> str | None:
    if patterns is not None and not any(fnmatch.fnmatchcase(layer.name, p) for p in patterns):
        return "is not among the layers asked for"
    if not layer.is_tracking:
        return "has no running statistics"
    if model.training and not layer.module.training:
        return "is frozen: in eval mode while the model is in train mode"
    return None


def _computed(
    model: nn.Module, layers: Sequence[BatchNormLayer], batches: Sequence[Batch], forward: Forward
) -> dict[str, Moments]:
    def settle(layer: BatchNormLayer, moments: Moments) -> None:
        _check(layer, moments)
        write_statistics(layer, moments.mean, moments.var_unbiased)

    with (
        preserved_modes(model),
        preserved_random_state(model),
        torch.no_grad(),
        working_statistics(layers),
    ):
        model.eval()
        forwards = [partial(forward, model, batch.payload) for batch in batches]
        return Lockstep(layers, forwards).run(settle)


def _check(layer: BatchNormLayer, moments: Moments) -> None:
    if moments.count < 2:
        raise CalibrationError(
            f"{layer.name}: {moments.count} value a channel is too few for a variance: "
            "use more samples"
        )
    if not bool(torch.isfinite(moments.mean).all() & torch.isfinite(moments.squares).all()):
        raise CalibrationError(f"{layer.name}: NaN or Inf arrives at it")


def _commit(layer: BatchNormLayer, moments: Moments, batches: int) -> None:
    mean, var, counter = layer.running_mean, layer.running_var, layer.counter
    assert mean is not None
    assert var is not None
    with torch.no_grad():
        mean.copy_(fitted(moments.mean, mean, layer.name))
        var.copy_(fitted(moments.var_unbiased, var, layer.name))
        if counter is not None:
            forgotten = updates_to_forget(layer.momentum, _MAX_INITIAL_WEIGHT)
            merged = int(counter) + batches
            counter.fill_(max(merged, int(forgotten)) if np.isfinite(forgotten) else merged)


def _snapshot(layer: BatchNormLayer) -> _Snapshot:
    mean, var, counter = layer.running_mean, layer.running_var, layer.counter
    assert mean is not None
    assert var is not None
    return _Snapshot(
        mean.clone(), var.clone(), None if counter is None else counter.clone(), _running(layer)
    )


def _restore(layers: Sequence[BatchNormLayer], snapshot: Sequence[_Snapshot]) -> None:
    with torch.no_grad():
        for layer, shot in zip(layers, snapshot, strict=True):
            for buffer, value in (
                (layer.running_mean, shot.mean),
                (layer.running_var, shot.var),
                (layer.counter, shot.counter),
            ):
                if buffer is not None and value is not None:
                    buffer.copy_(value)


def _running(layer: BatchNormLayer) -> RunningStatistics:
    mean, var, counter = layer.running_mean, layer.running_var, layer.counter
    assert mean is not None
    assert var is not None
    return RunningStatistics(
        mean=mean.detach().double().cpu().numpy().copy(),
        var=var.detach().double().cpu().numpy().copy(),
        updates=None if counter is None else int(counter),
    )


def _scored(model: nn.Module, score: Score) -> float:
    with preserved_modes(model), preserved_random_state(model), torch.no_grad():
        model.eval()
        return float(score(model))


def _is_worse(after: float, before: float | None) -> bool:
    return before is not None and np.isfinite(before) and not after >= before


def _device_of(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
