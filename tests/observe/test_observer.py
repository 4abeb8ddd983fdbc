"""Watching leaves no trace, holds little, and costs the host no wait."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnguard
from tests.benchmarks.overhead import held_bytes
from tests.networks import conv_net, digits

HOOKS = [
    name for name, value in vars(nn.Module()).items() if "hook" in name and isinstance(value, dict)
]


def trace(model):
    """Everything by which a watched model could be told from one that never was."""
    return {
        "hooks": [[list(vars(module)[name]) for name in HOOKS] for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "modes": [module.training for module in model.modules()],
        "momenta": [getattr(module, "momentum", None) for module in model.modules()],
        "buffers": [(name, id(buffer)) for name, buffer in model.named_buffers()],
        "parameters": [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
    }


def values(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = {f"{n}.grad": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {**state, **grads, "random state": torch.get_rng_state()}


def run(model, monitor, fail_at=None):
    """Train, evaluate, and go on; raise at one of the points in between, if asked to."""
    images, labels = digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    points = iter(range(1000))

    def point():
        if next(points) == fail_at:
            raise CheeseError

    for epoch in range(2):
        model.train()
        for step, batch in enumerate(torch.randperm(320).split(64)):
            inputs = images[batch].clone()
            if (epoch, step) == (0, 1):
                inputs[0] = torch.nan  # so that every probe has something to do
            optimizer.zero_grad()
            loss = F.cross_entropy(F.dropout(model(inputs), 0.1), labels[batch])
            point()
            if loss.isfinite():
                loss.backward()
                optimizer.step()
            point()
            monitor.step()
            point()
        model.eval()
        with torch.no_grad(), monitor.evaluation():
            for part in images[320:448].split(64):
                model(part)
                point()
        monitor.report()
    model.train()


class CheeseError(Exception):
    """What goes wrong in the user's loop."""


class Nobody:
    """The interface of a monitor, and nothing behind it."""

    def step(self):
        pass

    def evaluation(self):
        return contextlib.nullcontext()

    def report(self):
        pass


def watched(model):
    return bnguard.watch(model, every_n_steps=3, on_findings=lambda group: None)


def equal(now, before):
    assert now.keys() == before.keys()
    return all(torch.equal(now[key].nan_to_num(7), before[key].nan_to_num(7)) for key in before)


@pytest.mark.parametrize("fail_at", [None, *range(0, 34, 3), 1, 2, 17])
def test_the_model_is_as_if_never_watched(fail_at):
    """After close, and after an exception at any point of the loop."""
    watched_model, plain = conv_net(), conv_net()
    plain.load_state_dict(watched_model.state_dict())
    before = trace(watched_model)
    outcomes = []
    for model, is_watched in ((watched_model, True), (plain, False)):
        torch.manual_seed(4)
        monitor = watched(model) if is_watched else contextlib.nullcontext(Nobody())
        with contextlib.suppress(CheeseError), monitor as entered:
            run(model, entered, fail_at)
        outcomes.append(values(model))
    after = trace(watched_model)
    changed = {key for key in before if before[key] != after[key]}
    assert changed <= {"modes"}
    assert after["modes"] == trace(plain)["modes"]
    assert equal(*outcomes)
    assert pickle_size(watched_model) == pickle_size(plain)


def pickle_size(model):
    return len(pickle.dumps(model))


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        copy.copy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: torch.load(saved(model), weights_only=False),
    ],
    ids=["deepcopy", "copy", "pickle", "torch.save"],
)
def test_a_copy_of_a_watched_model_takes_nothing_along(copied):
    model = conv_net()
    with watched(model) as monitor:
        model(torch.randn(4, 1, 8, 8))
        monitor.step()
        twin = copied(model)
        seen = monitor.report().layers[0].calls.in_training
        if copied is not copy.copy:  # which shares its modules
            twin(torch.randn(4, 1, 8, 8))
            assert monitor.report().layers[0].calls.in_training == seen
        assert list(twin.state_dict()) == list(conv_net().state_dict())
        if copied is not copy.copy:
            # The hooks of the copy do nothing, and hold nothing of the monitor.
            assert pickle_size(twin) < pickle_size(conv_net()) + 3000


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_a_callback_leaves_no_trace(error):
    def complain(group):
        raise error

    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64))
    before = trace(model)
    with bnguard.watch(model, on_findings=complain, every_n_steps=1) as monitor:
        model(torch.full((4, 1, 8, 8), torch.nan))
        with pytest.raises(error):
            monitor.step()
    assert trace(model) == before


def test_an_exception_inside_the_model_leaves_no_trace():
    model = conv_net()
    before = trace(model)
    with watched(model) as monitor:
        model(torch.randn(4, 1, 8, 8))
        monitor.step()
        with pytest.raises(RuntimeError):
            model(torch.randn(4, 3, 8, 8))
    assert trace(model) == before


def test_a_forward_that_failed_does_not_spoil_the_next():
    model = conv_net()
    with watched(model) as monitor:
        for channels in (1, 3, 1):
            with contextlib.suppress(RuntimeError):
                model(torch.randn(4, channels, 8, 8))
            monitor.step()
        layer = monitor.report().layers[0]
    assert (layer.calls.in_training, layer.calls.outside, layer.updates_seen) == (2, 0, 2)


def test_memory_is_sixteen_vectors_or_four_mebibytes():
    wide = nn.Sequential(*[nn.BatchNorm1d(40_000) for _ in range(5)])
    narrow = conv_net()
    for model, batch in ((wide, torch.randn(4, 40_000)), (narrow, torch.randn(4, 1, 8, 8))):
        channels = sum(layer.channels for layer in bnguard.layers.bn_layer.find_layers(model))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with bnguard.watch(model, optimizer=optimizer, on_findings=lambda group: None) as monitor:
            most = 0
            for _ in range(40):
                model(batch)
                monitor.step()
                most = max(most, held_bytes(monitor))
        rows = 32 * batch[0].nbytes  # of training, to compare evaluation with
        assert most <= max(16 * 4 * channels, 4 * 2**20 + 8 * 4 * channels) + rows + 300 * 2**10


def test_a_layer_widened_in_place_is_reported_as_it_is():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4))
    with bnguard.watch(model, every_n_steps=6, on_findings=lambda group: None) as monitor:
        for _ in range(6):
            model(torch.randn(8, 4))
            monitor.step()
        with torch.no_grad(), monitor.evaluation():
            model.eval()(torch.randn(8, 4))
        model[1] = nn.BatchNorm1d(6)
        (layer,) = monitor.report().layers
        assert (layer.channels, layer.updates_seen) == (6, 0)
        assert layer.window is layer.evaluated is None
        model.train()(torch.randn(8, 6))
        monitor.step()
        (layer,) = monitor.report().layers
    assert layer.updates_seen == 1
    assert layer.window.mean.shape == layer.running.mean.shape == layer.gamma.shape == (6,)


def test_a_report_after_close_puts_no_hook_on_the_model():
    model = conv_net()
    before = trace(model)
    with bnguard.watch(model, on_findings=lambda group: None) as monitor:
        for value in (0.0, torch.nan):
            model(torch.full((4, 1, 8, 8), value))
            monitor.step()
    model.append(nn.BatchNorm1d(10))
    monitor.step()
    assert monitor.report().layers[0].poisoned_step == 2
    with monitor.evaluation():
        pass
    del model[-1]
    assert trace(model) == before


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("steps_before", [0, 3])
def test_loading_a_state_dict_does_not_count_as_an_update(steps_before, assign):
    source, model, (images, _) = conv_net(), conv_net(), digits()
    for batch in images[:640].split(32):
        source(batch)
    with bnguard.watch(model) as monitor:
        for batch in images[:320].split(32)[:steps_before]:
            model(batch)
            monitor.step()
        model.load_state_dict(copy.deepcopy(source.state_dict()), assign=assign)
        for batch in images[:320].split(32):
            model(batch)
            monitor.step()
    report = monitor.report()
    for layer in report.layers:
        assert layer.unseen_calls == 0
        assert layer.updates_seen == steps_before + 10
        assert layer.running_at_start.updates == (0 if steps_before else 20)
        assert layer.window.batches.max() >= 10
    assert not any("called without hooks" in note for note in report.notes)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["parallel", "compiled"])
def test_a_frozen_layer_inside_a_wrapper_is_known_as_held(wrap):
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), nn.Linear(4, 2))
    model[0][1].eval()
    model[0] = wrap(model[0])
    with bnguard.watch(nn.DataParallel(model)) as monitor:
        assert [layer.is_held_at_start for layer in monitor.report().layers] == [True]


def test_an_average_with_a_copied_counter_was_not_called():
    model = conv_net()
    average = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    both = nn.ModuleDict({"model": model, "average": average})
    with bnguard.watch(both, optimizer=optimizer) as monitor:
        for batch in digits()[0][:320].split(32):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
            with torch.no_grad():
                pairs = zip(average.state_dict().values(), model.state_dict().values(), strict=True)
                for own, new in pairs:
                    own.copy_(new if new.dtype == torch.int64 else 0.9 * own + 0.1 * new)
    report = monitor.report()
    assert all(layer.updates_seen == 0 for layer in report.layers if layer.name[:7] == "average")
    assert not any("called without hooks" in note for note in report.notes)


def test_weight_decay_does_not_reach_frozen_layers():
    model = conv_net()
    model[1].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=0.1)
    layers = bnguard.watch(model, optimizer=optimizer).report().layers
    decays = {layer.is_affine_frozen: layer.weight_decay for layer in layers}
    assert decays == {True: None, False: 0.1}
