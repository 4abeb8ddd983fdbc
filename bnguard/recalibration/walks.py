"""Batches on their way through a model, each in a thread that stops where it is told to.

So one forward can stand still at a layer while the others come up to it.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from queue import Empty, SimpleQueue

import torch

from bnguard.layers.randomness import RandomStream

_here = threading.local()


class Abandoned(BaseException):
    """Raised where a walk stands, to end it; no ``except Exception`` of a model stops it."""


class StuckError(Exception):
    """A walk neither stops nor ends, or cannot begin."""


class Walk:
    """A batch on its way through a model.

    Attributes:
        stream: Random numbers of its own.
        is_finished: Whether the forward has ended, also by an exception.
        error: The exception that ended it.
    """

    def __init__(
        self, forward: Callable[[], object], surroundings: Surroundings, stream: RandomStream
    ) -> None:
        self.stream = stream
        self.is_finished = False
        self.error: BaseException | None = None
        self._forward = forward
        self._surroundings = surroundings
        self._orders: SimpleQueue[SimpleQueue[Walk] | None] = SimpleQueue()
        self._stops: SimpleQueue[Walk] = SimpleQueue()
        self._thread = threading.Thread(
            target=contextvars.copy_context().run, args=(self._run,), daemon=True
        )

    @staticmethod
    def here() -> Walk | None:
        """Return the walk in whose own thread this is called, None in any other thread."""
        return getattr(_here, "walk", None)

    def resume(self, stops: SimpleQueue[Walk]) -> None:
        """Let the walk go on; it puts itself into ``stops`` when it stands or ends.

        Raises:
            StuckError: There can be no more threads.
        """
        if self._thread.ident is None:
            try:
                self._thread.start()
            except RuntimeError as error:
                raise StuckError(str(error)) from error
        self._orders.put(stops)

    def stop(self) -> None:
        """Stand still, in the walk's own thread, until it is resumed."""
        self._stops.put(self)
        self._await_order()

    def abandon(self) -> None:
        """End the walk where it stands, or at its next stop."""
        self._orders.put(None)

    def join(self) -> None:
        """Wait until the walk has ended."""
        if self._thread.ident is not None:
            self._thread.join()

    def _await_order(self) -> None:
        stops = self._orders.get()
        if stops is None:
            raise Abandoned
        self._stops = stops

    def _run(self) -> None:
        _here.walk = self
        try:
            self._await_order()
            with self._surroundings.entered():
                self._forward()
        except Abandoned:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.is_finished = True
            self._stops.put(self)


def advance_at_once(walks: Sequence[Walk], width: int, patience: float) -> None:
    """Let every walk go on to its next stop or its end, ``width`` at a time.

    Raises:
        StuckError: For so many seconds, none of those that run stops.
    """
    stops: SimpleQueue[Walk] = SimpleQueue()
    for count, walk in enumerate(walks):
        if count >= width:
            _await_stop(stops, patience)
        walk.resume(stops)
    for _ in walks[:width]:
        _await_stop(stops, patience)


def advance_in_turn(walks: Sequence[Walk], patience: float) -> None:
    """Let every walk go on to its next stop or its end, one by one, each on its random numbers.

    Raises:
        StuckError: A walk does not stop for so many seconds.
    """
    stops: SimpleQueue[Walk] = SimpleQueue()
    for walk in walks:
        with walk.stream.drawn_from():
            walk.resume(stops)
            _await_stop(stops, patience)


def _await_stop(stops: SimpleQueue[Walk], patience: float) -> None:
    try:
        stops.get(timeout=patience)
    except Empty:
        raise StuckError(f"a forward has not come to its next layer in {patience:.0f} s") from None


class Surroundings:
    """What PyTorch keeps a thread: captured where this is made, entered in another thread.

    Args:
        threads: How many threads an operation may use there.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._is_inference = torch.is_inference_mode_enabled()
        self._default_device = torch.get_default_device()
        has_stream = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._stream = torch.cuda.current_stream() if has_stream else None
        self._autocast = [
            (device, torch.get_autocast_dtype(device))
            for device in ("cpu", "cuda")
            if torch.is_autocast_enabled(device)
        ]

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Enter the surroundings; gradients are off in any case."""
        with ExitStack() as stack:
            if self._threads != torch.get_num_threads():
                torch.set_num_threads(self._threads)
            if self._is_inference:
                stack.enter_context(torch.inference_mode())
            stack.enter_context(torch.no_grad())
            if self._default_device.type != "cpu":
                stack.enter_context(self._default_device)
            if self._stream is not None:
                stack.enter_context(torch.cuda.stream(self._stream))
            for device, dtype in self._autocast:
                stack.enter_context(torch.autocast(device, dtype=dtype))
            yield
