"""When a state dict is loaded into a layer: its buffers change, and no batch did it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.observe.hooks import Hooks


class LoadingProbe:
    """Tells of each layer that a state dict was loaded into, as a part of a model as well.

    Args:
        layers: The layers to watch.
        on_loaded: Called with a layer after it was loaded.
    """

    def __init__(
        self, layers: Iterable[BatchNormLayer], on_loaded: Callable[[BatchNormLayer], None]
    ) -> None:
        self.hooks = Hooks()
        self._on_loaded = on_loaded
        self.follow(layers)

    def follow(self, layers: Iterable[BatchNormLayer]) -> None:
        """Watch these layers from now on."""
        self.hooks.close()
        for layer in layers:
            self.hooks.after_loading(layer.module, self._noted(layer))

    def _noted(self, layer: BatchNormLayer) -> Callable[[object], None]:
        return lambda incompatible_keys: self._on_loaded(layer)
