"""The mode gap: what it measures, under which settings, and that it leaves no trace."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import bnguard
from bnguard.layers.bn_layer import find_layers
from bnguard.observe import gap_probe
from bnguard.observe.gap_probe import GapProbe
from bnguard.observe.mode_gap import join_rows, relative_change, spread
from tests.networks import conv_net


def measured(model, *args, mode=torch.no_grad, **kwargs):
    probe = GapProbe(model, find_layers(model))
    with mode():
        model(*args, **kwargs)
    result = probe.measure()
    probe.close()
    return result


def changed(outputs, reference):
    """Root mean square of the change in standard deviations of the reference."""
    outputs, reference = outputs.double(), reference.double()
    variance = (reference - reference.mean(0)).square().mean()
    return ((outputs - reference).square().mean() / variance).sqrt().item()


def spoilt_net():
    """A network whose running statistics are off."""
    model = conv_net()
    for layer in find_layers(model):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 4.0)
    return model


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_buffers_that_a_forward_changes_are_restored(mode):
    class Counts(nn.Sequential):
        def forward(self, images):
            self.written += len(images)
            self.replaced = self.replaced + len(images)
            return super().forward(images)

    model = Counts(*conv_net())
    model.register_buffer("written", torch.zeros(()))
    model.register_buffer("replaced", torch.zeros(()))
    gap = measured(model.eval(), torch.randn(8, 1, 8, 8), mode=mode)
    assert gap.samples == 8
    assert model.written == model.replaced == 8


def test_change_and_flips_are_those_of_the_two_modes():
    model, images = spoilt_net().eval(), torch.randn(32, 1, 8, 8)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        running = twin(images)
        batch = twin.train()(images)
        half = copy.deepcopy(model).train()(images[:16])
    gap = measured(model, images)
    assert gap.samples == 32
    assert gap.relative_change == pytest.approx(changed(running, batch), rel=1e-5)
    assert gap.sampling_change == pytest.approx(changed(half, batch[:16]), rel=1e-5)
    samples = torch.arange(32)
    places = (samples, running.argmax(1)), (samples, batch.argmax(1))
    margins = [(p[places[0]] - p[places[1]]).abs() for p in (running.softmax(1), batch.softmax(1))]
    flips = (torch.stack(margins).amax(0) > 0.05).double().mean().item()
    assert gap.flipped_share == pytest.approx(flips)
    assert flips > 0


@pytest.mark.parametrize(("scale", "has_flips"), [(0.01, False), (10.0, True)])
def test_a_flip_between_classes_that_tie_does_not_count(scale, has_flips):
    model, images = spoilt_net().eval(), torch.randn(32, 1, 8, 8)
    with torch.no_grad():
        for parameter in model[-1].parameters():
            parameter *= scale
    assert (measured(model, images).flipped_share > 0.2) == has_flips


def test_probabilities_are_used_without_softmax():
    model, images = nn.Sequential(spoilt_net(), nn.Softmax(1)).eval(), torch.randn(32, 1, 8, 8)
    with torch.no_grad():
        for parameter in model[0][-1].parameters():
            parameter *= 10.0
    scores = measured(model[0], images)
    assert measured(model, images).flipped_share == scores.flipped_share > 0.2


def test_a_prediction_that_is_nan_counts_as_another():
    model, images = conv_net().eval(), torch.randn(32, 1, 8, 8)
    model[7].running_mean.fill_(torch.nan)
    assert measured(model, images).flipped_share == 1.0


def test_statistics_of_the_same_batch_give_no_gap():
    model, images = conv_net(momentum=1.0), torch.randn(64, 1, 8, 8)
    for layer in find_layers(model):
        # Normalising divides by n, the running variance was divided by n - 1.
        layer.module.eps = 1e-8
    with torch.no_grad():
        model.train()(images)
    gap = measured(model.eval(), images)
    assert gap.relative_change < 1e-2
    assert gap.flipped_share == 0


class Nested(nn.Module):
    """Takes and gives nested structures, holds dropout, and wraps what has the BN layers."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
        self.head = nn.Linear(6, 3)

    def forward(self, batch, *, scale):
        features = self.body(batch["x"][0] * scale)
        return {"scores": self.head(features), "aux": [features, ("name", None, 3)]}


def test_nested_inputs_and_outputs_and_the_smallest_module():
    model = Nested().eval()
    model.body[1].running_mean += 3
    batch = {"x": [torch.randn(20, 4)]}
    gap = measured(model, batch, scale=2.0)
    features, by_batch = batch["x"][0] * 2.0, copy.deepcopy(model.body)
    by_batch[1].train()
    with torch.no_grad():
        of_body = changed(model.body(features), by_batch(features))
    assert gap.relative_change == pytest.approx(of_body)
    assert gap.samples == 20
    assert gap.relative_change > 0.5
    assert gap.flipped_share > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_autocast_of_the_call_is_that_of_the_measurement(dtype):
    seen = []
    model = spoilt_net().eval()
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    probe = GapProbe(model, find_layers(model))
    with torch.no_grad(), torch.autocast("cpu", dtype):
        model(torch.randn(8, 1, 8, 8))
    gap = probe.measure()
    assert gap.relative_change > 0
    assert set(seen) == {dtype}
    assert not torch.is_autocast_enabled("cpu")


def test_an_evaluation_in_inference_mode():
    gap = measured(spoilt_net().eval(), torch.randn(8, 1, 8, 8), mode=torch.inference_mode)
    assert gap.relative_change > 0


def state(model):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return (
        [(module.training, getattr(module, "momentum", None)) for module in model.modules()],
        {name: (id(tensor), tensor.clone()) for name, tensor in tensors.items()},
        {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        torch.get_rng_state(),
    )


def same(now, before):
    if isinstance(before, torch.Tensor):
        return torch.equal(now, before)
    if isinstance(before, dict):
        return now.keys() == before.keys() and all(same(now[k], before[k]) for k in before)
    if isinstance(before, (list, tuple)):
        return len(now) == len(before) and all(map(same, now, before))
    return now == before


class Thrower(nn.Module):
    """Raises once batch statistics are used: in the measurement, and not before."""

    def __init__(self, error):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.error = error

    def forward(self, inputs):
        outputs = self.norm(inputs + torch.rand(4))
        if self.norm.training:
            raise self.error
        return outputs


@pytest.mark.parametrize("error", [None, ValueError("no"), KeyboardInterrupt()])
def test_nothing_about_the_model_is_changed_also_after_an_exception(error):
    model = nn.Sequential(nn.Linear(4, 4), Thrower(error) if error else Nested().body).eval()
    model[0].train()  # the user's own mix of modes
    loss = model[0](torch.randn(3, 4)).sum()
    loss.backward()
    inputs = torch.randn(16, 4)
    before = state(model)
    probe = GapProbe(model, find_layers(model))
    with torch.no_grad():
        model(inputs)
    torch.set_rng_state(before[-1])
    expected = pytest.raises(KeyboardInterrupt)
    with expected if isinstance(error, KeyboardInterrupt) else contextlib.nullcontext():
        result = probe.measure()
        if error:
            assert result == "the model raised ValueError when the batch was run again"
    probe.close()
    assert same(state(model), before)


def test_a_batch_of_one_cannot_be_measured_and_says_so():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    inputs = torch.randn(1, 4)
    before = state(model)
    assert measured(model, inputs) == "1 sample of evaluation is too few for batch statistics"
    assert same(state(model), before)


def test_a_large_batch_is_not_kept(monkeypatch):
    monkeypatch.setattr(gap_probe, "MAX_CAPTURED_BYTES", 1000)
    model = conv_net().eval()
    assert measured(model, torch.randn(8, 1, 8, 8)) == "a batch of 0 MiB is too large to keep"


def test_no_more_than_two_batches_are_kept_and_all_are_released():
    inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model = nn.Sequential(nn.Sequential(nn.Sequential(inner))).eval()
    probe = GapProbe(model, find_layers(model))
    for _ in range(3):
        model(torch.randn(39, 4))
    # A shape that no other test leaves behind.
    kept = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == (39, 4)]
    assert len(kept) == 2
    watched = [weakref.ref(tensor) for tensor in kept]
    del kept
    assert probe.measure().samples == 39
    probe.close()
    assert all(reference() is None for reference in watched)


def test_the_batch_is_kept_as_it_was_before_the_model_wrote_to_it():
    class WritesToItsInput(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, inputs):
            return self.norm(inputs.mul_(100))

    model = WritesToItsInput().eval()
    model.norm.running_var.fill_(1e4)
    gap = measured(model, torch.randn(4000, 4))
    assert gap.relative_change < 0.1


def test_a_model_that_is_back_in_train_mode_is_measured_in_eval_mode():
    model, images = spoilt_net().append(nn.Dropout(0.5)).eval(), torch.randn(32, 1, 8, 8)
    expected = measured(model, images).relative_change
    probe = GapProbe(model, find_layers(model))
    with torch.no_grad():
        model(images)
    model.train()
    assert probe.measure().relative_change == expected > 0.1
    assert all(module.training for module in model.modules())


def test_rows_of_several_batches_are_mixed():
    model = conv_net().train()
    kinds = torch.randn(64, 1, 8, 8), 3.0 + torch.randn(64, 1, 8, 8)
    for layer in find_layers(model):
        layer.module.momentum = 1.0
    with torch.no_grad():
        model(torch.cat(kinds))
    probe = GapProbe(model.eval(), find_layers(model))
    with torch.no_grad():
        for images in kinds:
            model(images)
    gap = probe.measure()
    assert gap.samples == 64
    assert gap.relative_change < 0.3 < measured(model, kinds[0]).relative_change


def test_rows_of_domains_that_take_turns_are_mixed():
    model = conv_net().train()
    images = torch.randn(64, 1, 8, 8) + 3.0 * (torch.arange(64) % 4).view(-1, 1, 1, 1)
    for layer in find_layers(model):
        layer.module.momentum = 1.0
    with torch.no_grad():
        model(images)
    probe = GapProbe(model.eval(), find_layers(model))
    with torch.no_grad():
        for _ in range(4):
            model(images)
    gap = probe.measure()
    assert gap.samples == 64
    assert gap.relative_change < 0.3 < measured(model, images[::4]).relative_change


def test_a_model_without_a_call_in_eval_mode_is_not_measured():
    model = conv_net().train()
    assert "seen in eval mode" in measured(model, torch.randn(8, 1, 8, 8))


def test_a_sync_batch_norm_of_one_process_is_measured():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(spoilt_net()).eval()
    assert measured(model, torch.randn(8, 1, 8, 8)).relative_change > 0


def of_every_caller(model, images):
    """Return the change and the flips that watch, recalibrate, diagnose and swap report."""
    monitor = bnguard.watch(model.eval())
    with torch.no_grad(), monitor.evaluation():
        model(images)
    gap = monitor.report().history.run.mode_gap
    monitor.close()
    recalibrated = bnguard.recalibrate(copy.deepcopy(model), [images], progress=False)
    row = bnguard.diagnose(model, [images], batch_sizes=(), progress=False).row("stored")
    of_batches = copy.deepcopy(model)
    for layer in find_layers(of_batches):
        layer.module.running_mean = layer.module.running_var = None
        layer.module.track_running_stats = False
    frozen = bnguard.swap(model, to="frozen").model
    norms = iter([frozen.get_submodule(layer.name) for layer in find_layers(model)])
    swapped = bnguard.swap(of_batches, to=lambda module: next(norms), sample=images)
    before = recalibrated.mode_gap_before
    changes = [gap.relative_change, before.relative_change, row.gap, swapped.output_change]
    return changes, [gap.flipped_share, before.flipped_share, row.flipped_share]


def test_watch_recalibrate_diagnose_and_swap_report_the_same_change():
    changes, flips = of_every_caller(spoilt_net(), torch.randn(40, 1, 8, 8))
    assert changes == pytest.approx([changes[0]] * 4, rel=1e-6)
    assert changes[0] > 0.1
    # On one batch the statistics of the evaluation data are those of the batch, but for n - 1.
    assert flips == pytest.approx([flips[0]] * 3, abs=0.03)


def test_an_undecided_network_flips_nothing_whoever_asks():
    model = spoilt_net()
    with torch.no_grad():
        for parameter in model[-1].parameters():
            parameter *= 1e-3
    changes, flips = of_every_caller(model, torch.randn(40, 1, 8, 8))
    assert changes == pytest.approx([changes[0]] * 4, rel=1e-6)
    assert flips == [0.0, 0.0, 0.0]


def test_a_constant_offset_between_features_does_not_count_as_spread():
    scores, change = torch.randn(64, 3), torch.randn(64, 3)
    offset = torch.tensor([100.0, 0.0, -100.0])
    expected = relative_change([scores + 0.1 * change], [scores])
    assert relative_change([scores + 0.1 * change + offset], [scores + offset]) == pytest.approx(
        expected, rel=1e-4
    )


def test_rows_of_several_shapes_have_the_spread_of_all_their_values():
    parts = [torch.randn(2, 3, 5) + 4.0, torch.randn(3, 3, 7)]
    values = torch.cat([part.flatten() for part in parts])
    assert join_rows(parts).shape == values.shape
    assert spread(join_rows(parts)) == pytest.approx(values.var(correction=0).item(), rel=1e-5)
    assert spread(parts[0][:1]) == pytest.approx(parts[0][0].var(correction=0).item(), rel=1e-5)


def test_outputs_that_are_the_same_in_every_row_are_measured_against_their_size():
    constant, varied = torch.full((8, 2), 5.0), torch.randn(8, 2)
    assert relative_change([constant * 1.1], [constant]) == pytest.approx(0.1, rel=1e-5)
    assert relative_change([constant * 1.1, varied], [constant, varied]) == 0.0
    assert relative_change([constant], [constant]) == 0.0
    assert relative_change([varied], [varied * torch.nan]) == float("inf")


def test_random_numbers_in_eval_mode_do_not_make_rows_dependent():
    class Sampled(nn.Sequential):
        def forward(self, inputs):
            values = super().forward(inputs)
            return values + 0.1 * torch.randn_like(values) + 0.1 * torch.randn_like(values)

    model = Sampled(nn.Linear(4, 8), nn.BatchNorm1d(8)).eval()
    gap = measured(model, torch.randn(64, 4))
    assert gap.samples == 64
    assert gap.sampling_change > 0.1


class Result:
    """An output of a class of its own, that leads back to itself."""

    def __init__(self, scores):
        self.scores, self.whole, self.kind = scores, self, Result


def test_outputs_in_objects_of_any_class_are_found():
    class Net(nn.Sequential):
        def forward(self, x):
            return [Result(super().forward(x))]

    x, model = torch.randn(64, 1, 8, 8), spoilt_net().eval()
    expected = measured(model, x)
    assert measured(Net(*model).eval(), x).relative_change == expected.relative_change
