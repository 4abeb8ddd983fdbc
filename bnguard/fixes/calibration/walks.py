"""Parts of a calibration set on their way through a model, each in a thread that can be stopped.

Exactly one thread runs at a time: the one that drives the chunks, or one of theirs.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from contextlib import ExitStack
from queue import SimpleQueue

import torch


class Abandoned(BaseException):
    """Raised where a chunk stands still, to end it; no ``except Exception`` of a model stops it."""


class Chunk:
    """A part of the calibration set on its way through the model.

    :meth:`advance` is called by the driver and returns when the chunk stopped; :meth:`stop` is
    called in the chunk's own thread, from wherever in the forward it is.
    """

    def __init__(self, forward: Callable[[], object], surroundings: Surroundings) -> None:
        self._forward = forward
        self._surroundings = surroundings
        self._error: BaseException | None = None
        # Whether to go on; that the chunk stands.
        self._orders: SimpleQueue[bool] = SimpleQueue()
        self._stops: SimpleQueue[None] = SimpleQueue()
        self._thread = threading.Thread(
            target=contextvars.copy_context().run, args=(self._run,), daemon=True
        )
        self.is_finished = False

    def is_current(self) -> bool:
        """Return whether this is the chunk's own thread, not one that the model started."""
        return threading.current_thread() is self._thread

    def advance(self) -> None:
        """Let the chunk run until it stops or ends; raise what its forward raised."""
        if self._thread.ident is None:
            self._thread.start()
        self._orders.put(True)
        self._stops.get()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Stand still until the driver advances the chunk."""
        self._stops.put(None)
        if not self._orders.get():
            raise Abandoned

    def abandon(self) -> None:
        """End the chunk where it stands, or at its next stop, and wait for that."""
        if self._thread.ident is not None:
            self._orders.put(False)
            self._thread.join()

    def _run(self) -> None:
        try:
            if self._orders.get():
                with self._surroundings.entered():
                    self._forward()
        except Abandoned:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.is_finished = True
            self._stops.put(None)


class Surroundings:
    """What PyTorch keeps a thread: captured in the thread that makes this, entered in another."""

    def __init__(self) -> None:
        self._is_inference = torch.is_inference_mode_enabled()
        self._default_device = torch.get_default_device()
        self._stream = (
            torch.cuda.current_stream()
            if torch.cuda.is_available() and torch.cuda.is_initialized()
            else None
        )
        self._autocast = [
            (device, torch.get_autocast_dtype(device))
            for device in ("cpu", "cuda")
            if torch.is_autocast_enabled(device)
        ]

    def entered(self) -> ExitStack:
        """Return the captured surroundings, entered; gradients are off in any case."""
        with ExitStack() as stack:
            if self._is_inference:
                stack.enter_context(torch.inference_mode())
            stack.enter_context(torch.no_grad())
            if self._default_device.type != "cpu":
                stack.enter_context(self._default_device)
            if self._stream is not None:
                stack.enter_context(torch.cuda.stream(self._stream))
            for device, dtype in self._autocast:
                stack.enter_context(torch.autocast(device, dtype=dtype))
            return stack.pop_all()
