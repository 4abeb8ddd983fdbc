"""Recalibration of running statistics, as a transaction on the user's model."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from functools import partial
from numbers import Real
from statistics import fmean
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from bnguard.distributed import Ranks
from bnguard.errors import CalibrationError, ConfigurationError
from bnguard.findings import counted
from bnguard.layers.bn_layer import BatchNormLayer, device_of, find_layers, require_module
from bnguard.layers.distances import DEFAULT_MOMENTUM, FORGOTTEN_WEIGHT, updates_to_forget
from bnguard.layers.preserve import (
    SavedStatistics,
    preserve_modes,
    preserve_random_states,
    preserve_statistics,
    restore_statistics,
    save_statistics,
)
from bnguard.observe.gap_probe import GapProbe
from bnguard.observe.history import LayerHistory, ModeGap, RunningStatistics
from bnguard.recalibration.batches import Batch, Forward, SampledRows, call, read_batches
from bnguard.recalibration.exact import calibrate_exactly
from bnguard.recalibration.memory import keep_freed_memory, memory_limit
from bnguard.recalibration.options import (
    Keep,
    Score,
    SkippedLayer,
    require_keep,
    require_samples,
    require_score,
    select_layers,
    unwrap,
)
from bnguard.recalibration.pooled import calibrate_precisely, mix_with_source
from bnguard.recalibration.result import LayerChange, Recalibration
from bnguard.recalibration.statistics import (
    Calibration,
    CalibrationProgress,
    Estimate,
    ForwardCancelled,
    Job,
    NoProgress,
    OnNonfinite,
    copy_statistics,
    current_statistics,
    estimate_unbiased,
    fit_to_buffer,
    prepare_for_calibration,
    read_inputs,
)

Method = Literal["exact", "precise", "adapt"]

METHODS: dict[Method, Callable[[Job], Calibration]] = {
    "exact": calibrate_exactly,
    "precise": calibrate_precisely,
    "adapt": calibrate_exactly,
}
# In the sums of a deep network, one after the other; but noise must not hide everything.
_ROUNDINGS = 1000.0
_MAX_NOISE = 0.3
# More than any training has, and held exactly by a counter of any type but half precision.
_MOST_UPDATES = 2**53
# Means that may be off by more than this, in standard deviations, are reported.
_MAX_MEAN_ERROR_STD = 0.1


def recalibrate(
    model: nn.Module,
    loader: Iterable[object],
    *,
    method: Method = "exact",
    samples: int = 1024,
    forward: Forward | None = None,
    layers: Iterable[str] | None = None,
    score: Score | None = None,
    keep: Keep = "if-better",
    on_nonfinite: OnNonfinite = "skip",
    prior: float = 0.0,
    memory: str | float = 0.5,
    tolerance: float | None = None,
    progress: bool = True,
) -> Recalibration:
    """Recompute the running statistics from data, and keep them if they prove better.

    Afterwards each layer's mean and unbiased variance are those of its inputs when the data run in
    eval mode. (A training-mode forward of all data as one batch divides by the biased variance, so
    its outputs differ by a relative 1/(2n) or so per layer, for n values per channel.)

    Everything else in the model stays as it is, and after an exception the statistics do too.
    With ``torch.distributed`` initialised every rank calls this with its own share of the data,
    and all end with the statistics of all of it.

    Args:
        model: The model, in any mode. Layers in eval mode in a model in train mode are frozen,
            and stay as they are.
        loader: Yields tensors; tuples or lists, whose first item the model takes; or mappings,
            whose entries the model takes by the names of the forward's parameters.
        method: ``"exact"``: as one giant batch would give it, at any batch size. ``"precise"``:
            each batch normalised by its own statistics, for sets too large to hold and for layers
            that are called on their own output; noisy below the first layer at small batches.
            ``"adapt"``: ``exact`` on new data, mixed with the statistics from before by ``prior``.
        samples: Use at most this number of samples, on all ranks together.
        forward: ``forward(model, batch)`` calls the model, if the loader yields anything else.
        layers: Names or patterns (``"backbone.*"``) of the layers to compute; all by default.
        score: ``score(model)`` says how good the model is, the higher the better; measured in
            eval mode before and after.
        keep: ``"if-better"`` rolls back if the score is worse with the new statistics.
        on_nonfinite: ``"skip"`` leaves out batches that bring NaN or Inf to a layer, and warns;
            ``"error"`` raises.
        prior: For ``"adapt"``: the number of samples that the statistics from before count as.
        memory: What may be held at once: ``"2GiB"``, or a share of what is free. A larger set
            runs as several virtual batches, whose statistics are merged.
        tolerance: Stop as soon as the standard error of every mean, in standard deviations, and
            of every log-variance is below this, as estimated from batches drawn at random.
        progress: Show a progress bar on a terminal.

    Returns:
        What moved, what was skipped, and an ``undo()``. It prints itself.

    Raises:
        CalibrationError: The statistics cannot be computed; the model is as it was.
        ConfigurationError: An option does not fit.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> result = recalibrate(model, [torch.randn(16, 4) for _ in range(4)])
        >>> result.samples, result.is_kept
        (64, True)
    """
    require_module(model, "recalibrate")
    check_options(
        method=method,
        samples=samples,
        score=score,
        keep=keep,
        on_nonfinite=on_nonfinite,
        prior=prior,
        memory=memory,
        tolerance=tolerance,
    )
    inner, ranks = unwrap(model), Ranks()
    selection = select_layers(inner, layers)
    _require_writable(selection.layers)
    saved = save_statistics(selection.layers)
    before = {layer.name: copy_statistics(layer) for layer in selection.layers}
    score_before = None if score is None else measure_score(model, score)
    share = samples // ranks.size + (ranks.rank < samples % ranks.size)
    rows = SampledRows()
    batches = read_batches(loader, inner, forward, samples=share, device=device_of(inner))
    with keep_freed_memory():
        calibration = calibrate(
            inner,
            selection.layers,
            rows.sample_from(batches),
            method=method,
            samples=share,
            forward=forward,
            on_nonfinite=on_nonfinite,
            prior=prior,
            memory=memory,
            tolerance=tolerance,
            progress=progress,
        )
        reached = [layer for layer in selection.layers if layer.name in calibration.estimates]
        sample = rows.batch
        if sample is not None and calibration.is_channels_last:
            sample = sample.in_channels_last()
        with _roll_back_on_error(reached, saved), closing(GapProbe(inner, reached)) as probe:
            gap_before = _measure_mode_gap(probe, inner, reached, forward, sample)
            for layer in reached:
                counter = _count_updates(layer, before[layer.name], prior, calibration)
                _write(layer, calibration.estimates[layer.name], counter)
            after = {layer.name: copy_statistics(layer) for layer in reached}
            gap_after = _measure_mode_gap(probe, inner, reached, forward, sample)
    with _roll_back_on_error(reached, saved):
        score_after = None if score is None else measure_score(model, score)
        is_worse = _is_worse(score_before, score_after)
        is_kept = keep == "always" or not is_worse
        if not is_kept:
            restore_statistics(reached, saved)
    notes = list(describe_calibration(calibration, method, prior, tolerance))
    if is_worse:
        notes.insert(0, "the score is worse with the new statistics")
    if calibration.left_out:
        warnings.warn(f"bnguard: {_describe_left_out(calibration)}", stacklevel=2)
    return Recalibration(
        method=method,
        layers=tuple(
            LayerChange(
                name=layer.name,
                before=before[layer.name],
                after=after[layer.name],
                eps=layer.eps,
                values=calibration.estimates[layer.name].values,
            )
            for layer in reached
        ),
        skipped=selection.skipped
        + tuple(
            SkippedLayer(layer.name, "was not reached by any batch")
            for layer in selection.layers
            if layer.name not in calibration.estimates
        ),
        samples=calibration.samples,
        batches=calibration.batches,
        virtual_batches=calibration.virtual_batches,
        left_out=calibration.left_out,
        is_kept=is_kept,
        score_before=score_before,
        score_after=score_after,
        mode_gap_before=gap_before,
        mode_gap_after=gap_after,
        notes=tuple(notes),
        restore=partial(restore_statistics, reached, saved),
    )


@contextmanager
def _roll_back_on_error(layers: Sequence[BatchNormLayer], saved: SavedStatistics) -> Iterator[None]:
    try:
        yield
    except BaseException:
        restore_statistics(layers, saved)
        raise


def calibrate(
    model: nn.Module,
    layers: tuple[BatchNormLayer, ...],
    batches: Iterator[Batch],
    *,
    method: Method,
    samples: int,
    forward: Forward | None,
    on_nonfinite: OnNonfinite = "skip",
    prior: float = 0.0,
    memory: str | float = 0.5,
    tolerance: float | None = None,
    progress: bool,
) -> Calibration:
    """Compute statistics for layers, which keep those that they have.

    ``batches`` are this rank's share of the data, on the model's device, and ``samples`` the most
    samples in it; ``model`` has no wrappers. All else is as for :func:`recalibrate`.

    Raises:
        CalibrationError: The statistics cannot be computed, or no batch reached a layer.
    """
    ranks, device = Ranks(), device_of(model)
    estimate = mix_with_source(layers, prior) if prior else estimate_unbiased
    with (
        prepare_for_calibration(model, layers),
        _show_progress(progress, ranks) as shown,
    ):
        calibration = METHODS[method](
            Job(
                model=model,
                device=device,
                noise=_estimate_noise(model, device),
                layers=layers,
                batches=batches,
                samples=samples,
                forward=forward,
                estimate=estimate,
                on_nonfinite=on_nonfinite,
                memory=memory_limit(memory, device),
                tolerance=tolerance,
                ranks=ranks,
                progress=shown,
            )
        )
    if not calibration.estimates:
        raise CalibrationError(
            "no batch reached a BN layer: check that the forward runs them, and as layer(x), since "
            "layer.forward(x) and functional.batch_norm go unseen"
        )
    return calibration


def check_options(
    *,
    method: str,
    samples: int,
    score: Score | None,
    keep: str,
    on_nonfinite: str,
    prior: float,
    memory: str | float,
    tolerance: float | None = None,
) -> None:
    """Raise ConfigurationError if an option of a recalibration is invalid."""
    for option, value, known in (
        ("method", method, get_args(Method)),
        ("on_nonfinite", on_nonfinite, get_args(OnNonfinite)),
    ):
        if value not in known:
            raise ConfigurationError(
                f"{option} {value!r} does not exist: use {' or '.join(map(repr, known))}"
            )
    require_keep(keep)
    require_samples(samples, 1)
    require_score(score)
    if not _is_finite(prior) or prior < 0 or (prior and method != "adapt"):
        raise ConfigurationError(f"prior {prior!r} needs method 'adapt', and a number of samples")
    memory_limit(memory, torch.device("cpu"))
    if tolerance is not None and (not _is_finite(tolerance) or tolerance <= 0):
        raise ConfigurationError(f"tolerance {tolerance!r} is never reached: use 0.01, say")


def _is_finite(number: object) -> bool:
    return isinstance(number, Real) and math.isfinite(number)


def measure_score(model: nn.Module, score: Score) -> float:
    """Return the mean score of all ranks, in eval mode and without gradients.

    Raises:
        ConfigurationError: The score is not a number.
    """
    with (
        preserve_modes(model),
        preserve_random_states(model),
        preserve_statistics(find_layers(model)),
        torch.no_grad(),
    ):
        model.eval()
        return fmean(Ranks().together(lambda: _as_number(score(model))))


def _as_number(score: object) -> float:
    try:
        return float(score)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(
            f"the score has to be a number, the higher the better, not {score!r}"
        ) from error


def _is_worse(before: float | None, after: float | None) -> bool:
    """Return whether a score fell, or is not a number."""
    if before is None or after is None:
        return False
    return math.isnan(after) if math.isnan(before) else not after >= before


def _show_progress(progress: bool, ranks: Ranks) -> AbstractContextManager[CalibrationProgress]:
    """Show a progress bar on a terminal, on the first rank."""
    if not progress or ranks.rank or not sys.stderr.isatty():
        return nullcontext(NoProgress())
    from bnguard.report.terminal import CalibrationBar

    return CalibrationBar()


def _measure_mode_gap(
    probe: GapProbe,
    model: nn.Module,
    layers: Sequence[BatchNormLayer],
    forward: Forward | None,
    batch: Batch | None,
) -> ModeGap | str:
    """Return the mode gap of these layers with their present statistics, or why there is none."""
    if batch is None:
        return "there are no samples to measure it on"
    for layer in layers:
        mean, var = current_statistics(layer)
        if not bool(mean.isfinite().all() and var.isfinite().all()):
            return f"the statistics of {layer.label} were not finite"
    with prepare_for_calibration(model, layers):
        try:
            if not probe.has_batch:
                # The inputs of the modules that hold all layers are known at the first layer.
                with suppress(ForwardCancelled), read_inputs(layers, _cancel):
                    call(model, forward, batch.copied())
                probe.hooks.close()
            return probe.measure()
        except CalibrationError as error:
            return str(error)


def _cancel(index: int, values: Tensor) -> None:
    raise ForwardCancelled


def _write(layer: BatchNormLayer, estimate: Estimate, counter: int) -> None:
    """Write statistics and counter into the buffers of a layer."""
    mean, var = current_statistics(layer)
    mean.copy_(fit_to_buffer(estimate.mean, mean, layer.name))
    var.copy_(fit_to_buffer(estimate.var, var, layer.name))
    if layer.counter is not None:
        layer.counter.fill_(counter)


def _count_updates(
    layer: BatchNormLayer, before: RunningStatistics, prior: float, done: Calibration
) -> int:
    """Return the number of updates after which training would have forgotten as much.

    The number holds with the momentum of the layer and with PyTorch's, which a reader of a
    checkpoint may have to assume.
    """
    momentum = layer.momentum
    history = LayerHistory(
        name=layer.name, channels=layer.channels, momentum=momentum, running=before
    )
    left = (history.initial_weight or 0.0) * prior / (prior + done.samples)
    if left > FORGOTTEN_WEIGHT:
        enough = [before.updates or 0, updates_to_forget(momentum or DEFAULT_MOMENTUM, left)]
    else:
        # Counters that are read in float32 are rounded.
        limit = FORGOTTEN_WEIGHT * (1.0 - 1e-6)
        enough = [
            (before.updates or 0) + done.batches,
            *(updates_to_forget(each, limit) for each in (momentum, DEFAULT_MOMENTUM)),
        ]
    return min(_MOST_UPDATES, int(max(filter(math.isfinite, enough))))


def describe_calibration(
    calibration: Calibration, method: Method, prior: float = 0.0, tolerance: float | None = None
) -> Iterator[str]:
    """Yield what a reader should know about how statistics were computed, a sentence each."""
    if calibration.left_out:
        yield _describe_left_out(calibration)
    # An upper limit: all values of a sample may be alike, and means mixed in do not scatter.
    error_std = math.sqrt(calibration.samples) / (prior + calibration.samples)
    if error_std > _MAX_MEAN_ERROR_STD:
        are = "is" if calibration.samples == 1 else "are"
        yield (
            f"{counted(calibration.samples, 'sample')} {are} few: "
            f"the standard error of a mean may be up to {error_std:.2g} σ"
        )
    if calibration.virtual_batches > 1 and METHODS[method] is calibrate_exactly:
        yield (
            f"ran as {calibration.virtual_batches} virtual batches, whose statistics are merged: "
            "more memory makes it one"
        )
    if tolerance is not None and calibration.is_within_tolerance:
        yield f"within the tolerance of {tolerance:g} after {calibration.samples:,} samples"
    elif tolerance is not None:
        yield f"the tolerance of {tolerance:g} takes more than {calibration.samples:,} samples"


def _describe_left_out(calibration: Calibration) -> str:
    batches = counted(calibration.left_out, "batch", "batches")
    return f"{batches} left out for NaN or Inf ({calibration.batches} used)"


def _require_writable(layers: Sequence[BatchNormLayer]) -> None:
    for layer in layers:
        mean, _ = current_statistics(layer)
        if mean.is_inference() and not torch.is_inference_mode_enabled():
            raise CalibrationError(
                f"{layer.label} was made in inference mode, so its statistics can only be written "
                "there: call recalibrate under torch.inference_mode(), or make the model outside it"
            )


def _estimate_noise(model: nn.Module, device: torch.device) -> float:
    """Return how far sums differ in another order, as a share of their terms."""
    dtypes = {tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()}
    if torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=torch.finfo(torch.float32).eps)
    return min(_ROUNDINGS * eps, _MAX_NOISE)
