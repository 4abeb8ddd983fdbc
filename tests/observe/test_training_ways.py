"""The ways in which people really run training, each watched and held against a float64 record."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import bnguard
from tests.networks import conv_net
from tests.observe.oracle import Oracle, check_window, near


def watched(model, **options):
    return bnguard.watch(model, on_findings=lambda group: None, **options)


def by_name(monitor):
    return {layer.name: layer for layer in monitor.report().layers}


def train_step(model, inputs, optimizer):
    optimizer.zero_grad()
    model(inputs).float().square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype):
    model = conv_net()
    oracles = {name: Oracle(model[int(name)]) for name in ("1", "4", "7")}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watched(model) as monitor:
        for _ in range(6):
            with torch.autocast("cpu", dtype):
                loss = model(torch.randn(16, 1, 8, 8)).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step()
    for name, layer in by_name(monitor).items():
        check_window(layer.window, oracles[name])
        assert layer.values_per_channel.keys() == {16 * 64 // 4 ** ["1", "4", "7"].index(name)}


def test_channels_last():
    model = conv_net().to(memory_format=torch.channels_last)
    oracles = {name: Oracle(model[int(name)]) for name in ("1", "4", "7")}
    with watched(model) as monitor:
        for _ in range(4):
            model(torch.randn(8, 1, 8, 8).contiguous(memory_format=torch.channels_last))
            monitor.step()
    for name, layer in by_name(monitor).items():
        check_window(layer.window, oracles[name])
        assert layer.samples == 8


def test_gradient_accumulation():
    """Four batches a step are four updates, and four calls of one forward each."""
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watched(model, every_n_steps=2) as monitor:
        for _ in range(8):
            for _ in range(4):
                model(torch.randn(16, 1, 8, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step()
    for layer in by_name(monitor).values():
        assert layer.updates_seen == layer.calls.in_training == 32
        assert (layer.calls.most_per_forward, layer.source) == (1, "buffers")
        assert layer.calls.recomputed == layer.calls.outside == 0
    assert "BN207" not in {finding.code for finding in monitor.report().findings}


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.block = nn.Sequential(nn.Linear(6, 200), nn.BatchNorm1d(200), nn.ReLU())
        self.use_reentrant = use_reentrant

    def forward(self, inputs):
        return checkpoint(self.block, self.first(inputs), use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    """Each batch updates twice, and is one batch of the window all the same."""
    model = Checkpointed(use_reentrant)
    first, second = Oracle(model.block[1]), None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watched(model, every_n_steps=100) as monitor:
        for _ in range(12):
            train_step(model, torch.randn(8, 6), optimizer)
            monitor.step()
    second = Oracle(nn.BatchNorm1d(200))
    second.means, second.variances = first.means[::2], first.variances[::2]
    assert np.allclose(first.means[::2], first.means[1::2])
    layer = by_name(monitor)["block.1"]
    check_window(layer.window, second)
    assert (layer.updates_seen, layer.calls.in_training) == (24, 24)
    assert layer.calls.recomputed == layer.calls.outside == 12
    assert layer.calls.most_per_forward == 1
    assert layer.streams == ()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_layer_that_is_read_from_its_calls(use_reentrant):
    """What autograd saves is packed away there: to look at it would compute the block again."""
    model = Checkpointed(use_reentrant)
    model.block[1].momentum = 0.0
    oracle = Oracle(model.block[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watched(model) as monitor:
        for _ in range(5):
            train_step(model, torch.randn(8, 6), optimizer)
            monitor.step()
    assert len(oracle.means) == 10
    window = by_name(monitor)["block.1"].window
    near(window.mean, np.mean(oracle.means, axis=0), 1.0)
    near(window.var_unbiased, np.mean(oracle.variances, axis=0), 1.0)


def test_steps_that_a_gradient_scaler_skips_are_batches_all_the_same():
    model = conv_net()
    oracle = Oracle(model[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = [parameter.clone() for parameter in model.parameters()]
    with watched(model, optimizer=optimizer) as monitor:
        for _ in range(5):
            optimizer.zero_grad()
            scaler.scale(model(torch.randn(16, 1, 8, 8)).square().mean() * 100).backward()
            scaler.step(optimizer)
            scaler.update()
            monitor.step()
    assert all(map(torch.equal, before, model.parameters())), "no step was skipped"
    layer = by_name(monitor)["1"]
    check_window(layer.window, oracle)
    assert layer.updates_seen == 5


def test_conversion_to_sync_batch_norm_between_steps():
    model = conv_net()
    with watched(model, every_n_steps=2) as monitor:
        for step in range(8):
            model(torch.randn(16, 1, 8, 8))
            monitor.step()
            if step == 2:
                nn.SyncBatchNorm.convert_sync_batchnorm(model)
        layer = by_name(monitor)["4"]
    assert layer.kind == "SyncBatchNorm"
    assert layer.updates_seen == 8
    assert layer.running.updates == 8


def test_layers_added_removed_and_frozen_between_steps():
    model = conv_net()
    with watched(model, every_n_steps=2) as monitor:
        for step in range(10):
            if step == 2:
                model.append(nn.BatchNorm1d(10))
            if step == 4:
                model[1] = nn.Identity()
            if step == 6:
                model[4].eval()
                model[4].requires_grad_(False)
            model(torch.randn(16, 1, 8, 8))
            monitor.step()
        layers = by_name(monitor)
    assert set(layers) == {"4", "7", "11"}
    assert layers["4"].updates_seen == 6
    assert layers["4"].is_affine_frozen
    assert layers["7"].updates_seen == 10
    # Added after the second step, noticed at the fourth.
    assert layers["11"].updates_seen == 6
    assert layers["11"].calls.in_training == 6


REPLACEMENTS = {
    "converted": lambda model: model.double(),
    "loaded": lambda model: model.load_state_dict(
        {key: value.clone() for key, value in model.state_dict().items()}, assign=True
    ),
    "emptied": lambda model: [layer.reset_running_stats() for layer in (model[1], model[4])],
}


@pytest.mark.parametrize("replace", REPLACEMENTS.values(), ids=REPLACEMENTS)
def test_buffers_replaced_while_watched(replace):
    model = conv_net()
    with watched(model) as monitor:
        for _ in range(3):
            model(torch.randn(16, 1, 8, 8))
            monitor.step()
        replace(model)
        monitor.step()
        dtype = model[1].running_mean.dtype
        oracle = Oracle(model[1])
        for _ in range(3):
            model(torch.randn(16, 1, 8, 8, dtype=dtype))
            monitor.step()
        layer = by_name(monitor)["1"]
    assert layer.updates_seen == 6
    if dtype is torch.float64:
        check_window(layer.window, oracle)


def test_a_lazy_layer_is_read_once_it_knows_its_width():
    model = nn.Sequential(nn.Flatten(), nn.LazyBatchNorm1d())
    with watched(model, every_n_steps=2) as monitor:
        for _ in range(6):
            model(torch.randn(8, 3, 2))
            monitor.step()
        layer = by_name(monitor)["1"]
    assert (layer.kind, layer.channels) == ("BatchNorm1d", 6)
    assert layer.updates_seen == 5  # the first is the one that made the buffers
    assert layer.window.mean.shape == (6,)


def test_a_model_whose_tensors_were_made_in_inference_mode():
    with torch.inference_mode():
        model = conv_net()
        oracle = Oracle(model[1])
        with watched(model) as monitor:
            for _ in range(4):
                model(torch.randn(16, 1, 8, 8))
                monitor.step()
            check_window(by_name(monitor)["1"].window, oracle)
            model.eval()
            with monitor.evaluation():
                model(torch.randn(16, 1, 8, 8))
            layer = by_name(monitor)["1"]
    assert layer.evaluated.count == 16 * 64
    assert monitor.report().history.run.mode_gap is not None


@pytest.mark.parametrize(
    ("momentum", "reason"),
    [
        (0.0, "momentum 0 keeps nothing of a batch"),
        (0.0005, "momentum 0.0005 leaves too few digits of a batch"),
        (None, "an average over more than 1,000 batches leaves too few digits of the next"),
    ],
)
def test_layers_whose_buffers_tell_too_little_are_read_from_autograd(momentum, reason):
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=momentum))
    model[0].num_batches_tracked += 1001
    oracle = Oracle(model[0])
    with watched(model) as monitor:
        for _ in range(5):
            model(torch.randn(6, 3) + 2)
            monitor.step()
        report = monitor.report()
    (layer,) = report.layers
    check_window(layer.window, oracle)
    assert layer.source == f"autograd: {reason}"
    assert f"note: layer 0 read from autograd: {reason}" in " ".join(str(report).split())
    assert report.to_dict()["layers"][0]["source"] == layer.source


def test_a_layer_put_in_the_place_of_one_that_was_read_from_its_calls_is_read_so_too():
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=0.0))
    with watched(model, every_n_steps=4) as monitor:
        for step in range(10):
            if step == 5:
                model[0] = nn.BatchNorm1d(3, momentum=0.0)
            model(torch.randn(6, 3))
            monitor.step()
        (layer,) = monitor.report().layers
    assert layer.source.startswith("autograd: momentum 0")
    assert np.all(layer.window.batches >= 2)


def test_a_plain_average_is_read_from_its_buffers_for_a_thousand_batches():
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=None))
    model[0].num_batches_tracked += 990
    with watched(model, every_n_steps=10) as monitor:
        sources = []
        for _ in range(30):
            model(torch.randn(6, 3))
            monitor.step()
            sources.append(monitor.report().layers[0].source)
        (layer,) = monitor.report().layers
    assert sources[8] == "buffers"
    assert sources[-1].startswith("autograd: an average over more")
    assert np.all(layer.window.batches == 10)


def test_half_precision_buffers_are_read_from_the_inputs():
    model = nn.Sequential(nn.BatchNorm2d(4)).bfloat16()
    oracle = Oracle(model[0])
    with watched(model) as monitor:
        for _ in range(5):
            model(torch.randn(6, 4, 5, 5).bfloat16() + 3)
            monitor.step()
        (layer,) = monitor.report().layers
    assert layer.source == "inputs: bfloat16 buffers are too coarse"
    check_window(layer.window, oracle)


@pytest.mark.parametrize("is_without_grad", [True, False])
def test_the_input_is_read_if_autograd_saved_nothing(is_without_grad):
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=0.0, affine=False))
    oracle = Oracle(model[0])
    mode = torch.no_grad() if is_without_grad else contextlib.nullcontext()
    with watched(model) as monitor, mode:
        for _ in range(4):
            model(torch.randn(6, 3))
            monitor.step()
    (layer,) = monitor.report().layers
    assert layer.source.startswith("inputs: momentum 0")
    check_window(layer.window, oracle)


def test_the_calls_of_a_step_have_separate_streams():
    """A discriminator that is given real samples and then others, a forward each."""
    model = nn.Sequential(nn.BatchNorm1d(3))
    with watched(model, every_n_steps=4) as monitor:
        for _ in range(24):
            model(torch.randn(32, 3))
            model(torch.randn(32, 3) * 2 + 5)
            monitor.step()
        (layer,) = monitor.report().layers
    first, second = layer.streams
    assert np.allclose(first.mean, 0, atol=0.3)
    assert np.allclose(second.mean, 5, atol=0.5)
    assert np.allclose(first.var_unbiased, 1, atol=0.3)
    assert np.allclose(second.var_unbiased, 4, atol=1)
    assert (layer.calls.most_per_forward, layer.updates_seen) == (1, 48)


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, left, right):
        return self.norm(left) - self.norm(right)


def test_the_calls_of_a_forward_have_separate_streams_and_blend_in_the_window():
    model = Siamese()
    oracle = Oracle(model.norm)
    with watched(model, every_n_steps=4) as monitor:
        for _ in range(24):
            model(torch.randn(32, 3), torch.randn(32, 3) + 3)
            monitor.step()
        (layer,) = monitor.report().layers
    assert layer.calls.most_per_forward == 2
    assert np.allclose(layer.streams[0].mean, 0, atol=0.3)
    assert np.allclose(layer.streams[1].mean, 3, atol=0.3)
    means = np.array(oracle.means).reshape(24, 2, 3)
    blends = (0.09 * means[:, 0] + 0.1 * means[:, 1]) / 0.19
    near(layer.window.mean, blends[20:].mean(0) if len(blends) > 24 else blends[-4:].mean(0), 1.0)


def test_images_of_every_size_do_not_fill_the_memory():
    model = nn.Sequential(nn.BatchNorm2d(1))
    with watched(model, every_n_steps=10**6) as monitor:
        for side in range(2, 402):
            model(torch.zeros(1, 1, side, 3))
            monitor.step()
        (layer,) = monitor.report().layers
    assert sum(layer.values_per_channel.values()) == layer.calls.in_training == 400
    assert len(layer.values_per_channel) <= 256 + 16
    assert layer.values_per_channel[6] == 1


def test_a_batch_of_one_is_reported_before_torch_rejects_it():
    model = nn.Sequential(nn.BatchNorm1d(3))
    with watched(model) as monitor:
        model(torch.randn(4, 3))
        monitor.step()
        with pytest.raises(ValueError, match="more than 1 value"):
            model(torch.randn(1, 3))
        (layer,) = monitor.report().layers
    assert layer.batch_of_one_step == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
class TestCompiled:
    """With the backend that compiles nothing: what is tested is what is traced."""

    @pytest.fixture(autouse=True)
    def _fresh(self):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        yield
        torch._dynamo.reset()

    def counted(self):
        counters = torch._dynamo.utils.counters
        return dict(counters["graph_break"]), counters["stats"]["unique_graphs"]

    def run(self, model, monitor):
        for _ in range(2):
            model.train()
            for _ in range(5):
                model(torch.randn(16, 1, 8, 8)).sum().backward()
                monitor.step()
            model.eval()
            with torch.no_grad(), monitor.evaluation():
                model(torch.randn(16, 1, 8, 8))

    @pytest.mark.parametrize("order", ["before", "after", "after the first call", "in place"])
    def test_nothing_breaks_and_nothing_is_compiled_twice(self, order):
        model = conv_net()
        oracle = None
        if order == "before":
            monitor = watched(model, every_n_steps=3)
            compiled = torch.compile(model, backend="eager")
        elif order == "in place":
            model.compile(backend="eager")
            compiled = model
            monitor = watched(model, every_n_steps=3)
        else:
            compiled = torch.compile(model, backend="eager")
            if order == "after the first call":
                compiled(torch.randn(16, 1, 8, 8)).sum().backward()
            monitor = watched(compiled, every_n_steps=3)
        self.run(compiled, monitor)
        assert self.counted() == ({}, 2)  # one graph for training, one for evaluation
        report = monitor.report()
        for layer in report.layers:
            assert layer.updates_seen == layer.unseen_calls == 10
            assert layer.window.batches.max() > 0
            assert layer.values_per_channel == {}
        assert "called without hooks, as under torch.compile" in " ".join(str(report).split())
        assert len(report.notes) == 1
        gap = report.history.run.mode_gap
        assert (gap is not None) is order.startswith("after")
        monitor.close()
        assert oracle is None

    @pytest.mark.slow
    def test_compiled_for_the_machine(self):
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU())
        compiled = torch.compile(model)
        monitor = watched(compiled, every_n_steps=3)
        with torch.no_grad():
            expected = model[0](torch.arange(32.0).view(8, 4))
        # Vector instructions change nothing here, and take three times as long to compile.
        scalar = {"cpp.vec_isa_ok": False, "cpp_cache_precompile_headers": False}
        with torch._inductor.config.patch(scalar):
            for _ in range(4):
                compiled(torch.arange(32.0).view(8, 4)).sum().backward()
                monitor.step()
        (layer,) = monitor.report().layers
        near(layer.window.mean, expected.double().mean(0).numpy(), 10.0)
        assert self.counted() == ({}, 1)


@pytest.mark.parametrize("first", [0, 3])
def test_training_goes_on_after_an_interrupted_forward(first):
    """Torch calls no hook after KeyboardInterrupt, with which a notebook's cell is stopped."""

    class Interrupted(nn.Module):
        def forward(self, values):
            if interrupts:
                raise KeyboardInterrupt
            return values

    interrupts = False
    model = nn.Sequential(nn.Linear(4, 8), Interrupted(), nn.BatchNorm1d(8), nn.Linear(8, 2))
    modes = torch._C._len_torch_function_stack()
    monitor = bnguard.watch(model, on_findings=lambda group: None, strict=True)

    def step():
        model(torch.randn(16, 4)).sum().backward()
        monitor.step()

    for _ in range(first):
        step()
    interrupts = True
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(16, 4))
    interrupts = False
    for _ in range(8):
        step()
    report = monitor.report()
    assert report.history.run.inputs.batches > first + 2
    monitor.close()
    assert torch._C._len_torch_function_stack() == modes
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_closing_after_an_interrupted_first_forward_leaves_no_trace():
    class Interrupted(nn.BatchNorm1d):
        def forward(self, values):
            raise KeyboardInterrupt

    model = nn.Sequential(nn.Linear(4, 8), Interrupted(8))
    modes = torch._C._len_torch_function_stack()
    monitor = bnguard.watch(model)
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(16, 4))
    monitor.close()
    assert torch._C._len_torch_function_stack() == modes
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_batches_that_are_accumulated_while_the_network_changes_are_no_streams():
    """More calls a step than are told apart: each place must cover the same steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(16))
    with watched(model) as monitor:
        for step in range(40):
            for _ in range(8):
                model(torch.randn(64, 16) * 1.1**step + 0.2 * step)
            monitor.step()
        (layer,) = monitor.report().layers
    first, *others = layer.streams
    for other in others:
        assert other.batches == first.batches
        assert np.allclose(other.mean, first.mean, atol=1.0)
        assert np.allclose(other.var_unbiased, first.var_unbiased, rtol=0.4)
