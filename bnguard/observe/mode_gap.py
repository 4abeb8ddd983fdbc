"""How far two ways to normalise disagree: the one definition of change, flips and mode gap.

The *change* between two outputs for the same samples is the root mean square of their difference,
in units of the reference's standard deviation. Its variance is taken per feature, about the mean
over the rows (dimension 0), and averaged over the features, so that a constant offset between
features does not count. All output tensors count alike, except those that are the same in every
row; if all are, the unit is their own root mean square. If some tensors have a row per sample, only
these are compared. Outputs whose rows do not fit together (images of several sizes, a loss per
batch), and a single row, have the variance over all their values.

A *flip* is a changed prediction (the class with the highest score, for the first output of shape
``(rows, classes)``), unless the probabilities of the two classes are within 0.05 in both outputs:
an undecided network flips by chance. Scores that are probabilities are used as they are.

The *mode gap* is the change, and the flips, between running and batch statistics, everything else
in eval mode; the outputs with batch statistics are the reference. ``watch``, ``recalibrate``,
``diagnose`` and ``swap`` all use the functions of this module. How it is measured while a model is
watched: :mod:`bnguard.observe.gap_probe`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from bnguard.layers.moments import wide

# Difference of the probabilities of two classes up to which they tie.
_MAX_TIE = 0.05

# Variance over mean square that rounding gives a float32 tensor with equal rows.
_ROUNDING = 1e-12


def relative_change(outputs: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Return the change between outputs, in standard deviations of the reference.

    0 for the same output, about 1.4 for an unrelated one of the same spread; infinite if an output
    is not finite. The module's docstring has the definition.

    Args:
        outputs: The tensors that the model returned, with a row per sample.
        reference: The same for the other way to normalise.

    Example:
        >>> import torch
        >>> relative_change([torch.tensor([[1.0, 9.0], [3.0, 9.0]])], [torch.tensor([[1.0, 9.0],
        ... [3.0, 7.0]])])
        1.0
    """
    units = [spread(expected) for expected in reference]
    if not any(units):
        units = [wide(expected).square().mean().item() or 1.0 for expected in reference]
    ratios = [
        (wide(output) - wide(expected)).square().mean().item() / unit
        for output, expected, unit in zip(outputs, reference, units, strict=True)
        if unit
    ]
    if not all(map(math.isfinite, ratios)):
        return math.inf
    return math.sqrt(sum(ratios) / len(ratios)) if ratios else 0.0


def spread(reference: Tensor) -> float:
    """Return the variance of each feature over the rows, averaged; over all values of one row.

    0 for a tensor that is the same in every row, up to rounding; NaN if a value is not finite.
    """
    values = wide(reference.detach())
    if values.numel() < 2:
        return 0.0
    if len(values) < 2:
        values = values.flatten()
    variance = (values - values.mean(0, keepdim=True)).square().mean().item()
    return 0.0 if variance <= _ROUNDING * values.square().mean().item() else variance


def flipped_share(
    outputs: Sequence[Tensor], reference: Sequence[Tensor], *, max_tie: float = _MAX_TIE
) -> float | None:
    """Return the share of predictions that change, without ties; None without class scores.

    Args:
        outputs: The tensors that the model returned, with a row per sample.
        reference: The same for the other way to normalise.
        max_tie: Difference of probability up to which two classes tie; 0 counts every change.

    Example:
        >>> import torch
        >>> scores, others = torch.tensor([[2.0, 0.0], [0.1, 0.0]]), torch.tensor([[0.0, 0.1]] * 2)
        >>> flipped_share([scores], [others])
        0.5
    """
    for output, expected in zip(outputs, reference, strict=True):
        if output.dim() == 2 and output.shape[1] > 1:
            classes = output.argmax(1, keepdim=True), expected.argmax(1, keepdim=True)
            margins = [
                (p.gather(1, classes[0]) - p.gather(1, classes[1])).abs()
                for p in map(_probabilities, (output, expected))
            ]
            # Negated, so that NaN counts as a flip.
            return (~(torch.maximum(*margins) <= max_tie)).float().mean().item()
    return None


def float_tensors(output: object) -> Iterator[Tensor]:
    """Yield the floating-point tensors in an output, also in containers and in attributes.

    Example:
        >>> import types
        >>> [t.shape for t in float_tensors([types.SimpleNamespace(scores=torch.zeros(2, 3))])]
        [torch.Size([2, 3])]
    """
    yield from _float_tensors(output, set())


def _float_tensors(output: object, seen: set[int]) -> Iterator[Tensor]:
    values: Iterable[object] = ()
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        values = output.values()
    elif isinstance(output, (list, tuple, set)):
        values = output
    elif not isinstance(output, (type, ModuleType, nn.Module)) and id(output) not in seen:
        # An object may lead back to itself.
        seen.add(id(output))
        slots = dataclasses.fields(output) if dataclasses.is_dataclass(output) else ()
        names = [field.name for field in slots] or list(getattr(output, "__dict__", {}))
        values = [getattr(output, name, None) for name in names]
    for value in values:
        yield from _float_tensors(value, seen)


def places_of_rows(returned: Sequence[Sequence[Tensor]], sizes: Sequence[int]) -> list[int]:
    """Return the indices of the output tensors with a row per sample, in every batch.

    A loss next to the scores, say, belongs to the batch.

    Example:
        >>> import torch
        >>> places_of_rows([[torch.tensor(0.7), torch.zeros(2, 3)]], [2])
        [1]
    """
    return [
        place
        for place, tensors in enumerate(zip(*returned, strict=True))
        if all(t.dim() > 0 and len(t) == size for t, size in zip(tensors, sizes, strict=True))
    ]


def join_rows(parts: Sequence[Tensor]) -> Tensor:
    """Return the rows of all batches; the flattened values if rows differ in shape."""
    if parts[0].dim() > 0 and len({part.shape[1:] for part in parts}) == 1:
        return torch.cat(list(parts))
    return torch.cat([part.flatten() for part in parts])


def _probabilities(scores: Tensor) -> Tensor:
    """Return the scores if they are probabilities, else their softmax."""
    scores = wide(scores)
    are_probabilities = (scores >= 0.0).all() and (scores.sum(1) - 1.0).abs().max() < 1e-2
    return scores if are_probabilities else scores.softmax(1)
