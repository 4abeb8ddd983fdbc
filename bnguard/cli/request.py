"""What commands that repair a checkpoint begin with: its name, its model and data, its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from bnguard.checkpoint import Checkpoint, CheckpointModel, load_state_dict, read_checkpoint
from bnguard.checkpoint.reading import checkpoint_at
from bnguard.cli.model_and_data import (
    OPTIONS,
    Data,
    Subject,
    built_data,
    built_model,
    configuration_beside,
    data_of_model,
    has_loaders,
    named_subjects,
)
from bnguard.errors import CheckpointError, ConfigurationError, nearest_name
from bnguard.layers.names import without_wrappers

if TYPE_CHECKING:
    from torch import Tensor, nn

# For the help of these commands: the model and the data are parsed apart from the options.
SUBJECTS_USAGE = """checkpoint [--config FILE] [options]
           [--model PACKAGE.Class [--model.NAME VALUE ...]]
           [--data PACKAGE.Class [--data.NAME VALUE ...]]"""
SUBJECTS_HELP = """
the model and its data:
  --model PACKAGE.Class   class or function that makes the model; its arguments
                          follow as --model.NAME, and start from those of
                          --config and the checkpoint's hyper-parameters
  --data PACKAGE.Class    class of a data module, or function that gives a
                          loader, its arguments as --data.NAME; not needed
                          where the model has loaders itself
  --config FILE           what LightningCLI saved, found beside the checkpoint
                          by itself; where it names no class, --model does
"""
WEIGHTS_HELP = (
    "which model of a file that holds several, as inspect calls it, or which part of one: "
    "ema, encoder_q"
)


def asks_for_help(arguments: list[str]) -> bool:
    """Return whether help is asked for, before anything is imported to give it."""
    return not {"-h", "--help"}.isdisjoint(arguments)


@dataclass(frozen=True)
class Request:
    """A checkpoint, and what the command line says of its model and data; nothing is built yet.

    Attributes:
        checkpoint: The checkpoint.
        subjects: The classes or functions named, by ``"model"`` and ``"data"``.
        values: All arguments.
        overridden: What of the class's own settings the checkpoint replaced, once the model is
            built.
    """

    checkpoint: Checkpoint
    subjects: Mapping[str, Subject]
    values: Namespace
    overridden: list[str] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """What a user should know of where these come from, a line each."""
        files = {s.configuration.path for s in self.subjects.values() if s.configuration}
        here = Path.cwd()
        lines = [
            f"arguments from {path.relative_to(here) if path.is_relative_to(here) else path}"
            for path in sorted(files)
        ]
        return lines + self.overridden

    def model(self) -> tuple[nn.Module, CheckpointModel]:
        """Return the model with the weights of the checkpoint, and which of its models these are.

        Raises:
            ConfigurationError: The model cannot be built, or the weights have to be chosen.
            CheckpointError: The weights do not fit.
        """
        model = built_model(self.subjects["model"], self.values)
        stored = chosen_weights(self.checkpoint, model, self.values.weights)
        path = self.checkpoint.path
        _load_weights(model, load_state_dict(path, stored.prefix), path)
        self.overridden[:] = _take_settings(model, stored)
        return model, stored

    def data(self, model: nn.Module) -> Data:
        """Return the data, those of the model itself where no others are named.

        Raises:
            ConfigurationError: They cannot be built.
        """
        if "data" in self.subjects:
            return built_data(self.subjects["data"], self.values)
        return data_of_model(model, self.subjects["model"].path)

    def reference(self) -> Data | None:
        """Return the data of training, where they are named apart.

        Raises:
            ConfigurationError: They cannot be built.
        """
        subject = self.subjects.get("reference")
        return None if subject is None else built_data(subject, self.values)


def requested(
    parser: ArgumentParser, arguments: list[str], command: str, options: Iterable[str] = OPTIONS
) -> Request:
    """Read the checkpoint and the arguments, those of the model and the data among them.

    Args:
        parser: Knows ``checkpoint``, ``--weights`` and the options of the command.
        arguments: The arguments.
        command: Name of the command, for messages.
        options: What is named as a class or function, with arguments of its own.

    Raises:
        CheckpointError: The checkpoint cannot be read, or has no BN layers.
        ConfigurationError: The model or the data are not named, or cannot be imported.
    """
    source = checkpoint_at(_checkpoint_among(arguments, parser, command))
    checkpoint = read_checkpoint(source)
    if not checkpoint.layers:
        why = f": {checkpoint.problems[0]}" if checkpoint.problems else ""
        raise CheckpointError(
            f"{source}: has no BN layers with running statistics, so there is nothing to do{why}"
        )
    subjects, rest = named_subjects(arguments, configuration_beside(source), options)
    _add_subjects(parser, subjects, checkpoint)
    given = tuple(rest)
    for option in subjects:
        _check_names(parser, option, given)
        subjects[option].check_given(parser, given)
    return Request(checkpoint, subjects, parser.parse_args(rest))


def _check_names(parser: ArgumentParser, option: str, given: Iterable[str]) -> None:
    """Make sure that a class or function takes the arguments that are given for it.

    Raises:
        ConfigurationError: It does not take one.
    """
    known = [a.dest for a in parser._actions if a.dest.startswith(f"{option}.")]
    for word in given:
        name = word.removeprefix("--").partition("=")[0]
        if not (word.startswith("--") and name.startswith(f"{option}.")) or name in known:
            continue
        if any(name.startswith((f"{one}.", f"{one}+")) for one in known):
            continue  # a part of an argument
        if any(one.startswith(f"{name}.") for one in known):
            continue  # a group of them
        near = nearest_name(name, known)
        meant = f"did you mean --{near}? " if near else ""
        listed = ", ".join(f"--{one}" for one in known) or "no arguments"
        raise ConfigurationError(f"--{name} does not exist: {meant}it takes {listed}")


def chosen_weights(checkpoint: Checkpoint, model: nn.Module, named: str | None) -> CheckpointModel:
    """Return which of a checkpoint's models is loaded into a model.

    That is the one that is named; or Lightning's own; or the only one whose BN layers are those
    of the model.

    Raises:
        CheckpointError: There is none of that name, or none or several to choose from.
    """
    if named is not None:
        return checkpoint.model_named(named)
    if checkpoint.main is not None:
        return checkpoint.main
    from bnguard.layers.bn_layer import find_layers

    channels = {layer.name: layer.channels for layer in find_layers(model)}
    fitting = [
        stored
        for stored in checkpoint.models
        if {layer.name: layer.channels for layer in stored.layers} == channels
    ]
    if len(fitting) == 1:
        return fitting[0]
    several = f", of which {_listed(fitting)} fit {type(model).__name__}" if fitting else ""
    raise CheckpointError(
        f"{checkpoint.path} holds several models, {_listed(checkpoint.models)}{several}: "
        "choose one with --weights NAME"
    )


def _take_settings(model: nn.Module, stored: CheckpointModel) -> list[str]:
    """Give BN layers the momentum and eps of a pickled module, and say where they had others."""
    from bnguard.layers.bn_layer import find_layers

    in_file = {layer.name: layer for layer in stored.layers}
    changed: dict[str, list[tuple[object, object]]] = {}
    for layer in find_layers(model):
        known = in_file.get(layer.name)
        if known is None:
            continue
        if known.eps is not None and layer.adapter.eps == "eps" and layer.eps != known.eps:
            changed.setdefault("eps", []).append((known.eps, layer.eps))
            layer.module.eps = known.eps  # type: ignore[assignment]
        has_momentum = known.is_momentum_known and layer.adapter.momentum == "momentum"
        if has_momentum and layer.module.momentum != known.momentum:
            changed.setdefault("momentum", []).append((known.momentum, layer.module.momentum))
            layer.module.momentum = known.momentum  # type: ignore[assignment]
    return [
        f"{setting} {pairs[0][0]} from the checkpoint, where {type(model).__name__} has "
        f"{pairs[0][1]} ({len(pairs)} {'layer' if len(pairs) == 1 else 'layers'})"
        for setting, pairs in changed.items()
    ]


def _listed(models: Iterable[CheckpointModel]) -> str:
    return ", ".join(repr(model.name) for model in models)


def _checkpoint_among(arguments: list[str], parser: ArgumentParser, command: str) -> Path:
    """Return the checkpoint, which is read before the arguments of the model are known."""
    options = parser._option_string_actions
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--" or not argument.startswith("-"):
            named = next(remaining, None) if argument == "--" else argument
            if named is not None:
                return Path(named)
        elif "=" not in argument and (argument not in options or options[argument].nargs != 0):
            next(remaining, None)  # its value
    raise ConfigurationError(f"no checkpoint is named: bnguard {command} CKPT --model …")


def _add_subjects(
    parser: ArgumentParser, subjects: dict[str, Subject], checkpoint: Checkpoint
) -> None:
    """Add the arguments of model and data; the model's start from the checkpoint's own.

    Raises:
        ConfigurationError: The model or the data are not named.
    """
    if "model" not in subjects:
        raise ConfigurationError("--model is missing: name it as --model package.module.Class")
    if "data" not in subjects and not has_loaders(subjects["model"].build):
        raise ConfigurationError("--data is missing: name it as --data package.module.Class")
    for option, subject in subjects.items():
        subjects[option] = subject.starting_from(*_stored(checkpoint, option))
        subjects[option].add_arguments(parser)


def _stored(
    checkpoint: Checkpoint, option: str
) -> tuple[Mapping[str, object], Mapping[str, str], str | None]:
    """Return the hyper-parameters of the model or the data, and the argument that took them all.

    They are plain values by name, and the classes of those that are objects by name.
    """
    if option == "model":
        return (
            checkpoint.hyper_parameters,
            checkpoint.foreign_hyper_parameters,
            checkpoint.hyper_parameters_argument,
        )
    if option == "data":
        return (
            checkpoint.data_hyper_parameters,
            checkpoint.foreign_data_hyper_parameters,
            checkpoint.data_hyper_parameters_argument,
        )
    return {}, {}, None


def _load_weights(model: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Load the weights, or say in one line why they are not this model's.

    Raises:
        CheckpointError: They do not fit.
    """
    from bnguard.recalibration.options import unwrap

    inner = unwrap(model)
    try:
        missing, unexpected = inner.load_state_dict(_named_as_in(inner, state), strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{source} does not fit {type(model).__name__}: {reason}") from error
    if not getattr(inner, "strict_loading", True):  # a Lightning module that says so
        return
    lacking = _without_tied(missing, inner.state_dict())
    wrong = [f"lacks {name}" for name in lacking] + [f"has {name} too much" for name in unexpected]
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise CheckpointError(f"{source} does not fit {type(model).__name__}: it {wrong[0]}{more}")


def _named_as_in(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights by the names that the model has for them, wherever wrappers were put in."""
    own = model.state_dict().keys()
    by_author = {without_wrappers(name): name for name in own}
    return {
        name if name in own else by_author.get(without_wrappers(name), name): tensor
        for name, tensor in state.items()
    }


def _without_tied(missing: Iterable[str], state: Mapping[str, Tensor]) -> list[str]:
    """Return those of the names whose tensor has no second name under which it was loaded.

    safetensors keeps one name only of a tensor that is tied.
    """
    absent = set(missing)
    loaded = {_place(tensor) for name, tensor in state.items() if name not in absent}
    return [name for name in missing if name not in state or _place(state[name]) not in loaded]


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Return what two names of one tensor have in common."""
    # An empty one, or one on the meta device, lies nowhere.
    where = tensor.data_ptr() or id(tensor)
    return where, tensor.shape, tensor.stride(), tensor.dtype
