"""How often layers are called in training, and with batches of which shapes, from cheap hooks.

The hooks read the shape of the input, and what autograd knows of the call: whether activations are
computed again, and the batch statistics that it saved.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.layers.moments import values_per_channel, wide
from bnguard.observe.history import Calls
from bnguard.observe.hooks import Hooks, Note

_NODES = ("NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0")
# Different sizes that are counted each for itself.
_MAX_DIFFERENT = 256


class ShapeProbe:
    """Notes the shape of each batch that a layer in train mode meets, and when it came.

    Args:
        model: The model, whose forwards tell the calls of a layer apart.
        layers: The layers to watch.
        on_batch_of_one: Called with the name of a layer before it meets its first batch with one
            value per channel, which PyTorch will refuse.

    Attributes:
        step: Number of the step that is under way.
        is_evaluating: Whether what comes now is no training.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[BatchNormLayer],
        on_batch_of_one: Callable[[str], None],
    ) -> None:
        self.hooks = Hooks()
        self.records: dict[str, ShapeRecord] = {}
        self.step = 1
        self.is_evaluating = False
        self._positions = itertools.count()
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
        # Those who estimate the statistics anew set another momentum for it.
        usual_momentum = layer.momentum
        module, has_modes = layer.module, layer.has_modes

        def note(args: tuple[object, ...]) -> None:
            values = args[0] if args else None
            if not isinstance(values, Tensor):
                return
            # What nearly every call is comes first, and asks for little: in the middle of a
            # training step hardly anything of Python is in the caches of the processor.
            if (
                (module.training if has_modes else layer.uses_batch_statistics)
                and self._is_inside
                and not self.is_evaluating
                and torch.is_grad_enabled()
                and record.is_repeated(values.shape, self.step, self._forwards)
            ):
                return
            if layer.uses_batch_statistics:
                note_batch(values.shape)
            else:
                note_frozen()

        def note_frozen() -> None:
            if record.position is None:
                record.position = next(self._positions)
            record.note_eval_mode(self.step, is_evaluating=self.is_evaluating)
            if torch.is_grad_enabled() and not self.is_evaluating:
                record.calls.in_eval_mode_with_grad += 1
                if self._model.training:
                    record.count_frozen()

        def note_batch(shape: torch.Size) -> None:
            if record.position is None:
                record.position = next(self._positions)
            if self.is_evaluating:
                record.calls.in_evaluation += layer.momentum == usual_momentum
                return
            if not torch.is_grad_enabled() and layer.momentum != usual_momentum:
                record.calls.estimating += 1
                return
            is_new = record.count_shape(shape) == 1
            self._place(record)
            if record.calls.frozen and record.calls.unfrozen_step is None:
                record.calls.unfrozen_step = self.step
            if is_new and values_per_channel(shape) == 1:
                self._on_batch_of_one(layer.name)

        return note

    def _place(self, record: ShapeRecord) -> None:
        """Note where a call with batch statistics stands: in which forward, or in a backward."""
        record.calls.outside += not self._is_inside
        if is_recomputing():
            record.calls.recomputed += 1
            return
        record.count_call(self.step, self._forwards if self._is_inside else -self.step)
        if torch.is_grad_enabled():
            record.count_with_grad(self.step)
        else:
            record.count_without_grad(self.step)


@dataclass(slots=True)
class ShapeRecord:
    """How often a layer was called, and with batches of which shapes.

    Attributes:
        calls: What was counted, but for the calls in training, which the shapes tell.
        calls_now: Calls so far in the step that is under way.
        position: Place in the order in which the layers were first called, in whatever mode.
    """

    calls: Calls = field(default_factory=Calls)
    calls_now: int = 0
    position: int | None = None
    _step_without_grad: int = 0
    _waiting: int = 0
    _step_in_eval_mode: int = 0
    _values: dict[int, int] = field(default_factory=dict)
    _sizes: dict[int, int] = field(default_factory=dict)
    _latest_shape: torch.Size | None = None
    _repeats: int = 0
    _forward: int = 0
    _calls_in_forward: int = 0
    _step: int = 0
    _earlier_step: int = 0
    _frozen_step: int = 0

    def values_per_channel(self) -> dict[int, int]:
        """Return how often n values per channel came, by n."""
        self._count_repeats()
        return dict(self._values)

    def samples(self) -> int | None:
        """Return the number of samples that came most often; None where none came."""
        self._count_repeats()
        return max(self._sizes, key=lambda size: self._sizes[size]) if self._sizes else None

    def repeats(self) -> int:
        """Return how often each batch is met: more than once where activations are recomputed."""
        calls = sum(self.values_per_channel().values())
        # A compiled layer is called without the hook: no call is known.
        return max(1, round(calls / max(calls - self.calls.recomputed, 1)))

    def is_repeated(self, shape: torch.Size, step: int, forward: int) -> bool:
        """Count a call that is as the one in the step before, and return whether it is."""
        if step != self._step + 1 or self.calls_now != 1 or shape != self._latest_shape:
            return False
        self._repeats += 1
        self._step, self._forward = step, forward
        return True

    def count_shape(self, shape: torch.Size) -> int:
        """Count a batch of this shape, and return how many with its values per channel came."""
        self._count_repeats()
        self._latest_shape = shape
        _count(self._sizes, shape[0], 1)
        return _count(self._values, values_per_channel(shape), 1)

    def _count_repeats(self) -> None:
        if self._repeats and self._latest_shape is not None:
            _count(self._sizes, self._latest_shape[0], self._repeats)
            _count(self._values, values_per_channel(self._latest_shape), self._repeats)
            self._repeats = 0

    def count_call(self, step: int, forward: int) -> None:
        """Count a call in this step, in the forward of the model with this number."""
        if step != self._step:
            self._step, self.calls_now = step, 0
        if forward != self._forward:
            self._forward, self._calls_in_forward = forward, 0
        self.calls_now += 1
        self._calls_in_forward += 1
        self.calls.most_per_step = max(self.calls.most_per_step, self.calls_now)
        self.calls.most_per_forward = max(self.calls.most_per_forward, self._calls_in_forward)

    def count_frozen(self) -> None:
        """Count a call in training that used running statistics."""
        self.calls.frozen += 1
        self.calls.frozen_after += self.calls.unfrozen_step is not None
        self._earlier_step = max(self._earlier_step, self._step)
        self._step = -1  # so that the next call with batch statistics is looked at

    def count_without_grad(self, step: int) -> None:
        """Count a call under ``torch.no_grad`` in this step."""
        if step != self._step_without_grad:
            self.calls.steps_without_grad += 1
            self._step_without_grad, self.calls.since_training = step, 0
        self.calls.without_grad += 1
        self.calls.since_training += 1

    def count_with_grad(self, step: int) -> None:
        """Count those under ``torch.no_grad`` that came before a call of training in this step."""
        if self.calls.since_training and step == self._step_without_grad != self._step_in_eval_mode:
            # Before the first step, a lazy layer takes its shape.
            if step > 1:
                self.calls.between_steps += self.calls.since_training
                self.calls.steps_with_some_between += 1
            self.calls.since_training = 0

    def note_eval_mode(self, step: int, *, is_evaluating: bool) -> None:
        """Note a call in eval mode, which what came before it in this step was meant for."""
        self._step_in_eval_mode = step
        self.calls.is_in_eval_mode = True
        if not is_evaluating:
            self._frozen_step = step

    def is_held_in_eval_mode(self, step: int) -> bool:
        """Return whether training called the layer in eval mode alone in this step, the newest."""
        return self._frozen_step >= step > max(self._step, self._earlier_step)


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


def _count(counts: dict[int, int], number: int, times: int) -> int:
    """Count a number that came so many times, and return how often it came in all.

    Where there are too many different ones, as with images of every size, it is rounded down to a
    power of two.
    """
    if number not in counts and len(counts) >= _MAX_DIFFERENT:
        number = 1 << (number.bit_length() - 1) if number else 0
    counts[number] = counts.get(number, 0) + times
    return counts[number]
