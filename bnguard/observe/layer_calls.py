"""Counts of the calls of layers, and the shapes of their batches."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.layers.moments import values_per_channel
from bnguard.observe.history import Calls
from bnguard.observe.hooks import Hooks, Note

# Different sizes with a count of their own.
_MAX_DIFFERENT = 256
# Steps in a row that a layer repeats until its hook may leave, and the steps until it is back.
_STEPS_BEFORE_REST = 100
_STEPS_OF_REST = 31

_IS_TRAINING = operator.attrgetter("training")


class ShapeProbe:
    """Counts the calls of each layer, by the shapes of their batches and by step.

    Args:
        model: The model, whose forwards separate the calls of a layer.
        on_batch_of_one: Called before the first batch of a layer with one value per channel, which
            PyTorch will reject without naming the layer.

    Attributes:
        step: Number of the current step.
        is_evaluating: Whether an evaluation runs.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[BatchNormLayer],
        on_batch_of_one: Callable[[], None],
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
        self._parts: list[_Part] = []
        self._steps_until_turn = _STEPS_BEFORE_REST + 2
        self.follow(layers)

    def follow(self, layers: Iterable[BatchNormLayer]) -> None:
        """Watch these layers from now on, and keep earlier counts of them."""
        self.wake()
        self.hooks.close()
        self.hooks.before(self._model, self._enter)
        self.hooks.after(self._model, self._leave)
        self._parts = []
        for layers_of_part in parts_of(self._model, layers):
            part = _Part()
            self._parts.append(part)
            for layer in layers_of_part:
                record = self.records.setdefault(layer.name, ShapeRecord())
                handle = self.hooks.before(layer.module, self._make_note(layer, record, part))
                part.members.append(_Member(layer, handle.id, record))

    def start_step(self, step: int) -> None:
        """Count the next calls to this step; send hooks away that see nothing new, or call them.

        They are back for one step in 32, and at once when the first layer of their part is called
        in any other way than before.
        That saves 3 % of a step of 1 to 4 ms, with 4 to 40 layers on a CPU.
        """
        self.step = step
        self._steps_until_turn -= 1
        if self._steps_until_turn > 0:
            return
        if any(part.resting for part in self._parts):
            self.wake()
        else:
            for part in self._parts:
                part.rest(step - 1)
            self._steps_until_turn = _STEPS_OF_REST

    def wake(self) -> None:
        """Call the hooks back, and complete the counts."""
        for part in self._parts:
            if part.wake():
                self._steps_until_turn = 1

    def _enter(self, args: tuple[object, ...]) -> None:
        self._forwards += 1
        self._is_inside = True

    def _leave(self, args: tuple[object, ...], output: object) -> None:
        self._is_inside = False

    def _make_note(self, layer: BatchNormLayer, record: ShapeRecord, part: _Part) -> Note:
        # Estimating the statistics again sets another momentum.
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
                and not self.is_evaluating
                and torch.is_grad_enabled()
                and (self._is_inside or not is_recomputing())
                and (part.first is not record or part.is_training())
                and record.is_repeated(values.shape, self.step, self._forward(), self._is_inside)
            ):
                return
            if part.first is record:
                part.wake()
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
            gamma = module._parameters.get("weight")
            is_adapted = gamma is not None and not isinstance(gamma, nn.Parameter)
            record.calls.has_other_weights |= is_adapted
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
                record.batch_of_one_step = record.batch_of_one_step or self.step
                self._on_batch_of_one()

        return note

    def _forward(self) -> int:
        """Return a number of the current forward of the model; outside, of the calls of a step."""
        return self._forwards if self._is_inside else -self.step

    def _place(self, record: ShapeRecord) -> None:
        """Count a call with batch statistics in its forward, or in the backward."""
        record.calls.outside += not self._is_inside
        record.is_inside = self._is_inside
        if is_recomputing():
            record.calls.recomputed += 1
            return
        record.count_call(self.step, self._forward())
        if torch.is_grad_enabled():
            record.count_with_grad(self.step)
        else:
            record.count_without_grad(self.step)


@dataclass(slots=True)
class ShapeRecord:
    """The calls of a layer, and the shapes of their batches."""

    calls: Calls = field(default_factory=Calls)  # without ``in_training``, which the shapes give
    calls_now: int = 0  # of the current step
    position: int | None = None  # in the order of first calls, in any mode
    batch_of_one_step: int | None = None  # the first with one value per channel
    # Of the newest call with batch statistics: whether it was in a forward of the model, its step
    # (-1 after a frozen call), its forward, and the steps in a row with one such call.
    is_inside: bool = True
    step: int = 0
    forward: int = 0
    repeated: int = 0
    _step_without_grad: int = 0
    _waiting: int = 0
    _step_in_eval_mode: int = 0
    _values: dict[int, int] = field(default_factory=dict)
    _sizes: dict[int, int] = field(default_factory=dict)
    _latest_shape: torch.Size | None = None
    _repeats: int = 0
    _calls_in_forward: int = 0
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

    def is_repeated(self, shape: torch.Size, step: int, forward: int, is_inside: bool) -> bool:
        """Return whether a call repeats that of the step before, and count it if so."""
        if (
            step != self.step + 1
            or self.calls_now != 1
            or shape != self._latest_shape
            or is_inside is not self.is_inside
        ):
            return False
        self.repeat(1, step, forward)
        return True

    def repeat(self, times: int, step: int, forward: int) -> None:
        """Count steps, up to this one, that repeated the newest call."""
        self._repeats += times
        self.repeated += times
        self.step, self.forward = step, forward

    def count_shape(self, shape: torch.Size) -> int:
        """Count a batch, and return the number of batches with its values per channel."""
        self._count_repeats()
        self._latest_shape, self.repeated = shape, 0
        _count(self._sizes, shape[0], 1)
        return _count(self._values, values_per_channel(shape), 1)

    def _count_repeats(self) -> None:
        if self._repeats and self._latest_shape is not None:
            _count(self._sizes, self._latest_shape[0], self._repeats)
            _count(self._values, values_per_channel(self._latest_shape), self._repeats)
            self.calls.outside += 0 if self.is_inside else self._repeats
            self._repeats = 0

    def count_call(self, step: int, forward: int) -> None:
        """Count a call in this step and this forward of the model."""
        if step != self.step:
            self.step, self.calls_now = step, 0
        if forward != self.forward:
            self.forward, self._calls_in_forward = forward, 0
        self.calls_now += 1
        self._calls_in_forward += 1
        self.calls.most_per_step = max(self.calls.most_per_step, self.calls_now)
        self.calls.most_per_forward = max(self.calls.most_per_forward, self._calls_in_forward)

    def count_frozen(self) -> None:
        """Count a call in training with running statistics."""
        self.calls.frozen += 1
        self.calls.frozen_after += self.calls.unfrozen_step is not None
        self._earlier_step = max(self._earlier_step, self.step)
        self.step = -1  # the next call with batch statistics does not repeat this one

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
        """Note a call in eval mode, which shows that earlier ones in the step are not a mistake."""
        self._step_in_eval_mode = step
        self.calls.is_in_eval_mode = True
        if not is_evaluating:
            self._frozen_step = step

    def is_held_in_eval_mode(self, step: int) -> bool:
        """Return whether training called the layer only in eval mode in this, the newest step."""
        return self._frozen_step >= step > max(self.step, self._earlier_step)


class _Member(NamedTuple):
    layer: BatchNormLayer
    hook: int
    record: ShapeRecord


class _Part:
    """Layers that are called together: while the first repeats itself, others need no hook."""

    def __init__(self) -> None:
        self.members: list[_Member] = []
        # Of the layer that is called first, while others rest; these, and their hooks.
        self.first: ShapeRecord | None = None
        self.resting: list[tuple[_Member, Callable[..., object]]] = []
        self._modules: list[nn.Module] = []
        self._repeated = 0

    def is_training(self) -> bool:
        """Return whether the modes of those that rest are as they were."""
        return all(map(_IS_TRAINING, self._modules))

    def rest(self, step: int) -> None:
        """Take the hooks off that saw nothing new for long, this step included."""
        steady = [
            member
            for member in self.members
            if member.record.repeated >= _STEPS_BEFORE_REST and member.record.step == step
        ]
        first = min(
            (member.record for member in self.members if member.record.position is not None),
            key=lambda record: record.position or 0,
            default=None,
        )
        if first is None or all(member.record is not first for member in steady):
            return
        self.first, self._repeated = first, first.repeated
        for member in steady:
            hooks = member.layer.module._forward_pre_hooks
            if member.record is not first and member.layer.has_modes and member.hook in hooks:
                self.resting.append((member, hooks.pop(member.hook)))
        self._modules = [member.layer.module for member, _ in self.resting]

    def wake(self) -> bool:
        """Put the hooks back; return whether any was away."""
        first, self.first = self.first, None
        resting, self.resting, self._modules = self.resting, [], []
        for member, hook in resting:
            assert first is not None
            member.record.repeat(first.repeated - self._repeated, first.step, first.forward)
            member.layer.module._forward_pre_hooks[member.hook] = hook
        return bool(resting)


def parts_of(
    model: nn.Module, layers: Iterable[BatchNormLayer]
) -> Iterator[tuple[BatchNormLayer, ...]]:
    """Yield the layers in each child of a model, and those that are its children, together.

    If one child holds all of them, it is that child that is divided.

    >>> from bnguard.layers.bn_layer import find_layers
    >>> inner = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.BatchNorm1d(2)))
    >>> model = nn.Sequential(nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)), inner)
    >>> [[layer.name for layer in part] for part in parts_of(model, find_layers(model))]
    [['0.0', '0.1'], ['1.0', '1.1.0']]
    """
    by_module = {layer.module: layer for layer in layers}
    whole, parts = model, [model]
    while len(parts) == 1:
        whole = parts[0]
        children = [child for child in whole.children() if child not in by_module]
        parts = [c for c in children if any(module in by_module for module in c.modules())]
        if any(child in by_module for child in whole.children()):
            break
    for part in [*parts, model]:
        found = [by_module.pop(module) for module in part.modules() if module in by_module]
        if found:
            yield tuple(found)


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
