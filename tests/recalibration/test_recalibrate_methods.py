"""The other methods; how much is held at once; when enough samples are enough."""

import copy

import pytest
import torch
from torch import nn

import bnguard
from bnguard.errors import CalibrationError
from tests.benchmarks.truth import errors, true_statistics


def net():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    )


def images(count=64):
    offsets = (torch.arange(count) >= count // 2).float().view(-1, 1, 1, 1) * 2.0
    return torch.randn(count, 2, 8, 8) + offsets


def test_precise_pools_the_inputs_of_batches_normalised_by_themselves():
    model, batches = net(), [*images(64).split(6), images(1)]
    twin, inputs = copy.deepcopy(model).double().train(), []
    twin[4].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    first = twin[0](torch.cat(batches).double())
    for batch in batches:
        twin(batch.double())
    second = torch.cat(inputs)
    bnguard.recalibrate(model, batches, method="precise")
    for layer, values in ((model[1], first), (model[4], second)):
        assert torch.allclose(layer.running_mean.double(), values.mean((0, 2, 3)), atol=1e-5)
        assert torch.allclose(layer.running_var.double(), values.var((0, 2, 3)), rtol=1e-5)


def test_precise_takes_batches_of_one_value_per_channel():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    x = torch.randn(30, 4) * 2.0
    result = bnguard.recalibrate(model, x.split(1), method="precise")
    assert torch.allclose(model[0].running_var, x.var(0), rtol=1e-5)
    assert result.virtual_batches == 30


def test_precise_takes_a_layer_on_its_own_descendants():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            for _ in range(3):
                x = self.norm(x) * 2.0
            return x

    model, x = Recurrent(), torch.randn(40, 4) * 4.0
    bnguard.recalibrate(model, [x], method="precise")
    unit = (x - x.mean(0)) / x.std(0, correction=0) * 2.0
    assert torch.allclose(model.norm.running_var, torch.cat([x, unit, unit]).var(0), rtol=1e-3)


def test_adapt_without_a_prior_is_exact():
    model, x = net(), images()
    twin = copy.deepcopy(model)
    bnguard.recalibrate(model, x.split(9), method="adapt")
    bnguard.recalibrate(twin, x.split(9), method="exact")
    assert torch.equal(model[4].running_var, twin[4].running_var)


@pytest.mark.parametrize("batch_size", [1, 9, 64])
def test_adapt_mixes_with_the_source_at_every_layer(batch_size):
    model, x, target = net(), images(), images() * 3.0 + 1.0
    bnguard.recalibrate(model, [x])
    source = copy.deepcopy(model).double()
    bnguard.recalibrate(model, target.split(batch_size), method="adapt", prior=16)
    weight = 64 / (16 + 64)
    values = target.double()
    for index, module in enumerate(source.eval()):
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.running_mean.lerp_(values.mean((0, 2, 3)), weight)
                module.running_var.lerp_(values.var((0, 2, 3)), weight)
            assert torch.allclose(
                model[index].running_mean.double(), module.running_mean, atol=1e-5
            )
            assert torch.allclose(model[index].running_var.double(), module.running_var, rtol=1e-5)
        values = module(values).detach()


def test_adapt_needs_a_source_to_mix_with():
    model = net()
    model[1].running_mean[0] = float("nan")
    with pytest.raises(CalibrationError, match="1: the statistics to mix with are not finite"):
        bnguard.recalibrate(model, [images()], method="adapt", prior=5)


def held_at_once(model, batches, **options):
    """Recalibrate; return the most forwards and samples in the model at once, and the result."""
    sizes, most_forwards, most_samples = [], 0, 0

    class Counted(nn.Module):
        def forward(self, x):
            nonlocal most_forwards, most_samples
            sizes.append(len(x))
            most_forwards = max(most_forwards, len(sizes))
            most_samples = max(most_samples, sum(sizes))
            try:
                return model(x)
            finally:
                sizes.remove(len(x))

    counted = Counted()
    counted.model = model
    result = bnguard.recalibrate(counted, batches, **options)
    return most_forwards, most_samples, result


def test_memory_bounds_how_many_samples_are_held_at_once():
    # A sample takes its 128 values twice, 4 x 6 x 6 of the first convolution, and as many behind.
    model, x = net(), images(640)
    truth = {
        f"model.{name}": statistics
        for name, statistics in true_statistics(copy.deepcopy(model).double(), [x.double()]).items()
    }
    forwards, samples, whole = held_at_once(model, x.split(16))
    assert (forwards, samples, whole.virtual_batches) == (1, 640, 1)
    forwards, samples, parts = held_at_once(model, x.split(16), samples=640, memory="300 kB")
    assert 2 <= parts.virtual_batches <= 8
    assert forwards == 1
    assert samples <= 640 / parts.virtual_batches + 16
    assert any(f"ran as {parts.virtual_batches} virtual batches" in note for note in parts.notes)
    assert max(errors(whole, truth)) < 1e-5 < max(errors(parts, truth))
    assert abs(parts.after["model.1"].mean - truth["model.1"][0]).max() < 1e-5


def test_the_thread_count_is_bounded():
    ragged = [torch.randn(1, 2, 8, 8 + width) for width in range(300)]
    forwards, _, result = held_at_once(net(), ragged)
    assert forwards == 256
    assert result.virtual_batches == 2


def test_batches_are_only_joined_if_samples_do_not_depend_on_one_another():
    class Centred(nn.Module):
        """Takes the mean of the batch away."""

        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(x - x.mean(0))

    model, x = Centred(), torch.randn(40, 4) * 2.0
    truth = true_statistics(copy.deepcopy(model).double(), [b.double() for b in x.split(4)])
    assert max(errors(bnguard.recalibrate(model, x.split(4)), truth)) < 1e-5


@pytest.mark.parametrize("method", ["exact", "precise"])
def test_a_tolerance_stops_when_the_statistics_are_precise_enough(method):
    x = torch.randn(20000, 4) * 3.0 + 1.0
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    result = bnguard.recalibrate(model, x.split(20), samples=20000, tolerance=0.05, method=method)
    # Independent values: 1/0.05² for the mean, twice that for the logarithm of the variance.
    assert 400 < result.samples < 4000
    assert f"within the tolerance of 0.05 after {result.samples:,} samples" in result.notes
    assert abs(result.after["0"].mean - 1.0).max() < 4 * 0.05 * 3.0
    few = bnguard.recalibrate(model, x.split(20), samples=100, tolerance=0.05, method=method)
    assert few.notes[-1] == "the tolerance of 0.05 takes more than 100 samples"


def test_pixels_of_one_image_do_not_count_as_independent():
    constant = torch.randn(2000, 2, 1, 1).expand(-1, -1, 8, 8)
    result = bnguard.recalibrate(
        nn.BatchNorm2d(2), constant.split(10), samples=2000, tolerance=0.05
    )
    assert result.samples > 400


@pytest.mark.parametrize(
    ("samples", "options", "told"),
    [
        (1, {}, ["1 sample is few: the standard error of a mean may be up to 1 σ"]),
        (16, {}, ["16 samples are few: the standard error of a mean may be up to 0.25 σ"]),
        (16, {"method": "adapt", "prior": 48.0}, []),
        (128, {}, []),
    ],
)
def test_few_samples_are_reported_with_the_error_of_the_means(samples, options, told):
    result = bnguard.recalibrate(net(), [images(128)[:samples]], **options)
    assert list(result.notes) == told


def test_means_of_samples_with_equal_values_scatter_as_reported():
    model = nn.Sequential(nn.BatchNorm2d(1))
    means = []
    for _ in range(200):
        bnguard.recalibrate(model, [torch.randn(16, 1, 1, 1).expand(16, 1, 3, 3)])
        means.append(model[0].running_mean.item())
    assert torch.tensor(means).std().item() == pytest.approx(0.25, rel=0.2)


def few_updates(momentum):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8, momentum=momentum))
    for _ in range(3):
        model(30.0 * torch.randn(16, 4))
    return model


def is_unconverged(subject):
    return any(
        finding.code == "BN303" and finding.severity > bnguard.Severity.INFO
        for finding in bnguard.inspect(subject).findings
    )


@pytest.mark.parametrize("momentum", [None, 0.0, 1e-9, 0.001, 0.1, 0.15, 0.3, 0.99], ids=str)
@pytest.mark.parametrize("method", ["exact", "precise", "adapt"])
def test_the_counter_says_converged_at_any_momentum(momentum, method):
    """One that knows the momentum, and one that has to assume the default; also after training."""
    model = few_updates(momentum)
    before = copy.deepcopy(model.state_dict())
    assert is_unconverged(before)
    result = bnguard.recalibrate(model, (30.0 * torch.randn(64, 4)).split(16), method=method)
    for _ in range(2):
        assert not is_unconverged(model)
        assert not is_unconverged(model.state_dict())
        model.train()(30.0 * torch.randn(16, 4))
    result.undo()
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)


@pytest.mark.parametrize("momentum", [0.001, 0.01, 0.1, 0.15], ids=str)
def test_the_counter_does_not_hide_what_a_prior_keeps_of_the_initial_statistics(momentum):
    model = few_updates(momentum)
    data = (30.0 * torch.randn(64, 4)).split(16)
    bnguard.recalibrate(model, data, method="adapt", prior=192.0)
    assert is_unconverged(model)
    left = 0.75 * (1.0 - momentum) ** 3
    assert (1.0 - momentum) ** int(model[1].num_batches_tracked) == pytest.approx(left, rel=0.15)
    stored = bnguard.inspect(model.state_dict())
    assert is_unconverged(model.state_dict()) or "momentum is not stored" in str(stored)
    bnguard.recalibrate(model, data, method="adapt", prior=1.0)
    assert not is_unconverged(model)
    assert not is_unconverged(model.state_dict())


def test_a_repaired_model_with_momentum_none_updates_at_the_pace_of_its_counter():
    model = few_updates(None)
    bnguard.recalibrate(model, (30.0 * torch.randn(64, 4)).split(16))
    mean = model[1].running_mean.clone()
    batch = 100.0 + torch.randn(16, 4)
    model.train()(batch)
    new = model[0](batch).mean(0)
    assert torch.allclose(model[1].running_mean, mean + (new - mean) / 30, rtol=1e-4)
