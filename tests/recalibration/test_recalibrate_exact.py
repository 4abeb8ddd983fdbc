"""Exact recalibration against float64 statistics of the whole set."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bnguard
from bnguard.errors import CalibrationError
from tests.benchmarks.truth import errors, true_statistics


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request):
    """Batches run one by one, or several at once."""
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


def conv_net(**options):
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6, **options),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2),
        nn.BatchNorm2d(8, **options),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
        nn.BatchNorm1d(5, **options),
    )


def images(count=48, size=10):
    """Images of two classes, sorted."""
    offsets = (torch.arange(count) >= count // 2).float().view(-1, 1, 1, 1) * 2.0
    return torch.randn(count, 3, size, size) * 1.5 + offsets


def double(batches):
    return [batch.double() for batch in batches]


def check(model, batches, tolerance=1e-5, **options):
    """Recalibrate, and compare with the float64 statistics of the whole set."""
    truth = true_statistics(copy.deepcopy(model).double(), double(batches))
    result = bnguard.recalibrate(model, batches, progress=False, **options)
    assert result.is_kept
    assert set(result.after) == set(truth)
    shift, ratio = errors(result, truth)
    assert shift < tolerance
    assert ratio < tolerance
    return result


@pytest.mark.parametrize("batch_size", [1, 2, 7, 48])
@pytest.mark.usefixtures("threads")
def test_the_result_is_that_of_one_giant_batch_at_any_batch_size(batch_size):
    check(conv_net(), images().split(batch_size))


def large_images_net():
    """A network whose rounding is out of the way: what is left is that of the statistics."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4),
    )
    return nn.Sequential(nn.BatchNorm2d(3), *net)


@pytest.mark.parametrize("method", ["exact", "adapt"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_large_images_give_the_same_at_any_batch_size(method, layout):
    x = (torch.randn(16, 3, 512, 512) + 1.0).contiguous(memory_format=layout)
    model = large_images_net()
    truth = true_statistics(copy.deepcopy(model).double(), double([x]))
    for batch_size in (1, 4, 16):
        result = bnguard.recalibrate(model, x.split(batch_size), method=method, progress=False)
        assert max(errors(result, truth)) < 1e-5


def test_batches_of_large_images_are_pooled_as_exactly():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))
    x = torch.randn(8, 3, 512, 512).contiguous(memory_format=torch.channels_last) + 1.0
    truth = true_statistics(copy.deepcopy(model).double(), double([x]))
    for batch_size in (1, 4, 16):
        result = bnguard.recalibrate(model, x.split(batch_size), method="precise", progress=False)
        assert max(errors(result, truth)) < 1e-5


def test_models_that_take_images_in_only_one_layout():
    class Viewed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = conv_net()

        def forward(self, x):
            x = self.net[:3](x)
            return self.net[3:](x.view(len(x), -1).mul(2.0).view(x.shape))

    check(Viewed(), images().split(7))


@pytest.mark.usefixtures("threads")
def test_batches_may_differ_in_size_down_to_one_value_per_channel():
    x = images(30)
    result = check(conv_net(), [x[:16], x[16:29], x[29:]])
    assert result.samples == 30


@pytest.mark.usefixtures("threads")
def test_batches_may_differ_in_spatial_size():
    check(conv_net(), [images(8, 10), images(4, 15), images(2, 12), images(2, 12)])


def test_a_mean_far_from_zero_costs_no_more_than_the_buffer_rounds():
    x = torch.randn(64, 4, 9, 9) * 0.01 + 1e4
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    truth = true_statistics(copy.deepcopy(model).double(), double(x.split(4)))
    result = bnguard.recalibrate(model, x.split(4))
    mean, var = truth["0"]
    assert abs(result.after["0"].mean - mean).max() <= 2**-11  # half the spacing of float32 there
    assert abs(result.after["0"].var / var - 1).max() < 2e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_modules_in_half_precision(dtype):
    model, x = conv_net().to(dtype), images().to(dtype)
    truth = true_statistics(model, x.split(8))
    shift, ratio = errors(bnguard.recalibrate(model, x.split(4)), truth)
    assert model[1].running_mean.dtype is dtype
    assert shift < 0.02
    assert ratio < 0.02


@pytest.mark.usefixtures("threads")
def test_under_autocast_the_statistics_are_of_the_cast_inputs():
    model, x = conv_net(), images()
    plain = errors(bnguard.recalibrate(copy.deepcopy(model), [x]), true_statistics(model, [x]))
    with torch.autocast("cpu", torch.bfloat16):
        truth = true_statistics(model, [x])
        shift, ratio = errors(bnguard.recalibrate(model, x.split(6)), truth)
    assert shift < 1e-3
    assert ratio < 1e-3
    assert max(plain) < 1e-3


def test_dropout_upstream_is_off():
    model = nn.Sequential(nn.Dropout(0.5), *conv_net(), nn.Dropout(0.5))
    check(model, images().split(8))


@pytest.mark.parametrize("momentum", [None, 0.0, 1e-6])
def test_momentum_makes_no_difference(momentum):
    check(conv_net(momentum=momentum), images().split(8))


class Siamese(nn.Module):
    """One encoder on two halves of the input."""

    def __init__(self):
        super().__init__()
        self.encoder = conv_net()

    def forward(self, x):
        return self.encoder(x[:, :3]) + self.encoder(x[:, 3:] * 3.0)


def test_calls_on_parallel_streams_are_pooled():
    x = torch.cat([images(20), images(20)], dim=1)
    check(Siamese(), x.split(3))


class SharedAfterOther(nn.Module):
    """A layer called twice, once after another layer: that one must come first."""

    def __init__(self):
        super().__init__()
        self.shared, self.other = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.shared(x) + self.shared(self.other(x * 5.0) ** 2)


def test_a_shared_layer_waits_for_the_layers_that_lead_to_it():
    model, x = SharedAfterOther(), torch.randn(40, 4) + 1.0
    truth = true_statistics(copy.deepcopy(model).double(), [x.double()], order=["other", "shared"])
    assert max(errors(bnguard.recalibrate(model, x.split(3)), truth)) < 1e-5


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.step = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        x = self.before(x)
        for _ in range(3):
            x = torch.relu(self.linear(self.step(x)))
        return x


def test_a_layer_on_its_own_descendants_is_refused_by_name():
    model, x = Recurrent(), torch.randn(40, 4) * 3.0
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError, match=r"leave the layer out, or use method 'precise'$"):
        bnguard.recalibrate(model, x.split(5))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_layer_on_its_own_descendants_can_be_left_out():
    model, x = Recurrent(), torch.randn(40, 4) * 3.0
    result = bnguard.recalibrate(model, x.split(5), layers=["before"])
    assert [layer.name for layer in result.skipped] == ["step"]
    assert (
        max(errors(result, true_statistics(model.double(), [x.double()], order=["before"]))) < 1e-5
    )


class Branches(nn.Module):
    """Two parallel layers in an order that depends on the batch; a third that some skip."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.extra = (nn.BatchNorm1d(4) for _ in range(3))

    def forward(self, x):
        if x[0, 0] > 0:
            y = self.left(x) * self.right(x * 2.0)
        else:
            y = self.right(x * 2.0) * self.left(x)
        return self.extra(y) if len(x) == 5 else y


def test_batches_may_visit_the_layers_in_different_order_and_skip_some():
    model, batches = Branches(), [*torch.randn(40, 4).split(5), *torch.randn(12, 4).split(4)]
    check(model, batches)


class Routed(nn.Module):
    """Sends each sample to the layer that the statistics of another decide on."""

    def __init__(self):
        super().__init__()
        self.gate, self.low, self.high = (nn.BatchNorm1d(4) for _ in range(3))

    def forward(self, x):
        is_high = self.gate(x)[:, 0] > 0
        y = torch.empty_like(x)
        if is_high.any():
            y[is_high] = self.high(x[is_high])
        if not is_high.all():
            y[~is_high] = self.low(x[~is_high])
        return y


def test_a_way_that_depends_on_the_statistics_is_found_with_the_new_ones():
    check(Routed(), (torch.randn(60, 4) * 2.0 + 5.0).split(6))


class Unet(nn.Module):
    """Keeps what a later layer needs on itself, as hooks that store features do."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        self.skip = x
        x = self.conv(self.down(x))
        return self.up(x + self.skip)


@pytest.mark.usefixtures("threads")
def test_models_that_keep_features_on_themselves():
    check(Unet(), images(20, 6).split(2))


class WritesToInput(nn.Module):
    """Normalises its input in place."""

    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def forward(self, x):
        return self.net(x.sub_(1.0).div_(3.0))


@pytest.mark.parametrize("batch_size", [5, 20])
def test_models_that_write_to_their_input(batch_size):
    x = images(20).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    model = WritesToInput()
    truth = true_statistics(
        copy.deepcopy(model).double(), [x.double()], lambda model, x: model(x.clone())
    )
    assert max(errors(bnguard.recalibrate(model, x.split(batch_size)), truth)) < 1e-5
    assert torch.equal(x, before)


class HiddenState(nn.Module):
    """Keeps features where nobody would look: in the closure of a hook."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        kept = {}
        self.down.register_forward_hook(lambda module, args, out: kept.update(skip=out))
        self.read = lambda: kept["skip"]

    def forward(self, x):
        return self.up(self.down(x).relu() + self.read() * 2.0)


@pytest.mark.usefixtures("threads")
def test_models_that_keep_features_elsewhere():
    check(HiddenState(), images(20, 6).split(5))


class Noisy(nn.Module):
    """Draws random numbers in eval mode too, as a variational autoencoder does."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x):
        x = self.inner(x)
        return self.outer(x + torch.randn_like(x))


@pytest.mark.usefixtures("threads")
def test_noise_that_is_on_in_eval_mode_is_part_of_the_inputs():
    model, x = Noisy(), torch.randn(4000, 4)
    state = torch.get_rng_state()
    result = bnguard.recalibrate(model, x.split(100), samples=4000)
    assert abs(result.after["outer"].var - 2.0).max() < 0.3
    assert abs(result.after["outer"].mean).max() < 0.1
    assert torch.equal(state, torch.get_rng_state())


class WithAutograd(nn.Module):
    """Takes a gradient inside its forward."""

    def __init__(self):
        super().__init__()
        self.net = conv_net()
        self.last = nn.BatchNorm2d(3)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.net(x).square().sum(), x)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return self.last(slope)


@pytest.mark.usefixtures("threads")
def test_models_that_call_autograd():
    model = WithAutograd()
    check(model, images(24).split(4), tolerance=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


class WithThreads(nn.Module):
    """Runs two branches in threads of its own."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.last = (nn.BatchNorm1d(4) for _ in range(3))
        self.pool = ThreadPoolExecutor(2)

    def __deepcopy__(self, memo):
        twin = WithThreads().to(self.left.weight.dtype)
        twin.load_state_dict(self.state_dict())
        return twin

    def forward(self, x):
        def branch(layer):
            with torch.no_grad():
                return layer(x)

        return self.last(sum(self.pool.map(branch, (self.left, self.right))) ** 2)


@pytest.mark.usefixtures("threads")
def test_models_that_start_threads():
    model = WithThreads()
    check(model, (torch.randn(60, 4) * 3.0).split(6))
    model.pool.shutdown()
    assert threading.active_count() < 20


class Locked(nn.Module):
    """Lets one forward through at a time."""

    def __init__(self):
        super().__init__()
        self.net = conv_net()
        self.locks = [threading.Lock()]

    def __deepcopy__(self, memo):
        twin = Locked().to(self.net[0].weight.dtype)
        twin.load_state_dict(self.state_dict())
        return twin

    def forward(self, x):
        with self.locks[0]:
            return self.net(x)


@pytest.mark.usefixtures("threads")
def test_models_that_let_one_forward_through_at_a_time(monkeypatch):
    monkeypatch.setattr("bnguard.recalibration.lockstep._TIMEOUT_SECONDS", 0.1)
    check(Locked(), images(20).split(4))


class LikeBatchNorm(nn.Module):
    """A BN class that is not PyTorch's, with buffers that broadcast."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("moving_mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("moving_var", torch.ones(1, channels, 1, 1))

    def forward(self, x):
        return (x - self.moving_mean) / (self.moving_var + 1e-3).sqrt()


def test_registered_classes(monkeypatch):
    known = dict(bnguard.layers.bn_layer._ADAPTERS)
    monkeypatch.setattr("bnguard.layers.bn_layer._ADAPTERS", known)
    bnguard.register_layer(
        LikeBatchNorm, mean="moving_mean", var="moving_var", momentum=0.1, eps=1e-3
    )
    model = nn.Sequential(LikeBatchNorm(3), nn.Conv2d(3, 4, 3), nn.ReLU(), LikeBatchNorm(4))
    x = images(20)
    mean = x.double().mean((0, 2, 3), keepdim=True)
    bnguard.recalibrate(model, x.split(3))
    assert model[0].moving_mean.shape == (1, 3, 1, 1)
    assert torch.allclose(model[0].moving_mean.double(), mean, atol=1e-5)
    h = model[:3](x).double()
    assert torch.allclose(model[3].moving_mean.double(), h.mean((0, 2, 3), keepdim=True), atol=1e-5)
    assert torch.allclose(model[3].moving_var.double(), h.var((0, 2, 3), keepdim=True), atol=1e-5)


class BatchNormAct(nn.BatchNorm2d):
    """A subclass with its activation inside."""

    def forward(self, x):
        return F.leaky_relu(super().forward(x))


def test_synchronised_layers_and_subclasses():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), BatchNormAct(4), nn.Conv2d(4, 4, 3), nn.SyncBatchNorm(4)
    )
    check(model, images(20).split(3))


class Operations(TorchDispatchMode):
    """Lists the operations that run under it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.names.append((len(args[0]), threading.current_thread()))
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("threads")
def test_batches_run_joined_in_the_thread_of_the_caller():
    with Operations() as operations:
        bnguard.recalibrate(conv_net(), images(48).split(4))
    assert (48, threading.main_thread()) in operations.names


def test_layers_given_by_keyword():
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(input=x)

    check(ByKeyword(), torch.randn(20, 4).split(3))


def test_a_layer_used_in_two_places_pools_their_inputs():
    norm = nn.BatchNorm1d(4)

    class TwoPlaces(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Sequential(norm), nn.Sequential(norm)

        def forward(self, x):
            return self.left(x) + self.right(x * 2.0 + 1.0)

    check(TwoPlaces(), torch.randn(20, 4).split(3))
