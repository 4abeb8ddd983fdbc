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
from bnguard.cli.model_and_data import Subject
from bnguard.cli.request import _stored


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


def built(model, folder, *given):
    checkpoint = {
        "pytorch-lightning_version": "2.5",
        "state_dict": {},
        "hyper_parameters": dict(model.hparams),
        "hparams_name": model._hparams_name,
    }
    torch.save(checkpoint, folder / "last.ckpt")
    stored = _stored(read_checkpoint(folder / "last.ckpt"), "model")
    subject = Subject("model", type(model)).starting_from(*stored)
    parser = ArgumentParser(exit_on_error=False)
    subject.add_arguments(parser)
    return subject.built(parser.parse_args(list(given))), subject.left_out(parser)


@pytest.mark.parametrize("cls", [OneNamespace, Untyped, ByName])
def test_a_namespace_is_given_back(cls, tmp_path):
    model = cls(argparse.Namespace(width=3, lr=0.1))
    assert built(model, tmp_path)[0].got == {"width": 3, "lr": 0.1}
    name = "hparams" if cls is Untyped else "args"
    changed, _ = built(model, tmp_path, f"--model.{name}.lr=0.5")
    assert changed.got == {"width": 3, "lr": 0.5}


def test_options_without_a_name_are_given_back_as_lightning_does(tmp_path):
    model = Keywords(width=3, depth=2, norm={"groups": 4}, why=None)
    again, left_out = built(model, tmp_path, "--model.depth=5")
    assert again.got == {"width": 3, "depth": 5, "norm": {"groups": 4}, "why": None}
    assert not left_out


def test_a_data_class_and_the_members_of_enumerations_are_given_back(tmp_path):
    model = WithObjects(Config(3, Act.GELU), Act.GELU)
    again, left_out = built(model, tmp_path)
    assert again.got == model.got
    assert not left_out
    assert built(model, tmp_path, "--model.act=RELU")[0].got["act"] is Act.RELU


def test_what_cannot_be_given_back_is_told(tmp_path):
    model = Keywords(width=3)
    model.hparams["width"] = torch.nn.ReLU()
    again, left_out = built(model, tmp_path)
    assert again.got == {"width": 8}
    assert left_out == ["model.width"]


def test_an_object_in_a_namespace_is_left_out_of_it_and_told(tmp_path):
    model = Untyped(argparse.Namespace(width=3, lr=0.1, act=object()))
    again, left_out = built(model, tmp_path)
    assert again.hparams == {"width": 3, "lr": 0.1}
    assert left_out == ["model.hparams.act"]
