"""What bnguard knows of a checkpoint once it is read: plain data, float64, no open files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from bnguard.errors import CheckpointError, nearest_name
from bnguard.findings import PastFinding
from bnguard.layers.distances import FloatArray
from bnguard.layers.names import without_wrappers

# Where Lightning keeps the state dict of the module.
LIGHTNING_PREFIX = "state_dict."


@dataclass(frozen=True, kw_only=True, eq=False)
class CheckpointLayer:
    """A BN layer as a checkpoint stores it. Arrays have shape ``(C,)``, float64.

    Attributes:
        name: Dotted name in the model, without the prefixes of wrappers.
        prefix: The name of its running mean in the file, without ``running_mean``.
        running_mean: Running mean.
        running_var: Running variance, the unbiased estimate.
        counter: ``num_batches_tracked``; None if the file has none.
        weight: Gamma; None without affine parameters.
        bias: Beta; None without affine parameters.
        dtype: Element type of the running statistics in the file, as torch names it.
        momentum: Weight of the new value in an update, None for a cumulative average.
        is_momentum_known: Whether the file holds the momentum, as a pickled module does.
        eps: What is added to the variance; None if the file does not hold it.
        is_updating: Whether train mode updates the statistics, as far as the file shows.
        aliases: Prefixes of the other layers whose running mean is in the same bytes.
        is_writable: Whether the statistics can be replaced; those in NumPy arrays cannot.
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
    is_writable: bool = True

    @property
    def channels(self) -> int:
        """C, the number of channels."""
        return len(self.running_mean)

    def key(self, attribute: str) -> str:
        """Return the name of an entry in the file, as ``write_statistics`` takes it."""
        return self.prefix + attribute


@dataclass(frozen=True, eq=False)
class CheckpointModel:
    """One of the models in a checkpoint.

    Attributes:
        prefix: The names of the file's entries begin with this, and the keys of its state dict
            follow: ``"state_dict."`` for Lightning, ``""`` for a bare state dict. For a part of a
            model it includes the names of the modules: ``"state_dict.encoder_q."``.
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
        for part in self.parts():
            inner = part.prefix.removeprefix(self.prefix)[:-1]
            if name in (inner, without_wrappers(inner), part.name):
                return part
        return None

    def parts(self) -> Iterator[CheckpointModel]:
        """Yield the part below each module that has BN layers in it, as a model."""
        seen: set[str] = set()
        for layer in self.layers:
            modules = layer.prefix.removeprefix(self.prefix).split(".")[:-1]
            for depth in range(1, len(modules)):
                prefix = self.prefix + "".join(f"{module}." for module in modules[:depth])
                if prefix not in seen:
                    seen.add(prefix)
                    inside = (each for each in self.layers if each.prefix.startswith(prefix))
                    named = (replace(e, name=layer_name(prefix, e.prefix)) for e in inside)
                    yield CheckpointModel(prefix, tuple(named))


def layer_name(model: str, layer: str) -> str:
    """Return the name of a layer in its model, from the prefixes of both."""
    return without_wrappers(layer.removeprefix(model)[:-1])


@dataclass(frozen=True)
class StoredArguments:
    """What Lightning's ``save_hyperparameters`` stored of a model or a data module.

    Attributes:
        values: Plain data by name: atoms, lists, tuples, dictionaries. A namespace is a dictionary
            here, a path a string.
        objects: Class names of all else that was stored, by name; objects are not rebuilt.
        argument: The argument that received all of it as one namespace or dictionary; None if each
            was an argument.
    """

    values: Mapping[str, object] = field(default_factory=dict)
    objects: Mapping[str, str] = field(default_factory=dict)
    argument: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A checkpoint, read without executing anything in it.

    Attributes:
        path: The file or folder.
        format: Name of its format.
        models: The models with BN layers in it; a Lightning checkpoint has one.
        is_lightning: Whether a Lightning Trainer saved it.
        hyper_parameters: The stored arguments of the model.
        data_hyper_parameters: The same of the data module.
        momenta: Momentum of the BN layers by name, as ``BatchNormMonitor`` noted it during
            training; empty if it did not.
        eps: The same of their eps.
        reported: What ``BatchNormMonitor`` had reported of the training when it was saved.
        monitored: What the checkpoint callbacks and early stopping monitored, by name: ``"min"``
            or ``"max"``, whichever is better.
        global_step: Training steps; None if the file does not say.
        epoch: Epochs; None if the file does not say.
        provenance: What bnguard noted when it wrote this file; None if it did not.
        problems: What looks like BN state and cannot be used, a line each.
    """

    path: Path
    format: str
    models: tuple[CheckpointModel, ...]
    is_lightning: bool = False
    hyper_parameters: StoredArguments = field(default_factory=StoredArguments)
    data_hyper_parameters: StoredArguments = field(default_factory=StoredArguments)
    momenta: Mapping[str, float | None] = field(default_factory=dict)
    eps: Mapping[str, float] = field(default_factory=dict)
    reported: tuple[PastFinding, ...] = ()
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
        """The model that is used if the user names none: the only one, or Lightning's own."""
        if len(self.models) == 1:
            return self.models[0]
        own = (model for model in self.models if model.prefix == LIGHTNING_PREFIX)
        return next(own, None) if self.is_lightning else None

    def model_named(self, name: str) -> CheckpointModel:
        """Return the model of this name, or the part of a model below the module of this name.

        Raises:
            CheckpointError: None has BN layers, or several models have such a part.
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
        if [*models] == [""]:
            hint = "it has a single one, without a name"
        raise CheckpointError(f"{self.path} has no model {name!r} with BN layers: {hint}")

    def only(self, name: str) -> Checkpoint:
        """Return the checkpoint as if one of its models, or a part of one, were the only one.

        Raises:
            CheckpointError: The file lacks the model.
        """
        return replace(self, models=(self.model_named(name),))

    def shared_with(self, model: CheckpointModel) -> tuple[str, ...]:
        """Return the models, or other layers of the same one, that share a model's statistics."""
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
