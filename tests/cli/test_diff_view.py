"""How the comparison of two checkpoints, and a table of layers, print themselves."""

import io

import torch
from rich.console import Console
from torch import nn

from bnguard.checkpoint import read_checkpoint
from bnguard.checkpoint.comparing import compare
from bnguard.cli.diff import difference_view
from bnguard.report.terminal import layer_table


def test_networks_without_a_layer_in_common_are_said_to_be_others(tmp_path):
    names = ("backbone", "encoder")
    for name in names:
        torch.save(nn.ModuleDict({name: nn.BatchNorm1d(4)}).state_dict(), tmp_path / name)
    before, after = (read_checkpoint(tmp_path / name) for name in names)
    assert "are they the same network?" in drawn(compare(before, after))
    assert "are they the same network?" not in drawn(compare(before, before))


def drawn(difference):
    console = Console(file=io.StringIO(), width=100)
    console.print(difference_view(difference, is_verbose=False))
    return console.file.getvalue()


def test_numbers_are_complete_in_a_narrow_terminal():
    console = Console(file=io.StringIO(), width=24)
    headings = ["layer", "updates", "var min"]
    console.print(layer_table(headings, [("backbone.layer1.bn", "12,345", "0.25678")]))
    assert "12,345  0.25678" in console.file.getvalue()
