"""A network with BN teaches its copy that has another norm, on data without labels.

The student begins where one forward can put it (:mod:`bnguard.swapping.group_fitting`). It then
learns to give the teacher's outputs, and the features behind each pair of layers; the weights of
its best step are kept. The student runs in eval mode, the teacher in whichever mode works.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnguard.errors import ConfigurationError
from bnguard.layers.preserve import preserve_modes, preserve_random_states
from bnguard.recalibration.batches import Batch, Forward, read_batches
from bnguard.swapping.imitation import Imitation, Pair

# Found by experiment on residual, depthwise and encoder-decoder networks (tests/benchmarks/swap).
_LEARNING_RATE = 1e-3
_WARM_UP_SHARE = 0.05
_MAX_GRADIENT_NORM = 1.0
# Neither network uses the statistics of a batch, so that gradients of small batches simply add up.
_MIN_SAMPLES_PER_STEP = 32
_SAMPLES_TO_MEASURE = 128
_MEASUREMENTS = 10
_MIN_STEPS_BETWEEN_MEASUREMENTS = 10
# The learning rate decays once a measurement is not nearer than the best one by this share. The
# networks of the benchmark then take 53 to 107 of 200 steps, and score as after all of them.
_LEAST_FALL = 0.08
# Of all steps: the last ones, in which the learning rate decays.
_DECAY_SHARE = 0.25
_NEAR_ENOUGH = 1e-3


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """How a distillation went.

    Attributes:
        steps: Optimizer steps that were taken.
        best_step: The step whose weights were kept; 0 if none was better than the start.
        samples: Samples that the student saw, repetitions counted.
        distance_before: Root mean square difference of the outputs before, in standard deviations
            of the teacher's outputs.
        distance_fitted: The same after each group norm was fitted to its BN layer, before the
            first step.
        distance: The same for the weights that were kept.
    """

    steps: int
    best_step: int
    samples: int
    distance_before: float
    distance_fitted: float
    distance: float


def distil(
    student: nn.Module,
    teacher: nn.Module,
    data: Iterable[object],
    *,
    pairs: Sequence[Pair],
    chooses_groups: bool,
    steps: int,
    forward: Forward | None,
    engine: Any,
    show_progress: Callable[[int, float], None],
) -> Distillation:
    """Train a student to give what its teacher gives, and keep its best weights.

    The student runs in eval mode, the teacher in the modes that it is in. The loss is the mean
    squared difference of each output, and of the features behind each pair of layers, over the
    variance of the teacher's. Adam minimises it: after a short warm-up the learning rate stays as
    it is until the distance hardly falls any more, and then decays. All parameters of the student
    learn, frozen ones too.

    Args:
        student: The network to train, on the device of the engine; its weights change, its modes
            and ``requires_grad`` stay.
        teacher: The network to imitate, on the same device.
        data: Batches as for :func:`bnguard.recalibrate`; passed over again when it ends.
        pairs: Layers of the teacher and the student whose outputs are to agree.
        chooses_groups: Whether the numbers of groups of the student's group norms are chosen too.
        steps: Optimizer steps at most; fewer if it hardly comes nearer.
        forward: ``forward(model, batch)`` calls a model, if ``data`` yields anything else.
        engine: Lightning's ``Fabric``, or :class:`OwnDevice`: device, precision and ranks.
        show_progress: Called with the number of steps taken and the best distance so far.

    Returns:
        How it went.

    Raises:
        ConfigurationError: There are no data, or no outputs to compare.
        CalibrationError: The forward failed.
    """
    dtypes = {parameter.dtype for parameter in _trainable(student)}
    if not dtypes:
        raise ConfigurationError("the model has no parameters to train: swap it without distilling")
    if torch.float16 in dtypes:
        raise ConfigurationError(
            "parameters in float16 are too coarse to train: swap model.float(), then use .half()"
        )
    batches = _endless(data, student, forward, engine.device)
    with preserve_modes(student), preserve_random_states(student), _require_gradients(student):
        student.eval()
        with engine.autocast():
            measured = _take(batches, _SAMPLES_TO_MEASURE)
            imitation = Imitation(student, teacher, pairs, forward, measured)
        training = _Training(student, imitation, batches, engine)
        return training.run(steps, show_progress, chooses_groups=chooses_groups)


class _Training:
    """The optimizer, and the way to where the student is nearest to its teacher."""

    def __init__(
        self, student: nn.Module, imitation: Imitation, batches: Iterator[Batch], engine: Any
    ) -> None:
        self._student = student
        self._imitation = imitation
        self._batches = batches
        self._engine = engine
        self._optimizer: Any = engine.setup_optimizers(
            torch.optim.Adam(_trainable(student), lr=_LEARNING_RATE)
        )

    def run(
        self, steps: int, show_progress: Callable[[int, float], None], *, chooses_groups: bool
    ) -> Distillation:
        """Fit, take the steps, and leave the student with the best weights that were measured."""
        before = self._distance()
        fitted = best = self._fit_norms(before, chooses_groups=chooses_groups)
        best_weights = _copy_weights(self._student)
        step = best_step = samples = 0
        interval = max(steps // _MEASUREMENTS, _MIN_STEPS_BETWEEN_MEASUREMENTS)
        warm_up, decay_start = _WARM_UP_SHARE * steps, round((1.0 - _DECAY_SHARE) * steps)
        while step < steps and best >= _NEAR_ENOUGH:
            step += 1
            rate = min(step / max(warm_up, 1.0), _rate(step, decay_start, steps))
            samples += self._step(_LEARNING_RATE * rate)
            if step % interval == 0 or step == steps:
                distance = self._distance()
                # The first measurement is of the warm-up.
                hardly_falls = step > interval and distance > (1.0 - _LEAST_FALL) * best
                if hardly_falls and step < decay_start:
                    decay_start, steps = step, round(step / (1.0 - _DECAY_SHARE))
                if distance < best:
                    best, best_step = distance, step
                    best_weights = _copy_weights(self._student)
                show_progress(step, best)
        _load_weights(self._student, best_weights)
        return Distillation(
            steps=step,
            best_step=best_step,
            samples=samples,
            distance_before=before,
            distance_fitted=fitted,
            distance=best,
        )

    def _fit_norms(self, before: float, *, chooses_groups: bool) -> float:
        """Fit the group norms to their BN layers if that is nearer; return the distance."""
        norms = [pair.norm for pair in self._imitation.pairs if isinstance(pair.norm, nn.GroupNorm)]
        groups, weights = [norm.num_groups for norm in norms], _copy_weights(self._student)
        with self._engine.autocast():
            self._imitation.fit_norms(choose_groups=chooses_groups)
        # Each rank has other data.
        found = [norm.num_groups for norm in norms], _copy_weights(self._student)
        self._set_norms(norms, *self._engine.broadcast(found))
        fitted = self._distance()
        if fitted <= before:
            return fitted
        self._set_norms(norms, groups, weights)
        return before

    def _set_norms(
        self, norms: Sequence[nn.GroupNorm], groups: Sequence[int], weights: Sequence[Tensor]
    ) -> None:
        for norm, number in zip(norms, groups, strict=True):
            norm.num_groups = number
        _load_weights(self._student, weights)

    def _distance(self) -> float:
        with self._engine.autocast():
            distance = self._imitation.distance()
        # The ranks must agree on which step was the best.
        return float(self._engine.all_reduce(torch.tensor(distance, device=self._engine.device)))

    def _step(self, lr: float) -> int:
        """Take one optimizer step on a large enough number of samples, and return that number."""
        group = _take(self._batches, _MIN_SAMPLES_PER_STEP)
        samples = sum(batch.size for batch in group)
        for batch in group:
            with self._engine.autocast():
                loss = self._imitation.loss(batch)
            self._engine.backward(loss * (batch.size / samples))
        self._share_gradients()
        norm = self._engine.clip_gradients(
            self._student, self._optimizer, max_norm=_MAX_GRADIENT_NORM, error_if_nonfinite=False
        )
        if norm is not None and not bool(torch.isfinite(norm)):
            # Dropped rather than the step, which a loss scaler counts on.
            self._optimizer.zero_grad(set_to_none=True)
        self._optimizer.param_groups[0]["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return samples

    def _share_gradients(self) -> None:
        """Give every rank the mean of all; a parameter that one rank left out counts as 0 there."""
        if self._engine.world_size == 1:
            return
        for parameter in _trainable(self._student):
            gradient = parameter.grad
            here = torch.zeros_like(parameter) if gradient is None else gradient
            parameter.grad = self._engine.all_reduce(here)


def _copy_weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


@torch.no_grad()
def _load_weights(model: nn.Module, weights: Sequence[Tensor]) -> None:
    for parameter, values in zip(model.parameters(), weights, strict=True):
        parameter.copy_(values)


def _rate(step: int, decay_start: int, last: int) -> float:
    """Return the share of the learning rate after the warm-up: 1, then half a cosine down to 0.

    >>> _rate(60, 60, 80), round(_rate(70, 60, 80), 2), _rate(80, 60, 80)
    (1.0, 0.5, 0.0)
    """
    progress = (step - decay_start) / max(last - decay_start, 1)
    return 0.5 * (1.0 + math.cos(math.pi * max(progress, 0.0)))


def _endless(
    data: Iterable[object], model: nn.Module, forward: Forward | None, device: torch.device
) -> Iterator[Batch]:
    """Yield the batches of the data over and over."""
    while True:
        batch = None
        for batch in read_batches(data, model, forward, samples=sys.maxsize, device=device):
            yield batch
        if batch is None:
            raise ConfigurationError("there are no samples to distil on: the data are empty")


def _take(batches: Iterator[Batch], samples: int) -> list[Batch]:
    """Return the next batches, which have at least that many samples together."""
    taken: list[Batch] = []
    while sum(batch.size for batch in taken) < samples:
        taken.append(next(batches))
    return taken


@contextmanager
def _require_gradients(model: nn.Module) -> Iterator[None]:
    """Let every parameter have gradients; restore the flags and the gradients at the end."""
    parameters = list(model.parameters())
    before = [(p.requires_grad, p.grad) for p in parameters]
    try:
        for parameter in _trainable(model):
            parameter.requires_grad_(True)
            parameter.grad = None
        yield
    finally:
        for parameter, (requires_grad, gradient) in zip(parameters, before, strict=True):
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.is_floating_point()]
