"""What bnguard knows of a checkpoint once it is read: plain data, float64, nothing open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from bnguard.errors import CheckpointError, nearest_name
from bnguard.layers.distances import FloatArray

# Where Lightning keeps the state dict of the module.
LIGHTNING_PREFIX = "state_dict."


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
            ``"state_dict."`` for Lightning, ``""`` for a bare state dict.
        layers: Its BN layers, in the order in which they were saved.
    """

    prefix: str
    layers: tuple[CheckpointLayer, ...]

    @property
    def name(self) -> str:
        """The prefix without its dot, ``""`` for a bare state dict."""
        return self.prefix.removesuffix(".")


@dataclass(frozen=True)
class ForeignValue:
    """A hyper-parameter that is an object of a class, which is not built.

    Attributes:
        class_name: Dotted name of the class.
        parts: What it was made of: the fields of a dataclass by name, or a tuple with the value
            of a member of an enumeration; None where that is no plain data either.
    """

    class_name: str
    parts: Mapping[str, object] | tuple[object, ...] | None = None


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
        foreign_hyper_parameters: The others of the model, by name.
        foreign_data_hyper_parameters: The others of the data module, by name.
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
    foreign_hyper_parameters: Mapping[str, ForeignValue] = field(default_factory=dict)
    foreign_data_hyper_parameters: Mapping[str, ForeignValue] = field(default_factory=dict)
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
        """Return the model of this name.

        Raises:
            CheckpointError: There is none with BN layers.
        """
        models = {model.name: model for model in self.models}
        if name in models:
            return models[name]
        near = nearest_name(name, models)
        hint = f"did you mean {near!r}?" if near else f"it has {', '.join(map(repr, models))}"
        raise CheckpointError(f"{self.path} has no model {name!r} with BN layers: {hint}")

    def only(self, prefix: str) -> Checkpoint:
        """Return the checkpoint as if one of its models were the only one.

        Raises:
            CheckpointError: It has no such model.
        """
        models = tuple(model for model in self.models if model.prefix == prefix)
        if not models:
            names = ", ".join(repr(model.prefix) for model in self.models) or "none"
            raise CheckpointError(
                f"{self.path}: has no model {prefix!r} with BN layers; it has {names}"
            )
        return replace(self, models=models)
