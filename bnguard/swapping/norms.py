"""The layers that replace BN: group norm that refuses groups of one, batch renorm, frozen BN.

Each keeps the names of BN's parameters and buffers, so a state dict of one loads into the other as
far as both have the entry.
"""

# Without "from __future__ import annotations": TorchScript reads types, not their names.

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnguard.errors import ConfigurationError


class GroupNorm(nn.GroupNorm):
    """Group normalisation (Wu and He 2018) that refuses to erase its input.

    PyTorch's own normalises a group of one value to zero without a word: the layer then gives its
    bias, whatever comes in.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the input, ``(N, C, …)``, normalised over groups of channels of each sample.

        Raises:
            ConfigurationError: A group has one value.
        """
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            self._refuse_groups_of_one(input)
        return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)

    @torch.jit.unused
    def _refuse_groups_of_one(self, input: Tensor) -> None:
        # An exported graph may take sizes that are not known yet.
        if not torch.compiler.is_compiling() and input.shape[1:].numel() == self.num_groups:
            raise ConfigurationError(
                f"GroupNorm of {self.num_groups} groups got an input of shape "
                f"{tuple(input.shape)}: a group of one value is always 0; use fewer groups, or "
                "let bnguard swap choose them for a sample"
            )


class FrozenNorm(nn.Module):
    """BN with its running statistics as constants: an affine transform, the same in both modes.

    Attributes:
        weight: Gamma, shape ``(C,)``, or None.
        bias: Beta, shape ``(C,)``, or None.
        running_mean: Constant mean, shape ``(C,)``.
        running_var: Constant variance, shape ``(C,)``.
        eps: What is added to the variance.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, mean: Tensor, var: Tensor, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("running_mean", mean)
        self.register_buffer("running_var", var)
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``(input − mean) / sqrt(var + eps) · weight + bias``, of the input's shape."""
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows in the brackets."""
        return f"{self.running_mean.numel()}, eps={self.eps}"


class RenormSchedule(NamedTuple):
    """How far batch renorm may correct, by the number of batches seen.

    At first not at all, which is plain BN; then the limits grow linearly. The defaults are those
    of Ioffe 2017, section 4.1.

    Attributes:
        start: Batches until the limits begin to grow.
        d_end: Batches until ``max_d`` is reached.
        r_end: Batches until ``max_r`` is reached.
        max_r: Largest factor, and one over the smallest.
        max_d: Largest shift, in running standard deviations.
    """

    start: int = 5_000
    d_end: int = 25_000
    r_end: int = 40_000
    max_r: float = 3.0
    max_d: float = 5.0


_USUAL_SCHEDULE = RenormSchedule()


def limits_after(
    batches: Tensor, schedule: tuple[int, int, int, float, float]
) -> tuple[Tensor, Tensor]:
    """Return the limits of r and d after a number of batches, a scalar each.

    >>> [limit.item() for limit in limits_after(torch.tensor(15_000), RenormSchedule())]
    [1.5714285373687744, 2.5]
    """
    start, d_end, r_end, max_r, max_d = schedule
    r_share = ((batches - start) / max(r_end - start, 1)).clamp(0.0, 1.0)
    d_share = ((batches - start) / max(d_end - start, 1)).clamp(0.0, 1.0)
    return 1.0 + r_share * (max_r - 1.0), d_share * max_d


class BatchRenorm(nn.Module):
    """Batch renormalisation (Ioffe 2017): trains with nearly the statistics that eval mode uses.

    In training the batch statistics normalise, then r and d, through which no gradient flows,
    bring the result to what the running statistics would give, as far as the schedule allows. In
    eval mode it is BN.

    Args:
        mean: Running mean to start from, shape ``(C,)``.
        var: Running variance to start from, shape ``(C,)``.
        batches: Batches that these come from, a scalar of integers.
        eps: What is added to the variances.
        momentum: Weight of the new value in an update; None for a cumulative average.
        schedule: How far it may correct.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    batches_ahead: Tensor

    def __init__(
        self,
        mean: Tensor,
        var: Tensor,
        batches: Tensor,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        schedule: RenormSchedule = _USUAL_SCHEDULE,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.schedule = schedule
        self.register_buffer("running_mean", mean)
        self.register_buffer("running_var", var)
        self.register_buffer("num_batches_tracked", batches)
        # In the state dict, so that a loaded model continues at the same place in the schedule.
        self.register_buffer("batches_ahead", torch.zeros_like(batches))
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    def skip_warm_up(self) -> None:
        """Correct as far as the schedule ever allows: the running statistics are known already."""
        self.batches_ahead.fill_(max(self.schedule.r_end, self.schedule.d_end))

    def forward(self, input: Tensor) -> Tensor:
        """Return the input, ``(N, C, …)``, renormalised in training, normalised in eval mode."""
        weight, bias = self.weight, self.bias
        if self.training:
            scale, shift = self._correction(input)
            shift = shift if weight is None else shift * weight
            bias = shift if bias is None else shift + bias
            weight = scale if weight is None else scale * weight
            return F.batch_norm(input, None, None, weight, bias, training=True, eps=self.eps)
        return F.batch_norm(input, self.running_mean, self.running_var, weight, bias, eps=self.eps)

    def _correction(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Return r and d of Ioffe's algorithm 1, shape ``(C,)``, and update the statistics."""
        with torch.no_grad():
            values = input.detach().transpose(0, 1).flatten(1).to(self.running_mean.dtype)
            var, mean = torch.var_mean(values, dim=1, correction=0)
            running_std = (self.running_var + self.eps).sqrt()
            max_r, max_d = limits_after(
                self.num_batches_tracked + self.batches_ahead, self.schedule
            )
            r = ((var + self.eps).sqrt() / running_std).clamp(1.0 / max_r, max_r)
            d = ((mean - self.running_mean) / running_std).clamp(-max_d, max_d)

            self.num_batches_tracked += 1
            if self.momentum is None:
                new = 1.0 / self.num_batches_tracked
            else:
                new = torch.full_like(max_r, self.momentum)
            n = values.shape[1]
            self.running_mean.lerp_(mean, new.to(mean.dtype))
            self.running_var.lerp_(var * (n / max(n - 1, 1)), new.to(var.dtype))
            return r, d

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows in the brackets."""
        return f"{self.running_mean.numel()}, eps={self.eps}, momentum={self.momentum}"
