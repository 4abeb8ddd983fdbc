"""A network with BN teaches its copy that has another norm, on data without labels."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bnguard.errors import ConfigurationError
from bnguard.layers.bn_layer import preserved_modes, preserved_random_state
from bnguard.layers.moments import Moments, channel_moments, merge_moments
from bnguard.observe.mode_gap import (
    float_tensors,
    join_rows,
    places_of_rows,
    relative_change,
    spread,
)
from bnguard.recalibration.batches import Batch, Forward, call, read_batches
from bnguard.swapping.engine import Engine

# Found by experiment on residual, depthwise and encoder-decoder networks (tests/benchmarks/swap).
_FEATURE_WEIGHT = 0.1


class Lesson:
    """What a student is to learn from its teacher; both are in eval mode.

    Args:
        student: The network that learns.
        teacher: The network to imitate.
        pairs: Layers of the student and the teacher whose outputs are to agree.
        forward: ``forward(model, batch)`` calls a model; None where the batch says how.
        exam: Batches on which the distance is measured.

    Raises:
        ConfigurationError: The model returns nothing to compare, or nothing finite.
        CalibrationError: The forward failed.
    """

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
        self._learning = [learning for learning, _ in pairs]
        self._taught = [taught for _, taught in pairs]
        self._forward = forward
        self._exam = exam
        moments: list[list[Moments]] = [[] for _ in pairs]

        def measure(index: int, output: Tensor) -> None:
            moments[index].append(channel_moments(output))

        with _telling(self._taught, measure), torch.no_grad():
            answers = [self._returned(teacher, batch) for batch in exam]
        rows = places_of_rows(answers, [batch.size for batch in exam])
        self._places = rows or range(len(answers[0]))
        self._answers = _joined([self._compared(answer) for answer in answers])
        if not self._answers:
            raise ConfigurationError(
                "the model returns no floating-point tensor, so there is nothing to distil: pass "
                "forward=lambda model, batch: … that returns its outputs"
            )
        if not all(bool(torch.isfinite(answer).all()) for answer in self._answers):
            raise ConfigurationError(
                "the model's own outputs on teacher_data are NaN or infinite, so that there is "
                "nothing to learn from them"
            )
        # Of the whole exam: one small batch has hardly any spread to scale by.
        self._output_scales = [spread(answer) or 1.0 for answer in self._answers]
        self._feature_scales = [_mean_variance(parts) for parts in moments]

    @torch.no_grad()
    def distance(self) -> float:
        """Return how far the outputs are apart, in standard deviations of the teacher's."""
        outputs = [self._compared(self._returned(self._student, batch)) for batch in self._exam]
        return relative_change(_joined(outputs), self._answers)

    def loss(self, batch: Batch) -> Tensor:
        """Return what a batch gives to minimise, a scalar."""
        features: list[list[Tensor]] = [[] for _ in self._taught]
        errors: list[Tensor] = []

        def keep(index: int, output: Tensor) -> None:
            # A clone, since an activation that comes next may write to it.
            features[index].append(output.detach().clone())

        def compare(index: int, output: Tensor) -> None:
            if features[index]:
                wanted = features[index].pop(0)
                errors.append(_squared_error(output, wanted) / self._feature_scales[index])

        with _telling(self._taught, keep), torch.no_grad():
            expected = self._compared(self._returned(self._teacher, batch))
        with _telling(self._learning, compare):
            outputs = self._compared(self._returned(self._student, batch))
        loss = torch.stack(
            [
                _squared_error(output, wanted) / scale
                for output, wanted, scale in zip(
                    outputs, expected, self._output_scales, strict=True
                )
            ]
        ).mean()
        return loss + _FEATURE_WEIGHT * torch.stack(errors).mean() if errors else loss

    def _returned(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        return list(float_tensors(call(model, self._forward, batch)))

    def _compared(self, returned: Sequence[Tensor]) -> list[Tensor]:
        return [returned[place] for place in self._places]


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


def _squared_error(output: Tensor, wanted: Tensor) -> Tensor:
    return (output.float() - wanted.float()).square().mean()


def _joined(outputs: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return each output over all batches."""
    return [join_rows(column) for column in zip(*outputs, strict=True)]


def _mean_variance(parts: Sequence[Moments]) -> float:
    """Return the variance within a channel, the mean over the channels; 1 where there is none."""
    if not parts:
        return 1.0
    variance = float(merge_moments(parts).var_biased.mean())
    return variance if variance > 0.0 else 1.0


Weights = dict[str, Tensor]


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


@dataclass(frozen=True)
class Course:
    """A distillation under way.

    Attributes:
        so_far: What it has come to.
        best_weights: The weights of its best step.
    """

    so_far: Distillation
    best_weights: Weights

    @classmethod
    def begun(cls, distance: float, student: nn.Module) -> Course:
        """Return a course of no steps."""
        start = Distillation(
            steps=0, best_step=0, samples=0, distance_before=distance, distance=distance
        )
        return cls(start, weights_of(student))

    def stepped(self, samples: int) -> Course:
        """Return the course after another step, on so many samples."""
        so_far = self.so_far
        so_far = replace(so_far, steps=so_far.steps + 1, samples=so_far.samples + samples)
        return replace(self, so_far=so_far)

    def measured(self, distance: float, student: nn.Module) -> Course:
        """Return the course with the weights that the student has now, if they are the best."""
        if not distance < self.so_far.distance:
            return self
        best = replace(self.so_far, distance=distance, best_step=self.so_far.steps)
        return Course(best, weights_of(student))


def weights_of(model: nn.Module) -> Weights:
    """Return a copy of all parameters."""
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


@torch.no_grad()
def load_weights(model: nn.Module, weights: Weights) -> None:
    """Put the parameters back to what they were."""
    for name, tensor in model.named_parameters():
        tensor.copy_(weights[name])


# Found by experiment on residual, depthwise and encoder-decoder networks (tests/benchmarks/swap).
_LEARNING_RATE = 2e-3
_WARM_UP_SHARE = 0.05
_MAX_GRADIENT_NORM = 1.0
# Neither network uses the statistics of a batch, so that gradients of small batches simply add up.
_MIN_SAMPLES_PER_STEP = 32
_SAMPLES_TO_MEASURE = 128
_MEASUREMENTS = 20
# Stop after so many measurements without a better one: half, since a large learning rate may do
# harm at first.
_PATIENCE = 10
_NEAR_ENOUGH = 1e-3


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
    engine: Engine,
    progress: Progress,
) -> Distillation:
    """Train a student to give what its teacher gives, and keep its best weights.

    Both run in eval mode. The loss is the mean squared difference of each output, and of the
    features behind each pair of layers, over the variance of the teacher's; Adam minimises it with
    a short warm-up and a cosine schedule. All parameters of the student learn, frozen ones too.

    Args:
        student: The network to train, on the device of the engine; its weights change, its modes
            and ``requires_grad`` stay.
        teacher: The network to imitate, on the same device; stays as it is.
        data: Batches as for :func:`bnguard.recalibrate`; passed over again when it ends.
        pairs: Layers of the student and the teacher whose outputs are to agree.
        steps: Optimizer steps at most; ends earlier where nothing improves any more.
        forward: ``forward(model, batch)`` calls a model, where ``data`` yields anything else.
        engine: Says in which precision, and on which ranks, it runs.
        progress: Is told how far it is.

    Returns:
        How it went. After an exception the student has the weights that it had.

    Raises:
        ConfigurationError: There are no data, or no outputs to compare.
        CalibrationError: The forward failed.
    """
    _check(student)
    batches = _endless(data, student, forward, engine.device)
    start = weights_of(student)
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
            with engine.autocast():
                exam = _first(batches, _SAMPLES_TO_MEASURE)
                lesson = Lesson(student, teacher, pairs, forward, exam)
            training = _Training(student, lesson, batches, engine)
            return training.run(steps, progress)
    except BaseException:
        load_weights(student, start)
        raise
    finally:
        progress.stop()


def _check(student: nn.Module) -> None:
    parameters = _learning(student)
    if not parameters:
        raise ConfigurationError("the model has no parameters to teach: leave teacher_data= out")
    if any(p.dtype == torch.float16 for p in parameters):
        raise ConfigurationError(
            "parameters of float16 are too coarse to learn: swap model.float(), then use .half()"
        )


class _Training:
    """The optimizer, and the way to where the student is nearest to its teacher."""

    def __init__(
        self,
        student: nn.Module,
        lesson: Lesson,
        batches: Iterator[Batch],
        engine: Engine,
    ) -> None:
        self._student = student
        self._lesson = lesson
        self._batches = batches
        self._engine = engine
        self._optimizer: Any = engine.setup_optimizers(
            torch.optim.Adam(_learning(student), lr=_LEARNING_RATE)
        )

    def run(self, steps: int, progress: Progress) -> Distillation:
        """Take the steps, measure now and then, and leave the student with its best weights."""
        course = Course.begun(self._distance(), self._student)
        interval = max(steps // _MEASUREMENTS, 1)
        while course.so_far.steps < steps and not _is_over(course.so_far, interval):
            step = course.so_far.steps + 1
            course = course.stepped(self._step(_LEARNING_RATE * _schedule(step, steps)))
            if step % interval == 0 or step == steps:
                course = course.measured(self._distance(), self._student)
                progress.advance(step, course.so_far.distance)
        load_weights(self._student, course.best_weights)
        return course.so_far

    def _distance(self) -> float:
        with self._engine.autocast():
            distance = self._lesson.distance()
        # The ranks must agree on which step was the best.
        return float(self._engine.all_reduce(torch.tensor(distance, device=self._engine.device)))

    def _step(self, lr: float) -> int:
        """Take one optimizer step on a large enough number of samples, and return that number."""
        group = _first(self._batches, _MIN_SAMPLES_PER_STEP)
        samples = sum(batch.size for batch in group)
        for batch in group:
            with self._engine.autocast():
                loss = self._lesson.loss(batch)
            self._engine.backward(loss * (batch.size / samples))
        self._share_gradients()
        norm = self._engine.clip_gradients(
            self._student,
            self._optimizer,
            max_norm=_MAX_GRADIENT_NORM,
            error_if_nonfinite=False,
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
        for parameter in _learning(self._student):
            gradient = parameter.grad
            here = torch.zeros_like(parameter) if gradient is None else gradient
            parameter.grad = self._engine.all_reduce(here)


def _is_over(so_far: Distillation, interval: int) -> bool:
    is_stuck = so_far.steps - so_far.best_step >= _PATIENCE * interval
    return is_stuck or so_far.distance < _NEAR_ENOUGH


def _schedule(step: int, steps: int) -> float:
    """Return the share of the learning rate: a linear warm-up, then half a cosine down to 0."""
    warm_up = max(round(_WARM_UP_SHARE * steps), 1)
    return min(step / warm_up, 0.5 * (1.0 + math.cos(math.pi * (step - 1) / steps)))


def _endless(
    data: Iterable[object], model: nn.Module, forward: Forward | None, device: torch.device
) -> Iterator[Batch]:
    """Yield the batches of the data over and over."""
    while True:
        batch = None
        for batch in read_batches(data, model, forward, samples=sys.maxsize, device=device):
            yield batch
        if batch is None:
            raise ConfigurationError("teacher_data is empty: it yielded no samples to distil on")


def _first(batches: Iterator[Batch], samples: int) -> list[Batch]:
    """Return the next batches that have at least so many samples together."""
    taken: list[Batch] = []
    while sum(batch.size for batch in taken) < samples:
        taken.append(next(batches))
    return taken


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
