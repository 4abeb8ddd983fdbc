"""Where DDP puts rank 0's buffers in place of a rank's own, before each forward."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import nn

from bnguard.layers.bn_layer import is_wrapper
from bnguard.observe.hooks import Hooks


class BroadcastProbe:
    """Tells, on other ranks than 0, when a forward begins, with the buffers as they are by then.

    Args:
        model: The model, wrapped or not; DDP writes the buffers before it calls what it wraps.
        on_forward: Called at each forward, not at those that it makes of itself.
    """

    def __init__(self, model: nn.Module, on_forward: Callable[[], None]) -> None:
        self.hooks = Hooks()
        if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
            inner = next(module for module in model.modules() if not is_wrapper(module))
            self.hooks.before_outermost([inner], lambda args, kwargs: on_forward())
