"""How a calibration set is parted into chunks that go through the model as one."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

from bnguard.recalibration.batches import Batch, can_be_joined, joined


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
        whole = joined(self.batches)
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

    def join(self, min_samples: int) -> None:
        """Join neighbours of the same shapes, later ones too, until a chunk has so many samples."""
        self._min_samples = min_samples
        apart, self.chunks = self.chunks, []
        for chunk in apart:
            for batch in chunk.batches:
                self.append(batch)

    def append(self, batch: Batch) -> None:
        """Put a batch into the last chunk, or into one of its own."""
        last = self.chunks[-1] if self.chunks else None
        is_open = last is not None and last.samples < self._min_samples
        if last is not None and is_open and can_be_joined(last.batches[-1], batch):
            self.chunks[-1] = self._chunk(*last.batches, batch)
        else:
            self.chunks.append(self._chunk(batch))

    def expel(self, numbers: Collection[int]) -> list[Batch]:
        """Take these chunks apart, or out where they are one batch; return what was taken out."""
        kept: list[Chunk] = []
        expelled: list[Batch] = []
        for number, chunk in enumerate(self.chunks):
            if number not in numbers:
                kept.append(chunk)
            elif len(chunk.batches) > 1:
                kept += map(self._chunk, chunk.batches)
            else:
                expelled += chunk.batches
        self.chunks = kept
        return expelled

    def _chunk(self, *batches: Batch) -> Chunk:
        return Chunk(batches, self._is_channels_last)
