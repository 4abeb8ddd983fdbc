"""The exact statistics in one forward: each layer gets its statistics when its inputs are known.

One chunk runs in the caller's thread. Several run in a thread each, and pause at each layer until
all are there.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue

import torch
from torch import Tensor

from bnguard.errors import CalibrationError
from bnguard.layers.moments import Moments
from bnguard.layers.preserve import RandomStream, draw_from_seed
from bnguard.recalibration.batches import Batch, call
from bnguard.recalibration.statistics import ForwardCancelled, Job, input_moments, read_inputs
from bnguard.recalibration.trial_forward import ForwardTraits, Witness

# The forward that runs in each thread.
_running = threading.local()


class StuckError(Exception):
    """A forward neither pauses nor ends, or its thread cannot start."""


class IrregularError(Exception):
    """The chunks cannot go through the layers side by side."""


class PausableForward:
    """A forward in a thread of its own, which pauses where it calls :meth:`stop`.

    Attributes:
        stream: Random numbers of its own; None if it draws none.
        is_finished: Whether the forward has ended, also by an exception.
        error: The exception that ended it.
    """

    def __init__(
        self, forward: Callable[[], object], context: ThreadContext, stream: RandomStream | None
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
            with paused.stream.in_use() if paused.stream else nullcontext():
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


# A forward that takes longer waits for a lock, say, that a paused one holds.
_TIMEOUT_SECONDS = 10.0
_TIMEOUT_FORWARDS = 5


def lockstep(
    job: Job,
    chunks: Sequence[Batch],
    witness: Witness | None,
    traits: ForwardTraits | None,
    samples: int,
) -> dict[int, tuple[Moments, ...]]:
    """Set the statistics of each layer reached; return its inputs on all ranks, by its index.

    In the end the witness runs alone, since a model that stores features on itself, say, mixes up
    forwards.

    ``chunks``, ``witness`` and ``traits`` are those of this rank, which may have no data;
    ``samples`` counts all ranks.

    Raises:
        IrregularError: On every rank, if the chunks of one cannot run this way.
        NonFiniteError: On every rank, if there is NaN or Inf in the inputs of one.
        CalibrationError: A layer cannot have the statistics.
    """
    layers = _Layers(job, witness, samples)
    if len(chunks) == 1:
        _run_in_place(job, chunks[0], layers)
    else:
        _run_in_threads(job, chunks, traits, layers)
    if any(job.ranks.together(layers.were_disturbed)):
        raise IrregularError("samples that run together influence each other")
    return layers.parts


@dataclass(frozen=True, eq=False)
class _Position:
    """Where the forwards of a rank are.

    Attributes:
        layers: Indices of the layers that they are about to run.
        inputs: Moments of the inputs there, in parts.
        has_ended: Whether a forward has ended.
        trouble: Why they cannot go on; None if they can.
    """

    layers: frozenset[int] = frozenset()
    inputs: tuple[Moments, ...] = ()
    has_ended: bool = False
    trouble: str | None = None


class _Layers:
    """Gives layers their statistics, one after the other and in step with the other ranks.

    Attributes:
        parts: Moments of the inputs of each layer so far, on all ranks.
    """

    def __init__(self, job: Job, witness: Witness | None, samples: int) -> None:
        self.parts: dict[int, tuple[Moments, ...]] = {}
        self._job = job
        self._samples = samples
        self._witness = witness
        self._met_by_witness: dict[int, Moments] = {}

    def read(self, index: int, values: Tensor, is_first: bool) -> tuple[Moments, ...]:
        """Return the moments of the inputs of a layer in a chunk, the first one or another."""
        if is_first and self._witness is not None:
            self._met_by_witness[index] = input_moments(self._witness.rows(values))
        self._job.progress.advance(len(values))
        return self._job.read_moments(values)

    def settle(self, advance: Callable[[], _Position]) -> bool:
        """Let the forwards advance and set the statistics where they are; return if any are left.

        Raises:
            IrregularError: They are not all at the same layer.
        """
        positions = self._job.ranks.together(advance)
        for position in positions:
            if position.trouble is not None:
                raise IrregularError(position.trouble)
        layers = frozenset[int]().union(*(position.layers for position in positions))
        if not layers:
            return False
        if len(layers) > 1 or any(position.has_ended for position in positions):
            raise IrregularError("batches call the layers in different order, or not the same ones")
        (index,) = layers
        if index in self.parts:
            raise IrregularError(f"{self._job.layers[index].name} is called several times")
        self.parts[index] = tuple(part for position in positions for part in position.inputs)
        self._job.set_statistics(index, self.parts[index], self._samples)
        return len(self.parts) < len(self._job.layers)

    def were_disturbed(self) -> bool:
        """Return whether the witness has other inputs when it runs alone."""
        return self._witness is not None and self._witness.is_disturbed(
            self._job, tuple(self.parts), self._met_by_witness
        )


def _run_in_place(job: Job, chunk: Batch, layers: _Layers) -> None:
    """Run a chunk in this thread, up to the last layer."""
    is_over = False
    failure: BaseException | None = None

    def on_input(index: int, values: Tensor) -> None:
        nonlocal is_over, failure
        if not is_over:
            try:
                is_over = not layers.settle(
                    lambda: _Position(frozenset([index]), layers.read(index, values, True))
                )
            except BaseException as error:
                # Kept, since the model may catch it.
                is_over, failure = True, error
        if is_over:
            raise ForwardCancelled

    def end() -> _Position:
        if isinstance(error, CalibrationError):
            return _Position(trouble=str(error))
        if error is not None:
            raise error
        return _Position(has_ended=True)

    error: BaseException | None = None
    with draw_from_seed(chunk.index, job.device), read_inputs(job.layers, on_input):
        try:
            call(job.model, job.forward, chunk)
        except ForwardCancelled:
            pass
        except BaseException as raised:
            error = raised
    if failure is not None:
        raise failure
    if not is_over:
        layers.settle(end)
    elif error is not None and not isinstance(error, Exception):
        raise error


def _run_in_threads(
    job: Job, chunks: Sequence[Batch], traits: ForwardTraits | None, layers: _Layers
) -> None:
    """Run each chunk in a thread, up to the last layer."""
    forwards = _Forwards(job, chunks, traits, layers)
    try:
        with read_inputs(job.layers, forwards.on_input):
            while layers.settle(forwards.advance):
                pass
    finally:
        forwards.end()


class _Forwards:
    """The forwards of this rank's chunks, each in a thread."""

    def __init__(
        self, job: Job, chunks: Sequence[Batch], traits: ForwardTraits | None, layers: _Layers
    ) -> None:
        self._layers = layers
        self._trouble: str | None = None
        self._timeout = _TIMEOUT_SECONDS
        self._threads = torch.get_num_threads()
        self._width = 1
        draws_random = False
        if traits is not None:
            draws_random = traits.draws_random
            largest = max(chunk.size for chunk in chunks)
            self._timeout += _TIMEOUT_FORWARDS * largest * traits.seconds_per_sample
            if not (traits.keeps_state or draws_random) and job.device.type == "cpu":
                self._width = min(self._threads, len(chunks))
        context = ThreadContext(self._threads // self._width)
        self._forwards = [
            PausableForward(
                partial(job.run, chunk),
                context,
                RandomStream(chunk.index, job.device) if draws_random else None,
            )
            for chunk in chunks
        ]
        self._reached: dict[PausableForward, tuple[int, tuple[Moments, ...]]] = {}

    def on_input(self, index: int, values: Tensor) -> None:
        """Read the inputs of a layer, and pause there."""
        paused = PausableForward.current()
        if paused is None:
            self._trouble = "the model calls BN layers in threads of its own"
            return
        is_first = paused is self._forwards[0]
        self._reached[paused] = (index, self._layers.read(index, values, is_first))
        paused.stop()

    def advance(self) -> _Position:
        """Let every forward continue to its next layer, or its end."""
        self._reached.clear()
        going = [paused for paused in self._forwards if not paused.is_finished]
        try:
            advance(going, self._width, self._timeout)
        except StuckError as error:
            self._trouble = str(error)
        if any(paused.error is not None for paused in going):
            self._trouble = "a forward fails when others run at the same time"
        return _Position(
            layers=frozenset(index for index, _ in self._reached.values()),
            inputs=tuple(
                part
                for paused in self._forwards
                if paused in self._reached
                for part in self._reached[paused][1]
            ),
            has_ended=any(paused.is_finished for paused in self._forwards),
            trouble=self._trouble,
        )

    def end(self) -> None:
        """End every forward where it is paused."""
        for paused in self._forwards:
            paused.cancel()
        # Only after all were cancelled, since one may wait for what another holds.
        for paused in self._forwards:
            paused.join()
        if self._width > 1:
            torch.set_num_threads(self._threads)
