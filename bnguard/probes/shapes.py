"""What kind of batches reach the layers in training, from a hook that only reads the shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bnguard.layers import BatchNormLayer
from bnguard.moments import values_per_channel
from bnguard.probes.hooks import Hooks, Note


@dataclass
class ShapeRecord:
    """The calls of one layer that normalised with the statistics of the batch.

    Attributes:
        shapes: How often each shape came.
        calls_without_grad: How many of the calls ran under ``torch.no_grad``.
        calls_outside: How many ran outside a forward of the model: an activation that is
            recomputed in the backward, or a part of the model that is called by itself.
        most_calls: The most calls in one forward of the model.
        calls_now: Calls so far in the forward that is running.
    """

    shapes: dict[torch.Size, int] = field(default_factory=dict)
    calls_without_grad: int = 0
    calls_outside: int = 0
    most_calls: int = 0
    calls_now: int = 0
    _forward: int = 0

    def values_per_channel(self) -> dict[int, int]:
        """Return how often n values per channel were normalised, by n."""
        counts: dict[int, int] = {}
        for shape, calls in self.shapes.items():
            n = values_per_channel(shape)
            counts[n] = counts.get(n, 0) + calls
        return counts

    def samples(self) -> int | None:
        """Return the number of samples that came most often; None where none came."""
        if not self.shapes:
            return None
        return int(max(self.shapes, key=lambda shape: self.shapes[shape])[0])

    def count(self, forward: int, is_inside: bool) -> None:
        """Count a call, as one of the forward with this number if it is inside of one."""
        if not is_inside:
            self.calls_outside += 1
            return
        if forward != self._forward:
            self._forward, self.calls_now = forward, 0
        self.calls_now += 1
        self.most_calls = max(self.most_calls, self.calls_now)


class ShapeProbe:
    """Notes the shape of each batch that a layer in train mode meets, and when it came.

    Args:
        model: The model, whose forwards tell the calls of a layer apart.
        layers: The layers to watch.
        on_batch_of_one: Called with the name of a layer before it meets its first batch with one
            value per channel, which PyTorch will refuse.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[BatchNormLayer],
        on_batch_of_one: Callable[[str], None],
    ) -> None:
        self.hooks = Hooks()
        self.records: dict[str, ShapeRecord] = {}
        self._on_batch_of_one = on_batch_of_one
        self._forwards = 0
        self._is_inside = False
        self._model = model
        self.follow(layers)

    def follow(self, layers: Iterable[BatchNormLayer]) -> None:
        """Watch these layers from now on; what was noted of them so far is kept."""
        self.hooks.close()
        self.hooks.before(self._model, self._enter)
        self.hooks.after(self._model, self._leave)
        for layer in layers:
            record = self.records.setdefault(layer.name, ShapeRecord())
            self.hooks.before(layer.module, self._noted(layer, record))

    def _enter(self, args: tuple[object, ...]) -> None:
        self._forwards += 1
        self._is_inside = True

    def _leave(self, args: tuple[object, ...], output: object) -> None:
        self._is_inside = False

    def _noted(self, layer: BatchNormLayer, record: ShapeRecord) -> Note:
        shapes = record.shapes

        def note(args: tuple[object, ...]) -> None:
            if not (args and isinstance(args[0], Tensor) and layer.uses_batch_statistics):
                return
            shape = args[0].shape
            is_new = shape not in shapes
            shapes[shape] = shapes.get(shape, 0) + 1
            record.count(self._forwards, self._is_inside)
            if not torch.is_grad_enabled():
                record.calls_without_grad += 1
            if is_new and values_per_channel(shape) == 1:
                self._on_batch_of_one(layer.name)

        return note
