"""Notices the steps and the evaluations of a training loop that reports neither.

:class:`LoopProbe` notices steps and kinds of forwards, and :class:`NoticedEvaluations` which of
these forwards belong to one evaluation.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from bnguard.layers.bn_layer import BatchNormLayer, is_wrapper
from bnguard.observe.eval_statistics import drops_values
from bnguard.observe.hooks import Hooks
from bnguard.observe.observer import Observer

Arguments = tuple[object, ...]
Keywords = dict[str, object]

# Forwards of the model itself in training, after which single layers in it are not called alone.
_FORWARDS_OF_MODEL = 10


class _OptimizerSteps:
    """Counts the steps of all optimizers in the process, from the first probe on."""

    number = 0
    is_counting = False

    @classmethod
    def count(cls) -> None:
        if not cls.is_counting:
            cls.is_counting = True
            register_optimizer_step_post_hook(cls._note)

    @classmethod
    def _note(cls, *_: object) -> None:
        cls.number += 1


class LoopProbe:
    """Notices steps through the optimizers' hooks, and evaluations by the forwards of a model.

    A step ends when each optimizer that took part in the last one has stepped, or, without any
    step of an optimizer, when a forward follows gradients that were cleared: a gradient scaler
    skipped the step, or a closure is evaluated again. The first step is reported when the next
    forward begins: a loop that reports its steps itself has done so by then.

    An evaluation begins with a forward in eval mode without gradients, and ends with the next
    forward that has gradients, or that is in train mode where an earlier one was in eval mode: a
    teacher's, at the start of the next step. Others in train mode without gradients do neither.
    After steps in train mode, a forward of the model in eval mode with gradients begins one too, if
    no input requires them, as those of an attack do: ``torch.no_grad`` was left out.

    Args:
        model: The model, wrapped or not.
        layers: Its BN layers.
        optimizers: What trains it.
        on_step: Called after each step.
        on_evaluation: Called with module, arguments and keywords before each forward of an
                evaluation.
        on_training: Called before each forward with gradients, and where an evaluation has ended.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[BatchNormLayer],
        optimizers: Iterable[Optimizer],
        *,
        on_step: Callable[[], None],
        on_evaluation: Callable[[nn.Module, Arguments, Keywords], None],
        on_training: Callable[[], None],
    ) -> None:
        self.hooks = Hooks()
        self._model = model
        self._on_step = on_step
        self._on_evaluation = on_evaluation
        self._on_training = on_training
        self._optimizer_handles: list[RemovableHandle] = []
        self._last_participants: set[int] = set()
        self._participants: set[int] = set()
        self._parameter: Tensor | None = None
        self._has_gradients = False
        self._steps_at_gradients = 0
        # Unknown under torch.compile, where no hook sees a forward.
        self._has_trained: bool | None = None
        self._is_due = False
        self._is_confirmed = False
        self._forwards = 0
        self._evaluated: set[nn.Module] = set()
        self._has_trained_in_train_mode = False
        self._evaluates_with_gradients = False
        for optimizer in optimizers:
            self.follow(optimizer)
        if not self._optimizer_handles:
            return
        _OptimizerSteps.count()
        self._follow_gradients(layers)
        inner = next((part for part in model.modules() if not is_wrapper(part)), model)

        def note(args: Arguments, kwargs: Keywords) -> None:
            if children and torch.is_grad_enabled():
                self._forwards += 1
                if self._forwards == _FORWARDS_OF_MODEL:
                    for handle in children:
                        handle.remove()
            self._note_forward(not inner.training, model, args, kwargs)

        # Before what other probes note of the same forward.
        self.hooks.before(model, note, with_kwargs=True, prepend=True)
        children = []
        for layer in _first_of_each_part(inner, layers):
            handle = self._follow_layer(inner, layer)
            if layer.module in set(inner.children()):
                children.append(handle)

    @property
    def has_steps(self) -> bool:
        """Whether a step was noticed that nobody reported."""
        return self._is_confirmed or self._is_due

    def follow(self, optimizer: Optimizer) -> None:
        """Notice the steps of this optimizer as well."""
        # accelerate and Fabric wrap optimizers, and step what they wrap.
        optimizer = getattr(optimizer, "optimizer", optimizer)
        if not hasattr(optimizer, "register_step_post_hook"):
            return
        key = id(optimizer)
        self._last_participants.add(key)
        probe = weakref.ref(self)

        def note(*_: object) -> None:
            if (self := probe()) is not None:
                self._note_optimizer_step(key)

        self._optimizer_handles.append(optimizer.register_step_post_hook(note))

    def take_over(self) -> bool:
        """Leave the steps to the caller; return whether the newest was reported already."""
        is_counted = self._is_confirmed and not self._has_trained
        self._is_due = self._is_confirmed = False
        for handle in self._optimizer_handles:
            handle.remove()
        self._optimizer_handles.clear()
        return is_counted

    def flush(self) -> None:
        """Report the first step, if it waits for the next forward."""
        if self._is_due:
            self._is_due, self._is_confirmed = False, True
            self._on_step()

    def close(self) -> None:
        """Take the hooks off."""
        self.hooks.close()
        for handle in self._optimizer_handles:
            handle.remove()

    def _follow_gradients(self, layers: Iterable[BatchNormLayer]) -> None:
        """Note when a backward ends, by a parameter of the first BN layer that learns."""
        for parameter in (part for layer in layers for part in layer.affine if part.requires_grad):
            probe = weakref.ref(self)

            def note(parameter: Tensor, probe: weakref.ref[LoopProbe] = probe) -> None:
                if (self := probe()) is not None:
                    self._has_gradients = True
                    self._steps_at_gradients = _OptimizerSteps.number

            self._parameter = parameter
            handle = parameter.register_post_accumulate_grad_hook(note)  # type: ignore[no-untyped-call]
            self._optimizer_handles.append(handle)
            return

    def _follow_layer(self, model: nn.Module, layer: BatchNormLayer) -> RemovableHandle:
        """Notice forwards that call parts of the model, as an encoder and a decoder."""
        was_in_train_mode = False

        def note(args: Arguments, kwargs: Keywords) -> None:
            nonlocal was_in_train_mode
            was_in_train_mode = was_in_train_mode or layer.is_training
            is_in_eval_mode = not layer.is_training and (was_in_train_mode or not model.training)
            self._note_forward(is_in_eval_mode, layer.module, args, kwargs)

        return self.hooks.before(layer.module, note, with_kwargs=True, prepend=True)

    def _note_forward(
        self, is_in_eval_mode: bool, module: nn.Module, args: Arguments, kwargs: Keywords
    ) -> None:
        if torch.is_grad_enabled() and self._is_without_no_grad(is_in_eval_mode, module, args):
            self.flush()
            # A training that forgets train() begins like this: its step is counted.
            self._evaluates_with_gradients = self._has_trained = True
            if module is self._model:
                self._on_evaluation(module, args, kwargs)
        elif torch.is_grad_enabled():
            if module is self._model:
                self._has_trained_in_train_mode = not is_in_eval_mode
            self._evaluates_with_gradients = False
            self._end_evaluation()
            self.flush()
            if self._is_step_skipped():
                self._end_step()
            self._has_trained = True
        elif is_in_eval_mode:
            self.flush()
            self._evaluated.add(module)
            self._on_evaluation(module, args, kwargs)
        elif module in self._evaluated:
            self._end_evaluation()

    def _is_without_no_grad(
        self, is_in_eval_mode: bool, module: nn.Module, args: Arguments
    ) -> bool:
        """Return whether a forward with gradients belongs to an evaluation."""
        if not is_in_eval_mode:
            return False
        if module is not self._model:
            return self._evaluates_with_gradients
        return self._has_trained_in_train_mode and not any(
            isinstance(value, Tensor) and value.requires_grad for value in args
        )

    def _end_evaluation(self) -> None:
        self._evaluated.clear()
        self._on_training()

    def _is_step_skipped(self) -> bool:
        return (
            self._has_gradients
            and bool(self._optimizer_handles)
            and self._steps_at_gradients == _OptimizerSteps.number
            and self._parameter is not None
            and self._parameter.grad is None
        )

    def _note_optimizer_step(self, optimizer: int) -> None:
        if self._has_trained is False:
            return  # a second optimizer of the same step, or what wraps the first
        if optimizer in self._participants:
            self._last_participants = self._participants
        self._participants = self._participants | {optimizer}
        if self._participants >= self._last_participants:
            self._end_step()

    def _end_step(self) -> None:
        if self._evaluates_with_gradients:
            self._has_trained_in_train_mode = self._evaluates_with_gradients = False
        self._participants = set()
        self._has_gradients = False
        if self._has_trained:
            self._has_trained = False
        self.flush()
        if self._is_confirmed:
            self._on_step()
        else:
            self._is_due = True


class NoticedEvaluations:
    """Finds where evaluations that nobody reports begin and end.

    One goes on while weights and statistics stay the same. Early ones are all read, later ones only
    as often as the rules run: a loop that acts in eval mode between its steps must not become slow.

    Args:
        observer: Observes the model.
        every_n_steps: How often the rules run.
        watch: Watches an evaluation; yields whether it is read, or passed over to save time.

    Attributes:
        is_on: Whether evaluations are noticed.
        number: Evaluations noticed so far.
    """

    def __init__(
        self,
        observer: Observer,
        every_n_steps: int,
        watch: Callable[[], AbstractContextManager[bool]],
    ) -> None:
        self.is_on = True
        self.number = 0
        self._observer = observer
        self._every_n_steps = every_n_steps
        self._watch = watch
        # Of the current evaluation, whose state is None if there is none.
        self._state: tuple[object, object] | None = None
        self._is_read = False
        self._watched = ExitStack()
        self._steps_at_end = 0
        # The version of the weights in the newest evaluation.
        self._weights_at_start: object = None
        # Steps at the newest forward, and whether there was a step between it and the one before.
        self._steps_at_forward = 0
        self._is_acting = False

    def note_forward(self, module: nn.Module, args: Arguments, kwargs: Keywords) -> None:
        """Begin an evaluation with this forward, unless it belongs to one."""
        observer, steps = self._observer, self._observer.steps
        is_passing = self._state is not None and not self._is_read
        if not (self.is_on and steps) or is_passing:
            return
        if steps != self._steps_at_forward:
            self._is_acting = steps == self._steps_at_forward + 1
            self._steps_at_forward = steps
        state = observer.weights.state_now()
        if self._state is not None:
            if state == self._state:
                return
            self.end()
        is_recent = steps - self._steps_at_end < min(self.number, self._every_n_steps)
        # Averaged, pruned or loaded since, it is the evaluation of another network.
        is_other = steps == self._steps_at_end and state[0] != self._weights_at_start
        if (is_recent and not is_other) or self._is_dropping():
            return
        self.number += 1
        self._state, self._weights_at_start = state, state[0]
        self._is_read = self._watched.enter_context(self._watch())
        observer.catch_up(module, args, kwargs)

    def note_training(self) -> None:
        """End the evaluation: the loop trains again."""
        self._observer.weights.note_training()
        self.end()

    def end(self) -> None:
        """End the evaluation; drop it if only the statistics are others now, as recalibrated ones.

        Averaged weights may have been exchanged for it, and are gone. Fewer samples than a training
        batch, step after step, are not an evaluation: an agent acts.
        """
        state, self._state = self._state, None
        if state is None:
            return
        self._steps_at_end = self._observer.steps
        watched = self._watched.pop_all()
        is_acting = (
            self._is_acting and self._is_read and not self._observer.evaluations.has_read_a_batch()
        )
        weights, statistics = self._observer.weights.state_now()
        is_exchanged = weights != state[0]
        if is_acting or (statistics != state[1] and not is_exchanged):
            error = RuntimeError("this is not the evaluation of a trained network")
            watched.__exit__(type(error), error, None)
            return
        if is_exchanged:
            self._observer.evaluations.note_exchanged_weights()
        watched.close()

    def stop(self) -> None:
        """End the evaluation, and notice no other."""
        self.end()
        self.is_on = False

    def _is_dropping(self) -> bool:
        """Return whether dropout acts, as when several passes measure the uncertainty."""
        modules = self._observer.model.modules()
        return any(module.training for module in modules if drops_values(module))


def _first_of_each_part(
    model: nn.Module, layers: Iterable[BatchNormLayer]
) -> Iterator[BatchNormLayer]:
    """Yield the first BN layer of each child of the model."""
    by_module = {layer.module: layer for layer in layers}
    for child in model.children():
        first = next((module for module in child.modules() if module in by_module), None)
        if first is not None:
            yield by_module[first]
