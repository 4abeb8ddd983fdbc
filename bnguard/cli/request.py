"""How commands on a checkpoint with model and data begin: options, checkpoint, model, weights."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, Namespace

from bnguard.checkpoint import Checkpoint, CheckpointModel, OpenCheckpoint, file_states
from bnguard.checkpoint.bn_entries import describe
from bnguard.checkpoint.reading import checkpoint_at, load_model, open_checkpoint
from bnguard.cli.model_and_data import Data, Factory, find_config, find_factory, read_config
from bnguard.cli.output import add_json_option, command_parser
from bnguard.cli.stored_arguments import arguments_for
from bnguard.errors import CheckpointError, ConfigurationError, nearest_name, path_from_here
from bnguard.layers.names import without_wrappers

if TYPE_CHECKING:
    from torch import Tensor, nn

# These options are read before the parser knows the arguments of the model and the data.
_USAGE = """checkpoint [--config FILE] [options]
           [--model PACKAGE.Class [--model.NAME VALUE ...]]
           [--data PACKAGE.Class [--data.NAME VALUE ...]]"""
_HELP = """
the model and its data:
  --model PACKAGE.Class   class or function that makes the model; its arguments
                          follow as --model.NAME, and start from those of
                          --config and the checkpoint's hyper-parameters
  --data PACKAGE.Class    class of a data module, or function that gives a
                          loader, its arguments as --data.NAME, or a loader;
                          not needed if the model has loaders itself
  --config FILE           what LightningCLI saved; by default that next to the
                          checkpoint; --model names the class if it does not
"""

_MISSING = (
    "--{0} is missing: name a class or a function, as --{0} package.module.{1} or --{0} file.py:{2}"
)


def model_command_parser(
    command: str, description: str, epilog: str, usage: str = ""
) -> ArgumentParser:
    """Return the parser of a command on a checkpoint with model and data, and its first options."""
    parser = command_parser(command, description, _HELP + epilog, _USAGE + usage)
    parser.add_argument("checkpoint", type=str, help="checkpoint to read")
    parser.add_argument(
        "--weights",
        type=str,
        help="which model of a file that holds several, as inspect calls it, or which part of "
        "one: ema, encoder_q",
    )
    parser.add_argument(
        "--metric",
        type=str,
        help="validation metric that is the score; by default what the training's checkpoint "
        "callback monitored, else one named like an accuracy, else the loss",
    )
    parser.add_argument("--device", type=str, default="cpu", help="cpu, cuda, cuda:1, mps, …")
    add_json_option(parser)
    return parser


def add_writing_options(parser: ArgumentParser, word: str) -> None:
    """Add the options of commands that compute in a precision and write a checkpoint."""
    parser.add_argument(
        "--precision",
        type=Literal["32-true", "16-mixed", "bf16-mixed"],
        default="32-true",
        help="as the Trainer names it",
    )
    parser.add_argument("--output", type=str, help=f"where to write; NAME-{word} by default")
    parser.add_argument("--force", action="store_true", help="write over an existing file")


@dataclass(frozen=True)
class Option:
    """An option of a command line.

    Attributes:
        name: Its name without dashes: ``model.width``.
        value: Its value; None for a flag.
        words: The arguments that give it, as they were typed.
    """

    name: str
    value: str | None
    words: Sequence[str]


def split_arguments(
    arguments: Iterable[str], flags: Container[str]
) -> tuple[list[str], list[Option]]:
    """Return the positional arguments of a command line, and its options; flags take no value.

    >>> split_arguments(["a.ckpt", "--json", "--model.lr=1"], {"--json"})[0]
    ['a.ckpt']
    """
    positional: list[str] = []
    options: list[Option] = []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--":
            positional += remaining
        elif not argument.startswith("-"):
            positional.append(argument)
        else:
            typed, is_joined, value = argument.partition("=")
            name = typed.lstrip("-").removesuffix("+")
            following = None if is_joined or typed in flags else next(remaining, None)
            words = [argument] if following is None else [argument, following]
            options.append(Option(name, value if is_joined else following, words))
    return positional, options


@dataclass(frozen=True)
class Request:
    """A checkpoint, and what the command line says about its model and data; nothing is built yet.

    Attributes:
        opened: The checkpoint, open until the weights are loaded.
        factories: What makes the model and the data, by ``"model"``, ``"data"``, ``"reference"``.
        states: What changes if the checkpoint is saved again.
        options: The options as they were typed.
        notes: Where arguments come from, and settings of the checkpoint that :meth:`model` took,
            a line each.
    """

    checkpoint: Checkpoint
    opened: OpenCheckpoint
    factories: Mapping[str, Factory]
    states: object
    values: Namespace
    options: Sequence[Option]
    notes: list[str] = field(default_factory=list)

    def model(self) -> tuple[nn.Module, CheckpointModel]:
        """Return the model with the checkpoint's weights, and which of its models these are."""
        model = self.factories["model"].make_model(self.values)
        stored = _choose_weights(self.checkpoint, model, self.values.weights)
        _load_weights(model, load_model(self.opened, stored.prefix), self.checkpoint.path)
        self.opened.files.close()  # The command may replace the file.
        self.notes.extend(_take_settings(model, stored))
        return model, stored

    def data(self, model: nn.Module) -> Data:
        """Return the data, by default those of the model itself."""
        if "data" not in self.factories:
            return Data(self.factories["model"].path, model)
        return self._make_data("data")

    def reference(self) -> Data | None:
        """Return the training data that ``--reference`` names; None without that option."""
        return self._make_data("reference") if "reference" in self.factories else None

    def _make_data(self, option: str) -> Data:
        return Data(self.factories[option].path, self.factories[option].make(self.values))


def run_request(
    parser: ArgumentParser,
    arguments: list[str],
    work: Callable[[Request], int],
    sections: Sequence[str] = ("model", "data"),
) -> int:
    """Read the checkpoint and the arguments, and do the work, which returns the exit status.

    ``sections`` are the options that name a class or function with arguments of its own.
    """
    if not {"-h", "--help"}.isdisjoint(arguments):
        parser.parse_args(["--help"])
    # Imports torch and Lightning, for which help does not wait.
    from bnguard.lightning.scoring import quiet_lightning

    with quiet_lightning(), ExitStack() as files:
        return work(_read_request(parser, arguments, sections, files))


def _read_request(
    parser: ArgumentParser, arguments: list[str], sections: Sequence[str], files: ExitStack
) -> Request:
    known = parser._option_string_actions
    flags = {typed for typed, action in known.items() if action.nargs == 0}
    positional, options = split_arguments(arguments, flags)
    _check_options(parser.prog, options, known, sections)
    if not positional:
        raise ConfigurationError(f"the checkpoint is missing: {parser.prog} CKPT --model …")
    source = checkpoint_at(Path(positional[0]))
    states = file_states(source) if source.exists() else None
    opened = files.enter_context(open_checkpoint(source))
    checkpoint = describe(opened)
    if not checkpoint.layers:
        why = f": {checkpoint.problems[0]}" if checkpoint.problems else ""
        raise CheckpointError(
            f"{source}: has no BN layers with running statistics: nothing to do{why}"
        )
    apart = {option.name: option for option in options if option.name in (*sections, "config")}
    for option in apart.values():
        if not option.value or option.value.startswith("--"):
            raise ConfigurationError(f"--{option.name} needs a value")
    named = {name: option.value for name, option in apart.items()}
    config = (
        find_config(source)
        if named.get("config") is None
        else read_config(Path(named["config"] or ""))
    )
    found = {section: find_factory(section, named.get(section), config) for section in sections}
    factories = {
        section: replace(factory, stored=arguments_for(checkpoint, section, factory.build))
        for section, factory in found.items()
        if factory is not None
    }
    if "model" not in factories:
        raise ConfigurationError(_MISSING.format("model", "Class", "build_net"))
    if "data" not in factories and not factories["model"].has_loaders:
        raise ConfigurationError(_MISSING.format("data", "DataModule", "train_loader"))
    for factory in factories.values():
        factory.add_arguments(parser, [option.name for option in options])
    rest = [word for option in options if option.name not in apart for word in option.words]
    configs = {f.config.path for f in factories.values() if f.config is not None}
    notes = [f"arguments from {path_from_here(path)}" for path in sorted(configs)]
    values = parser.parse_args([*rest, "--", *positional])
    return Request(checkpoint, opened, factories, states, values, options, notes)


def _check_options(
    program: str, options: Iterable[Option], known: Iterable[str], sections: Sequence[str]
) -> None:
    """Refuse an option that is none, whose value would be taken for a checkpoint."""
    for option in options:
        typed = option.words[0].partition("=")[0]
        is_of_section = option.name.partition(".")[0] in (*sections, "config")
        if is_of_section or any(name.startswith(typed) for name in known):
            continue
        near = nearest_name(option.name, (name.lstrip("-") for name in known))
        hint = f"did you mean --{near}?" if near else f"'{program} --help' lists the options"
        raise ConfigurationError(f"{typed} does not exist: {hint}")


def _choose_weights(checkpoint: Checkpoint, model: nn.Module, named: str | None) -> CheckpointModel:
    """Return the model that is named, or the one, or the part of it, that has the BN layers."""
    if named is not None:
        return checkpoint.model_named(named)
    from bnguard.layers.bn_layer import find_layers

    channels = {layer.name: layer.channels for layer in find_layers(model)}

    def choose_fitting(models: Iterable[CheckpointModel]) -> tuple[CheckpointModel, ...]:
        sizes = (
            (model, {layer.name: layer.channels for layer in model.layers}) for model in models
        )
        return tuple(model for model, found in sizes if found == channels)

    main = checkpoint.main
    if main is None:
        known, fitting = checkpoint.models, choose_fitting(checkpoint.models)
    else:
        # Perhaps the network alone, of a file that holds the Lightning module around it.
        known = fitting = choose_fitting([main]) or choose_fitting(main.parts()) or (main,)
    if len(fitting) == 1:
        return fitting[0]
    several = f" ({_list_names(fitting)} fit {type(model).__name__})" if fitting else ""
    raise CheckpointError(
        f"{checkpoint.path} has several models, {_list_names(known)}{several}: "
        "choose one with --weights NAME"
    )


def _take_settings(model: nn.Module, stored: CheckpointModel) -> list[str]:
    """Give BN layers the momentum and eps of a pickled module; return a line for each change."""
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
        f"{setting} {pairs[0][0]} from the checkpoint, not {type(model).__name__}'s "
        f"{pairs[0][1]} ({len(pairs)} {'layer' if len(pairs) == 1 else 'layers'})"
        for setting, pairs in changed.items()
    ]


def _list_names(models: Iterable[CheckpointModel]) -> str:
    return ", ".join(repr(model.name) for model in models)


def _load_weights(model: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Load the weights into the model."""
    from bnguard.recalibration.options import unwrap

    inner = unwrap(model)
    try:
        missing, unexpected = inner.load_state_dict(_rename_as_in(inner, state), strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{source} does not fit {type(model).__name__}: {reason}") from error
    if not getattr(inner, "strict_loading", True):  # a Lightning module that says so
        return
    lacking = _without_tied(missing, inner.state_dict())
    wrong = [f"the file lacks {name}" for name in lacking]
    wrong += [f"the model has no {name}" for name in unexpected]
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise CheckpointError(f"{source} does not fit {type(model).__name__}: {wrong[0]}{more}")


def _rename_as_in(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights as in the model, without what wrappers added to their names."""
    own = model.state_dict().keys()
    by_author = {without_wrappers(name): name for name in own}
    return {
        name if name in own else by_author.get(without_wrappers(name), name): tensor
        for name, tensor in state.items()
    }


def _without_tied(missing: Iterable[str], state: Mapping[str, Tensor]) -> list[str]:
    """Return the names whose tensor was not loaded under a second name either.

    safetensors keeps only one name of a tied tensor.
    """
    absent = set(missing)
    loaded = {_place(tensor) for name, tensor in state.items() if name not in absent}
    return [name for name in missing if name not in state or _place(state[name]) not in loaded]


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Return what two names of one tensor have in common."""
    # An empty tensor, or one on the meta device, has no address.
    where = tensor.data_ptr() or id(tensor)
    return where, tensor.shape, tensor.stride(), tensor.dtype
