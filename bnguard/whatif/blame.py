"""Find the layers that do the harm by bisection, in far fewer forwards than there are layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from bnguard.whatif.cures import Cure
from bnguard.whatif.result import LayerShare
from bnguard.whatif.table import Bench

# Samples that are enough to find the layers.
_SAMPLES = 256
# Groups of layers that do less of the harm than this are not split.
_NEGLIGIBLE_SHARE = 0.04
# At most this many times the splits that one bad layer takes, the worst group first.
_MOST_SPLITS = 3


def blame_layers(bench: Bench, cure: Cure) -> tuple[LayerShare, ...]:
    """Return the layers that a cure changes with their shares of the harm, the worst first.

    The cure is swapped in for the first layers, and for the last ones. A layer's share is the mean
    over the two orders, because great harm saturates and hides other layers. Layers whose
    statistics are not finite are returned alone, and nothing is measured.
    """
    changes = [cure.changes[name] for name in bench.order_of_calls if name in cure.changes]
    bad = [change for change in changes if change.max_shift_std is None]
    if bad:
        return tuple(LayerShare(change.name, None, None, None) for change in bad)
    names = [change.name for change in changes]
    # Layers that make up for others are not to blame.
    shares = [max(0.0, share) for share in _shares(bench, cure, names)]
    whole = sum(shares) or 1.0
    layers = [
        LayerShare(
            name=change.name,
            share=share / whole,
            shift_std=change.max_shift_std,
            log_variance_ratio=change.extreme_log_variance_ratio,
        )
        for change, share in zip(changes, shares, strict=True)
    ]
    return tuple(sorted(layers, key=lambda layer: layer.share or 0.0, reverse=True))


def _shares(bench: Bench, cure: Cure, names: Sequence[str]) -> list[float]:
    batches, statistics = bench.samples.first(_SAMPLES), cure.statistics
    expected = bench.outputs_with(statistics, batches)

    def harm(cured: Sequence[str]) -> float:
        some = {name: statistics[name] for name in cured}
        distance = bench.outputs_with(some, batches).change_from(expected)
        # Harm saturates: outputs that are far off are useless, however far.
        return 1.0 if math.isinf(distance) else distance / (1.0 + distance)

    count, whole = len(names), harm(())
    if whole <= 0.0:
        return [0.0] * count
    forwards = share_by_bisection(lambda cured: harm(names[:cured]), count, whole)
    backwards = share_by_bisection(lambda cured: harm(names[count - cured :]), count, whole)
    return [(one + other) / 2 for one, other in zip(forwards, reversed(backwards), strict=True)]


def share_by_bisection(harm: Callable[[int], float], count: int, whole: float) -> list[float]:
    """Return the share of each layer in the harm; they add up to 1.

    A layer's share is how far the harm falls when it is cured after all layers before it; negative
    if the harm rises. The layers of a group that was not split get equal shares.

    Args:
        harm: Returns the harm that is left when that many of the first layers are cured.
        count: Number of layers.
        whole: The harm when none is cured, above 0; none is left when all are.

    Example:
        >>> asked = []
        >>> def harm(cured):
        ...     asked.append(cured)
        ...     return 1.0 if cured < 6 else 0.0
        >>> share_by_bisection(harm, 8, 1.0), asked
        ([0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0], [4, 6, 5])
    """
    left = {0: whole, count: 0.0}

    def drop(group: tuple[int, int]) -> float:
        return left[group[0]] - left[group[1]]

    groups = [(0, count)]
    for _ in range(_MOST_SPLITS * math.ceil(math.log2(max(2, count)))):
        divisible = [group for group in groups if group[1] - group[0] > 1]
        worst = max(divisible, key=lambda group: abs(drop(group)), default=None)
        if worst is None or abs(drop(worst)) <= _NEGLIGIBLE_SHARE * whole:
            break
        start, stop = worst
        middle = (start + stop) // 2
        left[middle] = harm(middle)
        groups.remove(worst)
        groups += [(start, middle), (middle, stop)]
    return [
        drop(group) / (group[1] - group[0]) / whole
        for group in sorted(groups)
        for _ in range(*group)
    ]
