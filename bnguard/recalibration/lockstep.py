"""The exact statistics in one forward: every chunk stops at each layer until all are there."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue

import torch
from torch import Tensor

from bnguard.layers.moments import Moments
from bnguard.layers.preserve import RandomStream
from bnguard.recalibration.batches import Batch
from bnguard.recalibration.layer_inputs import (
    IrregularError,
    PartingError,
    arrivals,
    arrived_moments,
    on_host,
    settle,
)
from bnguard.recalibration.memory import Chunk
from bnguard.recalibration.statistics import Job
from bnguard.recalibration.trial_forward import Habits, Observation, disturbed_layers, observe

# Batches on their way through a model, each in a thread that stops where it is told to.


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
        with walk.stream.in_use():
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


# So many samples of a chunk are looked at again.
_WITNESSES = 2
# A forward that takes longer waits for another, as for a lock that stands at a layer with that one.
_PATIENCE_SECONDS = 10.0
_PATIENCE_FORWARDS = 5


def lockstep(
    job: Job, chunks: Sequence[Chunk], habits: Habits | None, samples: int
) -> dict[int, tuple[Moments, ...]]:
    """Settle every layer that is reached; return what arrived there on all ranks, by its index.

    In the end some samples go through again alone: if they meet something else then, the chunks
    disturbed one another, as in a model that stores features on itself.

    Args:
        job: What to calibrate.
        chunks: This rank's data; may be none.
        habits: How the model behaves; None where this rank has no data.
        samples: How many samples there are on all ranks.

    Raises:
        IrregularError: On every rank, where the chunks of one cannot run side by side.
        NonFiniteError: On every rank, where NaN or Inf arrives on one.
        CalibrationError: A layer cannot have the statistics.
    """
    walks = _Walks(job, chunks, habits)
    parts: dict[int, tuple[Moments, ...]] = {}
    try:
        with arrivals(job.layers, walks.arrive):
            while (index := _common(stands := job.ranks.together(walks.advance))) is not None:
                if index in parts:
                    raise IrregularError(f"{job.layers[index].name} is called several times")
                parts[index] = settle(job, index, [stand.arrived for stand in stands], samples)
                walks.note_settled(index)
    finally:
        walks.end()
    compared = job.ranks.together(walks.compared_with_witness)
    if any(each.is_parted_by_joining for each in compared):
        raise PartingError("samples go another way beside those that they are joined to")
    if any(each.is_disturbed for each in compared):
        raise IrregularError("forwards that run side by side disturb one another")
    return parts


@dataclass(frozen=True, eq=False)
class _Stand:
    """Where the chunks of a rank stand.

    Attributes:
        layers: Indices of the layers at which they stand.
        arrived: What arrived there, by the number of the chunk.
        has_ended: Whether one has gone all the way.
        trouble: Why they cannot run side by side; None where they can.
    """

    layers: frozenset[int]
    arrived: dict[int, Moments]
    has_ended: bool
    trouble: str | None


@dataclass(frozen=True)
class _Comparison:
    """Whether samples meet something else than alone: beside others, and joined to others."""

    is_disturbed: bool
    is_parted_by_joining: bool


def _common(stands: Sequence[_Stand]) -> int | None:
    """Return the one layer at which all chunks of all ranks stand; None where all have ended."""
    for stand in stands:
        if stand.trouble is not None:
            raise IrregularError(stand.trouble)
    layers = frozenset[int]().union(*(stand.layers for stand in stands))
    if len(layers) > 1 or (layers and any(stand.has_ended for stand in stands)):
        raise PartingError("batches call the layers in different order, or not the same ones")
    return next(iter(layers), None)


class _Walks:
    """The walks of this rank's chunks."""

    def __init__(self, job: Job, chunks: Sequence[Chunk], habits: Habits | None) -> None:
        self._job = job
        self._chunks = chunks
        self._settled: list[int] = []
        self._witness = _witness_of(chunks, habits)
        self._met_by_witness: dict[int, Moments] = {}
        self._trouble: str | None = None

        seconds = 0.0 if habits is None else habits.seconds_per_sample
        largest = max((chunk.samples for chunk in chunks), default=0)
        self._patience = _PATIENCE_SECONDS + _PATIENCE_FORWARDS * largest * seconds

        self._threads = torch.get_num_threads()
        can_run_at_once = habits is not None and habits.is_stateless and job.device.type == "cpu"
        self._width = max(1, min(self._threads, len(chunks))) if can_run_at_once else 1
        surroundings = Surroundings(self._threads // self._width)
        self._walks = [
            Walk(
                partial(job.run, chunk.whole),
                surroundings,
                RandomStream(chunk.whole.index, job.device),
            )
            for chunk in chunks
        ]
        self._stands_at: dict[Walk, tuple[int, Moments]] = {}

    def arrive(self, index: int, values: Tensor) -> None:
        """Read what arrives at a layer, and stand still there."""
        walk = Walk.here()
        if walk is None:
            self._trouble = "the model calls BN layers in threads of its own"
            return
        self._stands_at[walk] = (index, arrived_moments(values))
        if self._witness is not None and walk is self._walks[0]:
            share = len(values) * self._witness.size // self._chunks[0].samples
            self._met_by_witness[index] = arrived_moments(values[:share])
        self._job.progress.advance(len(values))
        walk.stop()

    def advance(self) -> _Stand:
        """Let every walk go on to its next layer, or its end."""
        self._stands_at.clear()
        going = [walk for walk in self._walks if not walk.is_finished]
        try:
            if self._width > 1:
                advance_at_once(going, self._width, self._patience)
            else:
                advance_in_turn(going, self._patience)
        except StuckError as error:
            self._trouble = str(error)
        if any(walk.error is not None for walk in going):
            self._trouble = "a forward fails beside others"
        arrived = {
            number: on_host(self._stands_at[walk][1])
            for number, walk in enumerate(self._walks)
            if walk in self._stands_at
        }
        return _Stand(
            layers=frozenset(index for index, _ in self._stands_at.values()),
            arrived=arrived,
            has_ended=any(walk.is_finished for walk in self._walks),
            trouble=self._trouble,
        )

    def note_settled(self, index: int) -> None:
        """Take note that a layer is settled; nothing after the last one needs to be computed."""
        self._settled.append(index)
        # What the first samples did not reach, others may.
        if len(self._settled) == len(self._job.layers):
            self.end()

    def end(self) -> None:
        """End every walk where it stands."""
        for walk in self._walks:
            walk.abandon()
        # After all have been told: one may wait for what another holds.
        for walk in self._walks:
            walk.join()
        if self._width > 1:
            torch.set_num_threads(self._threads)

    def compared_with_witness(self) -> _Comparison:
        """Return what becomes of samples alone, and alone with those that they are joined to."""
        if self._witness is None:
            return _Comparison(is_disturbed=False, is_parted_by_joining=False)
        job, chunk = self._job, self._chunks[0]
        alone = observe(job, self._witness)
        if not self._differs(alone, tuple(self._settled), self._met_by_witness):
            return _Comparison(is_disturbed=False, is_parted_by_joining=False)
        share = self._witness.size / chunk.samples
        joined = observe(job, chunk.whole, lambda values: values[: round(len(values) * share)])
        return _Comparison(
            is_disturbed=True,
            is_parted_by_joining=self._differs(alone, joined.calls, joined.moments),
        )

    def _differs(
        self, alone: Observation, calls: tuple[int, ...], met: Mapping[int, Moments]
    ) -> bool:
        return alone.calls != calls or bool(disturbed_layers(self._job, alone.moments, met))


def _witness_of(chunks: Sequence[Chunk], habits: Habits | None) -> Batch | None:
    """Return the first samples, or all of a chunk that must stay whole; None without others."""
    if habits is None or len(chunks) < 2:
        return None
    whole = chunks[0].whole
    return whole.rows(0, _WITNESSES) if habits.takes_rows else whole
