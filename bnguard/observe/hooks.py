"""Forward hooks that leave no trace: in copies, under ``torch.compile``, or after close."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

Note = Callable[..., None]


class Hooks:
    """The forward hooks of one probe, which come off together.

    An error in a note does not end the forward that it is called from: it waits for
    :meth:`raise_error`, and nothing more is noted.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._before: list[tuple[nn.Module, _Hook, bool]] = []
        self._is_paused = False
        self._error: Exception | None = None

    def before(
        self,
        module: nn.Module,
        note: Note,
        *,
        with_kwargs: bool = False,
        prepend: bool = False,
    ) -> None:
        """Call ``note`` with the arguments of each forward of the module, before it."""
        hook = _Hook(self, note)
        handle = module.register_forward_pre_hook(hook, with_kwargs=with_kwargs, prepend=prepend)
        self._handles.append(handle)
        self._before.append((module, hook, with_kwargs))

    def catch_up(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        """Call the notes that were added in the midst of the hooks before a forward."""
        for own, hook, with_kwargs in tuple(self._before):
            if own is module:
                hook(module, args, kwargs) if with_kwargs else hook(module, args)

    def before_outermost(self, modules: Iterable[nn.Module], note: Note) -> None:
        """Call ``note`` with arguments and keywords of each forward that none of these calls.

        Lightning lets DDP call a module whose training step then calls the module again.
        """
        depth = 0

        def enter(args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            nonlocal depth
            depth += 1
            if depth == 1:
                note(args, kwargs)

        def leave(args: tuple[object, ...], output: object) -> None:
            nonlocal depth
            # Not below 0, where a hook of somebody else's raised before ours had counted.
            depth = max(0, depth - 1)

        for module in modules:
            self.before(module, enter, with_kwargs=True)
            self.after(module, leave)

    def after(self, module: nn.Module, note: Note) -> None:
        """Call ``note`` with arguments and output of each forward, also one that raised."""
        self._handles.append(module.register_forward_hook(_Hook(self, note), always_call=True))

    def after_loading(self, module: nn.Module, note: Note) -> None:
        """Call ``note`` after each ``load_state_dict`` that reaches the module."""
        hook = _Hook(self, note)
        handle = module.register_load_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]
        self._handles.append(handle)

    def raise_error(self) -> None:
        """Raise what a note has raised, if one has."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Take the hooks off; what is called all the same, by a forward under way, does nothing."""
        for handle in self._handles:
            handle.remove()
        for _, hook, _ in self._before:
            hook.is_removed = True
        self._handles.clear()
        self._before.clear()


@contextmanager
def paused(*probes: Hooks) -> Iterator[None]:
    """Note nothing inside: what runs there is not the user's training."""
    before = [hooks._is_paused for hooks in probes]
    for hooks in probes:
        hooks._is_paused = True
    try:
        yield
    finally:
        for hooks, was_paused in zip(probes, before, strict=True):
            hooks._is_paused = was_paused


class _Hook:
    """A hook that stays behind when its module is copied or pickled.

    A copy of a watched model (an averaged one, a checkpoint of the whole module) is not watched,
    and must not carry the monitor along.
    """

    def __init__(self, hooks: Hooks, note: Note) -> None:
        self._hooks = hooks
        self._note = note
        self.is_removed = False

    def __call__(self, module: nn.Module, *call: object) -> None:
        # Under torch.compile this is a constant: the hook leaves nothing in the graph.
        if torch.compiler.is_compiling() or self._hooks._is_paused:
            return
        if self._hooks._error is None and not self.is_removed:
            try:
                self._note(*call)
            except Exception as error:
                self._hooks._error = error

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _inert_hook, ()


def _inert_hook() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(module: nn.Module, *call: object) -> None:
    return None
