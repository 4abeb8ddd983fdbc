"""A network with BN teaches its copy that has another norm, on data without labels.

The student begins where one forward can put it (:mod:`bnguard.swapping.group_fitting`). It then
learns to give the teacher's outputs, and the features behind each pair of layers; the weights of
its best step are kept. The student runs in eval mode, the teacher in whichever mode works.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from bnguard.distributed import Ranks
from bnguard.errors import ConfigurationError
from bnguard.layers.bn_layer import BatchNormLayer, device_of
from bnguard.layers.moments import Moments, channel_moments, merge_moments
from bnguard.layers.preserve import preserve_modes, preserve_random_states
from bnguard.observe.mode_gap import (
    float_tensors,
    join_rows,
    places_of_rows,
    relative_change,
    spread,
)
from bnguard.recalibration.batches import (
    Batch,
    Forward,
    call,
    can_be_joined,
    join_batches,
    read_batches,
)
from bnguard.recalibration.statistics import read_inputs
from bnguard.swapping.group_fitting import VALUES_PER_CHANNEL, fit_norms, normalise, pick_values

# Found by experiment on residual, depthwise and encoder-decoder networks (tests/benchmarks/swap).
_FEATURE_WEIGHT = 0.1
_LEARNING_RATE = 1e-3
_WARM_UP_SHARE = 0.05
_MAX_GRADIENT_NORM = 1.0
# Neither network uses the statistics of a batch, so that gradients of small batches simply add up.
_MIN_SAMPLES_PER_STEP = 32
_SAMPLES_TO_MEASURE = 128
_MEASUREMENTS = 10
# Stop after this many measurements without a better one: half, since a large learning rate may do
# harm at first.
_PATIENCE = 5
# Share of the rows of a batch whose features are compared: with all of them a DenseNet scored the
# same, and took some 15 % longer.
_FEATURE_SHARE = 0.25
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


@dataclass(frozen=True, eq=False)
class Pair:
    """A BN layer of the teacher, and what replaced it in the student.

    Attributes:
        layer: The BN layer.
        module: What replaced it: the norm, perhaps with an activation.
        norm: What normalises in it.
    """

    layer: BatchNormLayer
    module: nn.Module
    norm: nn.Module


class OwnDevice:
    """The part of Lightning's ``Fabric`` that a distillation uses, on the device of a model.

    Attributes:
        device: Device of the model's first parameter.
        world_size: Number of ranks of ``torch.distributed``.
        is_global_zero: Whether this is the rank that shows the progress.
    """

    def __init__(self, model: nn.Module) -> None:
        self.device = device_of(model)
        ranks = Ranks()
        self.world_size = ranks.size
        self.is_global_zero = ranks.rank == 0

    def to_device(self, module: nn.Module) -> nn.Module:
        """Return the module, which is there; its parts may be on several devices."""
        return module

    def autocast(self) -> AbstractContextManager[None]:
        """Return a context that changes nothing."""
        return nullcontext()

    def setup_optimizers(self, optimizer: Optimizer) -> Optimizer:
        """Return the optimizer itself."""
        return optimizer

    def backward(self, loss: Tensor) -> None:
        """Compute gradients."""
        loss.backward()  # type: ignore[no-untyped-call]

    def all_reduce(self, values: Tensor) -> Tensor:
        """Return the mean over the ranks."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values / self.world_size

    def broadcast(self, value: object) -> object:
        """Return the value of the first rank."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def clip_gradients(
        self, module: nn.Module, optimizer: Optimizer, *, max_norm: float, error_if_nonfinite: bool
    ) -> Tensor:
        """Scale the gradients down to a norm, and return the norm that they had."""
        return nn.utils.clip_grad_norm_(
            module.parameters(), max_norm, error_if_nonfinite=error_if_nonfinite
        )


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
    variance of the teacher's; Adam minimises it with a short warm-up and a cosine schedule. All
    parameters of the student learn, frozen ones too.

    Args:
        student: The network to train, on the device of the engine; its weights change, its modes
            and ``requires_grad`` stay.
        teacher: The network to imitate, on the same device.
        data: Batches as for :func:`bnguard.recalibrate`; passed over again when it ends.
        pairs: Layers of the teacher and the student whose outputs are to agree.
        chooses_groups: Whether the numbers of groups of the student's group norms are chosen too.
        steps: Optimizer steps at most; fewer if nothing improves any more.
        forward: ``forward(model, batch)`` calls a model, if ``data`` yields anything else.
        engine: Lightning's ``Fabric``, or :class:`OwnDevice`: device, precision and ranks.
        show_progress: Called with the number of steps taken and the best distance so far.

    Returns:
        How it went. After an exception the student has the weights that it had.

    Raises:
        ConfigurationError: There are no data, or no outputs to compare.
        CalibrationError: The forward failed.
    """
    _check_parameters(student)
    batches = _endless(data, student, forward, engine.device)
    start = _copy_weights(student)
    try:
        with (
            preserve_modes(student),
            preserve_random_states(student),
            _require_gradients(student),
        ):
            student.eval()
            with engine.autocast():
                measured = _take(batches, _SAMPLES_TO_MEASURE)
                imitation = _Imitation(student, teacher, pairs, forward, measured)
            training = _Training(student, imitation, batches, engine)
            return training.run(steps, show_progress, chooses_groups=chooses_groups)
    except BaseException:
        _load_weights(student, start)
        raise


def _check_parameters(student: nn.Module) -> None:
    parameters = _trainable(student)
    if not parameters:
        raise ConfigurationError("the model has no parameters to train: swap it without distilling")
    if any(p.dtype == torch.float16 for p in parameters):
        raise ConfigurationError(
            "parameters in float16 are too coarse to train: swap model.float(), then use .half()"
        )


class _Training:
    """The optimizer, and the way to where the student is nearest to its teacher."""

    def __init__(
        self,
        student: nn.Module,
        imitation: _Imitation,
        batches: Iterator[Batch],
        engine: Any,
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
        interval = max(steps // _MEASUREMENTS, 1)
        while step < steps and step - best_step < _PATIENCE * interval and best >= _NEAR_ENOUGH:
            step += 1
            samples += self._step(_LEARNING_RATE * _schedule(step, steps))
            if step % interval == 0 or step == steps:
                distance = self._distance()
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
        self, norms: Sequence[nn.GroupNorm], groups: Sequence[int], weights: dict[str, Tensor]
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
        for parameter in _trainable(self._student):
            gradient = parameter.grad
            here = torch.zeros_like(parameter) if gradient is None else gradient
            parameter.grad = self._engine.all_reduce(here)


def _copy_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


@torch.no_grad()
def _load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, tensor in model.named_parameters():
        tensor.copy_(weights[name])


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


class _Imitation:
    """How far a student is from its teacher, at the outputs and behind each pair of layers.

    The distance is measured on the batches ``measured``.

    Raises:
        ConfigurationError: The model returns nothing to compare, or nothing finite.
        CalibrationError: The forward failed.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        pairs: Sequence[Pair],
        forward: Forward | None,
        measured: Sequence[Batch],
    ) -> None:
        self.pairs = pairs
        self._student = student
        self._teacher = teacher
        self._student_layers = [pair.module for pair in pairs]
        self._teacher_layers = [pair.layer.module for pair in pairs]
        self._forward = forward
        self._measured = measured
        moments: list[list[Moments]] = [[] for _ in pairs]
        # What the BN layers give, without the activation that some bring along: batch by batch.
        self._normalised: list[dict[int, Tensor]] = []

        def measure(index: int, output: Tensor) -> None:
            moments[index].append(channel_moments(output))

        values_per_sample = max(1, VALUES_PER_CHANNEL // sum(batch.size for batch in measured))

        def keep(index: int, values: Tensor) -> None:
            if index not in self._normalised[-1]:
                given = normalise(pairs[index].layer, values)
                self._normalised[-1][index] = pick_values(given, values_per_sample)

        outputs_of_teacher = []
        layers = [pair.layer for pair in pairs]
        with (
            _calling_back(self._teacher_layers, measure),
            read_inputs(layers, keep),
            torch.no_grad(),
        ):
            for batch in measured:
                self._normalised.append({})
                outputs_of_teacher.append(self._run(teacher, batch))
        rows = places_of_rows(outputs_of_teacher, [batch.size for batch in measured])
        self._places = rows or range(len(outputs_of_teacher[0]))
        self._outputs_of_teacher = _join([self._select(each) for each in outputs_of_teacher])
        if not self._outputs_of_teacher:
            raise ConfigurationError(
                "the model returns no floating-point tensor, so there is nothing to distil: pass "
                "forward=lambda model, batch: … that returns its outputs"
            )
        if not all(bool(torch.isfinite(each).all()) for each in self._outputs_of_teacher):
            raise ConfigurationError(
                "the model's own outputs on these data are NaN or infinite: there is nothing to "
                "learn from them"
            )
        # Of all that is measured: one small batch has hardly any spread to scale by.
        self._output_scales = [spread(each) or 1.0 for each in self._outputs_of_teacher]
        self._feature_scales = [_mean_variance(parts) for parts in moments]

    def fit_norms(self, *, choose_groups: bool) -> None:
        """Fit each group norm to its BN layer, on as many batches as go through as one."""
        first = self._measured[0]
        joined = [can_be_joined(first, batch) for batch in self._measured]
        joined[0] = True
        kept = [each for each, is_joined in zip(self._normalised, joined, strict=True) if is_joined]
        whole = join_batches(list(itertools.compress(self._measured, joined)))
        fit_norms(
            [pair.norm for pair in self.pairs],
            {
                index: torch.cat([each[index] for each in kept])
                for index in range(len(self.pairs))
                if all(index in each for each in kept)
            },
            lambda: self._run(self._student, whole),
            choose_groups=choose_groups,
        )
        self._normalised.clear()

    @torch.no_grad()
    def distance(self) -> float:
        """Return how far the outputs are apart, in standard deviations of the teacher's."""
        outputs = [self._select(self._run(self._student, batch)) for batch in self._measured]
        return relative_change(_join(outputs), self._outputs_of_teacher)

    def loss(self, batch: Batch) -> Tensor:
        """Return the loss on a batch, a scalar."""
        features: list[list[Tensor]] = [[] for _ in self._teacher_layers]
        errors: list[Tensor] = []

        def keep(index: int, output: Tensor) -> None:
            # A clone: the activation that comes next may write to it.
            features[index].append(_first_rows(output).detach().clone())

        def compare(index: int, output: Tensor) -> None:
            if features[index]:
                wanted = features[index].pop(0)
                error = _squared_error(_first_rows(output), wanted)
                errors.append(error / self._feature_scales[index])

        with _calling_back(self._teacher_layers, keep), torch.no_grad():
            expected = self._select(self._run(self._teacher, batch))
        with _calling_back(self._student_layers, compare):
            outputs = self._select(self._run(self._student, batch))
        loss = torch.stack(
            [
                _squared_error(output, wanted) / scale
                for output, wanted, scale in zip(
                    outputs, expected, self._output_scales, strict=True
                )
            ]
        ).mean()
        return loss + _FEATURE_WEIGHT * torch.stack(errors).mean() if errors else loss

    def _run(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        return list(float_tensors(call(model, self._forward, batch)))

    def _select(self, returned: Sequence[Tensor]) -> list[Tensor]:
        return [returned[place] for place in self._places]


@contextmanager
def _calling_back(
    modules: Sequence[nn.Module], note: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """Call ``note`` with the number and the output of a module, whenever one of them is called."""

    def hook(index: int, module: nn.Module, args: object, output: Tensor) -> None:
        note(index, output)

    with ExitStack() as stack:
        for index, module in enumerate(modules):
            handle = module.register_forward_hook(partial(hook, index))
            stack.callback(handle.remove)
        yield


def _first_rows(output: Tensor) -> Tensor:
    return output[: math.ceil(_FEATURE_SHARE * len(output))]


def _squared_error(output: Tensor, wanted: Tensor) -> Tensor:
    return (output.float() - wanted.float()).square().mean()


def _join(outputs: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return each output over all batches."""
    return [join_rows(column) for column in zip(*outputs, strict=True)]


def _mean_variance(parts: Sequence[Moments]) -> float:
    """Return the mean variance of a channel; 1 if there is none."""
    if not parts:
        return 1.0
    variance = float(merge_moments(parts).var_biased.mean())
    return variance if variance > 0.0 else 1.0
