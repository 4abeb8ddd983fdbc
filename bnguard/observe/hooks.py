"""Forward hooks that leave no trace in copies, under ``torch.compile``, or after closing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from bnguard.observe.budget import own_time

Note = Callable[..., None]

_CALL = nn.Module._call_impl.__code__


class Hooks:
    """The hooks of one probe, removed together.

    An error in a note does not end the user's forward: :meth:`raise_error` raises it later, and the
    notes stop.

    Attributes:
        errors: Errors in notes so far, in this process.
    """

    errors = 0

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._before: list[tuple[nn.Module, _Hook, bool]] = []
        self._is_paused = False
        self._error: Exception | None = None

    def before(
        self, module: nn.Module, note: Note, *, with_kwargs: bool = False, prepend: bool = False
    ) -> RemovableHandle:
        """Call ``note`` with the arguments before each forward of the module."""
        hook = _Hook(self, note)
        handle = module.register_forward_pre_hook(hook, with_kwargs=with_kwargs, prepend=prepend)
        self._handles.append(handle)
        self._before.append((module, hook, with_kwargs))
        return handle

    def catch_up(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        """Call the notes that were added while the hooks before a forward ran."""
        for own, hook, with_kwargs in tuple(self._before):
            if own is module:
                hook(module, args, kwargs) if with_kwargs else hook(module, args)

    def before_outermost(self, modules: Iterable[nn.Module], note: Note) -> None:
        """Call ``note`` with arguments and keywords of each call from outside these modules.

        In Lightning, DDP calls a module whose training step calls the module again.
        """
        depth = 0
        outermost: nn.Module | None = None

        def watch(module: nn.Module) -> None:
            def enter(args: tuple[object, ...], kwargs: dict[str, object]) -> None:
                nonlocal depth, outermost
                # After KeyboardInterrupt, torch does not call the hooks that should have left.
                if outermost is module and not _calls_itself(module):
                    depth = 0
                depth += 1
                if depth == 1:
                    outermost = module
                    note(args, kwargs)

            self.before(module, enter, with_kwargs=True)
            self.after(module, leave)

        def leave(args: tuple[object, ...], output: object) -> None:
            nonlocal depth, outermost
            # Not below 0: another hook may have raised before ours could count.
            depth = max(0, depth - 1)
            outermost = outermost if depth else None

        for module in modules:
            watch(module)

    def after(self, module: nn.Module, note: Note) -> RemovableHandle:
        """Call ``note`` with arguments and output after each forward, even if it raised."""
        self._handles.append(module.register_forward_hook(_Hook(self, note), always_call=True))
        return self._handles[-1]

    def after_loading(self, module: nn.Module, note: Note) -> None:
        """Call ``note`` after each ``load_state_dict`` that reaches the module."""
        hook = _Hook(self, note)
        handle = module.register_load_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]
        self._handles.append(handle)

    def raise_error(self) -> None:
        """Raise the error of a note, if there was one."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Remove the hooks; those that a current forward still calls do nothing."""
        for handle in self._handles:
            handle.remove()
        for _, hook, _ in self._before:
            hook.is_removed = True
        self._handles.clear()
        self._before.clear()


@contextmanager
def pause_hooks(*probes: Hooks) -> Iterator[None]:
    """Pause hooks while something other than the user's training runs."""
    before = [hooks._is_paused for hooks in probes]
    for hooks in probes:
        hooks._is_paused = True
    try:
        yield
    finally:
        for hooks, was_paused in zip(probes, before, strict=True):
            hooks._is_paused = was_paused


def _calls_itself(module: nn.Module) -> bool:
    """Return whether the current call of a module comes from another call of it."""
    frame: FrameType | None = sys._getframe(1)
    calls = 0
    while frame is not None and calls < 2:
        calls += frame.f_code is _CALL and frame.f_locals["self"] is module
        frame = frame.f_back
    return calls > 1


class _Hook:
    """A hook that is inert in a copied or pickled module: copies are not watched."""

    def __init__(self, hooks: Hooks, note: Note) -> None:
        self._hooks = hooks
        self._note = note
        self.is_removed = False

    def __call__(self, module: nn.Module, *call: object) -> None:
        # A constant under torch.compile: the hook adds nothing to the graph.
        if torch.compiler.is_compiling() or self._hooks._is_paused:
            return
        if self._hooks._error is None and not self.is_removed:
            try:
                with own_time:
                    self._note(*call)
            except Exception as error:
                self._hooks._error = error
                Hooks.errors += 1

    def __reduce__(self) -> tuple[object, ...]:
        return partial, (_do_nothing,)


def _do_nothing(module: nn.Module, *call: object) -> None:
    return None
