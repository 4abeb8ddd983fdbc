"""How far a network that was swapped is from the one with BN, layer by layer and at the end."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from bnguard.errors import ConfigurationError
from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.layers.moments import Moments, channel_moments, merge_moments
from bnguard.observe.mode_gap import (
    float_tensors,
    join_rows,
    places_of_rows,
    relative_change,
    spread,
)
from bnguard.recalibration.batches import Batch, Forward, call, can_be_joined, join_batches
from bnguard.recalibration.statistics import read_inputs
from bnguard.swapping.group_fitting import VALUES_PER_CHANNEL, fit_norms, normalise, pick_values

# Found by experiment on residual, depthwise and encoder-decoder networks (tests/benchmarks/swap).
_FEATURE_WEIGHT = 0.1
# Share of the rows of a batch whose features are compared: with all of them a DenseNet scored the
# same, and took some 15 % longer.
_FEATURE_SHARE = 0.25


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


class Imitation:
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
        differences: list[tuple[int, Tensor]] = []

        def keep(index: int, output: Tensor) -> None:
            # A clone: the activation that comes next may write to it.
            features[index].append(_first_rows(output).detach().clone())

        def compare(index: int, output: Tensor) -> None:
            # Only subtracted here: autograd keeps nothing for that, and activation checkpointing,
            # which runs the layer again without this hook, misses nothing.
            if features[index]:
                difference = _first_rows(output).float() - features[index].pop(0).float()
                differences.append((index, difference))

        with _calling_back(self._teacher_layers, keep), torch.no_grad():
            expected = self._select(self._run(self._teacher, batch))
        with _calling_back(self._student_layers, compare):
            outputs = self._select(self._run(self._student, batch))
        of_outputs = [
            (output.float() - wanted.float()).square().mean() / scale
            for output, wanted, scale in zip(outputs, expected, self._output_scales, strict=True)
        ]
        loss = torch.stack(of_outputs).mean()
        if not differences:
            return loss
        of_features = [each.square().mean() / self._feature_scales[i] for i, each in differences]
        return loss + _FEATURE_WEIGHT * torch.stack(of_features).mean()

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


def _join(outputs: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return each output over all batches."""
    return [join_rows(column) for column in zip(*outputs, strict=True)]


def _mean_variance(parts: Sequence[Moments]) -> float:
    """Return the mean variance of a channel; 1 if there is none."""
    if not parts:
        return 1.0
    variance = float(merge_moments(parts).var_biased.mean())
    return variance if variance > 0.0 else 1.0
