"""What BN does to training, against plain float64 computation."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnguard
from bnguard import TrainingViews
from bnguard.errors import ConfigurationError
from bnguard.observe.training_views import normalisation_noise
from tests.networks import digits


def network():
    """Three BN layers with dropout, in float64; a tanh and a ReLU."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 16, bias=False),
        nn.BatchNorm1d(16),
        nn.Tanh(),
        nn.Dropout(0.2),
        nn.Linear(16, 16, bias=False),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, 16, bias=False),
        nn.BatchNorm1d(16, affine=False),
        nn.Linear(16, 10),
    ).double()


@pytest.fixture(scope="module")
def batch():
    images, labels = digits()
    return images[:64].double() * 4.0, labels[:64]


def loss_of(batch):
    images, labels = batch
    return lambda model: F.cross_entropy(model(images), labels)


def step(model, optimizer, batch):
    optimizer.zero_grad()
    loss_of(batch)(model).backward()
    optimizer.step()


@pytest.fixture(scope="module")
def run(batch):
    """Two trainings of 4 steps, the second with views: states, its reports, random states."""
    torch.manual_seed(0)
    model = network()
    twin = copy.deepcopy(model)
    reports, states, random = [], [], []
    for own, views in ((twin, None), (model, TrainingViews(loss_of(batch), every_n_steps=3))):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(own.parameters(), lr=0.5, momentum=0.9)
        with bnguard.watch(own, optimizer=optimizer, views=views, strict=True) as monitor:
            for _ in range(4):
                step(own, optimizer, batch)
                states.append(copy.deepcopy(own.state_dict()))
                reports.append(monitor.report())
                random.append(torch.get_rng_state())
    return states, reports[4:], random


def test_the_training_is_the_same_with_and_without_it(run):
    states, _, random = run
    for without, with_views in zip(states[:4], states[4:], strict=True):
        torch.testing.assert_close(without, with_views, rtol=0, atol=0)
    assert torch.equal(random[3], random[7])


def test_it_is_measured_after_the_second_step_and_then_every_n_steps(run):
    _, reports, _ = run
    views = [[layer.view for layer in report.layers] for report in reports]
    assert views[0] == [None, None, None]
    assert [view.step for view in views[1]] == [2, 2, 2]
    assert views[2] == views[1]


def test_gradients_are_compared_before_and_after_the_update_of_the_layers_before(run, batch):
    states, reports, random = run
    before, after = states[4], states[5]
    first, *rest = [layer.view for layer in reports[1].layers]
    assert (first.gradient_cosine, first.gradient_change) == (None, None)
    groups = [["1.", "2."], ["5.", "6."], ["8.", "9."]]
    for index, view in enumerate(rest, 1):
        moved = [prefix for group in groups[:index] for prefix in group]
        gradients = []
        for is_moved in (False, True):
            model = network()
            torch.set_rng_state(random[5])
            model.load_state_dict(
                {
                    name: after[name]
                    if is_moved and name.startswith(tuple(moved)) and "running" not in name
                    else before[name]
                    for name in before
                }
            )
            own = [p for n, p in model.named_parameters() if n.startswith(tuple(groups[index]))]
            found = torch.autograd.grad(loss_of(batch)(model), own)
            gradients.append(torch.cat([part.flatten() for part in found]))
        a, b = gradients
        assert view.gradient_cosine == pytest.approx((a @ b / a.norm() / b.norm()).item())
        assert view.gradient_change == pytest.approx(((a - b).norm() / a.norm()).item())
        assert view.gradient_change > 0.01


def test_an_update_of_accumulated_batches_is_measured_whole(batch):
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    views = TrainingViews(loss_of(batch), every_n_steps=1)
    with bnguard.watch(model, views=views, strict=True) as monitor:
        for number in (1, 2, 3):
            for is_last in (False, True):
                loss_of(batch)(model).backward()
                if is_last:
                    optimizer.step()
                    optimizer.zero_grad()
                monitor.step(number)
        assert all(layer.view.gradient_change > 0.01 for layer in monitor.report().layers[1:])


def test_shares_are_those_of_inputs_and_outputs_of_the_layer(run, batch):
    states, reports, _ = run
    model = network()
    model.load_state_dict(states[4])
    values = model[:2](batch[0])
    outputs = model[2](values)
    view = reports[1].layers[0].view
    for given, share, dead in (
        (outputs, view.saturated_share, view.dead_share),
        (values, view.saturated_share_without, view.dead_share_without),
    ):
        numbers = given.detach().numpy()
        assert share == pytest.approx((abs(numbers) > 2).mean())
        assert dead == pytest.approx((numbers.max(0) <= 0).mean())
    assert view.saturated_share_without > view.saturated_share > 0


@pytest.mark.parametrize("positions", [(), (6,)])
def test_noise_is_the_spread_of_a_normalised_value_over_random_batches(positions):
    torch.manual_seed(0)
    level = torch.randn(4096, 2, *(1 for _ in positions), dtype=torch.float64)
    population = 5.0 + level + 2.0 * torch.randn(4096, 2, *positions, dtype=torch.float64)
    others = (0, *range(2, population.dim()))
    sample, normalised, estimates = population[:256], [], []
    for _ in range(1000):
        drawn = population[torch.randint(4096, (64,))]
        mean, var = drawn.mean(others, keepdim=True), drawn.var(others, False, keepdim=True)
        normalised.append((sample - mean) / (var + 1e-5).sqrt())
        estimates.append(normalisation_noise(drawn, 1e-5) ** 2)
    spread = torch.stack(normalised).var(0).mean().sqrt().item()
    assert torch.tensor(estimates).mean().sqrt().item() == pytest.approx(spread, rel=0.06)
    assert normalisation_noise(population[:15], 1e-5) is None


def test_a_loss_that_fails_leaves_the_model_as_it_was(batch):
    torch.manual_seed(0)
    model = network()
    calls = iter(range(9))

    def loss(model):
        value = loss_of(batch)(model)
        if next(calls) == 1:
            raise RuntimeError("no more")
        return value

    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with bnguard.watch(model, optimizer=optimizer, views=TrainingViews(loss)) as monitor:
        step(model, optimizer, batch)
        optimizer.zero_grad()
        loss_of(batch)(model).backward()
        expected = [p - 0.5 * p.grad for p in model.parameters()]
        statistics = copy.deepcopy(dict(model.named_buffers()))
        with pytest.warns(UserWarning, match="nothing is measured for views any more: .*no more"):
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected, strict=True))
        torch.testing.assert_close(dict(model.named_buffers()), statistics, rtol=0, atol=0)
        # The error is the user's: watching goes on.
        assert monitor.report().failure is None
        step(model, optimizer, batch)
        assert monitor.report().history.run.steps == 3
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("views", [(3, 10), (loss_of, 0), (loss_of, 1.5)])
def test_views_that_cannot_be_measured_are_a_clear_error(views):
    with pytest.raises(ConfigurationError, match=r"cannot be called|at least 1"):
        TrainingViews(*views)


def test_a_word_in_the_place_of_the_loss_is_a_clear_error():
    with pytest.raises(ConfigurationError, match="loss of a fixed batch, not 'training'"):
        bnguard.watch(network(), views="training")


def test_it_is_shown_in_the_report_and_its_json(run):
    _, reports, _ = run
    shown = str(reports[1])
    assert "What BN does to training" in shown
    view = reports[1].layers[1].view
    assert reports[1].to_dict()["layers"][1]["view"]["noise_std"] == view.noise_std
    assert f"{view.gradient_cosine:.3g}" in shown
    assert "What BN does to training" not in str(reports[0])
