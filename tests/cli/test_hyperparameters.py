"""Which hyper-parameters of a checkpoint become arguments: none that would lead to an import."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from jsonargparse import ArgumentParser
from torch import nn

from bnguard.cli.stored_arguments import usable_defaults


class Untyped:
    """As most write it."""

    def __init__(self, cfg, arch="resnet18", widths=(1, 2), norm=None, lost: Nowhere = None):  # noqa: F821
        self.given = (cfg, arch, widths, norm, lost)


class Anything:
    def __init__(self, any: Any = None, several: dict[str, Any] | None = None):
        self.given = (any, several)


class Typed:
    def __init__(
        self,
        name: str = "a",
        body: nn.Module | None = None,
        norm: type[nn.Module] = nn.BatchNorm1d,
        act: Callable = nn.ReLU,
    ):
        self.given = (name, body, norm, act)


def defaults(cls, values):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "model", fail_untyped=False)
    return usable_defaults(parser, "model", values)[0]


def test_arguments_without_a_type_get_what_was_stored():
    values = {"cfg": {"model": {"width": 4}}, "arch": "resnet50", "widths": [3], "norm": "group"}
    assert defaults(Untyped, values) == {f"model.{name}": value for name, value in values.items()}


@pytest.mark.parametrize(
    "value",
    [
        {"class_path": "evil.Net"},
        "{class_path: evil.Net}",
        # Escapes that JSON and YAML undo.
        '{"\\u0063lass_path": "evil.Net"}',
        '? "\\x63lass_path"\n: evil.Net',
        '- ["\\x63lass_path"]',
        "[" * 1000,
    ],
)
def test_what_describes_an_object_is_left_out(value):
    given = {"cfg": {"deep": [value]}, "arch": value, "norm": [value], "lost": value}
    assert defaults(Untyped, given) == {}
    assert defaults(Anything, {"any": value, "several": {"a": value}}) == {}


def test_a_text_for_a_text_stays_whatever_it_looks_like():
    assert defaults(Typed, {"name": "lr: 0.1"}) == {"model.name": "lr: 0.1"}


def test_a_path_for_an_argument_that_imports_is_left_out():
    path = "os.system"
    given = {"name": path, "body": path, "norm": path, "act": path}
    assert defaults(Typed, given) == {"model.name": path}
