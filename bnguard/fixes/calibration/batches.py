"""What a loader yields, and how it is put through a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnguard.errors import CalibrationError

Forward = Callable[[nn.Module, Any], object]


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch of a loader.

    Attributes:
        index: Its number in the loader, from 0.
        payload: What the loader yielded, on the model's device.
        size: Samples in it.
    """

    index: int
    payload: object
    size: int


def read_batches(loader: Iterable[object], samples: int, device: torch.device) -> Iterator[Batch]:
    """Yield the batches that hold the first ``samples`` samples; the last one is cut to fit.

    Raises:
        CalibrationError: The loader raised an exception.
    """
    left = samples
    for index, payload in enumerate(_loaded(loader)):
        size = size_of(payload)
        if size > left:
            payload, size = _sliced(payload, size, left), left
        if size > 0:
            yield Batch(index, _moved(payload, device), size)
        left -= size
        if left <= 0:
            return


def size_of(payload: object) -> int:
    """Return the number of samples in a batch: the length of the first tensor in it.

    >>> size_of([torch.zeros(4, 3), torch.zeros(4)]), size_of({"x": torch.zeros(2, 3)})
    (4, 2)
    """
    for tensor in _tensors(payload):
        if tensor.dim() > 0:
            return len(tensor)
    return 1


def plain_forward(model: nn.Module, payload: object) -> object:
    """Call a model the way that most loaders mean.

    A tensor goes in as it is; of a tuple or list the first item, the rest being targets; of a
    mapping the entries that the forward has parameters for.

    Raises:
        CalibrationError: The batch is none of these.
    """
    if isinstance(payload, Tensor):
        return model(payload)
    if isinstance(payload, Mapping):
        return model(**_accepted(model, payload))
    if isinstance(payload, (tuple, list)) and payload:
        return model(payload[0])
    raise CalibrationError(
        f"the loader yields {type(payload).__name__}, and how {type(model).__name__} takes that is "
        "unknown: pass forward=lambda model, batch: ..."
    )


def _loaded(loader: Iterable[object]) -> Iterator[object]:
    iterator = iter(loader)
    count = 0
    while True:
        try:
            payload = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise CalibrationError(
                f"the loader failed at batch {count}: {type(error).__name__}: {error}"
            ) from error
        yield payload
        count += 1


def _accepted(model: nn.Module, payload: Mapping[str, object]) -> dict[str, object]:
    parameters = inspect.signature(model.forward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return dict(payload)
    accepted = {key: value for key, value in payload.items() if key in parameters}
    if not accepted:
        raise CalibrationError(
            f"none of the batch's entries ({', '.join(map(str, payload))}) is a parameter of "
            f"{type(model).__name__}.forward: pass forward=lambda model, batch: ..."
        )
    return accepted


def _tensors(payload: object) -> Iterator[Tensor]:
    if isinstance(payload, Tensor):
        yield payload
    elif isinstance(payload, Mapping):
        for value in payload.values():
            yield from _tensors(value)
    elif isinstance(payload, (tuple, list)):
        for value in payload:
            yield from _tensors(value)


def _mapped(payload: object, change: Callable[[Tensor], Tensor]) -> object:
    """Return the batch with every tensor changed; what is no tensor or container stays."""
    if isinstance(payload, Tensor):
        return change(payload)
    if isinstance(payload, Mapping):
        return {key: _mapped(value, change) for key, value in payload.items()}
    if isinstance(payload, (tuple, list)):
        items = [_mapped(value, change) for value in payload]
        return type(payload)(*items) if hasattr(payload, "_fields") else type(payload)(items)
    return payload


def _sliced(payload: object, size: int, kept: int) -> object:
    return _mapped(
        payload, lambda tensor: tensor[:kept] if tensor.dim() and len(tensor) == size else tensor
    )


def _moved(payload: object, device: torch.device) -> object:
    if not isinstance(payload, (Tensor, Mapping, tuple, list)) and hasattr(payload, "to"):
        return payload.to(device)
    return _mapped(payload, lambda tensor: tensor.to(device, non_blocking=True))
