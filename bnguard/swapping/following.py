"""An optimizer follows when the parameters of its model are exchanged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from bnguard.errors import ConfigurationError


def parameters_of(optimizer: torch.optim.Optimizer) -> set[nn.Parameter]:
    """Return all parameters that an optimizer updates."""
    return {p for group in optimizer.param_groups for p in group["params"]}


def check_follows(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Make sure that an optimizer is one of this model.

    Raises:
        ConfigurationError: It is none, or updates none of the model's parameters.
    """
    if not hasattr(optimizer, "param_groups"):
        raise ConfigurationError(f"optimizer={optimizer!r} is no optimizer of torch.optim")
    if not parameters_of(optimizer) & set(model.parameters()):
        raise ConfigurationError(
            "optimizer= updates none of the model's parameters: give the one that trains it"
        )


def follow(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    successors: Mapping[nn.Parameter, nn.Parameter],
    added: Iterable[tuple[Sequence[nn.Parameter], Sequence[nn.Parameter]]],
) -> None:
    """Let an optimizer update the parameters of another model in place of those that it had.

    Args:
        optimizer: The optimizer; its groups keep their order and options.
        model: The model to update.
        successors: What each old parameter has become; one without an entry stays itself.
        added: Parameters of a replaced layer with those of its replacement. New ones among these
            join the group that had the old ones, if one had.
    """
    added = list(added)
    alive = set(model.parameters())
    for group in optimizer.param_groups:
        before = group["params"]
        after = [successors.get(p, p) for p in before]
        after = [p for p in after if p in alive]
        known = parameters_of(optimizer) | set(successors.values())
        for old, new in added:
            if any(p in set(before) for p in old):
                after += [p for p in new if p not in known]
        group["params"] = after
        for old_parameter in before:
            state = optimizer.state.pop(old_parameter, None)
            successor = successors.get(old_parameter, old_parameter)
            if state is not None and successor in alive:
                optimizer.state[successor] = state
