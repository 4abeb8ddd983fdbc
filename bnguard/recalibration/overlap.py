"""Whether a score was measured on the samples that the statistics come from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from bnguard.recalibration.batches import Batch, tensors_in

# So many values of a sample tell it from others well enough.
_VALUES_COMPARED = 64


class SampleMarks:
    """Marks of the samples that went into a model, by which they are known again.

    Samples that are augmented anew each time are not.
    """

    def __init__(self) -> None:
        self._marks: set[bytes] = set()

    def share_in(self, other: SampleMarks) -> float:
        """Return which share of these samples is among the others; 0 where there are none."""
        return len(self._marks & other._marks) / len(self._marks) if self._marks else 0.0

    def marked(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Mark the samples of batches on their way."""
        for batch in batches:
            self._mark(batch.tensors())
            yield batch

    @contextmanager
    def of_inputs(self, model: nn.Module) -> Iterator[None]:
        """Mark every sample that is put into the model."""

        def mark(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            self._mark(tensors_in((args, kwargs)))

        handle = model.register_forward_pre_hook(mark, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _mark(self, tensors: Iterator[Tensor]) -> None:
        first = next((tensor for tensor in tensors if tensor.dim() > 1), None)
        if first is None or first.numel() == 0:
            return
        rows = first.detach().flatten(1)
        few = rows[:, :: max(1, rows.shape[1] // _VALUES_COMPARED)].float().cpu().numpy()
        self._marks.update(row.tobytes() for row in few)
