"""Comparing two checkpoints: how far running statistics moved, and what else changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile, zip_longest
from pathlib import Path

import numpy as np

from bnguard.checkpoint.bn_entries import STATISTICS
from bnguard.checkpoint.contents import entries
from bnguard.checkpoint.formats import OpenCheckpoint
from bnguard.checkpoint.reading import open_checkpoint
from bnguard.checkpoint.result import Checkpoint, CheckpointLayer, CheckpointModel
from bnguard.checkpoint.storage import StoredTensor
from bnguard.checkpoint.unpickling import Blob, TypedStorage
from bnguard.errors import CheckpointError
from bnguard.layers.distances import FloatArray, log_variance_ratio, shift_std
from bnguard.layers.names import without_wrappers

# Which version of its class each module was saved by, and the class of the dictionary.
_VERSIONS = "_metadata"
_ORDERED = "collections.OrderedDict"
# A checkpoint does not hold eps; this is PyTorch's default.
_EPS = 1e-5


@dataclass(frozen=True, eq=False)
class LayerDifference:
    """A BN layer in two checkpoints."""

    before: CheckpointLayer
    after: CheckpointLayer

    @property
    def name(self) -> str:
        """Dotted name in the model."""
        return self.before.name

    @property
    def shift_std(self) -> FloatArray:
        """How far the mean moved, in standard deviations of the first, shape ``(C,)``."""
        with np.errstate(all="ignore"):
            return shift_std(
                self.after.running_mean, self.before.running_mean, self.before.running_var, _EPS
            )

    @property
    def log_variance_ratio(self) -> FloatArray:
        """Logarithm of the second variance over the first, shape ``(C,)``."""
        with np.errstate(all="ignore"):
            return log_variance_ratio(self.after.running_var, self.before.running_var, _EPS)

    @property
    def is_identical(self) -> bool:
        """Whether mean, variance and counter are the same, NaN being the same as NaN."""
        before, after = self.before, self.after
        return (
            np.array_equal(before.running_mean, after.running_mean, equal_nan=True)
            and np.array_equal(before.running_var, after.running_var, equal_nan=True)
            and before.counter == after.counter
        )


@dataclass(frozen=True)
class EntryDifference:
    """An entry, other than running statistics, that is not bit-identical, and what differs."""

    key: str
    detail: str


@dataclass(frozen=True, eq=False)
class CheckpointDifference:
    """Two checkpoints, compared.

    Attributes:
        before: Path of the first.
        after: Path of the second.
        layers: BN layers that both have with as many channels, in the order of the first.
        entries: Every other entry that is not bit-identical. Of models under different prefixes,
            only the tensors of the models are compared; of different formats, only what both can
            hold.
    """

    before: Path
    after: Path
    layers: tuple[LayerDifference, ...]
    entries: tuple[EntryDifference, ...]


def compare(a: Checkpoint, b: Checkpoint) -> CheckpointDifference:
    """Compare two checkpoints layer by layer, and everything else bit by bit.

    Models are matched by their prefix; if each checkpoint has only one model, whatever its prefix,
    and also if one is a part of the other. To compare two models of one file, pass
    ``checkpoint.only(name)`` for each.

    Raises:
        CheckpointError: One of the files cannot be read any more, or it has several models, and
            the other none of the same names.
    """
    pairs = _model_pairs(a, b)
    layers = [(pair.first.prefix, d) for pair in pairs for d in _layer_pairs(pair)]
    compared = {
        f"{stem}{layer.name}.{attribute}" if layer.name else stem + attribute
        for prefix, layer in layers
        for stem in (prefix, without_wrappers(prefix))
        for attribute in STATISTICS
    }
    with open_checkpoint(a.path) as before, open_checkpoint(b.path) as after:
        if all(pair.is_alike for pair in pairs):
            has_extras = before.format == after.format
            values = [_everything(each, has_extras=has_extras) for each in (before, after)]
        else:
            (pair,) = pairs
            name = pair.first.prefix + pair.first_stem
            values = [
                _of_model(before, pair.first.prefix, pair.first_stem, name),
                _of_model(after, pair.second.prefix, pair.second_stem, name),
            ]
        others = tuple(d for d in _entry_differences(*values) if d.key not in compared)
    return CheckpointDifference(a.path, b.path, tuple(layer for _, layer in layers), others)


@dataclass(frozen=True, eq=False)
class _Pair:
    """Two models to compare, with the modules around all layers that the other one lacks."""

    first: CheckpointModel
    second: CheckpointModel
    first_stem: str = ""
    second_stem: str = ""

    @property
    def is_alike(self) -> bool:
        """Whether both have the same names for the same entries."""
        return (self.first.prefix, self.first_stem) == (self.second.prefix, self.second_stem)


def _model_pairs(a: Checkpoint, b: Checkpoint) -> list[_Pair]:
    others = {model.prefix: model for model in b.models}
    pairs = [_Pair(model, others[model.prefix]) for model in a.models if model.prefix in others]
    if pairs and (len(pairs) > 1 or _names(pairs[0].first) & _names(pairs[0].second)):
        return pairs
    if not a.models or not b.models:
        return []
    first, second = (pairs[0].first, pairs[0].second) if pairs else (_only_model(a), _only_model(b))
    return [_Pair(first, second, *_stems(first, second))]


def _only_model(checkpoint: Checkpoint) -> CheckpointModel:
    if checkpoint.main is None:
        names = ", ".join(repr(model.name) for model in checkpoint.models)
        raise CheckpointError(
            f"{checkpoint.path} has several models, {names}, and the other checkpoint has none of "
            "these: choose one of each with --weights FIRST SECOND ('' is a bare state dict)"
        )
    return checkpoint.main


def _names(model: CheckpointModel) -> set[str]:
    return {layer.name for layer in model.layers}


def _stems(first: CheckpointModel, second: CheckpointModel) -> tuple[str, str]:
    """Return the modules around the layers in each model, if one is a part of the other.

    A network may be saved alone, and as the attribute of a larger one, or of two.
    """
    if _names(first) & _names(second):
        return "", ""
    if len(first.layers) < len(second.layers):
        return _stems(second, first)[::-1]
    sizes = {layer.name: layer.channels for layer in first.layers}
    inner = _common_stem(_names(second))
    bare = {layer.name.removeprefix(inner): layer.channels for layer in second.layers}
    some = f".{next(iter(bare))}"
    stems = {f".{name}".removesuffix(some) + "." for name in sizes if f".{name}".endswith(some)}
    fitting = [
        stem.removeprefix(".")
        for stem in stems
        if all(sizes.get(stem.removeprefix(".") + name) == size for name, size in bare.items())
    ]
    return (fitting[0], inner) if len(fitting) == 1 else ("", "")


def _common_stem(names: Iterable[str]) -> str:
    """Return the modules that all names begin with.

    >>> _common_stem(["net.bn", "net.body.bn"])
    'net.'
    """
    parts = [name.split(".")[:-1] for name in names]
    common = takewhile(lambda each: len(set(each)) == 1, zip(*parts, strict=False))
    return "".join(f"{each[0]}." for each in common)


def _layer_pairs(pair: _Pair) -> Iterator[LayerDifference]:
    others = {layer.name.removeprefix(pair.second_stem): layer for layer in pair.second.layers}
    for layer in pair.first.layers:
        if not layer.name.startswith(pair.first_stem):
            continue
        other = others.get(layer.name.removeprefix(pair.first_stem))
        if other is not None and other.channels == layer.channels:
            yield LayerDifference(layer, other)


def _everything(checkpoint: OpenCheckpoint, *, has_extras: bool) -> dict[str, object]:
    """Return all values of a checkpoint by dotted name, without the prefixes of wrappers."""
    values = {
        entry.prefix + without_wrappers(".".join(entry.path[entry.home :])): entry.value
        for entry in entries(checkpoint)
    }
    extras = checkpoint.extras if has_extras else {}
    return values | {f"<{name}>": value for name, value in extras.items()}


def _of_model(checkpoint: OpenCheckpoint, prefix: str, stem: str, name: str) -> dict[str, object]:
    """Return the tensors of one model below a stem, under the name that another one has for it."""
    found = ((entry.key_in(prefix), entry.value) for entry in entries(checkpoint))
    own = {without_wrappers(key): value for key, value in found if key is not None}
    return {
        name + key.removeprefix(stem): value
        for key, value in own.items()
        if isinstance(value, StoredTensor) and key.startswith(stem)
    }


def _entry_differences(
    a: Mapping[str, object], b: Mapping[str, object]
) -> Iterator[EntryDifference]:
    for key in {**a, **b}:
        if key in a and key in b:
            detail = _difference(a[key], b[key])
            if detail is not None:
                yield EntryDifference(key, detail)
        # A plain dictionary has the same entries as torch's state dict, without these two.
        elif _VERSIONS not in key.split(".") and a.get(key, b.get(key)) != _ORDERED:
            yield EntryDifference(key, f"only in the {'first' if key in a else 'second'}")


def _difference(a: object, b: object) -> str | None:
    """Return what differs between two values; None if nothing does."""
    if isinstance(a, StoredTensor) and isinstance(b, StoredTensor):
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return f"{a.dtype} {a.shape} against {b.dtype} {b.shape}"
        return None if _is_same(a.byte_chunks(), b.byte_chunks()) else "values differ"
    chunks_a, chunks_b = _chunks(a), _chunks(b)
    if chunks_a is not None and chunks_b is not None:
        return None if _is_same(chunks_a, chunks_b) else "values differ"
    # repr distinguishes -0.0 from 0.0 and 1 from True, and finds NaN equal to itself.
    is_same = type(a) is type(b) and repr(a) == repr(b)
    return None if is_same else f"{_short(a)} against {_short(b)}"


def _chunks(value: object) -> Iterator[bytes] | None:
    if isinstance(value, Blob):
        return value.place.chunks()
    if isinstance(value, TypedStorage):
        return value.storage.find_source().chunks()
    return None


def _is_same(a: Iterable[bytes], b: Iterable[bytes]) -> bool:
    return all(first == second for first, second in zip_longest(a, b))


def _short(value: object) -> str:
    text = type(value).__name__ if isinstance(value, (StoredTensor, Blob)) else repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
