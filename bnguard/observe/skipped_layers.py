"""Finds layers that evaluation leaves out, and measures what that changes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from bnguard.layers.bn_layer import BatchNormLayer, find_layers
from bnguard.layers.preserve import preserve_random_states
from bnguard.observe.hooks import Hooks
from bnguard.observe.layer_calls import ShapeRecord
from bnguard.observe.mode_gap import float_tensors, relative_change


class SkipProbe:
    """Finds modules that in eval mode call none of the layers inside them, and what that changes.

    Modules that an evaluation does not call, as an auxiliary head, leave out nothing; nor do blocks
    that compute what the layer would, as one that folds it into a convolution.

    Args:
        model: The model.
        layers: Its BN layers.
        records: Their calls so far, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[BatchNormLayer],
        records: Mapping[str, ShapeRecord],
    ) -> None:
        self.hooks = Hooks()
        names = {layer.module: layer.name for layer in layers}
        for parent in model.modules():
            own = [records[names[part]] for part in parent.children() if part in names]
            if own and all(map(_is_idle, own)):
                inside = [records[names[part]] for part in parent.modules() if part in names]
                self._watch(parent, own, inside)

    def _watch(
        self, parent: nn.Module, own: Sequence[ShapeRecord], inside: Sequence[ShapeRecord]
    ) -> None:
        inputs: Any = None
        is_measured = any(record.calls.left_out for record in own)

        def is_idle() -> bool:
            return not parent.training and all(map(_is_idle, inside))

        def keep(args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            nonlocal inputs
            # The forward may write to its inputs.
            inputs = None if is_measured or not is_idle() else _repeat_rows((args, kwargs), 1)

        def note(args: tuple[object, ...], output: object) -> None:
            nonlocal inputs, is_measured
            if not is_idle():
                return
            for record in own:
                record.calls.left_out += 1
            if not is_measured:
                is_measured, change = True, _change_with_layers(parent, inputs, output)
                inputs = None
                for record in own:
                    record.calls.change_left_out = change

        self.hooks.before(parent, keep, with_kwargs=True)
        self.hooks.after(parent, note)


def _change_with_layers(parent: nn.Module, inputs: Any, output: object) -> float | None:
    """Return how far the outputs of a module are from those with its layers called in eval mode.

    A row that was alone comes twice if the layers are left out for it in any mode. None if the
    layers cannot be called, or the outputs not be compared.
    """
    is_alone = all(len(leaf) == 1 for leaf in tree_leaves(inputs) if _has_rows(leaf))
    for times in (1, 2) if is_alone else (1,):
        try:
            with preserve_random_states(parent), torch.inference_mode(False), torch.enable_grad():
                expected = _run_with_layers(parent, *_repeat_rows(inputs, times))
        except Exception:
            return None
        if expected is not None:
            actual = list(float_tensors(output))
            expected = [tensor[: len(tensor) // times] for tensor in expected]
            if [tensor.shape for tensor in actual] != [tensor.shape for tensor in expected]:
                return None
            return relative_change(actual, expected)
    return None


def _run_with_layers(
    parent: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> list[Tensor] | None:
    """Run a copy of a module in train mode, but with its layers and all leaves in eval mode.

    Returns its outputs; None if it called none of the layers.
    """
    copied = copy.deepcopy(parent).train()
    called: list[nn.Module] = []
    layers = [layer.module for layer in find_layers(copied)]
    leaves = [module for module in copied.modules() if not next(module.children(), None)]
    for module in (*layers, *leaves):
        module.eval()
    for module in layers:
        module.register_forward_pre_hook(lambda module, args: called.append(module))
    outputs = list(float_tensors(copied(*args, **kwargs)))
    return [tensor.detach() for tensor in outputs] if called else None


def _repeat_rows(inputs: Any, times: int) -> Any:
    """Return a copy of inputs, each with its rows this many times, without a graph."""
    return tree_map(
        lambda leaf: torch.cat([leaf.detach()] * times) if _has_rows(leaf) else leaf, inputs
    )


def _has_rows(leaf: object) -> TypeGuard[Tensor]:
    if not isinstance(leaf, Tensor) or leaf.dim() == 0:
        return False
    return leaf.layout is torch.strided and not leaf.is_nested


def _is_idle(record: ShapeRecord) -> bool:
    """Return whether training calls the layer, and nothing ever called it in evaluation."""
    calls = record.calls
    is_called = calls.is_in_eval_mode or calls.in_evaluation or calls.without_grad
    return record.position is not None and not is_called
