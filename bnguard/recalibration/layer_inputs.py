"""Read the inputs of BN layers in a forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.layers.moments import Moments, channel_moments, wide

OnInput = Callable[[int, Tensor], None]


class ForwardCancelled(BaseException):
    """Raised in a forward to end it; no ``except Exception`` of a model stops it."""


@contextmanager
def read_inputs(layers: Sequence[BatchNormLayer], on_input: OnInput) -> Iterator[None]:
    """Call ``on_input`` with the index of a layer and its input, at each call of the layer.

    The hooks run after those of the user, and so see what the layer sees.
    """

    def hook_for(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            on_input(index, args[0] if args else next(iter(kwargs.values())))

        return hook

    handles = [
        layer.module.register_forward_pre_hook(hook_for(index), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_moments(values: Tensor) -> Moments:
    """Return the moments of a layer's inputs; they are finite if the inputs are.

    Finite values whose squares overflow their dtype are computed again in float64.
    """
    moments = channel_moments(values)
    if not is_finite(moments) and bool(torch.isfinite(values).all()):
        return channel_moments(wide(values))
    return moments


def is_finite(moments: Moments) -> bool:
    """Return whether mean and variance are finite in every channel."""
    return bool((moments.mean + moments.squares).isfinite().all())


def on_host(moments: Moments) -> Moments:
    """Return the moments on the CPU in float64, where parts are merged and exchanged."""
    return Moments(moments.count, moments.mean.cpu().double(), moments.squares.cpu().double())
