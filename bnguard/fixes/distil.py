"""A network with BN teaches its copy that has another norm, on data without labels."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from bnguard.errors import ConfigurationError
from bnguard.fixes.calibration.batches import Batch, Forward, call, read_batches
from bnguard.fixes.grouping import evaluated
from bnguard.fixes.outputs import float_tensors, relative_distance, spread
from bnguard.layers import preserved_modes, preserved_random_state
from bnguard.moments import Moments, channel_moments, merge_moments

# Found by experiment on residual, depthwise and encoder-decoder networks (tests/benchmarks/swap).
_LEARNING_RATE = 2e-3
_WARM_UP_SHARE = 0.05
_FEATURE_WEIGHT = 0.1
_MAX_GRADIENT_NORM = 1.0
# Neither network uses the statistics of a batch, so that gradients of small batches simply add up.
_MIN_SAMPLES_PER_STEP = 32
_SAMPLES_TO_MEASURE = 128
_MEASUREMENTS = 20
# Stop after so many measurements without a better one: half, since a large learning rate may do
# harm at first.
_PATIENCE = 10
_NEAR_ENOUGH = 1e-3


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """How a distillation went.

    Attributes:
        steps: Optimizer steps that were taken.
        best_step: The step whose weights were kept; 0 where none was better than the start.
        samples: Samples that the student saw, repetitions counted.
        distance_before: Root mean square difference of the outputs before, in standard deviations
            of the teacher's outputs.
        distance: The same for the weights that were kept.
    """

    steps: int
    best_step: int
    samples: int
    distance_before: float
    distance: float


class Progress(Protocol):
    """Is told how far a distillation is."""

    def start(self) -> None:
        """The distillation begins."""

    def advance(self, step: int, distance: float) -> None:
        """So many steps are done, and this is the best distance so far."""

    def stop(self) -> None:
        """The distillation has ended, also by an exception."""


class Silent:
    """Shows nothing."""

    def start(self) -> None:
        """Do nothing."""

    def advance(self, step: int, distance: float) -> None:
        """Do nothing."""

    def stop(self) -> None:
        """Do nothing."""


def distil(
    student: nn.Module,
    teacher: nn.Module,
    data: Iterable[object],
    *,
    pairs: Sequence[tuple[nn.Module, nn.Module]],
    steps: int,
    forward: Forward | None,
    progress: Progress,
) -> Distillation:
    """Train a student to give what its teacher gives, and keep its best weights.

    Both run in eval mode. The loss is the mean squared difference of each output, and of the
    features behind each pair of layers, over the variance of the teacher's; Adam minimises it with
    a short warm-up and a cosine schedule. All parameters of the student learn, frozen ones too.

    Args:
        student: The network to train; its weights change, its modes and ``requires_grad`` stay.
        teacher: The network to imitate; stays as it is.
        data: Batches as for :func:`bnguard.recalibrate`; passed over again when it ends.
        pairs: Layers of the student and the teacher whose outputs are to agree.
        steps: Optimizer steps at most; ends earlier where nothing improves any more.
        forward: ``forward(model, batch)`` calls a model, where ``data`` yields anything else.
        progress: Is told how far it is.

    Returns:
        How it went. After an exception the student has the weights that it had.

    Raises:
        ConfigurationError: There are no data, or no outputs to compare.
        CalibrationError: The forward failed.
    """
    device = next(student.parameters()).device
    batches = _endless(data, student, forward, device)
    start = _weights(student)
    progress.start()
    try:
        with (
            preserved_modes(student),
            preserved_modes(teacher),
            preserved_random_state(student),
            _all_learning(student),
        ):
            student.eval()
            teacher.eval()
            exam = _first(batches, _SAMPLES_TO_MEASURE)
            lesson = _Lesson(student, teacher, pairs, forward, exam)
            return _train(lesson, student, batches, steps, progress)
    except BaseException:
        _load(student, start)
        raise
    finally:
        progress.stop()


class _Lesson:
    """One distillation: the two networks, and what tells how far they are apart."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        pairs: Sequence[tuple[nn.Module, nn.Module]],
        forward: Forward | None,
        exam: Sequence[Batch],
    ) -> None:
        self._student = student
        self._teacher = teacher
        self._pairs = pairs
        self._forward = forward
        self._exam = exam
        moments: list[list[Moments]] = [[] for _ in pairs]

        def measure(index: int, output: Tensor) -> None:
            moments[index].append(channel_moments(output))

        with _telling([taught for _, taught in pairs], measure):
            self._answers = _joined([self._taught(batch) for batch in exam])
        if not self._answers:
            raise ConfigurationError(
                "the model returns no floating-point tensor, so there is nothing to distil: pass "
                "forward=lambda model, batch: … that returns its outputs"
            )
        # Of the whole exam: one small batch has hardly any spread to scale by.
        self._output_scales = [spread(answer) for answer in self._answers]
        self._feature_scales = [_mean_variance(parts) for parts in moments]

    def distance(self) -> float:
        """Return how far the outputs are apart, in standard deviations of the teacher's."""
        outputs = [
            list(float_tensors(evaluated(self._student, self._forward, batch)))
            for batch in self._exam
        ]
        return relative_distance(_joined(outputs), self._answers)

    def loss(self, batch: Batch) -> Tensor:
        """Return what a batch gives to minimise, a scalar."""
        features: list[list[Tensor]] = [[] for _ in self._pairs]
        errors: list[Tensor] = []

        def keep(index: int, output: Tensor) -> None:
            # A clone, since an activation that comes next may write to it.
            features[index].append(output.detach().clone())

        def compare(index: int, output: Tensor) -> None:
            difference = (output - features[index].pop(0)).float()
            errors.append(difference.square().mean() / self._feature_scales[index])

        with _telling([taught for _, taught in self._pairs], keep):
            expected = self._taught(batch)
        with _telling([learning for learning, _ in self._pairs], compare):
            outputs = list(float_tensors(call(self._student, self._forward, batch)))
        loss = torch.stack(
            [
                (output - wanted).float().square().mean() / scale
                for output, wanted, scale in zip(
                    outputs, expected, self._output_scales, strict=True
                )
            ]
        ).mean()
        return loss + _FEATURE_WEIGHT * torch.stack(errors).mean() if errors else loss

    @torch.no_grad()
    def _taught(self, batch: Batch) -> list[Tensor]:
        return list(float_tensors(call(self._teacher, self._forward, batch)))


def _train(
    lesson: _Lesson, student: nn.Module, batches: Iterator[Batch], steps: int, progress: Progress
) -> Distillation:
    """Take the steps, measure now and then, and leave the student with its best weights."""
    before = best = lesson.distance()
    best_weights, best_step, taken, samples = _weights(student), 0, 0, 0
    interval = max(steps // _MEASUREMENTS, 1)
    optimizer = torch.optim.Adam(_learning(student), lr=_LEARNING_RATE)
    for step in range(1, steps + 1):
        if best < _NEAR_ENOUGH or taken - best_step >= _PATIENCE * interval:
            break
        optimizer.param_groups[0]["lr"] = _LEARNING_RATE * _schedule(step, steps)
        samples += _step(lesson, optimizer, batches)
        taken = step
        if step % interval == 0 or step == steps:
            distance = lesson.distance()
            if distance < best:
                best, best_step, best_weights = distance, step, _weights(student)
            progress.advance(step, best)
    _load(student, best_weights)
    return Distillation(
        steps=taken, best_step=best_step, samples=samples, distance_before=before, distance=best
    )


def _step(lesson: _Lesson, optimizer: torch.optim.Optimizer, batches: Iterator[Batch]) -> int:
    """Take one optimizer step on a large enough number of samples, and return that number."""
    group = _first(batches, _MIN_SAMPLES_PER_STEP)
    samples = sum(batch.size for batch in group)
    for batch in group:
        (lesson.loss(batch) * (batch.size / samples)).backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], _MAX_GRADIENT_NORM)
    if bool(torch.isfinite(norm)):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return samples


def _schedule(step: int, steps: int) -> float:
    """Return the share of the learning rate: a linear warm-up, then half a cosine down to 0."""
    warm_up = max(round(_WARM_UP_SHARE * steps), 1)
    return min(step / warm_up, 0.5 * (1.0 + math.cos(math.pi * (step - 1) / steps)))


def _endless(
    data: Iterable[object], model: nn.Module, forward: Forward | None, device: torch.device
) -> Iterator[Batch]:
    """Yield the batches of the data over and over; those that can be read once are kept."""
    is_one_pass = isinstance(data, Iterator)
    kept: list[Batch] = []
    while True:
        count = 0
        again = kept if is_one_pass and kept else None
        source = (
            iter(again)
            if again is not None
            else read_batches(data, model, forward, samples=sys.maxsize, device=device)
        )
        for batch in source:
            count += 1
            if is_one_pass and again is None:
                kept.append(batch)
            yield batch
        if count == 0:
            raise ConfigurationError("teacher_data is empty: it yielded no samples to distil on")


def _first(batches: Iterator[Batch], samples: int) -> list[Batch]:
    """Return the next batches that have at least so many samples together."""
    taken: list[Batch] = []
    while sum(batch.size for batch in taken) < samples:
        taken.append(next(batches))
    return taken


@contextmanager
def _telling(modules: Sequence[nn.Module], tell: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Tell the number of a module and its output, whenever one of the modules is called."""

    def hook(index: int, module: nn.Module, args: object, output: Tensor) -> None:
        tell(index, output)

    with ExitStack() as stack:
        for index, module in enumerate(modules):
            handle = module.register_forward_hook(partial(hook, index))
            stack.callback(handle.remove)
        yield


@contextmanager
def _all_learning(model: nn.Module) -> Iterator[None]:
    """Let every parameter have gradients; put the flags and the gradients back at the end."""
    parameters = list(model.parameters())
    before = [(p.requires_grad, p.grad) for p in parameters]
    try:
        for parameter in _learning(model):
            parameter.requires_grad_(True)
            parameter.grad = None
        yield
    finally:
        for parameter, (requires_grad, gradient) in zip(parameters, before, strict=True):
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient


def _learning(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.is_floating_point()]


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


@torch.no_grad()
def _load(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, tensor in model.named_parameters():
        tensor.copy_(weights[name])


def _joined(outputs: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return each output over all batches, flat: batches may differ in size and shape."""
    columns = zip(*outputs, strict=True)
    return [torch.cat([part.flatten().float() for part in column]) for column in columns]


def _mean_variance(parts: Sequence[Moments]) -> float:
    """Return the variance within a channel, the mean over the channels; 1 where there is none."""
    if not parts:
        return 1.0
    variance = float(merge_moments(parts).var_biased.mean())
    return variance if variance > 0.0 else 1.0
