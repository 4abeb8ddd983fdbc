"""Where a NaN or Inf first appears in a forward, looked for only after one was noticed.

Normal steps pay nothing: the running buffers show that a batch was bad, and hooks on every module
then wait for the next time, for a bounded number of forwards.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from bnguard.history import BadValueOrigin
from bnguard.probes.hooks import Hooks

# Forwards that are looked at before the hooks come off without having seen anything.
_MAX_FORWARDS = 200


class OriginProbe:
    """Waits for the first module whose output is not finite, in the order in which they end.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.hooks = Hooks()
        self.origin: BadValueOrigin | None = None
        self._forwards = 0
        for name, module in model.named_modules():
            self.hooks.after(module, self._looker(name, module, is_model=module is model))

    def _looker(self, name: str, module: nn.Module, *, is_model: bool) -> Callable[..., None]:
        @torch.no_grad()
        def look(args: tuple[object, ...], output: object) -> None:
            channels = _bad_channels(output)
            if channels is not None:
                self.origin = BadValueOrigin(
                    module=name,
                    kind=type(module).__name__,
                    channels=channels,
                    is_input_bad=_bad_channels(args) is not None,
                    bad_parameters=tuple(
                        parameter_name
                        for parameter_name, parameter in module.named_parameters(recurse=False)
                        if not bool(parameter.isfinite().all())
                    ),
                )
                self.hooks.close()
                return
            self._forwards += is_model
            if self._forwards >= _MAX_FORWARDS:
                self.hooks.close()

        return look


def _bad_channels(tree: object) -> tuple[int, ...] | None:
    """Return the channels of the first tensor that is not finite; None where all are."""
    for leaf in tree_flatten(tree)[0]:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            continue
        bad = ~leaf.detach().isfinite()
        if not bool(bad.any()):
            continue
        if leaf.dim() < 2:
            return ()
        per_channel = bad.transpose(0, 1).flatten(1).any(1)
        return tuple(per_channel.nonzero().flatten().tolist())
    return None
