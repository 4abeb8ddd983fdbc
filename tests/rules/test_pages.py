"""The pages of the rules: their code runs, and they can be written as HTML."""

from __future__ import annotations

import html
import math
import re
import textwrap
from functools import partial
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bnguard
from bnguard.report.pages import pages_html
from bnguard.rules import RULES
from tests.networks import conv_net, mlp


def blocks():
    for rule in RULES:
        # How to silence a rule is the same on all pages.
        page = rule.page() if rule is RULES[0] else rule.page().split("\nSilence:\n")[0]
        for code in re.findall(r"::\n\n((?: {8}.*\n|\n)+)", page + "\n"):
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
        "channel": 0,
        "block": model,
        "DistributedDataParallel": lambda model, **options: model,
        "timm": SimpleNamespace(
            layers=SimpleNamespace(convert_sync_batchnorm=nn.SyncBatchNorm.convert_sync_batchnorm)
        ),
        "validate": lambda model: None,
        "encoder": encoder,
        "a": torch.randn(4, 64),
        "b": torch.randn(4, 64),
        "features": features,
        "mask": torch.ones(4, 6),
        "batch_norm": nn.BatchNorm1d(3),
    }


@pytest.mark.parametrize(("rule", "code"), list(blocks()))
@pytest.mark.filterwarnings("ignore")
def test_the_code_of_a_page_runs(rule, code):
    exec(compile(code, rule.code, "exec"), surroundings())


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_an_example_shows_fault_and_fix(rule):
    example = rule.page().split("\nExample:\n")[1].split("\nFix:\n")[0]
    assert "# Fault" in example
    assert "# Fix" in example


@pytest.mark.parametrize("code", ["BN101", "BN103", "BN104", "BN105", "BN109", "BN402"])
@pytest.mark.filterwarnings("ignore")
def test_the_fault_of_an_example_is_found(code):
    example = next(block.values[1] for block in blocks() if block.id == code)
    names = surroundings()
    exec(example.split("# Fix")[0], names)
    if code == "BN103":
        names["model"][1] = names["layer"]
    monitor = bnguard.watch(names["model"], optimizer=names.get("optimizer"))
    assert code in {finding.code for finding in monitor.report().findings}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_a_page_names_public_sources(rule):
    references = rule.page().split("\nReferences:\n")[1]
    assert re.search(r"[\w-]+/[\w.-]+#\d+", references)


@pytest.mark.parametrize("code", ["BN106", "BN107", "BN201", "BN202", "BN203"])
def test_a_page_that_proposes_another_norm_says_which_for_whom(code):
    page = next(rule for rule in RULES if rule.code == code).page()
    assert ("Which norm:" if code == "BN202" else "BN202 says which norm for whom") in " ".join(
        page.split()
    )


def test_the_pages_as_html_are_complete_and_link_to_each_other():
    page = pages_html(RULES)
    tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.feed(page)
    anchors = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert anchors == [rule.code for rule in RULES]
    links = {attributes["href"] for tag, attributes in tags if tag == "a"}
    assert {f"#{code}" for code in anchors} <= links
    assert "https://github.com/pytorch/pytorch/issues/4741" in links
    assert "https://arxiv.org/abs/1502.03167" in links
    assert all(link.startswith(("#", "https://")) for link in links)
    assert not any("src" in attributes or tag == "link" for tag, attributes in tags)
    text = plain(html.unescape(re.sub(r"<[^>]*>", "", page)))
    assert all(plain(rule.page()) in text for rule in RULES)


def plain(text):
    return re.sub(r"[\s`:]", "", text)
