"""How far statistics from a sample of the data can be from those of all of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from bnguard.layers.moments import Moments, merge_moments

# Fewer parts say too little about how they scatter.
_MIN_PARTS = 8
_MOST_PARTS = 64


class Pool:
    """What arrived at each layer, in at most 64 parts; more are merged in pairs."""

    def __init__(self) -> None:
        self._parts: dict[int, list[Moments]] = {}

    def add(self, arrived: Mapping[int, Iterable[Moments]]) -> None:
        """Take in what arrived, by the index of the layer."""
        for index, moments in arrived.items():
            parts = self._parts.setdefault(index, [])
            parts.extend(moments)
            while len(parts) > _MOST_PARTS:
                parts[:] = [merge_moments(parts[i : i + 2]) for i in range(0, len(parts), 2)]

    @property
    def parts(self) -> Mapping[int, Sequence[Moments]]:
        """What arrived, by the index of the layer."""
        return self._parts

    def merged(self) -> dict[int, Moments]:
        """Return the moments of all that arrived at each layer, by its index."""
        return {index: merge_moments(parts) for index, parts in self._parts.items()}


def is_precise(arrived: Mapping[int, Sequence[Moments]], tolerance: float) -> bool:
    """Return whether the standard errors of every layer's statistics are within a tolerance.

    Args:
        arrived: What arrived at each layer, in parts that were drawn at random.
        tolerance: Largest standard error of a mean, in standard deviations, and of the logarithm
            of a variance.
    """
    return all(
        len(parts) >= _MIN_PARTS and bool((torch.cat(standard_errors(parts)) <= tolerance).all())
        for parts in arrived.values()
    )


def standard_errors(parts: Sequence[Moments]) -> tuple[Tensor, Tensor]:
    """Return the standard errors of mean and variance, as seen in how parts of a sample scatter.

    The parts are clusters, so that values that belong together, as the pixels of an image do, do
    not count as independent: the linearised variance of a ratio of cluster totals (Cochran,
    "Sampling Techniques", 3rd edition 1977, section 6.4).

    Args:
        parts: At least two parts with values in them.

    Returns:
        That of the mean in standard deviations, and that of the logarithm of the variance, both
        of shape ``(C,)``.
    """
    filled = [part for part in parts if part.count > 0]
    whole = merge_moments(filled)
    var = whole.var_biased.clamp_min(torch.finfo(torch.float32).tiny)
    weights = torch.tensor([part.count / whole.count for part in filled], dtype=torch.float64)
    offsets = torch.stack([part.mean - whole.mean for part in filled])
    spreads = torch.stack([part.var_biased for part in filled]) + offsets**2 - whole.var_biased
    correction = len(filled) / (len(filled) - 1)
    scatter = (weights[:, None] ** 2 * torch.stack([offsets**2, spreads**2])).sum(1) * correction
    return scatter[0].sqrt() / var.sqrt(), scatter[1].sqrt() / var
