"""What counts as a BN layer, and what is preserved."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bnguard.layers.bn_layer import find_layers, is_wrapper


class FusedBatchNorm(nn.BatchNorm2d):
    """A subclass, as timm's BatchNormAct2d is one."""


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(3),
        nn.BatchNorm2d(3),
        nn.BatchNorm3d(3),
        nn.SyncBatchNorm(3),
        nn.LazyBatchNorm2d(),
        FusedBatchNorm(3),
    ],
)
def test_every_batch_norm_of_torch_is_found(layer):
    assert [found.module for found in find_layers(nn.Sequential(nn.ReLU(), layer))] == [layer]


@pytest.mark.parametrize("layer", [nn.InstanceNorm2d(3), nn.GroupNorm(1, 3), nn.LayerNorm(3)])
def test_other_norms_are_not(layer):
    assert find_layers(nn.Sequential(layer)) == ()


def test_a_module_in_two_places_is_one_layer_with_its_first_name():
    shared = nn.BatchNorm1d(2)
    model = nn.ModuleDict({"first": nn.Sequential(shared), "second": nn.Sequential(shared)})
    assert [layer.name for layer in find_layers(model)] == ["first.0"]


def test_a_layer_that_is_itself_the_model_has_an_empty_name():
    assert [layer.name for layer in find_layers(nn.BatchNorm1d(2))] == [""]


def test_wrappers_leave_no_trace_in_names():
    inner = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert [layer.name for layer in find_layers(nn.DataParallel(inner))] == ["1"]
    assert [layer.name for layer in find_layers(torch.compile(inner))] == ["1"]


def test_layers_without_statistics_or_parameters():
    untracked, lazy = find_layers(
        nn.Sequential(
            nn.BatchNorm1d(2, affine=False, track_running_stats=False), nn.LazyBatchNorm1d()
        )
    )
    assert not untracked.is_tracking
    assert untracked.weight is None
    assert untracked.counter is None
    assert untracked.uses_batch_statistics
    assert not lazy.is_tracking
    assert lazy.channels == 0


@pytest.mark.parametrize(
    "build",
    [
        nn.DataParallel,
        lambda net: torch.compile(nn.DataParallel(net)),
        lambda net: nn.DataParallel(torch.compile(net)),
        torch.optim.swa_utils.AveragedModel,
    ],
)
def test_wrappers_leave_no_trace_in_the_names(build):
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert [layer.name for layer in find_layers(build(net))] == ["1"]


def test_a_part_that_is_compiled_keeps_the_name_that_its_author_wrote():
    net = nn.Sequential(torch.compile(nn.Sequential(nn.BatchNorm1d(2))), nn.BatchNorm1d(2))
    assert [layer.name for layer in find_layers(net)] == ["0.0", "1"]


def test_fabric_leaves_no_trace_in_the_names():
    fabric = pytest.importorskip("lightning_fabric").Fabric(accelerator="cpu", devices=1)
    inner = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model = fabric.setup(inner)
    assert [layer.name for layer in find_layers(model)] == ["1"]
    assert is_wrapper(model)
