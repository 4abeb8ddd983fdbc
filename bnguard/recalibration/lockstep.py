"""The exact statistics in one forward: every chunk pauses at each layer until all are there."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue

import torch
from torch import Tensor

from bnguard.layers.moments import Moments
from bnguard.layers.preserve import RandomStream
from bnguard.recalibration.batches import Batch
from bnguard.recalibration.layer_inputs import input_moments, on_host, read_inputs
from bnguard.recalibration.statistics import Job
from bnguard.recalibration.trial_forward import ForwardTraits, is_disturbed, observe

# The forward that runs in each thread.
_running = threading.local()


class ForwardCancelled(BaseException):
    """Raised in a paused forward to end it; no ``except Exception`` of a model stops it."""


class StuckError(Exception):
    """A forward neither pauses nor ends, or its thread cannot start."""


class IrregularError(Exception):
    """The chunks cannot go through the layers side by side."""


class DivergingError(IrregularError):
    """Batches call other layers than those they are joined to, so each has to run alone."""


class PausableForward:
    """A forward in a thread of its own, which pauses where it calls :meth:`stop`.

    Attributes:
        stream: Random numbers of its own.
        is_finished: Whether the forward has ended, also by an exception.
        error: The exception that ended it.
    """

    def __init__(
        self, forward: Callable[[], object], context: ThreadContext, stream: RandomStream
    ) -> None:
        self.stream = stream
        self.is_finished = False
        self.error: BaseException | None = None
        self._forward = forward
        self._context = context
        self._orders: SimpleQueue[SimpleQueue[PausableForward] | None] = SimpleQueue()
        self._stops: SimpleQueue[PausableForward] = SimpleQueue()
        self._thread = threading.Thread(
            target=contextvars.copy_context().run, args=(self._run,), daemon=True
        )

    @staticmethod
    def current() -> PausableForward | None:
        """Return the forward that runs in the current thread, if any."""
        return getattr(_running, "forward", None)

    def resume(self, stops: SimpleQueue[PausableForward]) -> None:
        """Let the forward continue; it puts itself into ``stops`` when it pauses or ends.

        Raises:
            StuckError: The thread cannot start.
        """
        if self._thread.ident is None:
            try:
                self._thread.start()
            except RuntimeError as error:
                raise StuckError(str(error)) from error
        self._orders.put(stops)

    def stop(self) -> None:
        """Pause, in the forward's own thread, until it is resumed."""
        self._stops.put(self)
        self._await_order()

    def cancel(self) -> None:
        """End the forward where it is paused, or at its next stop."""
        self._orders.put(None)

    def join(self) -> None:
        """Wait until the forward has ended."""
        if self._thread.ident is not None:
            self._thread.join()

    def _await_order(self) -> None:
        stops = self._orders.get()
        if stops is None:
            raise ForwardCancelled
        self._stops = stops

    def _run(self) -> None:
        _running.forward = self
        try:
            self._await_order()
            with self._context.enter():
                self._forward()
        except ForwardCancelled:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.is_finished = True
            self._stops.put(self)


def advance(forwards: Sequence[PausableForward], width: int, timeout: float) -> None:
    """Let every forward continue to its next stop or its end, ``width`` at a time.

    One at a time, each draws its own random numbers.

    Raises:
        StuckError: No running forward stops within the timeout, in seconds.
    """
    stops: SimpleQueue[PausableForward] = SimpleQueue()
    if width == 1:
        for paused in forwards:
            with paused.stream.in_use():
                paused.resume(stops)
                _await_stop(stops, timeout)
        return
    for count, paused in enumerate(forwards):
        if count >= width:
            _await_stop(stops, timeout)
        paused.resume(stops)
    for _ in forwards[:width]:
        _await_stop(stops, timeout)


def _await_stop(stops: SimpleQueue[PausableForward], timeout: float) -> None:
    try:
        stops.get(timeout=timeout)
    except Empty:
        raise StuckError(f"a forward did not reach its next layer in {timeout:.0f} s") from None


class ThreadContext:
    """PyTorch's settings of the thread that constructs this, for use in another thread.

    Args:
        threads: Number of threads that an operation may use there.
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
    def enter(self) -> Iterator[None]:
        """Use the settings in the current thread, without gradients."""
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


# Samples of a chunk that run again alone.
_WITNESSES = 2
# A forward that takes longer waits for a lock, say, that a paused one holds.
_TIMEOUT_SECONDS = 10.0
_TIMEOUT_FORWARDS = 5


def lockstep(
    job: Job, chunks: Sequence[Batch], traits: ForwardTraits | None, samples: int
) -> dict[int, tuple[Moments, ...]]:
    """Set the statistics of each layer reached; return its inputs on all ranks, by its index.

    In the end some samples run again alone: if their inputs differ then, the chunks disturbed one
    another, as in a model that stores features on itself.

    ``chunks`` and ``traits`` are those of this rank, which may have no data; ``samples`` counts all
    ranks.

    Raises:
        IrregularError: On every rank, if the chunks of one cannot run side by side.
        NonFiniteError: On every rank, if there is NaN or Inf in the inputs of one.
        CalibrationError: A layer cannot have the statistics.
    """
    forwards = _Forwards(job, chunks, traits)
    parts: dict[int, tuple[Moments, ...]] = {}
    try:
        with read_inputs(job.layers, forwards.on_input):
            while (
                index := _find_common_layer(positions := job.ranks.together(forwards.advance))
            ) is not None:
                if index in parts:
                    raise IrregularError(f"{job.layers[index].name} is called several times")
                parts[index] = job.set_statistics(
                    index, [position.inputs for position in positions], samples
                )
                forwards.mark_done(index)
    finally:
        forwards.end()
    compared = job.ranks.together(forwards.compare_with_witness)
    if any(is_parted for _, is_parted in compared):
        raise DivergingError("samples call other layers when they are joined to others")
    if any(is_disturbed for is_disturbed, _ in compared):
        raise IrregularError("forwards that run side by side disturb one another")
    return parts


@dataclass(frozen=True, eq=False)
class _Positions:
    """Where the forwards of a rank are paused.

    Attributes:
        layers: Indices of the layers.
        inputs: Moments of the inputs there, by the number of the chunk.
        has_ended: Whether a forward has ended.
        trouble: Why they cannot run side by side; None if they can.
    """

    layers: frozenset[int]
    inputs: dict[int, Moments]
    has_ended: bool
    trouble: str | None


def _find_common_layer(positions: Sequence[_Positions]) -> int | None:
    """Return the layer where the forwards of all ranks are paused; None if all have ended."""
    for position in positions:
        if position.trouble is not None:
            raise IrregularError(position.trouble)
    layers = frozenset[int]().union(*(position.layers for position in positions))
    if len(layers) > 1 or (layers and any(position.has_ended for position in positions)):
        raise DivergingError("batches call the layers in different order, or not the same ones")
    return next(iter(layers), None)


class _Forwards:
    """The forwards of this rank's chunks."""

    def __init__(self, job: Job, chunks: Sequence[Batch], traits: ForwardTraits | None) -> None:
        self._job = job
        self._chunks = chunks
        self._done: list[int] = []
        self._witness = _choose_witness(chunks, traits)
        self._met_by_witness: dict[int, Moments] = {}
        self._trouble: str | None = None
        seconds = 0.0 if traits is None else traits.seconds_per_sample
        largest = max((chunk.size for chunk in chunks), default=0)
        self._timeout = _TIMEOUT_SECONDS + _TIMEOUT_FORWARDS * largest * seconds

        self._threads = torch.get_num_threads()
        can_run_at_once = traits is not None and traits.is_stateless and job.device.type == "cpu"
        self._width = max(1, min(self._threads, len(chunks))) if can_run_at_once else 1
        context = ThreadContext(self._threads // self._width)
        self._forwards = [
            PausableForward(partial(job.run, chunk), context, RandomStream(chunk.index, job.device))
            for chunk in chunks
        ]
        self._reached: dict[PausableForward, tuple[int, Moments]] = {}

    def on_input(self, index: int, values: Tensor) -> None:
        """Read the inputs of a layer, and pause there."""
        paused = PausableForward.current()
        if paused is None:
            self._trouble = "the model calls BN layers in threads of its own"
            return
        self._reached[paused] = (index, input_moments(values))
        if self._witness is not None and paused is self._forwards[0]:
            share = len(values) * self._witness.size // self._chunks[0].size
            self._met_by_witness[index] = input_moments(values[:share])
        self._job.progress.advance(len(values))
        paused.stop()

    def advance(self) -> _Positions:
        """Let every forward continue to its next layer, or its end."""
        self._reached.clear()
        going = [paused for paused in self._forwards if not paused.is_finished]
        try:
            advance(going, self._width, self._timeout)
        except StuckError as error:
            self._trouble = str(error)
        if any(paused.error is not None for paused in going):
            self._trouble = "a forward fails next to others"
        return _Positions(
            layers=frozenset(index for index, _ in self._reached.values()),
            inputs={
                number: on_host(self._reached[paused][1])
                for number, paused in enumerate(self._forwards)
                if paused in self._reached
            },
            has_ended=any(paused.is_finished for paused in self._forwards),
            trouble=self._trouble,
        )

    def mark_done(self, index: int) -> None:
        """Note that a layer has its statistics; the forwards end after the last one."""
        self._done.append(index)
        if len(self._done) == len(self._job.layers):
            self.end()

    def end(self) -> None:
        """End every forward where it is paused."""
        for paused in self._forwards:
            paused.cancel()
        # Only after all were cancelled, since one may wait for what another holds.
        for paused in self._forwards:
            paused.join()
        if self._width > 1:
            torch.set_num_threads(self._threads)

    def compare_with_witness(self) -> tuple[bool, bool]:
        """Run a few samples again, alone and joined to others.

        Returns:
            Whether the other chunks changed their inputs; if so, whether joining them does too.
        """
        if self._witness is None:
            return False, False
        job, chunk = self._job, self._chunks[0]
        alone = observe(job, self._witness)
        if not is_disturbed(job, alone, tuple(self._done), self._met_by_witness):
            return False, False
        share = self._witness.size / chunk.size
        joined = observe(job, chunk, lambda values: values[: round(len(values) * share)])
        return True, is_disturbed(job, alone, joined.calls, joined.moments)


def _choose_witness(chunks: Sequence[Batch], traits: ForwardTraits | None) -> Batch | None:
    """Return the first samples, or the first chunk if it must stay whole; None for a sole chunk."""
    if traits is None or len(chunks) < 2:
        return None
    return chunks[0].rows(0, _WITNESSES) if traits.takes_rows else chunks[0]
