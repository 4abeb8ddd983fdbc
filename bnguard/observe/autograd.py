"""What autograd knows of a call: whether it is a recomputation, and the statistics that it saved.

Both are asked as ``torch.utils.checkpoint`` and ``torch.autograd.graph`` ask for them.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor

from bnguard.layers.moments import wide

_NODES = ("NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0")


def is_recomputing() -> bool:
    """Return whether a backward is running, so that a forward now computes activations again."""
    return bool(torch._C._current_graph_task_id() != -1)


def saved_statistics(output: object, eps: float) -> tuple[Tensor, Tensor] | None:
    """Return the batch mean and biased variance that a BN call saved for its backward.

    None where :func:`saves_statistics` says that there is nothing to read.

    >>> layer = torch.nn.BatchNorm1d(1)
    >>> mean, var = saved_statistics(layer(torch.tensor([[1.0], [5.0]])), layer.eps)
    >>> round(mean.item(), 3), round(var.item(), 3)
    (3.0, 4.0)
    """
    if not saves_statistics(output):
        return None
    node = output.grad_fn
    return node._saved_result1, wide(node._saved_result2).pow(-2.0) - eps


def saves_statistics(output: object) -> TypeGuard[Any]:
    """Return whether a BN call saved statistics that can be read, and are precise enough.

    It did not without gradients, in a class that does more than normalise, in half precision, or
    where tensors that are saved go elsewhere, as under activation checkpointing.
    """
    node = getattr(output, "grad_fn", None)
    if node is None or type(node).__name__ not in _NODES:
        return False
    # To read a tensor that was packed away would unpack it: compute it again, or fetch it.
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return False
    mean = node._saved_result1
    return mean.dtype in (torch.float32, torch.float64) and mean.numel() > 0
