"""The inputs of the model in training: whether batches differ too much, and whether all is finite.

:class:`Entrance` finds the module that the training step calls; :class:`SampleProbe` compares its
inputs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from bnguard.layers.distances import FloatArray
from bnguard.layers.moments import mean_and_biased_var
from bnguard.observe.history import InputWindow
from bnguard.observe.hooks import Hooks

# Numbers read per sample, evenly spaced, and batches per window: few enough to cost next to
# nothing. After the first steps of a run and of a window, one in four is read.
_MAX_FEATURES = 64
_MAX_BATCHES = 64
_FIRST_STEPS = 8
_ONE_IN = 4
# Calls of a step that are compared separately; further ones share the last.
_MAX_PLACES = 4
# Share of the batches at one place from which the others count as exceptions.
_USUAL_SHARE = 0.75
# Windows that are kept, and that a comparison needs.
_MAX_WINDOWS = 64
_MIN_WINDOWS = 4
# Standard deviations by which windows have to differ more than chance explains. If brightness makes
# most of an input, a median over its features does not average anything.
_MIN_OVER_CHANCE_STD = 5.0
# Batches from which a slow trend is removed, as in what a generator feeds a discriminator.
_MIN_BATCHES_OF_TREND = 16
# Of the first batches of a run, which are compared with their neighbours.
_MIN_BATCHES_OF_ORDER = 8
_MAX_COMPONENTS = 8
# Sums that wait on the device until they are checked.
_MAX_WAITING = 256


class SampleProbe:
    """Compares the variance between batches with that between the samples of a batch.

    Reads a few numbers of each sample in the first input, without waiting for the device. If a step
    calls the model several times, batches are compared with those at the same place in other steps,
    and the place whose batches differ least counts: a discriminator sees real and generated images,
    and the latter change as the generator learns. Accumulated batches come from one loader and
    share a place.

    Args:
        accumulated_batches: Batches whose gradients are added before a step of the optimizer.
    """

    def __init__(self, accumulated_batches: int = 1) -> None:
        self._accumulated = max(1, accumulated_batches)
        self._newest: InputWindow | None = None
        self._newest_count = 0
        self._windows: list[_Summary] = []
        self._batches: list[_Batch] = []
        self._first: list[_Batch] = []
        self._shape: torch.Size | None = None
        self._steps = self._steps_of_run = 0
        self._is_read = True
        self._current: InputWindow | None = None
        self._is_current = False
        self._place = 0

    def start_window(self) -> None:
        """Begin a new window and keep the one that ends."""
        self._newest, self._newest_count = self.window(), max(len(self._batches), 2)
        self._windows = [*self._windows, *self._summarise()][-_MAX_WINDOWS:]
        self._batches, self._steps, self._is_read = [], 0, True
        self._is_current = False

    def start_step(self) -> None:
        """Count the next calls to the next step."""
        self._steps += 1
        self._steps_of_run += 1
        self._place = 0
        is_early = self._steps < _FIRST_STEPS or self._steps_of_run < _MAX_BATCHES
        self._is_read = is_early or self._steps % _ONE_IN == 0

    def window(self) -> InputWindow | None:
        """Return the newest window with at least half the batches of the last full one."""
        if not self._is_current:
            self._current, self._is_current = self._compare(), True
        return self._current

    def _compare(self) -> InputWindow | None:
        count, newest = len(self._batches), self._newest
        if count < 2 or (newest is not None and 2 * count < self._newest_count):
            return newest
        means, variances = _moments_that_vary(self._batches)
        places, steps, sizes = np.array([batch.origin for batch in self._batches]).T
        calls = np.array([np.count_nonzero(steps == step) for step in steps])
        calls = np.where(calls % self._accumulated == 0, calls // self._accumulated, calls)
        places = np.minimum(places % calls, _MAX_PLACES - 1)
        groups = [
            (places == place) & (calls == many)
            for place, many in sorted(set(zip(places, calls, strict=True)))
        ]
        # One of several places may be fed by a network that learns fast at first.
        has_one_place = max(map(np.count_nonzero, groups)) > _USUAL_SHARE * count
        enough = 2 if has_one_place else _MIN_BATCHES_OF_TREND
        windows_by_place = [
            _compare_moments(means[here], variances[here], steps[here], sizes[here])
            for here in groups
            if np.count_nonzero(here) >= enough
        ]
        window = min(windows_by_place, key=usual_ratio, default=newest)
        if window is None or not has_one_place:
            return window
        windows = [*self._windows, *self._summarise()]
        change, excess = _neighbour_change(self._first)
        return dataclasses.replace(
            window,
            windows=len(windows),
            between_windows=_between_windows(windows),
            neighbour_change=change,
            neighbour_excess_std=excess,
        )

    def _summarise(self) -> Iterator[_Summary]:
        """Yield a summary of the current window, if it has enough batches from one place."""
        batches = self._batches
        if len(batches) < 2 or len({batch.origin[0] // self._accumulated for batch in batches}) > 1:
            return
        means, variances = _moments(batches)
        with np.errstate(all="ignore"):  # The data may be infinite.
            spread = means.var(0, ddof=1)
        yield _Summary(len(batches), means.mean(0), spread, variances.mean(0))

    def note(self, tensors: Sequence[Tensor]) -> None:
        """Read the inputs of a call."""
        place, self._place = self._place, self._place + 1
        if not self._is_read or len(self._batches) >= _MAX_BATCHES:
            return
        samples = _select_samples(tensors)
        if samples is None:
            return
        # The same place in samples of another shape is another number.
        if samples.shape[1:] != self._shape:
            self._shape = samples.shape[1:]
            self._batches, self._windows, self._first = [], [], []
        self._is_current = False
        with torch.no_grad():
            mean, variance = mean_and_biased_var(_select_features(samples))
        self._batches.append(_Batch((place, self._steps, len(samples)), mean, variance))
        if len(self._first) < min(self._steps_of_run + 1, _MAX_BATCHES):
            self._first.append(self._batches[-1])


class Entrance:
    """Reads the inputs of the model in training, and finds the first step with NaN or Inf in them.

    A training step may call a part of the model (``self.network(x)``) and never the model itself,
    so all modules around the first BN layer have a hook, and the outermost call counts. NaN and Inf
    survive in the sum of an input; the sums stay on the device until asked for.

    Args:
        model: The model.
        note: Receives all tensors of a call.

    Attributes:
        step: The current step.
        is_fed_by_network: Whether an input ever had a gradient function.
    """

    def __init__(self, model: nn.Module, note: Callable[[Sequence[Tensor]], None]) -> None:
        self.hooks = Hooks()
        self.step = 1
        self.is_fed_by_network = False
        self._model = model
        self._note = note
        self._path: tuple[nn.Module, ...] = ()
        self._first_bad_step: int | None = None
        self._waiting: list[tuple[int, Tensor]] = []

    def follow(self, first: nn.Module) -> None:
        """Watch the modules that contain this one, the BN layer that is called first."""
        around = (module for module in self._model.modules() if module is not first)
        path = tuple(module for module in around if first in module.modules()) or (self._model,)
        if path != self._path:
            self._path = path
            self.hooks.close()
            self.hooks.before_outermost(path, self._enter)

    def _enter(self, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if self._model.training and torch.is_grad_enabled():
            tensors = _tensors(args, kwargs)
            self.is_fed_by_network |= any(values.grad_fn is not None for values in tensors)
            self._note(tensors)
            self._note_finiteness(tensors)

    def _note_finiteness(self, tensors: Sequence[Tensor]) -> None:
        if self._first_bad_step is not None:
            return
        for values in filter(_has_numbers, tensors):
            # A sum in float16 may overflow.
            dtype = torch.promote_types(values.dtype, torch.float32)
            self._waiting.append((self.step, values.detach().sum(dtype=dtype)))
        if len(self._waiting) >= _MAX_WAITING:
            self.first_bad_step()

    def first_bad_step(self) -> int | None:
        """Return the first step whose input was not finite; None if there was none."""
        waiting, self._waiting = self._waiting, []
        if waiting and self._first_bad_step is None:
            device = waiting[0][1].device
            sums = torch.stack([total.float().to(device) for _, total in waiting])
            bad = (~sums.isfinite()).nonzero().flatten().tolist()
            self._first_bad_step = waiting[bad[0]][0] if bad else None
        return self._first_bad_step


@dataclass(frozen=True)
class _Batch:
    """Mean and biased variance of a batch over its samples, shape ``(F,)`` each."""

    origin: tuple[int, int, int]  # place among the calls of its step, step, and samples
    mean: Tensor
    variance: Tensor


@dataclass(frozen=True)
class _Summary:
    """The batches of a window: number, mean of means, variance of means, mean variance."""

    batches: int
    mean: FloatArray
    spread: FloatArray
    variance: FloatArray


def compare_batches(batches: Iterable[Sequence[Tensor]]) -> InputWindow | None:
    """Return how much successive batches differ; None if that cannot be known."""
    samples = [_select_samples(batch) for batch in batches]
    found = [_select_features(each) for each in samples if each is not None]
    if len(found) < 2 or len({features.shape[1] for features in found}) > 1:
        return None
    read = [
        _Batch((0, step, len(features)), *mean_and_biased_var(features))
        for step, features in enumerate(found)
    ]
    _, steps, sizes = np.array([batch.origin for batch in read]).T
    return _compare_moments(*_moments_that_vary(read), steps, sizes)


def _moments(batches: Sequence[_Batch]) -> tuple[FloatArray, FloatArray]:
    """Return means and variances on the host, a row per batch."""
    means = torch.stack([batch.mean for batch in batches])
    variances = torch.stack([batch.variance for batch in batches])
    return means.cpu().double().numpy(), variances.cpu().double().numpy()


def _moments_that_vary(batches: Sequence[_Batch]) -> tuple[FloatArray, FloatArray]:
    """Return the same of the features that are finite everywhere and vary anywhere."""
    means, variances = _moments(batches)
    varies = np.isfinite(variances + means).all(0) & (variances > 0.0).any(0)
    return means[:, varies], variances[:, varies]


def usual_ratio(window: InputWindow) -> float:
    """Return the median ratio over the features; infinite if none is finite."""
    ratio = window.variance_ratio[np.isfinite(window.variance_ratio)]
    return float(np.median(ratio)) if ratio.size else math.inf


def _between_windows(windows: Sequence[_Summary]) -> FloatArray:
    """Return the variance between neighbouring windows as a share of that between samples.

    Half the mean square of successive differences (von Neumann), which slow drift hardly affects,
    minus what the spread of the batches explains.
    """
    windows = [window for window in windows if window.mean.shape == windows[-1].mean.shape]
    if len(windows) < _MIN_WINDOWS:
        return np.empty(0)
    means = np.array([window.mean for window in windows])
    with np.errstate(all="ignore"):
        chance = np.mean([window.spread / window.batches for window in windows], axis=0)
        within = np.mean([window.variance + window.spread for window in windows], axis=0)
        between = np.square(np.diff(means, axis=0)).mean(0) / 2
        most = 1.0 + _MIN_OVER_CHANCE_STD * math.sqrt(3.0 / len(windows))
        between = np.where(between > most * chance, between - chance, 0.0)
        share = between / (between + within)
    return np.asarray(share[np.isfinite(share)])


def _neighbour_change(batches: Sequence[_Batch]) -> tuple[float, float]:
    """Return the change between batches that follow each other, and how unlikely it is by chance.

    The former is von Neumann's ratio of the principal components of the batch means, or of the one
    that says most: an augmentation of whole batches is few components, sorted data are many. The
    latter is its distance from 1 in standard deviations.
    """
    if len(batches) < _MIN_BATCHES_OF_ORDER:
        return 1.0, 0.0
    means, _ = _moments(batches)
    if not np.isfinite(means).all():
        return 1.0, 0.0
    rest = _without_trend(means, np.arange(len(means), dtype=float))
    scores, scale, _ = np.linalg.svd(rest, full_matrices=False)
    rank = int(np.count_nonzero(scale > 1e-9 * scale[0]))
    kept = min(_MAX_COMPONENTS, len(means) // 4, rank)
    if not kept:
        return 1.0, 0.0
    changes = np.square(np.diff(scores[:, :kept], axis=0)).mean(0) / (2 * scores[:, :kept].var(0))
    candidates = [(float(changes.mean()), kept), *((float(change), 1) for change in changes)]
    excesses = [abs(change - 1.0) * math.sqrt(n * len(means)) for change, n in candidates]
    clearest = int(np.argmax(excesses))
    return candidates[clearest][0], excesses[clearest]


def _without_trend(means: FloatArray, steps: FloatArray) -> FloatArray:
    """Return what is left of batch means; of many of them next to a parabola in time."""
    powers = 3 if len(means) >= _MIN_BATCHES_OF_TREND else 1
    times = np.vander(np.interp(steps, (steps[0], steps[-1]), (-1.0, 1.0)), powers)
    return np.asarray(means - times @ np.linalg.lstsq(times, means, rcond=None)[0])


def _compare_moments(
    means: FloatArray, variances: FloatArray, steps: FloatArray, sizes: FloatArray
) -> InputWindow:
    """Return how much batches differ, after a parabola in time is removed if there are many."""
    rest = _without_trend(means, steps)
    freedom = len(means) - (3 if len(means) >= _MIN_BATCHES_OF_TREND else 1)
    between = sizes.mean() * np.square(rest).sum(0) / freedom
    within = variances.mean(0) * sizes.sum() / (sizes.sum() - len(sizes))
    with np.errstate(all="ignore"):
        return InputWindow(batches=1 + freedom, variance_ratio=np.asarray(between / within))


def _select_samples(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return the first input that has samples; None if there is none, or a single sample."""
    values = next((t for t in tensors if t.dim() > 1 and _has_numbers(t)), None)
    if values is None or len(values) < 2 or not values.numel() or _have_relations(tensors):
        return None
    return values


def _select_features(samples: Tensor) -> Tensor:
    """Return some numbers of each sample, shape ``(N, F)``."""
    flat = samples.detach().flatten(1)
    return flat[:, :: -(-flat.shape[1] // _MAX_FEATURES)].float()


def _have_relations(tensors: Sequence[Tensor]) -> bool:
    """Return whether some inputs relate the rows of others, as the edges of a graph do.

    The rows are then nodes, and those of one graph are not independent samples.

    >>> nodes, edges, adjacency = torch.rand(5, 3), torch.ones(2, 7), torch.ones(5, 5)
    >>> _have_relations([nodes, edges]), _have_relations([nodes, adjacency])
    (True, True)
    >>> _have_relations([nodes, torch.ones(5)]), _have_relations([adjacency])
    (False, False)
    """
    if len(tensors) == 1:
        return False
    rows = {len(tensor) for tensor in tensors if tensor.dim()}
    are_square = {t.shape == (len(t), len(t)) for t in tensors if t.dim() > 1}
    is_sparse = any(tensor.layout is not torch.strided for tensor in tensors)
    return len(rows) > 1 or is_sparse or len(are_square) > 1


def _has_numbers(values: Tensor) -> bool:
    return values.is_floating_point() and values.layout is torch.strided


def _tensors(args: tuple[object, ...], kwargs: dict[str, object]) -> list[Tensor]:
    # The usual call has one tensor; to flatten it would cost more than all the rest.
    is_usual = len(args) == 1 and isinstance(args[0], Tensor) and not kwargs
    leaves = args if is_usual else tree_flatten((args, kwargs))[0]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
