"""Read the batches of a loader, move them to the model's device, and run them."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import (
    Callable,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeGuard, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from bnguard.errors import CalibrationError, LoaderError, in_one_line

T = TypeVar("T")
Forward = Callable[[nn.Module, Any], object]

# A kept sample of the data has at most this number of rows, and at least half of it.
_MOST_ROWS = 64

# In a list of images, tensors with three dimensions, each entry is a sample.
_IMAGE_DIMS = 3
_IMAGE_CHANNELS = (1, 3, 4)


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch of a loader, as arguments of the forward.

    Attributes:
        index: Its number in the loader, from 0.
        args: Positional arguments.
        kwargs: Keyword arguments.
        size: Samples in it.
    """

    index: int
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    size: int

    @property
    def can_be_cut(self) -> bool:
        """Whether every tensor has a row per sample, and none is sparse or links the others."""
        tensors = list(self.tensors())
        lists_samples = any(map(_lists_samples, (*self.args, *self.kwargs.values())))
        has_rows = all(is_dense(t) and t.dim() > 0 and len(t) == self.size for t in tensors)
        if not tensors or not has_rows or lists_samples:
            return False
        # A square matrix next to other rows links them, as the nodes of a graph.
        return len({t.shape == (self.size, self.size) for t in tensors if t.dim() > 1}) < 2

    @cached_property
    def layout(self) -> Hashable:
        """What two batches that can be joined have in common; unique if this one cannot be."""
        return _layout((self.args, self.kwargs)) if self.can_be_cut else object()

    def rows(self, start: int, stop: int) -> Batch:
        """Return the samples from ``start`` to before ``stop`` of a batch that can be cut."""
        stop = min(stop, self.size)
        return self._map(lambda tensor: tensor[start:stop], stop - start)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        args, kwargs = _move(self.args, device), _move(self.kwargs, device)
        return Batch(self.index, args, kwargs, self.size)

    def copied(self) -> Batch:
        """Return the batch with tensors of its own."""
        return self._map(Tensor.clone, self.size)

    def in_channels_last(self) -> Batch:
        """Return the batch with its images in the channels-last layout."""
        return self._map(_in_channels_last, self.size)

    def tensors(self) -> Iterator[Tensor]:
        """Yield its tensors, depth first."""
        return _tensors_in((self.args, self.kwargs))

    @property
    def is_finite(self) -> bool:
        """Whether its tensors are free of NaN and Inf."""
        return all(bool(tensor.isfinite().all()) for tensor in self.tensors())

    @property
    def nbytes(self) -> int:
        """Bytes that its tensors take."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def _map(self, change: Callable[[Tensor], Tensor], size: int) -> Batch:
        args, kwargs = _map_tensors(self.args, change), _map_tensors(self.kwargs, change)
        return Batch(self.index, args, kwargs, size)


def can_be_joined(first: Batch, second: Batch) -> bool:
    """Return whether two batches differ in nothing but the values of their rows."""
    return first.layout == second.layout


def join_batches(batches: Sequence[Batch]) -> Batch:
    """Return batches that can be joined as one, with the first's index and tensors of its own."""
    first = batches[0]
    if len(batches) == 1:
        return first.copied()
    columns = zip(*(batch.tensors() for batch in batches), strict=True)
    whole = iter([torch.cat(column) for column in columns])
    return first._map(lambda _: next(whole), sum(batch.size for batch in batches))


def read_batches(
    loader: Iterable[object],
    model: nn.Module,
    forward: Forward | None,
    *,
    samples: int,
    device: torch.device,
) -> Iterator[Batch]:
    """Yield the batches that hold the first ``samples`` samples; the last one is cut to fit.

    A batch that cannot be cut is used whole.

    Raises:
        CalibrationError: The loader raised an exception, or yields what the model does not take.
    """
    left = samples
    if left <= 0:
        return
    for index, payload in enumerate(_read_loader(loader)):
        args, kwargs = _bind_arguments(model, payload) if forward is None else ((payload,), {})
        size = _first(map(_size_of, (*args, *kwargs.values())))
        batch = Batch(index, args, kwargs, 1 if size is None else size)
        if batch.size > left and batch.can_be_cut:
            batch = batch.rows(0, left)
        if batch.size > 0:
            try:
                moved = batch.to(device)
            except Exception as error:
                raise LoaderError(
                    f"batch {index} of the loader cannot be moved to {device}: {in_one_line(error)}"
                ) from error
            yield moved
        left -= batch.size
        if left <= 0:
            return


def can_draw(loader: object) -> TypeGuard[DataLoader[object]]:
    """Return whether the samples of a loader can be drawn one by one."""
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def shuffle_indices(count: int) -> list[int]:
    """Return the numbers below ``count`` in a random order, the same each time."""
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return order


def load_samples(
    loader: DataLoader[object], indices: Sequence[int], **options: Any
) -> DataLoader[object]:
    """Return a loader over some of a loader's samples, in order, with its settings or these."""
    settings = {
        "batch_size": loader.batch_size or 1,
        "collate_fn": loader.collate_fn,
        "num_workers": loader.num_workers,
        "pin_memory": loader.pin_memory,
    }
    return DataLoader(Subset(loader.dataset, indices), **{**settings, **options})


class SampledRows:
    """Between 32 and 64 rows from all over a stream of batches; all if there are fewer."""

    def __init__(self) -> None:
        self._rows: list[Batch] = []
        self._seen, self._every = 0, 1
        self._uncut: Batch | None = None

    def sample_from(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches, and keep copies of some of their rows."""
        for batch in batches:
            if batch.can_be_cut:
                self._keep_rows(batch)
            elif self._uncut is None:
                self._uncut = batch.copied()
            yield batch

    @property
    def batch(self) -> Batch | None:
        """The rows that can be joined to the first one, without NaN or Inf; None without any."""
        if not self._rows:
            return self._uncut
        rows = [row for row in self._rows if row.is_finite] or self._rows
        return join_batches([row for row in rows if can_be_joined(rows[0], row)])

    def _keep_rows(self, batch: Batch) -> None:
        for row in range(batch.size):
            if self._seen % self._every == 0:
                self._rows.append(batch.rows(row, row + 1).copied())
            self._seen += 1
            if len(self._rows) == _MOST_ROWS:
                self._rows = self._rows[::2]
                self._every *= 2


def call(model: nn.Module, forward: Forward | None, batch: Batch) -> object:
    """Run a batch through the model.

    Raises:
        CalibrationError: The forward raised an exception, or memory ran out.
    """
    try:
        if forward is not None:
            return forward(model, *batch.args)
        return model(*batch.args, **batch.kwargs)
    except CalibrationError:
        raise
    except Exception as error:
        if _is_out_of_memory(error):
            raise CalibrationError(
                f"out of memory at batch {batch.index}: use fewer samples, or less memory"
            ) from error
        raise CalibrationError(
            f"the forward failed at batch {batch.index}: {in_one_line(error)}"
            f"{_hint_at(error, forward)}"
        ) from error


def _hint_at(error: Exception, forward: Forward | None) -> str:
    """Return what may help against an error of the forward."""
    # A layer without running statistics is the only one that asks for this in eval mode.
    if "more than 1 value per channel" in str(error):
        return "; let the loader drop a last batch of one (drop_last=True)"
    return "" if forward else "; if the model takes more, wrap it, or pass a forward function"


def _read_loader(loader: Iterable[object]) -> Iterator[object]:
    kind = type(loader)
    if isinstance(loader, Tensor):
        raise LoaderError(
            f"the loader is a tensor of shape {tuple(loader.shape)}, each row of which would be a "
            "batch: pass loader.split(32)"
        )
    if isinstance(loader, Dataset) and not hasattr(kind, "__iter__"):
        raise LoaderError(
            f"the loader is a {kind.__name__}, which yields samples and not batches: pass "
            "torch.utils.data.DataLoader(loader, batch_size=32)"
        )
    if _is_one_batch(loader):
        raise LoaderError(
            f"the loader is a {kind.__name__} of tensors of different kinds, one batch by the look "
            "of it: pass a list of batches, [loader]"
        )
    if isinstance(loader, (str, Mapping)) or not (
        hasattr(kind, "__iter__") or hasattr(kind, "__getitem__")
    ):
        raise LoaderError(f"the loader is of type {kind.__name__}, and yields no batches")
    count = 0
    try:
        for payload in loader:
            yield payload
            count += 1
    except Exception as error:
        raise LoaderError(f"the loader failed at batch {count}: {in_one_line(error)}") from error


def _is_one_batch(loader: object) -> bool:
    """Return whether this is inputs and targets: tensors that differ in dtype or dimensions."""
    if not isinstance(loader, (tuple, list)):
        return False
    kinds = {(item.dtype, item.dim()) if isinstance(item, Tensor) else None for item in loader}
    return len(kinds) > 1 and None not in kinds


def _bind_arguments(
    model: nn.Module, payload: object
) -> tuple[tuple[object, ...], Mapping[str, object]]:
    """Return the arguments of the forward, as PyTorch's ``update_bn`` chooses them.

    The model takes a tensor as it is; the first item of a tuple or list, whose rest are targets;
    and the entries of a mapping that the forward has parameters for.
    """
    if isinstance(payload, Tensor):
        return (payload,), {}
    if isinstance(payload, Mapping):
        return (), _select_entries(model, payload)
    if isinstance(payload, (tuple, list)) and payload:
        return (payload[0],), {}
    raise CalibrationError(
        f"the loader yields {type(payload).__name__}, and how {type(model).__name__} takes that is "
        "unknown: wrap the model in one that does, or pass a forward function"
    )


def _select_entries(model: nn.Module, payload: Mapping[str, object]) -> dict[str, object]:
    parameters = inspect.signature(model.forward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return dict(payload)
    accepted = {key: value for key, value in payload.items() if key in parameters}
    if not accepted:
        raise CalibrationError(
            f"none of a batch's entries ({', '.join(map(str, payload))}) is a parameter of "
            f"{type(model).__name__}.forward: wrap the model in one that takes them, or pass a "
            "forward function"
        )
    return accepted


def _size_of(payload: object) -> int | None:
    """Return the length of the first tensor or list of samples, if any."""
    if isinstance(payload, Tensor):
        return payload.size(0) if payload.dim() else None
    entries = _entries(payload)
    return len(entries) if _is_list_of_samples(payload) else _first(map(_size_of, entries.values()))


def _lists_samples(payload: object) -> bool:
    """Return whether there is a list of samples in a batch."""
    return _is_list_of_samples(payload) or any(map(_lists_samples, _entries(payload).values()))


def _is_list_of_samples(payload: object) -> bool:
    """Return whether each entry is an image, or a record that begins with one."""
    if not isinstance(payload, (tuple, list)) or not payload:
        return False
    return not any(isinstance(entry, (tuple, list)) for entry in payload) and all(
        _is_image(next(_tensors_in(entry), None)) for entry in payload
    )


def _entries(payload: object) -> Mapping[Any, object]:
    """Return the entries of a container by their keys; none for anything else."""
    if isinstance(payload, Mapping):
        return payload
    if isinstance(payload, (tuple, list)):
        return dict(enumerate(payload))
    if _is_dataclass(payload):
        fields = dataclasses.fields(cast("Any", payload))
        return {field.name: getattr(payload, field.name) for field in fields}
    return {}


def _is_dataclass(payload: object) -> bool:
    return dataclasses.is_dataclass(payload) and not isinstance(payload, type)


def _first(sizes: Iterable[int | None]) -> int | None:
    return next((size for size in sizes if size is not None), None)


def is_dense(tensor: Tensor) -> bool:
    """Return whether each row has the same shape, and all of its values are stored."""
    return tensor.layout is torch.strided and not tensor.is_nested


def _is_image(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and is_dense(value)
        and value.dim() == _IMAGE_DIMS
        and value.shape[0] in _IMAGE_CHANNELS
    )


def _tensors_in(payload: object) -> Iterator[Tensor]:
    if isinstance(payload, Tensor):
        yield payload
    for entry in _entries(payload).values():
        yield from _tensors_in(entry)


def _map_tensors(payload: T, change: Callable[[Tensor], Tensor]) -> T:
    """Return the payload with every tensor changed."""
    if isinstance(payload, Tensor):
        return cast("T", change(payload))
    return _rebuild(payload, lambda value: _map_tensors(value, change))


def _move(payload: T, device: torch.device) -> T:
    """Return the payload on the device: its tensors, and whatever else has a method ``to``."""
    if hasattr(payload, "to"):
        return cast("T", payload.to(device))
    return _rebuild(payload, lambda value: _move(value, device))


def _in_channels_last(tensor: Tensor) -> Tensor:
    has_images = tensor.dim() == _IMAGE_DIMS + 1
    return tensor.contiguous(memory_format=torch.channels_last) if has_images else tensor


def _rebuild(payload: T, change: Callable[[object], object]) -> T:
    """Return a container of the same type with every entry changed, or any other payload."""
    if isinstance(payload, MutableMapping):
        changed = copy.copy(payload)
        for key, value in payload.items():
            changed[key] = change(value)
        return changed
    kind: Any = type(payload)
    if isinstance(payload, Mapping):
        return cast("T", kind({key: change(value) for key, value in payload.items()}))
    if isinstance(payload, (tuple, list)):
        items = [change(value) for value in payload]
        is_named = hasattr(payload, "_fields")
        return cast("T", kind(*items) if is_named else kind(items))
    if _is_dataclass(payload):
        twin = copy.copy(payload)
        for name, value in _entries(payload).items():
            # It may be frozen.
            object.__setattr__(twin, name, change(value))
        return twin
    return payload


def _layout(payload: object) -> Hashable:
    """Return what two payloads must have in common to be joined."""
    if isinstance(payload, Tensor):
        return (payload.shape[1:], payload.dtype, payload.device)
    if isinstance(payload, (Mapping, tuple, list)) or _is_dataclass(payload):
        entries = _entries(payload)
        return (type(payload), *((key, _layout(value)) for key, value in entries.items()))
    if payload is None or isinstance(payload, (bool, int, float, str)):
        return payload
    return object()


def _is_out_of_memory(error: Exception) -> bool:
    is_from_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return is_from_cpu or isinstance(error, (MemoryError, torch.OutOfMemoryError))
