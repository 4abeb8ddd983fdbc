"""What the model is given in training: whether its samples are alike, and whether it is finite.

:class:`Entrance` listens to whichever of the model's modules the training step calls, and hands the
inputs to the probes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from bnguard.layers.distances import FloatArray
from bnguard.layers.moments import mean_and_biased_var
from bnguard.observe.history import InputWindow
from bnguard.observe.hooks import Hooks

# Numbers of a sample that are looked at, evenly spaced, and batches a window: enough to tell, and
# so few that the look costs next to nothing. Of the steps after the first, one in four is read.
_MAX_FEATURES = 64
_MAX_BATCHES = 64
_FIRST_STEPS = 8
_ONE_IN = 4
# Calls of a step that are told apart; further ones share the last.
_MAX_PLACES = 4
# Share of the batches from which the rest, of odd steps, are no further places.
_USUAL_SHARE = 0.75
# Windows that are kept, and from how many on they are compared.
_MAX_WINDOWS = 64
_MIN_WINDOWS = 4
_MIN_OVER_CHANCE = 2.0
# From so many batches on a slow change of the data is told from batches that differ: what a
# network that learns is fed by another one that does, as a discriminator is.
_MIN_BATCHES_OF_TREND = 16
# Sums that wait on the device before they are looked at, where nobody asks earlier.
_MAX_WAITING = 256
# Is given the floating-point tensors of a call.
InputNote = Callable[[Sequence[Tensor]], None]


class SampleProbe:
    """Compares the variance between batches with that between the samples of a batch.

    Reads a few numbers of each sample in the first input, without waiting for the device. Where the
    model is called several times a step, each batch is compared with those at the same place in
    other steps of as many calls, and the place counts whose batches differ least: real and
    generated images, of which a discriminator is given one after the other, differ on purpose, and
    the latter from step to step, since the generator learns. Batches whose gradients are
    accumulated come from one loader: they are at the same place.

    Args:
        accumulated_batches: Batches whose gradients are added before a step of the optimizer.
    """

    def __init__(self, accumulated_batches: int = 1) -> None:
        self._accumulated = max(1, accumulated_batches)
        self._newest: InputWindow | None = None
        self._newest_count = 0
        self._windows: list[_Summary] = []
        self._batches: list[_Batch] = []
        self._shape: torch.Size | None = None
        self._steps = 0
        self._is_read = True
        self._place = 0

    def start_window(self) -> None:
        """Begin a new window, and keep the one that ends."""
        self._newest, self._newest_count = self.window(), max(len(self._batches), 2)
        self._windows = [*self._windows, *self._summary()][-_MAX_WINDOWS:]
        self._batches, self._steps, self._is_read = [], 0, True

    def start_step(self) -> None:
        """Let the calls that come now be those of the next step."""
        self._steps += 1
        self._place = 0
        self._is_read = self._steps < _FIRST_STEPS or self._steps % _ONE_IN == 0

    def window(self) -> InputWindow | None:
        """Return the newest window with at least half of the batches of the last full one."""
        count, newest = len(self._batches), self._newest
        if count < 2 or (newest is not None and 2 * count < self._newest_count):
            return newest
        means, variances = (
            torch.stack(part).cpu().double().numpy()
            for part in zip(*((batch.mean, batch.variance) for batch in self._batches), strict=True)
        )
        is_finite = np.isfinite(variances).all(0) & np.isfinite(means).all(0)
        varies = is_finite & (variances > 0.0).any(0)
        means, variances = means[:, varies], variances[:, varies]
        places, steps, sizes = np.array([batch.origin for batch in self._batches]).T
        calls = np.array([np.count_nonzero(steps == step) for step in steps])
        calls = np.where(calls % self._accumulated == 0, calls // self._accumulated, calls)
        places = np.minimum(places % calls, _MAX_PLACES - 1)
        groups = [
            (places == place) & (calls == many)
            for place, many in sorted(set(zip(places, calls, strict=True)))
        ]
        # One of several places may be fed by a network that learns, fast at first.
        has_one_place = max(map(np.count_nonzero, groups)) > _USUAL_SHARE * count
        enough = 2 if has_one_place else _MIN_BATCHES_OF_TREND
        of_places = [
            _of_place(means[here], variances[here], steps[here], sizes[here])
            for here in groups
            if np.count_nonzero(here) >= enough
        ]
        window = min(of_places, key=_usual_ratio, default=newest)
        if window is None or not has_one_place:
            return window
        windows = [*self._windows, *self._summary()]
        return dataclasses.replace(
            window, windows=len(windows), between_windows=_between_windows(windows)
        )

    def _summary(self) -> Iterator[_Summary]:
        """Yield what is kept of the window that is under way, if it has batches enough."""
        batches = self._batches
        # Calls of a step that differ on purpose are not told apart over windows.
        if len(batches) < 2 or len({batch.origin[0] // self._accumulated for batch in batches}) > 1:
            return
        means = torch.stack([batch.mean for batch in batches]).cpu().double().numpy()
        variances = torch.stack([batch.variance for batch in batches]).cpu().double().numpy()
        with np.errstate(all="ignore"):  # The data may be infinite.
            spread = means.var(0, ddof=1)
        yield _Summary(len(batches), means.mean(0), spread, variances.mean(0))

    def note(self, inputs: Sequence[Tensor]) -> None:
        """Take in what a batch brings to the model."""
        place, self._place = self._place, self._place + 1
        if not self._is_read or len(self._batches) >= _MAX_BATCHES:
            return
        samples = _samples(inputs)
        if samples is None:
            return
        # The same place in samples of another shape is another number.
        if samples.shape[1:] != self._shape:
            self._shape, self._batches, self._windows = samples.shape[1:], [], []
        with torch.no_grad():
            mean, variance = mean_and_biased_var(_features(samples))
        self._batches.append(_Batch((place, self._steps, len(samples)), mean, variance))


class FinitenessProbe:
    """Finds the first training step whose input held NaN or Inf.

    Adds up each input, in which a NaN or an Inf stays, and looks at the sums when asked: nothing
    waits for the device until then.
    """

    def __init__(self) -> None:
        self.step = 1
        self._first_bad_step: int | None = None
        self._waiting: list[tuple[int, Tensor]] = []

    def note(self, inputs: Sequence[Tensor]) -> None:
        """Take in what a batch brings to the model."""
        if self._first_bad_step is not None:
            return
        for values in inputs:
            # In float32 at least: a sum in float16 overflows by itself.
            dtype = torch.promote_types(values.dtype, torch.float32)
            self._waiting.append((self.step, values.detach().sum(dtype=dtype)))
        if len(self._waiting) >= _MAX_WAITING:
            self.first_bad_step()

    def first_bad_step(self) -> int | None:
        """Return the first step whose input was not finite; None where all were, or not seen."""
        waiting, self._waiting = self._waiting, []
        if waiting and self._first_bad_step is None:
            device = waiting[0][1].device
            sums = torch.stack([total.float().to(device) for _, total in waiting])
            bad = (~sums.isfinite()).nonzero().flatten().tolist()
            self._first_bad_step = waiting[bad[0]][0] if bad else None
        return self._first_bad_step


class Entrance:
    """Hands on the numbers that a batch of training brings to the model.

    A training step may call the model, or one of its parts (``self.network(x)``) and never the
    model itself; so the modules around the first BN layer are listened to, and of calls inside
    each other the outermost counts.

    Args:
        model: The model.
        notes: What the inputs are handed to.

    Attributes:
        is_fed_by_network: Whether an input ever came out of a computation that has a gradient.
    """

    def __init__(self, model: nn.Module, notes: Sequence[InputNote]) -> None:
        self.hooks = Hooks()
        self.is_fed_by_network = False
        self._model = model
        self._notes = notes
        self._path: tuple[nn.Module, ...] = ()

    def follow(self, first: nn.Module) -> None:
        """Listen to the modules that contain this one, the BN layer that is called first."""
        path = tuple(_around(first, self._model)) or (self._model,)
        if path != self._path:
            self._path = path
            self.hooks.close()
            self.hooks.before_outermost(path, self._enter)

    def _enter(self, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if self._model.training and torch.is_grad_enabled():
            inputs = list(_numbers(args, kwargs))
            self.is_fed_by_network |= any(values.grad_fn is not None for values in inputs)
            for note in self._notes:
                note(inputs)


@dataclass(frozen=True)
class _Batch:
    """What is kept of a batch.

    Attributes:
        origin: Its place among the calls of its step, the number of the step, and its samples.
        mean: Mean of its samples.
        variance: Their biased variance.
    """

    origin: tuple[int, int, int]
    mean: Tensor
    variance: Tensor


@dataclass(frozen=True)
class _Summary:
    """The batches of a window: their number, mean of means, variance of means, mean variance."""

    batches: int
    mean: FloatArray
    spread: FloatArray
    variance: FloatArray


def _usual_ratio(window: InputWindow) -> float:
    ratio = window.variance_ratio[np.isfinite(window.variance_ratio)]
    return float(np.median(ratio)) if ratio.size else math.inf


def _between_windows(windows: Sequence[_Summary]) -> FloatArray:
    """Return the variance between neighbouring windows as a share of that between samples.

    Half the mean square of successive differences (von Neumann), which a slow change hardly enters,
    without what the batches of a window explain.
    """
    windows = [window for window in windows if window.mean.shape == windows[-1].mean.shape]
    if len(windows) < _MIN_WINDOWS:
        return np.empty(0)
    means = np.array([window.mean for window in windows])
    with np.errstate(all="ignore"):
        chance = np.mean([window.spread / window.batches for window in windows], axis=0)
        within = np.mean([window.variance + window.spread for window in windows], axis=0)
        between = np.square(np.diff(means, axis=0)).mean(0) / 2
        between = np.where(between > _MIN_OVER_CHANCE * chance, between - chance, 0.0)
        share = between / (between + within)
    return np.asarray(share[np.isfinite(share)])


def _of_place(
    means: FloatArray, variances: FloatArray, steps: FloatArray, sizes: FloatArray
) -> InputWindow:
    """Return how much the batches of one place differ; many of them beside a parabola in time."""
    powers = 3 if len(means) >= _MIN_BATCHES_OF_TREND else 1
    times = np.vander(np.interp(steps, (steps[0], steps[-1]), (-1.0, 1.0)), powers)
    rest = means - times @ np.linalg.lstsq(times, means, rcond=None)[0]
    freedom = len(means) - powers
    between = sizes.mean() * np.square(rest).sum(0) / freedom
    within = variances.mean(0) * sizes.sum() / (sizes.sum() - len(sizes))
    with np.errstate(all="ignore"):
        return InputWindow(batches=1 + freedom, variance_ratio=np.asarray(between / within))


def _samples(inputs: Sequence[Tensor]) -> Tensor | None:
    """Return the first input that has samples; None where there is none, or a single sample."""
    values = next((values for values in inputs if values.dim() > 1), None)
    return None if values is None or len(values) < 2 or not values.numel() else values


def _features(samples: Tensor) -> Tensor:
    """Return some numbers of each sample, shape ``(N, F)``."""
    flat = samples.detach().flatten(1)
    return flat[:, :: -(-flat.shape[1] // _MAX_FEATURES)].float()


def _around(inner: nn.Module, model: nn.Module) -> Iterator[nn.Module]:
    """Return the modules that contain a module, the outermost first."""
    for module in model.modules():
        if module is not inner and any(part is inner for part in module.modules()):
            yield module


def _numbers(args: tuple[object, ...], kwargs: dict[str, object]) -> Iterator[Tensor]:
    # The usual call has one tensor; to flatten it would cost more than all the rest.
    is_usual = len(args) == 1 and isinstance(args[0], Tensor) and not kwargs
    for leaf in args if is_usual else tree_flatten((args, kwargs))[0]:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.layout is torch.strided:
            yield leaf
