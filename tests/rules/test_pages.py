"""The code in the pages can be pasted: it parses, and runs where one process can run it."""

from __future__ import annotations

import ast
import math
import re
import textwrap
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bnguard
from bnguard.rules import RULES
from tests.networks import conv_net, mlp

# They need another library, or several processes.
NOT_RUN = ("timm.", "torch.distributed")


def blocks():
    for rule in RULES:
        for code in re.findall(r"::\n\n((?: {8}.*\n|\n)+)", rule.page() + "\n"):
            yield pytest.param(rule, textwrap.dedent(code).strip(), id=rule.code)


def surroundings():
    """What the reader of a page has: a model, its data, and the names that the page speaks of."""
    images = torch.randn(8, 1, 8, 8)
    dataset = TensorDataset(images, torch.randint(10, (8,)))
    loader = DataLoader(dataset, batch_size=4)
    model = conv_net()
    features = torch.randn(4, 3, 6)
    encoder = mlp()
    return {
        "torch": torch,
        "nn": nn,
        "math": math,
        "bnguard": SimpleNamespace(
            # Two steps show that it runs.
            swap=partial(bnguard.swap, steps=2, progress=False),
            recalibrate=partial(bnguard.recalibrate, progress=False),
            inspect=bnguard.inspect,
            watch=bnguard.watch,
        ),
        "model": model,
        "averaged": torch.optim.swa_utils.AveragedModel(model),
        "teacher": conv_net(),
        "student": model,
        "backbone": model,
        "frozen_layer": model[1],
        "layer": model[1],
        "channels": 32,
        "conv": nn.Conv2d(1, 32, 3),
        "DataLoader": DataLoader,
        "dataset": dataset,
        "train_loader": loader,
        "val_loader": loader,
        "target_loader": loader,
        "batch": images,
        "batch_index": 0,
        "channel": 0,
        "monitor": bnguard.watch(model),
        "encoder": encoder,
        "a": torch.randn(4, 64),
        "b": torch.randn(4, 64),
        "features": features,
        "mask": torch.ones(4, 6),
        "batch_norm": nn.BatchNorm1d(3),
    }


@pytest.mark.parametrize(("rule", "code"), list(blocks()))
@pytest.mark.filterwarnings("ignore")
def test_the_code_of_a_page_can_be_pasted(rule, code):
    tree = ast.parse(code)
    if not any(name in code for name in NOT_RUN):
        exec(compile(tree, rule.code, "exec"), surroundings())


def test_every_page_has_code_in_its_fix():
    for rule in RULES:
        fix = rule.page().split("\nFix:\n")[1].split("\nFix safety:\n")[0]
        assert "::\n" in fix, rule.code


@pytest.mark.parametrize("code", ["BN106", "BN107", "BN201", "BN202", "BN203"])
def test_a_page_that_proposes_another_norm_says_which_for_whom(code):
    page = next(rule for rule in RULES if rule.code == code).page()
    assert "Which norm:" in page
    assert re.search(r"Wu & He.*table 2|BN202", page)
