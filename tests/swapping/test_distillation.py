"""The network with BN teaches its copy: it gets nearer, keeps its best, and leaves the rest."""

from __future__ import annotations

import copy
import inspect
from collections import namedtuple
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bnguard.errors import BNGuardError, ConfigurationError, LoaderError
from bnguard.observe.mode_gap import float_tensors, relative_change
from bnguard.swapping import distillation
from bnguard.swapping.api import swap
from bnguard.swapping.teacher import _progress_bar
from tests.networks import conv_net, digits, mlp


@pytest.fixture(scope="module")
def trained():
    """A network that knows its digits, and the accuracy on unseen ones as a function."""
    torch.manual_seed(0)
    images, labels = digits()
    images = images.flatten(1)
    model = mlp(64)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(10):
        for batch in torch.randperm(1200).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()

    def accuracy(model):
        with torch.no_grad():
            return (model.eval()(images[1200:]).argmax(1) == labels[1200:]).float().mean().item()

    return model.eval(), list(images[:1200].split(32)), accuracy


def test_a_swapped_network_learns_what_it_knew(trained):
    model, batches, accuracy = trained
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    naive = accuracy(swap(model, "group", sample=batches[0]).model)
    result = swap(model, "group", teacher_data=batches, progress=False)
    assert accuracy(model) > 0.95
    assert naive < accuracy(model) - 0.1
    assert accuracy(result.model) > accuracy(model) - 0.015
    assert result.distillation.distance < 0.3 * result.distillation.distance_before
    assert result.distillation.distance <= result.distillation.distance_fitted
    assert result.distillation.samples >= 32 * result.distillation.steps
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert [p.grad for p in result.model.parameters()] == [None] * 10
    assert f"{result.distillation.distance:.3g} σ after step" in str(result)
    assert "still far off" not in str(result)


def test_batches_of_one_teach_as_well_as_large_ones(trained):
    model, batches, accuracy = trained
    singles = torch.cat(batches)[:320].split(1)
    result = swap(model, "group", teacher_data=singles, steps=30, progress=False)
    assert accuracy(result.model) > accuracy(model) - 0.04


def test_bad_statistics_are_recalibrated_before_they_teach(trained):
    model, batches, accuracy = trained
    broken = mlp(64)
    broken.load_state_dict(model.state_dict())
    broken[1].running_mean += 5.0
    kept = broken[1].running_mean.clone()
    result = swap(broken, "group", teacher_data=batches, steps=100, progress=False)
    assert "did not fit these data (worst at layer 1)" in result.notes[0]
    assert torch.equal(broken[1].running_mean, kept)
    assert accuracy(result.model) > accuracy(model) - 0.02 > accuracy(broken)
    assert swap(model, "group", teacher_data=batches, steps=1, progress=False).notes == ()


@pytest.mark.parametrize("to", ["frozen", "batch-renorm"])
def test_a_target_that_keeps_running_statistics_is_given_the_mended_ones(trained, to):
    model, batches, accuracy = trained
    broken = copy.deepcopy(model)
    for layer in (m for m in broken.modules() if isinstance(m, nn.BatchNorm1d)):
        layer.reset_running_stats()
    assert accuracy(broken) < 0.9
    result = swap(broken, to, teacher_data=batches, steps=1, progress=False)
    assert accuracy(result.model) > accuracy(model) - 0.02


def test_frozen_parameters_learn_and_stay_frozen(trained):
    model, batches, _ = trained
    frozen = mlp(64)
    frozen.load_state_dict(model.state_dict())
    frozen.requires_grad_(False)
    result = swap(frozen, "group", teacher_data=batches, steps=20, progress=False)
    assert not any(p.requires_grad for p in result.model.parameters())
    assert not torch.equal(result.model[0].weight, frozen[0].weight)


def test_the_best_weights_are_kept_where_learning_does_harm(trained, monkeypatch):
    model, batches, _ = trained
    monkeypatch.setattr(distillation, "_LEARNING_RATE", 10.0)
    result = swap(model, "group", teacher_data=batches, steps=40, progress=False)
    learnt = result.distillation
    assert learnt.distance <= learnt.distance_before
    assert learnt.steps < 40
    assert learnt.best_step == 0
    assert torch.equal(result.model[0].weight, model[0].weight)


def test_a_target_that_computes_the_same_takes_no_step(trained):
    model, batches, _ = trained
    result = swap(model, "frozen", teacher_data=batches, progress=False)
    assert result.distillation.steps == 0


def test_in_place_distilling_gives_the_weights_and_layers_back_after_an_exception(trained):
    model, batches, _ = trained
    own = mlp(64)
    own.load_state_dict(model.state_dict())
    own.train()
    layers = list(own)
    calls = []

    def failing(model, batch):
        calls.append(model)
        if len(calls) > 60:
            raise KeyboardInterrupt
        return model(batch)

    with pytest.raises(KeyboardInterrupt):
        swap(own, "group", teacher_data=batches, forward=failing, in_place=True, progress=False)
    assert list(own) == layers
    assert all(module.training for module in own.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(own.state_dict()[name], value)


def test_nested_outputs_and_activations_in_place():
    Output = namedtuple("Output", ["maps", "rest"])

    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 8, 3)
            self.norm = nn.BatchNorm2d(8)
            self.relu = nn.ReLU(inplace=True)
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            maps = self.relu(self.norm(self.conv(x)))
            scores = self.head(maps.mean((2, 3)))
            return Output(maps, {"scores": [scores], "labels": scores.argmax(1)})

    images = digits()[0][:64]
    model = Nested()
    with torch.no_grad():
        for _ in range(60):
            model(images)
    result = swap(model, "layer", teacher_data=images.split(16), steps=60, progress=False)
    assert result.distillation.distance < 0.6 * result.distillation.distance_before


def test_outputs_are_found_in_every_structure_and_compared_by_their_spread():
    a, b = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 3.0])
    found = list(float_tensors({"x": [a, (torch.tensor([1]), {"y": b})], "name": "z", "n": None}))
    assert [tensor.tolist() for tensor in found] == [a.tolist(), b.tolist()]
    assert relative_change([b, a], [a, b]) == pytest.approx(1.0)
    assert relative_change([a * float("nan")], [a]) == float("inf")


def test_labels_are_left_out_and_a_forward_may_take_anything(trained):
    model, batches, _ = trained
    loader = [(batch, torch.zeros(len(batch))) for batch in batches[:4]]
    swap(model, "group", teacher_data=loader, steps=2, progress=False)
    odd = [{"pixels": batch, "note": "x"} for batch in batches[:4]]
    result = swap(
        model,
        "group",
        teacher_data=odd,
        steps=2,
        forward=lambda model, batch: model(batch["pixels"]),
        progress=False,
    )
    assert result.distillation.steps == 2


def test_a_generator_is_passed_over_again(trained):
    model, batches, _ = trained
    result = swap(model, "group", teacher_data=(b for b in batches[:6]), steps=20, progress=False)
    assert result.distillation.samples >= 20 * 32


@pytest.mark.parametrize(
    ("data", "forward", "message"),
    [
        ([], None, "the data are empty"),
        (iter(()), None, "the data are empty"),
        ([torch.full((40, 1, 8, 8), torch.nan)], None, "are NaN or infinite"),
        (
            [torch.rand(4, 1, 8, 8)],
            lambda model, batch: model(batch) is None,
            "no floating-point tensor",
        ),
    ],
)
def test_what_cannot_teach_is_refused(data, forward, message):
    with pytest.raises(BNGuardError, match=message):
        swap(conv_net(), "group", teacher_data=data, forward=forward, steps=1, progress=False)


def test_the_random_state_and_modes_are_left_alone(trained):
    model, batches, _ = trained
    own = mlp(64)
    own.load_state_dict(model.state_dict())
    own.train()
    own[4].eval()
    state = torch.get_rng_state()
    result = swap(own, "group", teacher_data=batches, steps=3, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in result.model] == [m.training for m in own]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.BatchNorm1d(4, affine=False)), "has no parameters to train"),
        (nn.Sequential(nn.BatchNorm1d(4)).half(), "float16 are too coarse to train"),
    ],
)
def test_what_cannot_learn_is_refused(model, message):
    data = [torch.rand(8, 4, dtype=model[0].running_mean.dtype)]
    with pytest.raises(ConfigurationError, match=message):
        swap(model, "group", teacher_data=data, progress=False)


def test_statistics_that_few_samples_cannot_judge_are_left_as_they_are(trained):
    model, batches, _ = trained
    few = [batches[0][:8]]
    assert swap(model, "group", teacher_data=few, steps=1, progress=False).notes == ()
    single = swap(model, "group", teacher_data=[batches[0][:1]], steps=1, progress=False)
    assert "statistics of the teacher could not be checked" in single.notes[0]


def test_a_loader_that_fails_is_not_taken_for_one_that_ends(trained):
    model, batches, _ = trained

    def fail_at_second():
        yield batches[0]
        raise OSError("the disk is gone")

    with pytest.raises(LoaderError, match="failed at batch 1: OSError: the disk is gone"):
        swap(model, "group", teacher_data=fail_at_second(), steps=1, progress=False)


def test_a_generator_is_checked_and_measured_as_a_loader_is(trained):
    model, batches, _ = trained
    broken = mlp(64)
    broken.load_state_dict(model.state_dict())
    broken[1].running_mean += 5.0
    result = swap(broken, "group", teacher_data=iter(batches), steps=1, progress=False)
    assert "did not fit these data" in result.notes[0]
    assert result.output_change > 0.0
    assert result.replaced[0].positions == 1


def test_bfloat16_is_kept_and_learns(trained):
    model, batches, _ = trained
    half = mlp(64).eval()
    half.load_state_dict(model.state_dict())
    half.bfloat16()
    data = [batch.bfloat16() for batch in batches]
    result = swap(half, "group", teacher_data=data, steps=40, progress=False)
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    assert result.distillation.distance < 0.7 * result.distillation.distance_before


def test_the_bar_shows_the_distance_that_is_left():
    with _progress_bar(100, is_shown=True) as show_progress:
        show_progress(30, 0.1234)
        (task,) = inspect.getclosurevars(show_progress).nonlocals["bar"].tasks
    assert (task.completed, task.total, task.description) == (30, 100, "0.123 σ off")


def test_a_loss_beside_the_scores_is_not_learnt():
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = conv_net()

        def forward(self, x):
            scores = self.net(x)
            return {"loss": 1e3 * scores.mean(), "scores": scores} if self.has_loss else scores

    found = []
    for has_loss in (False, True):
        model = WithLoss()
        model.has_loss = has_loss
        batches = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)).split(16)
        result = swap(model, teacher_data=batches, steps=3, progress=False)
        found.append((result.output_change, result.distillation))
    assert found[0] == found[1]


def test_learning_ends_once_the_network_hardly_comes_nearer(trained):
    model, batches, accuracy = trained
    result = swap(model, "group", teacher_data=batches, steps=400, progress=False)
    assert 40 < result.distillation.steps < 300
    assert result.distillation.best_step > 0.75 * result.distillation.steps
    assert accuracy(result.model) > accuracy(model) - 0.015


def test_activation_checkpointing_learns_the_same():
    class Checkpointed(nn.Module):
        def __init__(self, is_active):
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
            self.head = nn.Linear(8, 2)
            self.is_active = is_active

        def forward(self, x):
            run = partial(checkpoint, self.body, use_reentrant=False)
            maps = run(x) if self.is_active else self.body(x)
            return self.head(maps.mean((2, 3)))

    batches = digits()[0][:64].split(16)
    found = [
        swap(Checkpointed(is_active), teacher_data=batches, steps=5, progress=False).distillation
        for is_active in (False, True)
    ]
    assert found[0].distance < found[0].distance_fitted
    assert found[0] == found[1]
