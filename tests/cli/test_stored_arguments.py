"""A class gets the hyper-parameters that a checkpoint holds in whatever form it takes them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from enum import Enum

import pytest
import torch
from jsonargparse import ArgumentParser
from pytorch_lightning import LightningModule

from bnguard.checkpoint import read_checkpoint
from bnguard.cli.model_and_data import Factory
from bnguard.cli.request import split_arguments
from bnguard.cli.stored_arguments import arguments_for
from bnguard.errors import ConfigurationError


class Act(Enum):
    RELU = "relu"
    GELU = "gelu"


@dataclass
class Config:
    width: int = 8
    act: Act = Act.RELU


class OneNamespace(LightningModule):
    def __init__(self, args: argparse.Namespace):
        super().__init__()
        self.save_hyperparameters(args)
        self.got = vars(args)


class Untyped(LightningModule):
    def __init__(self, hparams):
        super().__init__()
        self.save_hyperparameters(hparams)
        self.got = {"width": self.hparams.width, "lr": self.hparams["lr"]}


class ByName(LightningModule):
    """Keeps a namespace as one of its arguments."""

    def __init__(self, args):
        super().__init__()
        self.save_hyperparameters()
        self.got = vars(args)


class Keywords(LightningModule):
    def __init__(self, width=8, **options):
        super().__init__()
        self.save_hyperparameters()
        self.got = {"width": width, **options}


class WithObjects(LightningModule):
    def __init__(self, config: Config, act: Act | None = None):
        super().__init__()
        self.save_hyperparameters()
        self.got = {"config": config, "act": act}


def starting(model, folder, *given):
    checkpoint = {
        "pytorch-lightning_version": "2.5",
        "state_dict": {},
        "hyper_parameters": dict(model.hparams),
        "hparams_name": model._hparams_name,
    }
    torch.save(checkpoint, folder / "last.ckpt")
    read = read_checkpoint(folder / "last.ckpt")
    build = type(model)
    factory = Factory("model", build, stored=arguments_for(read, "model", build))
    parser = ArgumentParser(exit_on_error=False)
    factory.add_arguments(parser, [option.name for option in split_arguments(given, ())[1]])
    return factory, parser


def built(model, folder, *given):
    factory, parser = starting(model, folder, *given)
    return factory.make(parser.parse_args(list(given)))


@pytest.mark.parametrize("cls", [OneNamespace, Untyped, ByName])
def test_a_namespace_is_given_back(cls, tmp_path):
    model = cls(argparse.Namespace(width=3, lr=0.1))
    assert built(model, tmp_path).got == {"width": 3, "lr": 0.1}
    name = "hparams" if cls is Untyped else "args"
    changed = built(model, tmp_path, f"--model.{name}.lr=0.5")
    assert changed.got == {"width": 3, "lr": 0.5}


def test_options_without_a_name_are_given_back_as_lightning_does(tmp_path):
    model = Keywords(width=3, depth=2, norm={"groups": 4}, why=None)
    again = built(model, tmp_path, "--model.depth=5")
    assert again.got == {"width": 3, "depth": 5, "norm": {"groups": 4}, "why": None}


@pytest.mark.parametrize(
    ("model", "name", "class_name"),
    [
        (WithObjects(Config(3, Act.GELU)), "model.config", "Config"),
        (WithObjects({"width": 3}, Act.GELU), "model.act", "Act"),
        (Keywords(width=Act.RELU), "model.width", "Act"),
        (Keywords(norm=Act.RELU), "model.norm", "Act"),
        (Untyped(argparse.Namespace(width=3, lr=0.1, act=Act.GELU)), "model.hparams.act", "Act"),
        (ByName(argparse.Namespace(width=3, act=Act.GELU)), "model.args", "Act"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_an_object_is_not_rebuilt_and_has_to_be_given(model, name, class_name, tmp_path):
    """A model that would silently be another one is not built."""
    with pytest.raises(ConfigurationError, match=f"{name} as an object.*pass --{name}$") as raised:
        built(model, tmp_path)
    assert class_name in str(raised.value)


def test_what_is_given_takes_the_place_of_an_object(tmp_path):
    assert built(Keywords(width=Act.RELU), tmp_path, "--model.width=3").got["width"] == 3
    assert built(Keywords(norm=Act.RELU), tmp_path, "--model.norm=3").got["norm"] == 3
    act = built(WithObjects({"width": 3}, Act.GELU), tmp_path, "--model.act=RELU")
    assert act.got == {"config": Config(3), "act": Act.RELU}
    config = built(WithObjects(Config(3)), tmp_path, "--model.config.width=4")
    assert config.got["config"].width == 4
    namespace = argparse.Namespace(width=3, lr=0.1, act=Act.GELU)
    again = built(Untyped(namespace), tmp_path, "--model.hparams.act=null")
    assert again.hparams == {"width": 3, "lr": 0.1, "act": None}


def test_an_object_that_the_class_does_not_take_is_left_alone(tmp_path):
    model = OneNamespace(argparse.Namespace(width=3))
    model.hparams["callback"] = Act.RELU
    model._hparams_name = None
    starting(model, tmp_path)
