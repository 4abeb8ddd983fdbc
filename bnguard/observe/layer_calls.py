"""Counts of the calls of layers in training, and the shapes of their batches, from cheap hooks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.layers.moments import values_per_channel
from bnguard.observe.history import Calls
from bnguard.observe.hooks import Hooks, Note

# Different sizes with a count of their own.
_MAX_DIFFERENT = 256


class ShapeProbe:
    """Counts the calls of each layer, by the shapes of their batches and by step.

    Args:
        model: The model, whose forwards separate the calls of a layer.
        layers: The layers to watch.
        on_batch_of_one: Called with the name of a layer before its first batch with one value per
            channel, which PyTorch will reject.

    Attributes:
        step: Number of the current step.
        is_evaluating: Whether an evaluation runs.
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
        """Watch these layers from now on, and keep earlier counts of them."""
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
        # Estimating the statistics anew sets another momentum.
        usual_momentum = layer.momentum
        module, has_modes = layer.module, layer.has_modes

        def note(args: tuple[object, ...]) -> None:
            values = args[0] if args else None
            if not isinstance(values, Tensor):
                return
            # The usual call comes first and does little: in the middle of a training step hardly
            # any of Python's code is in the processor's caches.
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
        """Count a call with batch statistics in its forward, or in the backward."""
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
    """The calls of a layer, and the shapes of their batches.

    Attributes:
        calls: The counts, without ``in_training``, which the shapes give.
        calls_now: Calls so far in the current step.
        position: Index in the order of first calls, in any mode.
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
        """Return the number of batches with n values per channel, by n."""
        self._count_repeats()
        return dict(self._values)

    def samples(self) -> int | None:
        """Return the most frequent batch size; None without a batch."""
        self._count_repeats()
        return max(self._sizes, key=lambda size: self._sizes[size]) if self._sizes else None

    def repeats(self) -> int:
        """Return the calls per batch: several if activations are recomputed."""
        calls = sum(self.values_per_channel().values())
        # Without a known call, the layer is compiled: hooks do not run.
        return max(1, round(calls / max(calls - self.calls.recomputed, 1)))

    def is_repeated(self, shape: torch.Size, step: int, forward: int) -> bool:
        """Return whether a call repeats that of the step before, and count it if so."""
        if step != self._step + 1 or self.calls_now != 1 or shape != self._latest_shape:
            return False
        self._repeats += 1
        self._step, self._forward = step, forward
        return True

    def count_shape(self, shape: torch.Size) -> int:
        """Count a batch, and return the number of batches with its values per channel."""
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
        """Count a call in this step and this forward of the model."""
        if step != self._step:
            self._step, self.calls_now = step, 0
        if forward != self._forward:
            self._forward, self._calls_in_forward = forward, 0
        self.calls_now += 1
        self._calls_in_forward += 1
        self.calls.most_per_step = max(self.calls.most_per_step, self.calls_now)
        self.calls.most_per_forward = max(self.calls.most_per_forward, self._calls_in_forward)

    def count_frozen(self) -> None:
        """Count a call in training with running statistics."""
        self.calls.frozen += 1
        self.calls.frozen_after += self.calls.unfrozen_step is not None
        self._earlier_step = max(self._earlier_step, self._step)
        self._step = -1  # the next call with batch statistics is no repetition

    def count_without_grad(self, step: int) -> None:
        """Count a call under ``torch.no_grad`` in this step."""
        if step != self._step_without_grad:
            self.calls.steps_without_grad += 1
            self._step_without_grad, self.calls.since_training = step, 0
        self.calls.without_grad += 1
        self.calls.since_training += 1

    def count_with_grad(self, step: int) -> None:
        """Count the calls under ``torch.no_grad`` before a training call in this step."""
        if self.calls.since_training and step == self._step_without_grad != self._step_in_eval_mode:
            # Before the first step, such a call may initialise a lazy layer.
            if step > 1:
                self.calls.between_steps += self.calls.since_training
                self.calls.steps_with_some_between += 1
            self.calls.since_training = 0

    def note_eval_mode(self, step: int, *, is_evaluating: bool) -> None:
        """Note a call in eval mode, which shows that earlier ones in this step are no mistake."""
        self._step_in_eval_mode = step
        self.calls.is_in_eval_mode = True
        if not is_evaluating:
            self._frozen_step = step

    def is_held_in_eval_mode(self, step: int) -> bool:
        """Return whether training called the layer only in eval mode in this, the newest step."""
        return self._frozen_step >= step > max(self._step, self._earlier_step)


def is_recomputing() -> bool:
    """Return whether a backward is running, in which a forward computes activations again."""
    return bool(torch._C._current_graph_task_id() != -1)


def _count(counts: dict[int, int], number: int, times: int) -> int:
    """Add to the count of a number and return it.

    Beyond the limit of different numbers, as with images of every size, a new one is rounded down
    to a power of two.
    """
    if number not in counts and len(counts) >= _MAX_DIFFERENT:
        number = 1 << (number.bit_length() - 1) if number else 0
    counts[number] = counts.get(number, 0) + times
    return counts[number]
