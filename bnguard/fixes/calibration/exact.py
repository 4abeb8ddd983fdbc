"""The exact engine: statistics of a whole calibration set, as if it were one giant batch.

Every chunk of the set runs through the model in eval mode and stops at each BN layer. When all
have arrived, the moments of what arrived are merged, the layer gets its statistics, and all go
on. So each layer is computed from inputs that the new statistics upstream have normalised, and
one forward's work does it, whatever the batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from bnguard.errors import CalibrationError
from bnguard.fixes.calibration.walks import Abandoned, Chunk, Surroundings
from bnguard.layers import BatchNormLayer
from bnguard.moments import Moments, channel_moments, merge_moments

Settle = Callable[[BatchNormLayer, Moments], None]


class Lockstep:
    """Chunks that wait for one another at each BN layer.

    Args:
        layers: The layers to compute.
        forwards: What puts each chunk through the model.
    """

    def __init__(
        self, layers: Sequence[BatchNormLayer], forwards: Sequence[Callable[[], object]]
    ) -> None:
        surroundings = Surroundings()
        self._chunks = [Chunk(forward, surroundings) for forward in forwards]
        self._current = self._chunks[0]
        self._arrived: dict[Chunk, tuple[BatchNormLayer, Moments]] = {}
        self._layers = layers

    def run(self, settle: Settle) -> dict[str, Moments]:
        """Put all chunks through; call ``settle`` with each layer and its moments, in order."""
        merged: dict[str, Moments] = {}
        handles = [
            layer.module.register_forward_pre_hook(self._hook(layer), with_kwargs=True)
            for layer in self._layers
        ]
        try:
            while self._advance_all():
                layer = self._common_layer()
                if layer.name in merged:
                    raise CalibrationError(f"{layer.name} is called several times in a forward")
                moments = merge_moments([moments for _, moments in self._arrived.values()])
                settle(layer, moments)
                merged[layer.name] = moments
        finally:
            for handle in handles:
                handle.remove()
            for chunk in self._chunks:
                chunk.abandon()
        return merged

    def _advance_all(self) -> bool:
        """Let every chunk run to its next layer; return whether any arrived at one."""
        self._arrived.clear()
        for chunk in self._chunks:
            if not chunk.is_finished:
                self._current = chunk
                chunk.advance()
        return bool(self._arrived)

    def _common_layer(self) -> BatchNormLayer:
        layers = {layer.name: layer for layer, _ in self._arrived.values()}
        if len(layers) > 1 or len(self._arrived) < len(self._chunks):
            raise CalibrationError(f"batches visit layers in different order: {', '.join(layers)}")
        return next(iter(layers.values()))

    def _hook(self, layer: BatchNormLayer) -> Callable[..., None]:
        def arrive(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values: Tensor = args[0] if args else next(iter(kwargs.values()))
            chunk = self._current
            self._arrived[chunk] = (layer, channel_moments(values))
            chunk.stop()

        return arrive
