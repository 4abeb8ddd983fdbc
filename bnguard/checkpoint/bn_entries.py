"""Finding BN state by key: ``PREFIX.running_mean`` and ``PREFIX.running_var``, and the rest.

InstanceNorm with tracked statistics looks the same in a state dict, and is treated alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

from bnguard.checkpoint.contents import Entry, entries
from bnguard.checkpoint.formats import OpenCheckpoint
from bnguard.checkpoint.result import (
    Checkpoint,
    CheckpointLayer,
    CheckpointModel,
    StoredArguments,
    layer_name,
)
from bnguard.checkpoint.storage import FLOATING, INTEGER, StoredTensor
from bnguard.checkpoint.unpickling import InertObject, NotPlainError, mapping_of, plain
from bnguard.errors import CheckpointError, printable
from bnguard.findings import PastFinding
from bnguard.layers.distances import FloatArray

MEAN, VAR, COUNTER = "running_mean", "running_var", "num_batches_tracked"
STATISTICS = (MEAN, VAR, COUNTER)
_AFFINE = ("weight", "bias")
# The names in Keras and TensorFlow.
_FOREIGN_NAMES = {
    "moving_mean": MEAN,
    "moving_variance": VAR,
    "moving_var": VAR,
    "gamma": "weight",
    "beta": "bias",
}
_KEY = re.compile(r"(.*[./])?([^./:]*)(:\d+)?", re.DOTALL)
# A module that was an argument is not the model that was trained.
_ARGUMENTS = ("hyper_parameters", "datamodule_hyper_parameters")
# Lightning writes what a callback monitors into the key of its state.
_MONITORED = re.compile(r"'monitor': '([^']+)', 'mode': '(min|max)'")
# Beyond these a file is hostile, not large: a thousand names may share one storage.
_MOST_CANDIDATES = 200_000
_LONGEST_KEY = 4096
_MOST_VALUES = 2**22
_MOST_FINDINGS = 10_000
_ABSENT = object()


def describe(checkpoint: OpenCheckpoint) -> Checkpoint:
    """Read the BN layers of an open checkpoint, and what it says about its training."""
    by_model = groups_by_model(checkpoint)
    sharing: dict[object, list[str]] = {}
    for group in (group for groups in by_model.values() for group in groups):
        sharing.setdefault(group.place, []).append(group.prefix)
    reader = _Reader(checkpoint.path)
    models = []
    for prefix, groups in by_model.items():
        read = (reader.layer(prefix, group, sharing[group.place]) for group in groups)
        layers = tuple(layer for layer in read if layer is not None)
        if layers:
            models.append(CheckpointModel(prefix, layers))
    root = mapping_of(checkpoint.root) or {}
    unknown = () if by_model else _find_unreadable_state(checkpoint)
    return Checkpoint(
        path=checkpoint.path,
        format=checkpoint.format,
        models=tuple(models),
        is_lightning=checkpoint.is_lightning,
        hyper_parameters=_read_arguments(root, "hyper_parameters", "hparams_name"),
        data_hyper_parameters=_read_arguments(
            root, "datamodule_hyper_parameters", "datamodule_hparams_name"
        ),
        momenta=_numbers(_read_note(root, "momentum")),
        eps={name: e for name, e in _numbers(_read_note(root, "eps")).items() if e is not None},
        reported=tuple(_findings(_read_note(root, "findings"))),
        monitored=_read_monitored(root),
        global_step=_count(root.get("global_step")),
        epoch=_count(root.get("epoch")),
        provenance=checkpoint.provenance,
        problems=(*reader.problems(), *unknown),
    )


@dataclass(frozen=True, eq=False)
class TensorGroup:
    """The tensors that look like one BN layer, by attribute."""

    prefix: str
    owner: InertObject | None = None  # the pickled module that holds them
    tensors: dict[str, StoredTensor] = field(default_factory=dict)

    @property
    def place(self) -> object:
        """What running means in the same bytes have in common."""
        mean = self.tensors.get(MEAN)
        if mean is None or mean.is_meta:
            return id(self)
        return id(mean.pieces[0].storage), mean.pieces[0].start


def groups_by_model(checkpoint: OpenCheckpoint) -> dict[str, list[TensorGroup]]:
    """Return the groups of tensors with running statistics, by the prefix of their model."""
    found: dict[tuple[str, str], TensorGroup] = {}
    for entry, tensor in _candidates(checkpoint):
        prefix, attribute = _split_key(entry.key)
        group = found.setdefault((entry.prefix, prefix), TensorGroup(prefix, entry.owner))
        # torch's own name wins over a foreign one.
        if entry.key.endswith(attribute) or attribute not in group.tensors:
            group.tensors[attribute] = tensor
    by_model: dict[str, list[TensorGroup]] = {}
    for (model, _), group in found.items():
        if MEAN in group.tensors or VAR in group.tensors:
            by_model.setdefault(model, []).append(group)
    return by_model


def _candidates(checkpoint: OpenCheckpoint) -> Iterator[tuple[Entry, StoredTensor]]:
    count = 0
    for entry in entries(checkpoint):
        if not isinstance(entry.value, StoredTensor) or not entry.path:
            continue
        attribute = _split_key(entry.path[-1])[1]
        if attribute not in (*STATISTICS, *_AFFINE) or entry.path[0] in _ARGUMENTS:
            continue
        count += 1
        if count > _MOST_CANDIDATES or sum(map(len, entry.path)) > _LONGEST_KEY:
            raise CheckpointError(
                f"{checkpoint.path}: has more layers, or longer names, than any model; "
                "save the state dict alone"
            )
        yield entry, entry.value


def _split_key(key: str) -> tuple[str, str]:
    """Return a key without its last name, and that name as PyTorch has it.

    >>> _split_key("block1/bn/moving_variance:0"), _split_key("bn.weight")
    (('block1/bn/', 'running_var'), ('bn.', 'weight'))
    """
    match = _KEY.fullmatch(key)
    before, name = (match[1] or "", match[2]) if match else ("", key)
    return before, _FOREIGN_NAMES.get(name, name)


def _find_unreadable_state(checkpoint: OpenCheckpoint) -> Iterator[str]:
    """Yield which BN state of other libraries the checkpoint may have."""
    saved = mapping_of(checkpoint.root) or {"": checkpoint.root}
    for value in saved.values():
        if isinstance(value, InertObject) and not isinstance(value.state, dict | tuple | None):
            yield f"a {value.class_name} that hides its state; load it and save its state_dict()"
            return
    for entry in entries(checkpoint):
        # What is not read as a tensor is an object, and entries are its parts.
        is_statistic = any(_split_key(part)[1] in (MEAN, VAR) for part in entry.path[:-1])
        if is_statistic and "torch._utils._rebuild" in str(entry.value):
            yield "its tensors were pickled without torch.save; load it and save it by torch.save"
            return
        if is_statistic and "numpy" in str(entry.value):
            yield (
                "its BN statistics are NumPy arrays that cannot be read: save them as "
                "{k: torch.as_tensor(v) for k, v in state.items()}"
            )
            return


class _Reader:
    """Reads groups of tensors as layers, and notes why one cannot be read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._layers_by_problem: dict[str, list[str]] = {}
        self._values = 0

    def problems(self) -> Iterator[str]:
        """Yield what was noted, a line for all layers that have the same problem."""
        for problem, names in self._layers_by_problem.items():
            yield f"{names[0] if len(names) == 1 else f'{len(names)} layers'}: {problem}"

    def layer(
        self, model: str, group: TensorGroup, same_place: list[str]
    ) -> CheckpointLayer | None:
        problem = _problem(group.tensors)
        if problem is not None:
            self._note(group, problem)
            return None
        mean, var = group.tensors[MEAN], group.tensors[VAR]
        state = group.owner.state if group.owner is not None else None
        options = state if isinstance(state, dict) else {}
        momentum, eps = options.get("momentum", _ABSENT), options.get("eps")
        is_frozen = group.owner is not None and ".FrozenBatchNorm" in group.owner.class_name
        return CheckpointLayer(
            name=layer_name(model, group.prefix),
            prefix=group.prefix,
            running_mean=self._read(mean),
            running_var=self._read(var),
            counter=self._counter(group),
            weight=self._affine(group, "weight"),
            bias=self._affine(group, "bias"),
            dtype=mean.dtype,
            momentum=float(momentum) if _is_number(momentum) else None,
            is_momentum_known=momentum is None or _is_number(momentum),
            eps=float(eps) if _is_number(eps) else None,
            is_updating=options.get("track_running_stats") is not False and not is_frozen,
            aliases=tuple(prefix for prefix in same_place if prefix != group.prefix),
            is_writable=all(p.storage.is_replaceable for t in (mean, var) for p in t.pieces),
        )

    def _read(self, tensor: StoredTensor) -> FloatArray:
        self._values += tensor.numel
        if self._values > _MOST_VALUES:
            raise CheckpointError(
                f"{self._path}: its running statistics have more than {_MOST_VALUES:,} "
                "values together; these are not statistics of BN layers"
            )
        return tensor.to_float64()

    def _counter(self, group: TensorGroup) -> int | None:
        tensor = group.tensors.get(COUNTER)
        if tensor is None:
            return None
        if tensor.is_meta or tensor.numel != 1 or tensor.dtype not in INTEGER | FLOATING:
            self._note(group, f"{COUNTER} is not a count (shape {tensor.shape}, {tensor.dtype})")
            return None
        # Whoever converts a whole state dict converts the counters too.
        count = float(tensor.to_float64().item())
        if not count.is_integer() or count < 0:
            self._note(group, f"{COUNTER} is {count:g} ({tensor.dtype}), which is not a count")
            return None
        return int(count)

    def _affine(self, group: TensorGroup, attribute: str) -> FloatArray | None:
        tensor, mean = group.tensors.get(attribute), group.tensors[MEAN]
        if tensor is None:
            return None
        problem = _unreadable(attribute, tensor)
        if problem is None and tensor.shape != mean.shape:
            problem = f"{attribute} has shape {tensor.shape}, {MEAN} {mean.shape}"
        if problem is not None:
            self._note(group, problem)
            return None
        return self._read(tensor)

    def _note(self, group: TensorGroup, problem: str) -> None:
        name = group.prefix.removesuffix(".") or "the model itself"
        self._layers_by_problem.setdefault(problem, []).append(printable(name))


def _problem(tensors: Mapping[str, StoredTensor]) -> str | None:
    """Return why tensors cannot be the running statistics of a layer; None if they can."""
    for present, absent in ((MEAN, VAR), (VAR, MEAN)):
        if absent not in tensors:
            return f"{present} without {absent}"
    for attribute in (MEAN, VAR):
        if (problem := _unreadable(attribute, tensors[attribute])) is not None:
            return problem
        if len(tensors[attribute].shape) != 1:
            return f"{attribute} has shape {tensors[attribute].shape}, not one value per channel"
    if tensors[MEAN].shape != tensors[VAR].shape:
        return f"{MEAN} has shape {tensors[MEAN].shape}, {VAR} {tensors[VAR].shape}"
    return None


def _unreadable(attribute: str, tensor: StoredTensor) -> str | None:
    """Return why a tensor does not have values in floating point; None if it has."""
    if tensor.is_meta:
        return f"{attribute} cannot be read (on the meta device, without values)"
    return None if tensor.dtype in FLOATING else f"{attribute} cannot be read ({tensor.dtype})"


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _read_arguments(root: Mapping[object, object], key: str, name_key: str) -> StoredArguments:
    values, objects = {}, {}
    for name, value in (mapping_of(root.get(key)) or {}).items():
        try:
            values[str(name)] = plain(value)
        except NotPlainError as error:
            objects[str(name)] = str(error)
    argument = root.get(name_key)
    return StoredArguments(values, objects, argument if isinstance(argument, str) else None)


def _read_note(root: Mapping[object, object], key: str) -> object:
    """Return what ``BatchNormMonitor`` noted in a checkpoint; None if it did not."""
    node: object = root
    for part in ("bnguard", "monitor", key):
        node = (mapping_of(node) or {}).get(part)
    return node


def _numbers(noted: object) -> dict[str, float | None]:
    """Return a number of each layer, by its name."""
    return {
        str(name): value
        for name, value in (mapping_of(noted) or {}).items()
        if value is None or isinstance(value, float)
    }


def _findings(noted: object) -> Iterator[PastFinding]:
    """Yield the findings of the training, without what is not a finding."""
    for record in noted[:_MOST_FINDINGS] if isinstance(noted, list) else ():
        match mapping_of(record):
            case {
                "code": str(code),
                "name": str(name),
                "severity": str(severity),
                "layer": str() | None as layer,
                "message": str(message),
                "evidence": str(evidence),
                "first_step": int(first),
                "last_step": int(last),
            }:
                yield PastFinding(
                    code=printable(code),
                    name=printable(name),
                    severity=printable(severity),
                    layer=None if layer is None else printable(layer),
                    message=printable(message),
                    evidence=printable(evidence),
                    first_step=first,
                    last_step=last,
                )


def _read_monitored(root: Mapping[object, object]) -> dict[str, str]:
    """Return what callbacks monitored, from the keys of their states."""
    states = mapping_of(root.get("callbacks")) or {}
    found = (_MONITORED.search(key) for key in states if isinstance(key, str))
    return {key[1]: key[2] for key in found if key}


def _count(value: object) -> int | None:
    return value if type(value) is int else None
