"""What a model returns, of any nested structure, and how far two such returns lie apart."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor


def float_tensors(output: object) -> Iterator[Tensor]:
    """Yield the floating-point tensors in an output, in order: containers and dataclasses too."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from float_tensors(value)
    elif isinstance(output, (list, tuple, set)):
        for value in output:
            yield from float_tensors(value)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield from float_tensors(getattr(output, field.name))


def places_of_rows(returned: Sequence[Sequence[Tensor]], sizes: Sequence[int]) -> list[int]:
    """Return which tensors have a row a sample, in what a model returned for batches of some sizes.

    A loss that is returned beside the scores is of a batch, and not of its samples.

    >>> import torch
    >>> places_of_rows([[torch.tensor(0.7), torch.zeros(2, 3)]], [2])
    [1]
    """
    return [
        place
        for place, tensors in enumerate(zip(*returned, strict=True))
        if all(t.dim() > 0 and len(t) == size for t, size in zip(tensors, sizes, strict=True))
    ]


def relative_distance(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the root mean square difference, in standard deviations of what was expected.

    Each tensor counts the same, whatever its size. 0 is the same output, about 1.4 an unrelated
    one of the same spread; infinite where an output is not finite.

    >>> import torch
    >>> round(relative_distance([torch.tensor([1.0, 3.0])], [torch.tensor([1.0, 5.0])]), 3)
    0.707
    """
    if not expected:
        return 0.0
    errors = [
        (output.float() - wanted.float()).square().mean().item() / spread(wanted)
        for output, wanted in zip(outputs, expected, strict=True)
    ]
    return math.sqrt(sum(errors) / len(errors)) if all(map(math.isfinite, errors)) else math.inf


def spread(expected: Tensor) -> float:
    """Return the variance of an output; of one that is all the same, nearly its square."""
    values = expected.detach().float()
    spread = float(values.var(correction=0))
    return max(spread, 1e-6 * float(values.square().mean()), 1e-12)
