"""Modules that normalise over the batch in training and are not known as BN layers.

Two signs give them away: a call of ``batch_norm`` from outside a known layer, in the first forward
of each part of the model; and a module that averages the means of its inputs.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from bnguard.layers.bn_layer import BatchNormLayer, adapter_of
from bnguard.layers.moments import channel_moments, wide
from bnguard.layers.names import without_wrappers
from bnguard.observe.hooks import Hooks
from bnguard.observe.windows import UnknownLayer

_OWN_FILES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
_EPS_NAMES = ("eps", "epsilon")
# Part of the change of a running mean that its weight may leave unexplained.
_MAX_MISFIT = 0.02
# First calls of a module that are checked; then each that doubles their number, at no cost.
_FIRST_CALLS = 4


class UnknownProbe:
    """Finds modules of a model that normalise over the batch without being known."""

    def __init__(self, model: nn.Module, layers: Iterable[BatchNormLayer]) -> None:
        self.hooks = Hooks()
        self._known = {id(layer.module) for layer in layers}
        self._names = {id(module): name for name, module in model.named_modules()}
        self._found: dict[tuple[str, str], UnknownLayer] = {}
        self._spying = ExitStack()
        self._is_looking = False
        for module in model.modules():
            names = _statistics_of(module)
            if names is not None and id(module) not in self._known and not adapter_of(type(module)):
                self._watch_statistics(module, *names)
        if not any(map(_is_compiled, model.modules())):
            self._spy_on([model, *model.children()])

    def found(self) -> tuple[UnknownLayer, ...]:
        """Return what was found so far, each place once."""
        return tuple(self._found.values())

    def end_look(self) -> None:
        """Stop watching calls; after KeyboardInterrupt, torch does not call the hook that does."""
        self._spying.close()
        self._is_looking = False

    def _note(self, module: nn.Module, place: str, registration: str) -> None:
        name = without_wrappers(self._names.get(id(module), ""))
        kind = type(module).__name__
        self._found.setdefault((kind, place), UnknownLayer(name, kind, place, registration))

    def _watch_statistics(self, module: nn.Module, mean: str, var: str) -> None:
        """Check in some calls whether the mean of the inputs enters the mean that is kept."""
        calls = itertools.count(1)
        before: tuple[Tensor, Tensor] | None = None

        def begin(args: tuple[object, ...]) -> None:
            nonlocal before
            before = None
            number = next(calls)
            if number > _FIRST_CALLS and number.bit_count() > 1:
                return
            values, old = args[0] if args else None, getattr(module, mean)
            if not (isinstance(values, Tensor) and values.dim() >= 2 and len(values) > 1):
                return
            if values.shape[1] == old.numel() and torch.is_grad_enabled():
                before = channel_moments(values).mean, wide(old.detach().clone()).view(-1)

        def end(args: tuple[object, ...], output: object) -> None:
            if before is None:
                return
            weight = _weight_of(*before, wide(getattr(module, mean).detach()).view(-1))
            if weight is not None:
                for handle in handles:
                    handle.remove()
                # This says more than the calls of batch_norm that the module may make.
                kind = type(module).__name__
                self._found = {key: value for key, value in self._found.items() if key[0] != kind}
                code = type(module).forward.__code__
                place = f"{Path(code.co_filename).name}:{code.co_firstlineno}"
                self._note(module, place, _registration(module, mean, var, weight))

        handles = (self.hooks.before(module, begin), self.hooks.after(module, end))

    def _spy_on(self, parts: Iterable[nn.Module]) -> None:
        """Watch the calls of ``batch_norm`` in the first training forward of each part."""
        for part in parts:
            handles: list[RemovableHandle] = []
            handles.append(self.hooks.before(part, partial(self._look, part, handles)))

    def _look(self, part: nn.Module, own: list[RemovableHandle], args: tuple[object, ...]) -> None:
        if not (part.training and torch.is_grad_enabled()):
            return
        own[0].remove()
        if not self._is_looking:
            self._is_looking = True
            self._spying.enter_context(_Spy(self._note_call))
            # Not one of the probe's hooks, which may be paused or removed before the forward ends.
            handle = part.register_forward_hook(lambda *_: self.end_look(), always_call=True)
            self._spying.callback(handle.remove)

    def _note_call(self, running_mean: Tensor | None, running_var: Tensor | None) -> None:
        """Note a call of ``batch_norm`` that normalises over the batch, and its caller."""
        made: nn.Module | None = None
        for frame in _frames():
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and id(owner) in self._known:
                return
            if isinstance(owner, nn.Module) and id(owner) not in self._names:
                made = owner
            if not frame.f_code.co_filename.startswith(_OWN_FILES):
                break
        else:
            return
        owners = (frame.f_locals.get("self") for frame in _frames())
        for inside in owners:
            if isinstance(inside, nn.Module) and id(inside) in self._names:
                place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                self._note(inside, place, _advice(inside, made, running_mean, running_var))
                return


class _Spy(TorchFunctionMode):
    """Calls a function with the running statistics of each ``batch_norm`` that uses the batch."""

    def __init__(self, note: Callable[[Tensor | None, Tensor | None], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm or func is torch.batch_norm:
            # The two take their arguments in a different order.
            mean, var = args[1:3] if func is F.batch_norm else args[3:5]
            if kwargs.get("training", len(args) > 5 and args[5]):
                self._note(mean, var)
        return func(*args, **kwargs)


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    held = {**vars(module), **module._buffers, **module._parameters}
    return {
        name: value
        for name, value in held.items()
        if isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad
    }


def _statistics_of(module: nn.Module) -> tuple[str, str] | None:
    """Return the names of a mean and a variance of the same size that a module keeps."""
    tensors = {name: value for name, value in _tensors(module).items() if not is_lazy(value)}
    pairs = (
        (mean, var)
        for mean in tensors
        for var in tensors
        if "mean" in mean and "var" in var and tensors[mean].numel() == tensors[var].numel()
    )
    return next(pairs, None)


def _weight_of(batch: Tensor, old: Tensor, new: Tensor) -> float | None:
    """Return the weight with which a batch entered a running mean; None if it did not."""
    step, change = batch - old, new - old
    size = step.square().sum()
    if not change.any() or not size > 0.0:
        return None
    weight = (step * change).sum() / size
    misfit = (change - weight * step).norm() / change.norm()
    is_average = 0.0 < weight <= 1.0 + _MAX_MISFIT and misfit < _MAX_MISFIT
    return float(weight) if is_average else None


def _registration(module: nn.Module, mean: str, var: str, weight: float) -> str:
    """Return the call that registers the class of a module, as far as one batch shows it."""
    parts = [type(module).__name__, f'mean="{mean}"', f'var="{var}"']
    numbers = {name: value for name, value in vars(module).items() if isinstance(value, float)}
    for name, value in numbers.items():
        if name in _EPS_NAMES:
            continue
        if abs(value - weight) < _MAX_MISFIT * weight:
            parts.append(f'momentum="{name}"')
            break
        if abs(1.0 - value - weight) < _MAX_MISFIT * weight:
            parts += [f'momentum="{name}"', "is_momentum_of_old=True"]
            break
    else:
        parts.append(f"momentum={weight:.3g}")
    eps = next((name for name in _EPS_NAMES if name in numbers), None)
    parts.append("eps=1e-5" if eps is None else f'eps="{eps}"')
    if "is_grad_enabled" in _names_used(type(module).forward):
        parts.append("is_training=lambda module: torch.is_grad_enabled()")
    return f"bnguard.register_layer({', '.join(parts)})"


def _names_used(function: Any) -> set[str]:
    """Return the names that a function uses, and those of the functions that it calls by name."""
    names = set(function.__code__.co_names)
    called = (function.__globals__.get(name) for name in tuple(names))
    for callee in called:
        names.update(getattr(getattr(callee, "__code__", None), "co_names", ()))
    return names


def _advice(
    inside: nn.Module, made: nn.Module | None, mean: Tensor | None, var: Tensor | None
) -> str:
    """Return how to make a call of ``batch_norm`` visible."""
    if made is not None:
        return f"make the {type(made).__name__} in __init__: one made in forward does not learn"
    names = {id(value): name for name, value in _tensors(inside).items()}
    if mean is None or id(mean) not in names or id(var) not in names:
        return "call a torch.nn.BatchNorm module in place of F.batch_norm"
    return (
        f'bnguard.register_layer({type(inside).__name__}, mean="{names[id(mean)]}", '
        f'var="{names[id(var)]}") if it only normalises'
    )
