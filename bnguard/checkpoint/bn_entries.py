"""Finding BN state by key: ``PREFIX.running_mean`` and ``PREFIX.running_var``, and what is with it.

:class:`Checkpoint` is what bnguard knows of a file once it is read: plain data, float64, nothing
open. InstanceNorm with tracked statistics looks the same in a state dict, and is treated alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeGuard

from bnguard.checkpoint.contents import Contents, Entry, entries
from bnguard.checkpoint.stored_tensors import FLOATING, INTEGER, StoredTensor, to_float64
from bnguard.checkpoint.unpickling import InertObject, NotPlainError, mapping_of, plain
from bnguard.errors import CheckpointError, nearest_name, printable
from bnguard.layers.distances import FloatArray
from bnguard.layers.names import without_wrappers

# Where Lightning keeps the state dict of the module.
LIGHTNING_PREFIX = "state_dict."
MEAN, VAR, COUNTER = "running_mean", "running_var", "num_batches_tracked"
STATISTICS = (MEAN, VAR, COUNTER)
_AFFINE = ("weight", "bias")
# How Lightning writes what a callback monitors into the key of its state.
_MONITORED = re.compile(r"'monitor': '([^']+)', 'mode': '(min|max)'")
# A module saved as it was given as an argument is no model that was trained.
_NO_MODELS = ("hyper_parameters", "datamodule_hyper_parameters")
# Beyond these a file is hostile, not large: a thousand names may share one storage.
_MOST_CANDIDATES = 200_000
_LONGEST_KEY = 4096
_MOST_VALUES = 2**22
_ABSENT = object()
# What Keras and TensorFlow call them.
_FOREIGN_NAMES = {
    "moving_mean": MEAN,
    "moving_variance": VAR,
    "moving_var": VAR,
    "gamma": "weight",
    "beta": "bias",
}
_KEY = re.compile(r"(.*[./])?([^./:]*)(:\d+)?", re.DOTALL)
# Each layer may have a few.
_MOST_FINDINGS = 10_000


@dataclass(frozen=True, kw_only=True, eq=False)
class CheckpointLayer:
    """A BN layer as a checkpoint stores it. Arrays have shape ``(C,)``, float64.

    Attributes:
        name: Dotted name in the model, without the prefixes of wrappers.
        prefix: What stands before ``running_mean`` in the name of its entry in the file.
        running_mean: Running mean.
        running_var: Running variance, the unbiased estimate.
        counter: ``num_batches_tracked``; None where there is none.
        weight: Gamma; None without affine parameters.
        bias: Beta; None without affine parameters.
        dtype: Element type of the running statistics in the file, as torch names it.
        momentum: Weight of the new value in an update, None for a cumulative average.
        is_momentum_known: Whether the file holds the momentum, as a pickled module does.
        eps: What is added to the variance; None where the file does not hold it.
        is_updating: Whether train mode updates the statistics, as far as the file tells.
        aliases: Prefixes of the other layers of the file that share the bytes of this one's
            running mean.
    """

    name: str
    prefix: str
    running_mean: FloatArray
    running_var: FloatArray
    counter: int | None
    weight: FloatArray | None
    bias: FloatArray | None
    dtype: str
    momentum: float | None = None
    is_momentum_known: bool = False
    eps: float | None = None
    is_updating: bool = True
    aliases: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        """C, the number of channels."""
        return len(self.running_mean)

    def key(self, attribute: str) -> str:
        """Return the name of an entry of this layer in the file.

        ``write_statistics`` takes these names.
        """
        return self.prefix + attribute


@dataclass(frozen=True, eq=False)
class CheckpointModel:
    """One of the models in a checkpoint.

    Attributes:
        prefix: What stands before the keys of its state dict in the names of the file's entries:
            ``"state_dict."`` for Lightning, ``""`` for a bare state dict. For a part of a model
            that was named, the names of its modules follow: ``"state_dict.encoder_q."``.
        layers: Its BN layers, in the order in which they were saved.
    """

    prefix: str
    layers: tuple[CheckpointLayer, ...]

    @property
    def name(self) -> str:
        """The prefix without its dot, ``""`` for a bare state dict."""
        return self.prefix.removesuffix(".")

    def part(self, name: str) -> CheckpointModel | None:
        """Return the part of the model below a module, as a model; None without BN layers there.

        Args:
            name: Dotted name of the module, with or without the prefixes of the model and of
                wrappers: ``"encoder_q"``.
        """
        for layer in self.layers:
            modules = layer.prefix.removeprefix(self.prefix).split(".")[:-1]
            for depth in range(1, len(modules)):
                inner = ".".join(modules[:depth])
                if name in (inner, without_wrappers(inner), self.prefix + inner):
                    prefix = f"{self.prefix}{inner}."
                    inside = [each for each in self.layers if each.prefix.startswith(prefix)]
                    return CheckpointModel(
                        prefix,
                        tuple(
                            replace(each, name=_layer_name(each.prefix.removeprefix(prefix)))
                            for each in inside
                        ),
                    )
        return None


@dataclass(frozen=True, kw_only=True)
class NotedFinding:
    """A finding of the training that made a checkpoint, as the callback noted it there.

    Attributes:
        code: Code of the rule.
        name: Name of the rule.
        severity: ``"warning"`` or ``"error"``.
        layer: Dotted name of the layer; None for the model.
        message: What was wrong.
        evidence: The number that said so, in words.
        first_step: Step in which it first showed.
        last_step: Step in which it last did.
    """

    code: str
    name: str
    severity: str
    layer: str | None
    message: str
    evidence: str
    first_step: int
    last_step: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A checkpoint, read without executing anything in it.

    Attributes:
        path: The file or folder.
        format: Name of its format.
        models: The models with BN layers in it; a Lightning checkpoint has one.
        is_lightning: Whether a Lightning Trainer saved it.
        hyper_parameters: What Lightning's ``save_hyperparameters`` stored, as far as it is plain
            data: atoms, lists, tuples, dictionaries. A namespace is a dictionary here, a path a
            string.
        data_hyper_parameters: The same of the data module, as far as it is plain data.
        foreign_hyper_parameters: The others of the model, which are objects and not built: their
            classes by name.
        foreign_data_hyper_parameters: The same of the data module.
        hyper_parameters_argument: The argument that was given all of the model's as one
            namespace or dictionary; None where each was an argument.
        data_hyper_parameters_argument: The same of the data module.
        momenta: Momentum of the BN layers by name, as ``BatchNormMonitor`` noted it during
            training; empty where it did not.
        eps: The same of their eps.
        reported: What ``BatchNormMonitor`` had reported of the training when it was saved.
        monitored: What its checkpoint callbacks and early stopping monitored, by name: ``"min"``
            or ``"max"``, whichever is better.
        global_step: Training steps taken; None where the file does not say.
        epoch: Epochs; None where the file does not say.
        provenance: What bnguard noted when it wrote this file; None where it did not.
        problems: What looks like BN state and cannot be used, a line each.
    """

    path: Path
    format: str
    models: tuple[CheckpointModel, ...]
    is_lightning: bool = False
    hyper_parameters: Mapping[str, object] = field(default_factory=dict)
    data_hyper_parameters: Mapping[str, object] = field(default_factory=dict)
    foreign_hyper_parameters: Mapping[str, str] = field(default_factory=dict)
    foreign_data_hyper_parameters: Mapping[str, str] = field(default_factory=dict)
    hyper_parameters_argument: str | None = None
    data_hyper_parameters_argument: str | None = None
    momenta: Mapping[str, float | None] = field(default_factory=dict)
    eps: Mapping[str, float] = field(default_factory=dict)
    reported: tuple[NotedFinding, ...] = ()
    monitored: Mapping[str, str] = field(default_factory=dict)
    global_step: int | None = None
    epoch: int | None = None
    provenance: Mapping[str, object] | None = None
    problems: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[CheckpointLayer, ...]:
        """The BN layers of all models."""
        return tuple(layer for model in self.models for layer in model.layers)

    @property
    def main(self) -> CheckpointModel | None:
        """The model that is meant where none is named: the only one, or Lightning's own."""
        if len(self.models) == 1:
            return self.models[0]
        own = (model for model in self.models if model.prefix == LIGHTNING_PREFIX)
        return next(own, None) if self.is_lightning else None

    def model_named(self, name: str) -> CheckpointModel:
        """Return the model of this name, or the part of a model below the module of this name.

        Raises:
            CheckpointError: There is none with BN layers, or several models have such a part.
        """
        models = {model.name: model for model in self.models}
        if name in models:
            return models[name]
        parts = [part for model in self.models if (part := model.part(name)) is not None]
        if len(parts) == 1:
            return parts[0]
        if parts:
            names = ", ".join(repr(part.name) for part in parts)
            raise CheckpointError(f"{self.path} has several {name!r}: name one of {names}")
        near = nearest_name(name, models)
        hint = f"did you mean {near!r}?" if near else f"it has {', '.join(map(repr, models))}"
        raise CheckpointError(f"{self.path} has no model {name!r} with BN layers: {hint}")

    def only(self, name: str) -> Checkpoint:
        """Return the checkpoint as if one of its models, or a part of one, were the only one.

        Raises:
            CheckpointError: It has no such model.
        """
        return replace(self, models=(self.model_named(name),))

    def shared_with(self, model: CheckpointModel) -> tuple[str, ...]:
        """Return what else of the checkpoint changes with the statistics of a model.

        These are the names of other models, and of layers of the same one.
        """
        own = {layer.prefix for layer in model.layers}
        others = [alias for layer in model.layers for alias in layer.aliases if alias not in own]
        homes = {layer.prefix: each for each in self.models for layer in each.layers}
        return tuple(
            dict.fromkeys(
                alias.removesuffix(".")
                if alias not in homes or model.prefix.startswith(homes[alias].prefix)
                else homes[alias].name
                for alias in others
            )
        )


def attribute_of(key: str) -> str:
    """Return the last part of a dotted name.

    >>> attribute_of("layer1.0.bn1.running_mean")
    'running_mean'
    """
    return key.rpartition(".")[2]


def split_key(key: str) -> tuple[str, str]:
    """Return what stands before the last name of a key, and that name as PyTorch has it.

    >>> split_key("block1/bn/moving_variance:0"), split_key("bn.weight")
    (('block1/bn/', 'running_var'), ('bn.', 'weight'))
    """
    match = _KEY.fullmatch(key)
    before, name = (match[1] or "", match[2]) if match else ("", key)
    return before, _FOREIGN_NAMES.get(name, name)


def _layer_name(prefix: str) -> str:
    return without_wrappers(prefix[:-1])


def describe(contents: Contents) -> Checkpoint:
    """Read the BN layers of an opened checkpoint, and what it says about its training.

    Raises:
        CheckpointError: It is damaged, or holds more than can be BN state.
    """
    reader = _Reader(contents)
    models = []
    by_model = groups_by_model(contents)
    foreign_state = None if by_model else _foreign_state(contents)
    sharing: dict[tuple[int, int], list[str]] = {}
    for group in (group for groups in by_model.values() for group in groups):
        if (place := _place(group)) is not None:
            sharing.setdefault(place, []).append(group.prefix)
    for prefix, groups in by_model.items():
        layers = tuple(
            replace(layer, aliases=tuple(p for p in sharing[place] if p != layer.prefix))
            if (place := _place(group)) is not None and len(sharing[place]) > 1
            else layer
            for group in groups
            if (layer := reader.layer(prefix, group)) is not None
        )
        if layers:
            models.append(CheckpointModel(prefix, layers))
    root = mapping_of(contents.root) or {}
    own, foreign = _hyper_parameters(root, "hyper_parameters")
    of_data, foreign_of_data = _hyper_parameters(root, "datamodule_hyper_parameters")
    return Checkpoint(
        path=contents.path,
        format=contents.format,
        models=tuple(models),
        is_lightning=contents.is_lightning,
        hyper_parameters=own,
        data_hyper_parameters=of_data,
        foreign_hyper_parameters=foreign,
        foreign_data_hyper_parameters=foreign_of_data,
        hyper_parameters_argument=_text(root.get("hparams_name")),
        data_hyper_parameters_argument=_text(root.get("datamodule_hparams_name")),
        momenta=_numbers(_noted(root, "momentum")),
        eps={name: e for name, e in _numbers(_noted(root, "eps")).items() if e is not None},
        reported=tuple(_findings(_noted(root, "findings"))),
        monitored=_monitored(root),
        global_step=_count(root.get("global_step")),
        epoch=_count(root.get("epoch")),
        provenance=contents.provenance,
        problems=(*reader.problems(), *([foreign_state] if foreign_state else [])),
    )


@dataclass(frozen=True, eq=False)
class TensorGroup:
    """The tensors that look like one BN layer.

    Attributes:
        prefix: What stands before the attribute in the names of their entries.
        owner: The pickled module that holds them; None in a state dict.
        tensors: The tensors by attribute.
    """

    prefix: str
    owner: InertObject | None = None
    tensors: dict[str, StoredTensor] = field(default_factory=dict)


def groups_by_model(contents: Contents) -> dict[str, list[TensorGroup]]:
    """Return the groups of tensors with running statistics, by the prefix of their model.

    Raises:
        CheckpointError: The checkpoint holds more than can be BN state.
    """
    found: dict[tuple[str, str], TensorGroup] = {}
    for entry in _candidates(contents):
        prefix, attribute = split_key(entry.key)
        group = found.setdefault((entry.prefix, prefix), TensorGroup(prefix, entry.owner))
        is_own_name = attribute == attribute_of(entry.key)
        if is_own_name or attribute not in group.tensors:
            group.tensors[attribute] = entry.value  # type: ignore[assignment]
    by_model: dict[str, list[TensorGroup]] = {}
    for (model, _), group in found.items():
        if MEAN in group.tensors or VAR in group.tensors:
            by_model.setdefault(model, []).append(group)
    return by_model


def _place(group: TensorGroup) -> tuple[int, int] | None:
    """Return what running means in the same bytes have in common."""
    mean = group.tensors.get(MEAN)
    if mean is None or mean.is_meta:
        return None
    return id(mean.pieces[0].storage), mean.pieces[0].start


def _foreign_state(contents: Contents) -> str | None:
    """Return what BN state of other libraries is, where torch's names or tensors are missing."""
    saved = mapping_of(contents.root) or {"": contents.root}
    for value in saved.values():
        if isinstance(value, InertObject) and not isinstance(value.state, dict | tuple | None):
            return f"a {value.class_name} that hides its state; load it and save its state_dict()"
    for entry in entries(contents):
        # An array is an object of NumPy, and its parts are what entries are made of.
        for part in entry.path[:-1]:
            if split_key(part)[1] in (MEAN, VAR) and "numpy" in str(entry.value):
                return (
                    "its BN statistics are NumPy arrays that cannot be read: save them as "
                    "{k: torch.as_tensor(v) for k, v in state.items()}"
                )
    return None


def _candidates(contents: Contents) -> Iterator[Entry]:
    count = 0
    for entry in entries(contents):
        if not isinstance(entry.value, StoredTensor) or not entry.path:
            continue
        attribute = split_key(entry.path[-1])[1]
        if attribute not in (*STATISTICS, *_AFFINE) or entry.path[0] in _NO_MODELS:
            continue
        count += 1
        if count > _MOST_CANDIDATES or sum(map(len, entry.path)) > _LONGEST_KEY:
            raise CheckpointError(
                f"{contents.path}: has more layers, or longer names, than any model; "
                "save the state dict alone"
            )
        yield entry


class _Reader:
    """Reads groups of tensors as layers, and notes why one cannot be."""

    def __init__(self, contents: Contents) -> None:
        self.contents = contents
        self.layers_by_problem: dict[str, list[str]] = {}
        self.values = 0

    def problems(self) -> Iterator[str]:
        """Yield what was noted, a line for all layers that have the same problem."""
        for problem, names in self.layers_by_problem.items():
            yield f"{names[0] if len(names) == 1 else f'{len(names)} layers'}: {problem}"

    def layer(self, model: str, group: TensorGroup) -> CheckpointLayer | None:
        problem = _problem(group.tensors)
        if problem is not None:
            self._note(group, problem)
            return None
        mean, var = group.tensors[MEAN], group.tensors[VAR]
        options = group.owner.state if group.owner is not None else None
        options = options if isinstance(options, dict) else {}
        momentum, eps = options.get("momentum", _ABSENT), options.get("eps")
        is_frozen = group.owner is not None and ".FrozenBatchNorm" in group.owner.class_name
        return CheckpointLayer(
            name=_layer_name(group.prefix.removeprefix(model)),
            prefix=group.prefix,
            running_mean=self._values(mean),
            running_var=self._values(var),
            counter=self._counter(group),
            weight=self._affine(group, "weight"),
            bias=self._affine(group, "bias"),
            dtype=mean.dtype,
            momentum=float(momentum) if _is_number(momentum) else None,
            is_momentum_known=momentum is None or _is_number(momentum),
            eps=float(eps) if _is_number(eps) else None,
            is_updating=options.get("track_running_stats") is not False and not is_frozen,
        )

    def _values(self, tensor: StoredTensor) -> FloatArray:
        self.values += tensor.numel
        if self.values > _MOST_VALUES:
            raise CheckpointError(
                f"{self.contents.path}: its running statistics have more than {_MOST_VALUES:,} "
                "values together; these are not statistics of BN layers"
            )
        return to_float64(tensor.read(), tensor.dtype)

    def _counter(self, group: TensorGroup) -> int | None:
        tensor = group.tensors.get(COUNTER)
        if tensor is None:
            return None
        if tensor.is_meta or tensor.numel != 1 or tensor.dtype not in INTEGER | FLOATING:
            self._note(group, f"{COUNTER} is not a count (shape {tensor.shape}, {tensor.dtype})")
            return None
        if tensor.dtype in INTEGER:
            count = int(tensor.read().item())
        else:
            # Whoever converts a whole state dict converts the counters too.
            stored = float(to_float64(tensor.read(), tensor.dtype).item())
            if not stored.is_integer():
                self._note(group, f"{COUNTER} is {stored:g} ({tensor.dtype}), which is not a count")
                return None
            count = int(stored)
        if count < 0:
            self._note(group, f"{COUNTER} is {count}, which is not a count")
            return None
        return count

    def _affine(self, group: TensorGroup, attribute: str) -> FloatArray | None:
        tensor = group.tensors.get(attribute)
        if tensor is None:
            return None
        if tensor.is_meta or tensor.dtype not in FLOATING:
            self._note(group, f"{attribute} cannot be read ({_kind(tensor)})")
            return None
        if tensor.shape != group.tensors[MEAN].shape:
            self._note(
                group,
                f"{attribute} has shape {tensor.shape}, {MEAN} {group.tensors[MEAN].shape}",
            )
            return None
        return self._values(tensor)

    def _note(self, group: TensorGroup, problem: str) -> None:
        name = group.prefix.removesuffix(".") or "the model itself"
        self.layers_by_problem.setdefault(problem, []).append(printable(name))


def _problem(tensors: Mapping[str, StoredTensor]) -> str | None:
    """Return why tensors cannot be the running statistics of a layer; None where they can."""
    for present, absent in ((MEAN, VAR), (VAR, MEAN)):
        if absent not in tensors:
            return f"{present} without {absent}"
    mean, var = tensors[MEAN], tensors[VAR]
    for attribute, tensor in ((MEAN, mean), (VAR, var)):
        if tensor.is_meta or tensor.dtype not in FLOATING:
            return f"{attribute} cannot be read ({_kind(tensor)})"
        if len(tensor.shape) != 1:
            return f"{attribute} has shape {tensor.shape}, not one value per channel"
    if mean.shape != var.shape:
        return f"{MEAN} has shape {mean.shape}, {VAR} {var.shape}"
    return None


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _kind(tensor: StoredTensor) -> str:
    return "on the meta device, without values" if tensor.is_meta else tensor.dtype


def _hyper_parameters(
    root: Mapping[object, object], key: str
) -> tuple[Mapping[str, object], Mapping[str, str]]:
    """Return Lightning's hyper-parameters: those that are plain, and the classes of the others."""
    own, foreign = {}, {}
    for name, value in (mapping_of(root.get(key)) or {}).items():
        try:
            own[str(name)] = plain(value)
        except NotPlainError as error:
            foreign[str(name)] = str(error)
    return own, foreign


def _noted(root: Mapping[object, object], key: str) -> object:
    """Return what ``BatchNormMonitor`` noted in a checkpoint; None where it did not."""
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


def _findings(noted: object) -> Iterator[NotedFinding]:
    """Yield the findings of the training; what is not a finding is left out."""
    for record in noted[:_MOST_FINDINGS] if isinstance(noted, list) else ():
        given = mapping_of(record) or {}
        layer = given.get("layer")
        texts = {key: given.get(key) for key in ("code", "name", "severity", "message", "evidence")}
        first, last = _count(given.get("first_step")), _count(given.get("last_step"))
        is_whole = all(isinstance(text, str) for text in texts.values())
        if is_whole and (layer is None or isinstance(layer, str)) and None not in (first, last):
            yield NotedFinding(
                **{key: printable(str(text)) for key, text in texts.items()},
                layer=None if layer is None else printable(layer),
                first_step=first or 0,
                last_step=last or 0,
            )


def _monitored(root: Mapping[object, object]) -> dict[str, str]:
    """Return what callbacks monitored, which stands in the keys of their states."""
    states = mapping_of(root.get("callbacks")) or {}
    found = (_MONITORED.search(key) for key in states if isinstance(key, str))
    return {key[1]: key[2] for key in found if key}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _count(value: object) -> int | None:
    return value if type(value) is int else None
