"""A model, and the generators of the process, are as before after any work on the model."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.ao.quantization import (
    DeQuantStub,
    QuantStub,
    convert,
    fuse_modules_qat,
    get_default_qat_qconfig,
    get_default_qconfig,
    prepare,
    prepare_qat,
)
from torch.utils.data import DataLoader, Dataset

# Here and not in a test: the first import of rich draws from Python's generator.
from bnguard import diagnose, recalibrate, swap
from bnguard.errors import CalibrationError
from bnguard.layers.bn_layer import find_layers
from bnguard.layers.preserve import (
    RandomStates,
    RandomStream,
    draw_from_seed,
    has_statistics,
    preserve_gradients,
    preserve_modes,
    preserve_random_states,
    preserve_statistics,
    restore_statistics,
    save_statistics,
)
from bnguard.observe.gap_probe import GapProbe

CPU = torch.device("cpu")


class Augmented(Dataset):
    """Augments with all three generators, and may fail at a sample."""

    def __init__(self, fails_at=None):
        self.samples = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        self.fails_at = fails_at

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        if index == self.fails_at:
            raise OSError("disk on fire")
        scale = random.uniform(0.5, 1.5) + np.random.rand() + torch.rand(()).item()
        return self.samples[index] * scale, index % 2


def loader_of(fails_at=None):
    return DataLoader(Augmented(fails_at), batch_size=16, shuffle=True)


def net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)
    )


WORK = {
    "recalibrate": lambda model, loader: recalibrate(model, loader),
    "precise": lambda model, loader: recalibrate(model, loader, method="precise"),
    "diagnose": lambda model, loader: diagnose(model, loader, loader),
    "swap": lambda model, loader: swap(model, sample=torch.ones(4, 3, 4, 4)),
    "distil": lambda model, loader: swap(model, teacher_data=loader, steps=2, progress=False),
}


@pytest.mark.parametrize("fails_at", [None, 40], ids=["to the end", "loader fails"])
@pytest.mark.parametrize("work", list(WORK))
def test_all_three_generators_are_as_before(work, fails_at):
    model, loader = net(), loader_of(fails_at)
    before = RandomStates.now([CPU])
    try:
        WORK[work](model, loader)
    except (CalibrationError, OSError):
        assert fails_at is not None
    assert before.is_same(RandomStates.now([CPU]))


def test_the_mode_gap_of_watching_leaves_all_three_generators():
    class Draws(nn.Module):
        def forward(self, x):
            return x * (random.random() + np.random.rand() + torch.rand(1))

    model = nn.Sequential(nn.BatchNorm1d(4), Draws(), nn.Linear(4, 3))
    layers = find_layers(model)
    probe = GapProbe(model.eval(), layers)
    model(torch.randn(8, 4))
    before = RandomStates.now([CPU])
    assert not isinstance(probe.measure(), str)
    assert before.is_same(RandomStates.now([CPU]))
    probe.close()


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(1)])
def test_each_generator_comes_back_after_an_exception(draw):
    def draw_and_stop():
        draw()
        assert not before.is_same(RandomStates.now([CPU]))
        raise KeyboardInterrupt

    model, before = nn.Linear(2, 2), RandomStates.now([CPU])
    with pytest.raises(KeyboardInterrupt), preserve_random_states(model):
        draw_and_stop()
    assert before.is_same(RandomStates.now([CPU]))


def test_a_forward_that_draws_from_numpy_or_python_is_calibrated():
    class Jitters(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.second(self.first(x) * (1.0 + random.random() + np.random.rand()))

    model, x = Jitters(), torch.randn(90, 4) * 3.0
    recalibrate(model, x.split(30))
    assert torch.allclose(model.first.running_var, x.var(0), rtol=1e-4)
    # Each batch is scaled by its own number between 1 and 3.
    assert (model.second.running_var > 1.0).all()
    assert (model.second.running_var < 9.0).all()


@pytest.mark.parametrize("bit_generator", [np.random.PCG64, np.random.MT19937])
def test_numpy_may_draw_from_a_generator_of_another_kind(bit_generator):
    model, usual = net(), np.random.get_bit_generator()
    np.random.set_bit_generator(bit_generator(3))
    try:
        before = RandomStates.now([CPU])
        recalibrate(model, loader_of())
        assert before.is_same(RandomStates.now([CPU]))
    finally:
        np.random.set_bit_generator(usual)


def test_modes_come_back_one_by_one_after_an_exception():
    model = nn.Sequential(nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()), nn.ReLU())
    model[0].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(ValueError, match="more than 1 value"), preserve_modes(model):
        model.train()(torch.randn(1, 2))
    assert [module.training for module in model.modules()] == before


def test_gradients_are_out_of_the_reach_of_a_backward():
    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    gradient, values = model.weight.grad, model.weight.grad.clone()
    with preserve_gradients(model):
        model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad is gradient
    assert torch.equal(gradient, values)


def test_statistics_come_back_and_a_backward_that_needs_them_still_works():
    model = nn.BatchNorm1d(4)
    loss = model.eval()(torch.randn(8, 4)).square().sum()
    mean, values = model.running_mean, model.running_mean.clone()
    with preserve_statistics(find_layers(model)):
        model.train()(torch.randn(8, 4) + 3.0)
        assert not torch.equal(model.running_mean, values)
        mean.data.fill_(7.0)  # As DistributedDataParallel writes to the buffers that it knows.
    assert model.running_mean is mean
    assert torch.equal(mean, values)
    loss.backward()


def test_saved_statistics_go_to_the_layers_of_their_names():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    first, second = find_layers(model)
    saved = save_statistics([first])
    assert has_statistics(first, saved)
    assert not has_statistics(second, saved)
    model.train()(torch.randn(8, 4) + 3.0)
    moved = model[1].running_mean.clone()
    assert not has_statistics(first, saved)
    restore_statistics([first, second], saved)
    assert has_statistics(first, saved)
    assert model[0].num_batches_tracked == 0
    assert torch.equal(model[1].running_mean, moved)


def test_a_stream_continues_and_disturbs_no_other():
    torch.manual_seed(7)
    whole = torch.rand(4)
    outside = torch.get_rng_state()
    stream, drawn = RandomStream(7, CPU), []
    for _ in range(2):
        with stream.in_use():
            drawn.append(torch.rand(2))
        with draw_from_seed(1, CPU):
            torch.rand(5)
    assert torch.equal(torch.cat(drawn), whole)
    assert torch.equal(torch.get_rng_state(), outside)


def test_a_stream_knows_whether_it_was_in_use():
    with draw_from_seed(3, CPU) as stream:
        pass
    assert stream.is_untouched
    with draw_from_seed(3, CPU) as stream:
        torch.rand(1)
    assert not stream.is_untouched


@pytest.mark.filterwarnings("ignore")  # torch deprecates its own quantisation
def test_observers_for_quantisation_that_resize_their_buffers_are_as_before():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).train()
    model.qconfig = get_default_qat_qconfig("fbgemm")
    prepare_qat(fuse_modules_qat(model, ["0", "1", "2"]), inplace=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = torch.randn(32, 3, 4, 4).split(8)
    recalibrate(model, batches, progress=False).undo()
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    model(batches[0])  # still works as an observer


@pytest.mark.filterwarnings("ignore")  # torch deprecates its own quantisation
def test_layers_of_a_quantised_network_are_calibrated():
    model = nn.Sequential(QuantStub(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), DeQuantStub()).eval()
    model.qconfig = get_default_qconfig("fbgemm")
    x = torch.randn(32, 3, 8, 8)
    prepare(model, inplace=True)(x)
    convert(model, inplace=True)
    recalibrate(model, x.split(8), progress=False)
    values = model[1](model[0](x)).dequantize()
    assert torch.allclose(model[2].running_mean, values.mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(model[2].running_var, values.var((0, 2, 3)), rtol=1e-3)
