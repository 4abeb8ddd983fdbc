"""How much memory a calibration may take, and batches in chunks that fit into it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from bnguard.errors import ConfigurationError
from bnguard.recalibration.batches import Batch, can_be_joined, join_batches

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12} | {
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
# Where the system does not tell what is free.
_UNKNOWN_FREE = 4 * 2**30


def memory_limit(memory: str | float, device: torch.device) -> int:
    """Return a limit in bytes.

    Args:
        memory: ``"2GiB"``, ``"500 MB"``, bytes as a whole number, or a share of what is free on
            the device, between 0 and 1.
        device: The device.

    Raises:
        ConfigurationError: It is none of these.

    Example:
        >>> memory_limit("2GiB", torch.device("cpu")) == 2 * 2**30
        True
    """
    if isinstance(memory, float) and 0.0 < memory <= 1.0:
        return int(memory * free_memory(device))
    if isinstance(memory, int) and memory > 0:
        return memory
    if isinstance(memory, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?) *([kmgt]?i?)b?", memory.strip().lower())
        if match and match[2] in _UNITS and float(match[1]) > 0:
            return int(float(match[1]) * _UNITS[match[2]])
    raise ConfigurationError(f"memory {memory!r} is not an amount: use '2GiB', or a share like 0.5")


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device, as far as the system tells."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        return free + reserved - used
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return _UNKNOWN_FREE
    match = re.search(r"MemAvailable: *(\d+) kB", text)
    return int(match[1]) * 2**10 if match else _UNKNOWN_FREE


@dataclass(frozen=True, eq=False)
class Chunk:
    """One or several batches that go through the model as one.

    Attributes:
        batches: The batches.
        is_channels_last: Whether images go through in that layout.
    """

    batches: tuple[Batch, ...]
    is_channels_last: bool

    @cached_property
    def whole(self) -> Batch:
        """The batches joined."""
        whole = join_batches(self.batches)
        return whole.in_channels_last() if self.is_channels_last else whole

    @property
    def samples(self) -> int:
        """Samples in all its batches."""
        return sum(batch.size for batch in self.batches)


class ChunkedBatches:
    """Batches in chunks, each batch in one of its own until they are joined.

    Args:
        is_channels_last: Whether images go through in that layout.

    Attributes:
        chunks: The chunks.
    """

    def __init__(self, *, is_channels_last: bool) -> None:
        self._is_channels_last = is_channels_last
        self._min_samples = 1
        self.chunks: list[Chunk] = []

    @property
    def samples(self) -> int:
        """Samples in all chunks."""
        return sum(chunk.samples for chunk in self.chunks)

    @property
    def batches(self) -> int:
        """Batches in all chunks."""
        return sum(len(chunk.batches) for chunk in self.chunks)

    @property
    def apart(self) -> Iterator[Batch]:
        """The batches as they came."""
        return (batch for chunk in self.chunks for batch in chunk.batches)

    def join(self, min_samples: int) -> None:
        """Join neighbours of the same shapes, later ones too, until a chunk has so many samples."""
        self._min_samples = min_samples
        apart, self.chunks = list(self.apart), []
        for batch in apart:
            self.append(batch)

    def append(self, batch: Batch) -> None:
        """Put a batch into the last chunk, or into one of its own."""
        last = self.chunks[-1] if self.chunks else None
        is_open = last is not None and last.samples < self._min_samples
        if last is not None and is_open and can_be_joined(last.batches[-1], batch):
            self.chunks[-1] = self._chunk(*last.batches, batch)
        else:
            self.chunks.append(self._chunk(batch))

    def remove(self, numbers: Collection[int]) -> list[Batch]:
        """Split these chunks into their batches; remove and return those that are one batch."""
        kept: list[Chunk] = []
        removed: list[Batch] = []
        for number, chunk in enumerate(self.chunks):
            if number not in numbers:
                kept.append(chunk)
            elif len(chunk.batches) > 1:
                kept += map(self._chunk, chunk.batches)
            else:
                removed += chunk.batches
        self.chunks = kept
        return removed

    def _chunk(self, *batches: Batch) -> Chunk:
        return Chunk(batches, self._is_channels_last)
