"""How far a student is from its teacher: at the outputs, and behind each pair of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from bnguard.errors import ConfigurationError
from bnguard.fixes.calibration.batches import Batch, Forward, call
from bnguard.fixes.outputs import float_tensors, places_of_rows, relative_distance, spread
from bnguard.moments import Moments, channel_moments, merge_moments

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
        self._output_scales = [spread(answer) for answer in self._answers]
        self._feature_scales = [_mean_variance(parts) for parts in moments]

    @torch.no_grad()
    def distance(self) -> float:
        """Return how far the outputs are apart, in standard deviations of the teacher's."""
        outputs = [self._compared(self._returned(self._student, batch)) for batch in self._exam]
        return relative_distance(_joined(outputs), self._answers)

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
    """Return each output over all batches, flat: batches may differ in size and shape."""
    columns = zip(*outputs, strict=True)
    return [torch.cat([part.flatten().float() for part in column]) for column in columns]


def _mean_variance(parts: Sequence[Moments]) -> float:
    """Return the variance within a channel, the mean over the channels; 1 where there is none."""
    if not parts:
        return 1.0
    variance = float(merge_moments(parts).var_biased.mean())
    return variance if variance > 0.0 else 1.0
