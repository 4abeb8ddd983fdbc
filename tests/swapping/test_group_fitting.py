"""Where a swapped network starts, which mode teaches it, and when it is not kept."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnguard import swap
from bnguard.layers.bn_layer import find_layers
from bnguard.swapping.distillation import distil
from bnguard.swapping.group_fitting import fit_norms, pick_values
from bnguard.swapping.imitation import Pair
from bnguard.swapping.teacher import OwnDevice
from tests.benchmarks.digit_tasks import DenseNet, Generator, restoration
from tests.networks import digits


def test_a_group_norm_is_fitted_by_least_squares():
    torch.manual_seed(0)
    x = torch.randn(64, 8, 4, 4) * (torch.rand(8, 1, 1) + 0.5)
    wanted = nn.BatchNorm2d(8)(x).detach() * torch.arange(8.0).view(8, 1, 1) + 3.0
    norm = nn.GroupNorm(2, 8)
    fit_norms([norm], {0: pick_values(wanted, 16)}, lambda: norm(x), choose_groups=False)
    normalised = F.group_norm(x, 2).double().transpose(0, 1).flatten(1)
    for channel, values in enumerate(wanted.double().transpose(0, 1).flatten(1)):
        unknowns = torch.stack([normalised[channel], torch.ones_like(values)], dim=1)
        slope, offset = torch.linalg.lstsq(unknowns, values[:, None]).solution[:, 0]
        assert norm.weight[channel].item() == pytest.approx(slope.item(), rel=0.02)
        assert norm.bias[channel].item() == pytest.approx(offset.item(), rel=0.02)


@pytest.mark.parametrize(("groups", "expected"), [(8, 8), (1, 1), (4, 4)])
def test_the_groups_that_explain_the_outputs_are_chosen(groups, expected):
    """Samples whose groups have a scale and a mean of their own, which the target has not."""
    torch.manual_seed(0)
    clean = torch.randn(64, 8, 4, 4) * torch.rand(8, 1, 1).add(0.5)
    scale, mean = torch.rand(2, 64, groups, 1, 1, 1) * 3.0 + 0.5
    x = (clean.unflatten(1, (groups, -1)) * scale + mean).flatten(1, 2)
    norm = nn.GroupNorm(2, 8)
    wanted = F.group_norm(x, groups)
    fit_norms([norm], {0: pick_values(wanted, 16)}, lambda: norm(x), choose_groups=True)
    assert norm.num_groups == expected


def test_layers_without_affine_parameters_or_calls_stay_as_they_are():
    bare, uncalled, other = nn.GroupNorm(2, 8, affine=False), nn.GroupNorm(2, 8), nn.Identity()
    x = torch.randn(16, 8, 4, 4)
    wanted = dict.fromkeys(range(3), pick_values(x, 16))
    fit_norms([bare, uncalled, other], wanted, lambda: other(bare(x)), choose_groups=True)
    assert bare.weight is None
    assert uncalled.weight.tolist() == [1.0] * 8


def test_four_forwards_of_the_sample_choose_the_groups_and_fit():
    passes = []

    def forward(model, batch):
        passes.append(len(batch))
        return model(batch)

    model = DenseNet().eval()
    for layer in find_layers(model):
        layer.module.running_var.fill_(0.01)
    student = swap(model, "group").model
    pairs = [
        Pair(layer, student.get_submodule(layer.name), student.get_submodule(layer.name))
        for layer in find_layers(model)
    ]
    result = distil(
        student,
        model,
        digits()[0][:128].split(64),
        pairs=pairs,
        chooses_groups=True,
        steps=0,
        forward=forward,
        engine=OwnDevice(model),
        show_progress=lambda step, distance: None,
    )
    assert result.distance_fitted < result.distance_before
    assert sum(passes) <= 4 * 128


def test_a_dense_network_keeps_its_accuracy_from_the_first_step_on():
    """It fell from 98.7 % to 23.5 %, and to 82 % after 50 steps, with a channel a group."""
    torch.manual_seed(0)
    images, labels = digits()
    model = DenseNet()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    # At a constant rate, the accuracy would depend on how a processor rounds.
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 6)
    for _ in range(6):
        for batch in torch.randperm(1000).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        falling.step()
    model.eval()

    @torch.no_grad()
    def accuracy(network):
        return (network(images[1200:]).argmax(1) == labels[1200:]).float().mean().item()

    result = swap(model, teacher_data=images[:1000].split(32), steps=20, progress=False)
    assert accuracy(model) > 0.9
    assert accuracy(result.model) > accuracy(model) - 0.04
    assert result.distillation.distance_fitted < 0.3 * result.distillation.distance_before


@pytest.fixture(scope="module")
def generator():
    """A network trained at batch size 1 on images whose contrast differs: eval mode fails."""
    torch.manual_seed(0)
    task = restoration()
    inputs, wanted = task.inputs, task.targets
    model = Generator()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(2):
        for index in torch.randperm(1000):
            optimizer.zero_grad()
            F.l1_loss(model(inputs[index : index + 1]), wanted[index : index + 1]).backward()
            optimizer.step()

    @torch.no_grad()
    def error(network):
        pairs = zip(inputs[1200:1300].split(1), wanted[1200:1300].split(1), strict=True)
        return torch.stack([F.l1_loss(network(x), y) for x, y in pairs]).mean().item()

    return model, inputs[:300].split(1), error


@pytest.mark.parametrize("is_scored", [True, False])
def test_the_mode_that_works_teaches(generator, is_scored):
    model, data, error = generator
    in_eval_mode, works = error(copy.deepcopy(model).eval()), error(copy.deepcopy(model).train())
    assert in_eval_mode > 3 * works
    score = (lambda network: -error(network)) if is_scored else None
    before = copy.deepcopy(model.state_dict())
    result = swap(model, teacher_data=data, steps=20, score=score, progress=False)
    assert error(result.model.eval()) < 1.2 * works
    assert "taught with the statistics of each batch" in result.notes[-1]
    assert ("pass a score" in result.notes[-1]) == (not is_scored)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    if is_scored:
        assert result.score_before == pytest.approx(-works, rel=0.05)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("is_scored", [True, False])
def test_a_model_that_is_clearly_worse_is_not_kept(generator, in_place, is_scored):
    model, data, error = generator
    model = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    options = {"teacher_data": data, "steps": 1, "in_place": in_place, "progress": False}
    if is_scored:
        options["score"] = lambda network: -error(network)
    # One group for all channels cannot do what statistics of each channel do.
    result = swap(model, "layer", **options)
    assert not result.is_kept
    assert result.model is model
    assert "not kept" in str(result)
    assert result.to_dict()["kept"] is False
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert swap(model, "layer", **options, keep="always").is_kept


@pytest.fixture(scope="module")
def trained_on_pretrained():
    torch.manual_seed(0)
    images, labels = digits()
    backbone = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 64)
    )
    norm = backbone[1]
    with torch.no_grad():
        # Of other data, which it was pretrained on.
        norm.running_mean.uniform_(-1.0, 1.0)
        norm.running_var.uniform_(0.01, 4.0)
    model = nn.Sequential(backbone, nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(4):
        for batch in torch.randperm(1000).split(32):
            model.train()
            norm.eval()
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()

    @torch.no_grad()
    def accuracy(network):
        mode = network.training
        found = network.eval()(images[1200:]).argmax(1) == labels[1200:]
        network.train(mode)
        norm.eval()
        return found.float().mean().item()

    return model, images, accuracy


def test_statistics_that_are_frozen_on_purpose_teach(trained_on_pretrained):
    """A backbone in eval mode, on data that its statistics do not fit, and a head trained on it."""
    model, images, accuracy = trained_on_pretrained
    before = accuracy(model)
    assert before > 0.8
    for options in ({}, {"score": accuracy}):
        subject = model if not options else copy.deepcopy(model).eval()
        result = swap(
            subject, teacher_data=images[:512].split(32), steps=30, progress=False, **options
        )
        assert accuracy(result.model) > before - 0.08
        assert result.is_kept


def test_the_statistics_of_each_small_batch_teach_where_joined_ones_hide_them():
    """Joined, images of any contrast have the statistics of eval mode; one by one they do not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3))
    images = torch.randn(512, 1, 8, 8) * torch.rand(512, 1, 1, 1) * 30
    result = swap(model, teacher_data=images.split(1), steps=0, progress=False)
    one_by_one = torch.cat([model.train()(image) for image in images[:32].split(1)])
    error = (result.model.eval()(images[:32]) - one_by_one).std() / one_by_one.std()
    assert "taught with the statistics of each batch" in result.notes[-1]
    assert error < 0.05


def test_a_last_batch_of_one_does_not_stop_a_teacher_with_batch_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8)
    )
    batches = (3.0 * torch.randn(57, 8) + 1.0).split(7)
    result = swap(model, teacher_data=batches, steps=20, keep="always", progress=False)
    assert "taught with the statistics of each batch" in result.notes[-1]
    assert result.distillation.distance < result.distillation.distance_before
