"""Which layers do the harm: found by bisection, in far fewer forwards than there are layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bnguard.whatif.cures import Cure
from bnguard.whatif.result import LayerShare
from bnguard.whatif.table import Bench

# So many samples tell which layers do the harm.
_SAMPLES = 256
# A group of layers that does less of the harm than this is not looked into.
_NEGLIGIBLE_SHARE = 0.04
# Groups are split, the worst first, so many times as often as one layer alone would take.
_MOST_SPLITS = 3


def blame_layers(bench: Bench, cure: Cure) -> tuple[LayerShare, ...]:
    """Return the layers that a cure reaches with their shares in the harm, the worst first.

    The statistics of the cure are swapped in for a group of layers at a time: for the first so
    many, and for the last so many. A layer's share is the mean of what it takes away in the two
    orders, since harm that is great already does not grow, and hides what other layers do. Where
    statistics are not finite, these layers are to blame, and nothing is measured.
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
        # Outputs that are another network's do the same harm, however far off they are.
        return 1.0 if math.isinf(distance) else distance / (1.0 + distance)

    count, whole = len(names), harm(())
    if whole <= 0.0:
        return [0.0] * count
    forwards = share_by_bisection(lambda cured: harm(names[:cured]), count, whole)
    backwards = share_by_bisection(lambda cured: harm(names[count - cured :]), count, whole)
    return [(one + other) / 2 for one, other in zip(forwards, reversed(backwards), strict=True)]


@dataclass(frozen=True)
class _Group:
    """Layers that follow one another, and how far the harm falls when they are cured.

    Attributes:
        start: Number of the first.
        stop: Number after the last.
        drop: How far the harm falls.
    """

    start: int
    stop: int
    drop: float

    @property
    def size(self) -> int:
        return self.stop - self.start


def share_by_bisection(harm: Callable[[int], float], count: int, whole: float) -> list[float]:
    """Return the share of each layer in the harm; they add up to 1.

    Layers are cured from the first on. A layer's share is how far the harm falls when it is cured
    after all before it: below 0 where it rises. The layers of a group that was not split share
    alike.

    Args:
        harm: Returns what harm is left when the first so many layers are cured.
        count: How many layers there are.
        whole: The harm when none is cured, above 0; none is left when all are.

    Example:
        >>> asked = []
        >>> def harm(cured):
        ...     asked.append(cured)
        ...     return 1.0 if cured < 6 else 0.0
        >>> share_by_bisection(harm, 8, 1.0), asked
        ([0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0], [4, 6, 5])
    """
    groups = [_Group(0, count, whole)]
    left = {0: whole, count: 0.0}
    for _ in range(_MOST_SPLITS * math.ceil(math.log2(max(2, count)))):
        worst = max(groups, key=lambda group: abs(group.drop) if group.size > 1 else 0.0)
        if worst.size == 1 or abs(worst.drop) <= _NEGLIGIBLE_SHARE * whole:
            break
        middle = (worst.start + worst.stop) // 2
        left[middle] = harm(middle)
        groups.remove(worst)
        groups += [
            _Group(start, stop, left[start] - left[stop])
            for start, stop in ((worst.start, middle), (middle, worst.stop))
        ]
    groups.sort(key=lambda group: group.start)
    return [group.drop / group.size / whole for group in groups for _ in range(group.size)]
