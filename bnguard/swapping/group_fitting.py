"""The number of groups, gamma and beta of each group norm, by least squares, layer by layer.

The teacher's BN outputs on a few batches are known. The student then runs once on the same
samples. Just before a group norm is called, its inputs are those that the layers before it, fitted
already, will give; so it gets the number of groups and the affine parameters by which its output
is nearest to the teacher's. No training step is needed: for each channel this is a regression on
the normalised values, and the variance that it leaves unexplained ranks the numbers of groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bnguard.layers.bn_layer import BatchNormLayer

# Two unknowns a channel are known well by as many values; more take memory in every layer.
VALUES_PER_CHANNEL = 1024
# Of the normalised variance, 1: keeps a channel that is the same everywhere from a huge gamma.
_RIDGE = 1e-3
# Values of one sample whose mean and variance a group may be normalised by.
MIN_VALUES_PER_GROUP = 16
# Each number of groups that is tried is larger than the last by this factor.
_GROUPS_RATIO = 1.5


@dataclass(frozen=True)
class _Fit:
    """A regression of the wanted output on the normalised input: one slope a channel."""

    unexplained: float
    slope: Tensor
    offset: Tensor


def pick_values(values: Tensor, count: int) -> Tensor:
    """Return at most ``count`` values per channel and sample, the same positions of every sample.

    They are a copy of shape ``(N, C, P)``, of values of shape ``(N, C, …)``.
    """
    rows = values.flatten(2) if values.dim() > 2 else values.unsqueeze(2)
    order = torch.randperm(rows.shape[2], generator=torch.Generator().manual_seed(0))
    return rows[:, :, order[:count].to(rows.device)].detach().clone()


def normalise(layer: BatchNormLayer, values: Tensor) -> Tensor:
    """Return what a BN layer gives for its inputs in its mode, without a built-in activation."""
    mean, var = layer.running_mean, layer.running_var
    uses_batch = layer.is_training or mean is None
    return F.batch_norm(
        values,
        None if uses_batch else mean,
        None if uses_batch else var,
        layer.weight,
        layer.bias,
        training=uses_batch,
        eps=layer.eps,
    )


@torch.no_grad()
def fit_norms(
    norms: Sequence[nn.Module],
    wanted: Mapping[int, Tensor],
    run: Callable[[], object],
    *,
    choose_groups: bool,
) -> None:
    """Fit the group norms among some modules to what BN gave in their place.

    Args:
        norms: Modules of the student; those that are not group norms stay as they are.
        wanted: What BN gave, as :func:`pick_values` returns it, by the index of the norm.
        run: Puts the same samples through the student, in eval mode.
        choose_groups: Whether the numbers of groups are chosen too.
    """
    fitted: set[int] = set()

    def before_call(index: int, values: Tensor) -> None:
        norm, target = norms[index], wanted.get(index)
        # A layer that is called several times is fitted to its first call.
        if index in fitted or not isinstance(norm, nn.GroupNorm) or target is None:
            return
        fitted.add(index)
        if target.shape[:2] != values.shape[:2]:
            return
        choices = _candidates(values) if choose_groups else iter([norm.num_groups])
        best = min(
            ((_fit(values, groups, norm.eps, target), groups) for groups in choices),
            key=lambda pair: pair[0].unexplained,
            default=None,
        )
        if best is not None:
            fit, norm.num_groups = best
            _set_affine(norm, fit)

    def hook(index: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args:
            before_call(index, args[0])

    with ExitStack() as stack:
        for index, norm in enumerate(norms):
            stack.callback(norm.register_forward_pre_hook(partial(hook, index)).remove)
        run()


def _candidates(values: Tensor) -> Iterator[int]:
    """Yield numbers of groups that divide the channels and leave each group enough values."""
    channels, positions = values.shape[1], values.shape[2:].numel()
    last = 0.0
    for groups in range(1, channels + 1):
        size = channels // groups * positions
        if channels % groups or size < 2 or (groups > 1 and size < MIN_VALUES_PER_GROUP):
            continue
        if groups >= _GROUPS_RATIO * last or groups == channels:
            last = groups
            yield groups


def _fit(values: Tensor, groups: int, eps: float, target: Tensor) -> _Fit:
    normalised = pick_values(F.group_norm(values, groups, eps=eps), target.shape[2])
    given, wanted = (_channels_first(each) for each in (normalised, target))
    mean_given, mean_wanted = given.mean(1), wanted.mean(1)
    given, wanted = given - mean_given[:, None], wanted - mean_wanted[:, None]
    covariance = (given * wanted).mean(1)
    variance = given.square().mean(1) + _RIDGE
    slope = covariance / variance
    unexplained = wanted.square().mean(1) - covariance * slope
    return _Fit(float(unexplained.sum()), slope, mean_wanted - slope * mean_given)


def _channels_first(values: Tensor) -> Tensor:
    return values.double().transpose(0, 1).flatten(1)


def _set_affine(norm: nn.GroupNorm, fit: _Fit) -> None:
    for name, values in (("weight", fit.slope), ("bias", fit.offset)):
        parameter = getattr(norm, name)
        if parameter is not None and not parametrize.is_parametrized(norm, name):
            parameter.copy_(values)
