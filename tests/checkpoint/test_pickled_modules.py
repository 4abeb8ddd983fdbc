"""Modules saved whole, by ``torch.save(model)``: what counts in them, and their own options."""

import pytest
import torch
from torch import nn

from bnguard.checkpoint import load_state_dict, read_checkpoint
from bnguard.configuration import Configuration
from bnguard.errors import CheckpointError
from bnguard.inspection import inspect_checkpoint


class FrozenBatchNorm2d(nn.Module):
    """As in detection networks: buffers, no momentum."""

    def __init__(self, channels):
        super().__init__()
        for name, value in {
            "weight": 1.0,
            "bias": 0.0,
            "running_mean": 0.0,
            "running_var": 1.0,
        }.items():
            self.register_buffer(name, torch.full((channels,), value))


class Detector(nn.Module):
    """Tensors and modules in plain attributes, as detection networks have them."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3, momentum=0.003))
        self.conv = torch.nn.utils.weight_norm(nn.Conv2d(4, 4, 1))
        self.shared = self.body[1]
        self.stride = torch.tensor([8.0, 16.0])
        self.stages = (self.body, [self.body[1]])
        self._models = [self.body, self.conv]
        self.register_buffer("anchors", torch.zeros(3), persistent=False)
        self.register_buffer("grid", torch.ones(2))

    def forward(self, x):
        return self.conv(self.body(x))


def wrapped_in_dictionaries(model):
    return {"epoch": 3, "model": model, "ema": None, "updates": 7}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel, wrapped_in_dictionaries])
def test_a_pickled_module_holds_what_its_state_dict_holds(tmp_path, wrap, protocol, is_zip):
    model = Detector()
    path = tmp_path / "model.pt"
    torch.save(wrap(model), path, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    loaded = load_state_dict(path)
    expected = model.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)
    layers = read_checkpoint(path).layers
    assert [layer.name for layer in layers] == ["body.1", "shared"]
    assert {(layer.momentum, layer.is_momentum_known, layer.eps) for layer in layers} == {
        (0.003, True, 1e-3)
    }


def test_the_momentum_of_the_file_decides(tmp_path):
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=0.003))
    for _ in range(60):
        model(torch.randn(16, 3))
    torch.save(model, tmp_path / "model.pt")
    (finding,) = inspect_checkpoint(read_checkpoint(tmp_path / "model.pt")).findings
    assert finding.code == "BN303"
    assert finding.evidence.value == pytest.approx(100 * 0.997**60)


def test_a_cumulative_average_is_known_to_be_one(tmp_path):
    torch.save(nn.Sequential(nn.BatchNorm1d(3, momentum=None)), tmp_path / "model.pt")
    (layer,) = read_checkpoint(tmp_path / "model.pt").layers
    assert layer.momentum is None
    assert layer.is_momentum_known


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_counters_that_were_converted_with_the_weights_count(tmp_path, dtype):
    model = nn.BatchNorm1d(3)
    for _ in range(5):
        model(torch.randn(16, 3))
    state = {key: value.to(dtype) for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "half.pt")
    checkpoint = read_checkpoint(tmp_path / "half.pt")
    assert checkpoint.layers[0].counter == 5
    assert not checkpoint.problems


def test_one_problem_of_many_layers_is_one_line(tmp_path):
    model = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(7)))
    for layer in model:
        layer.num_batches_tracked.fill_(100_000)
    torch.save({key: value.half() for key, value in model.state_dict().items()}, tmp_path / "a.pt")
    assert read_checkpoint(tmp_path / "a.pt").problems == (
        "7 layers: num_batches_tracked is inf (float16), which is not a count",
    )


def test_layers_that_never_update_are_known(tmp_path):
    layer = nn.BatchNorm2d(3)
    layer.track_running_stats = False
    torch.save(nn.Sequential(layer, nn.BatchNorm2d(3)), tmp_path / "model.pt")
    layers = read_checkpoint(tmp_path / "model.pt").layers
    assert [layer.is_updating for layer in layers] == [False, True]
    torch.save(nn.Sequential(FrozenBatchNorm2d(3)), tmp_path / "model.pt")
    checkpoint = read_checkpoint(tmp_path / "model.pt")
    assert not checkpoint.layers[0].is_updating
    assert not inspect_checkpoint(checkpoint).findings


def test_the_gain_is_that_with_the_eps_of_the_file(tmp_path):
    layer = nn.BatchNorm2d(4, eps=1e-3)
    layer.running_var.fill_(1e-7)
    nn.init.constant_(layer.weight, 5.0)
    layer.num_batches_tracked.fill_(10_000)
    torch.save(nn.Sequential(layer), tmp_path / "model.pt")
    checkpoint = read_checkpoint(tmp_path / "model.pt")
    low = Configuration().changed(select=["BN403"], limits={"BN403": {"max_gain": 100}})
    (finding,) = inspect_checkpoint(checkpoint, low).findings
    assert round(finding.evidence.value) == 158
    assert "BN403" not in {found.code for found in inspect_checkpoint(checkpoint).findings}


class Hidden(nn.Module):
    """A module whose state is its own affair."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def __getstate__(self):
        return b"compressed"

    def __setstate__(self, state): ...


def test_a_module_with_a_state_of_its_own_is_told(tmp_path):
    torch.save(Hidden(), tmp_path / "model.pt")
    checkpoint = read_checkpoint(tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"Hidden.*save its state_dict\(\)") as caught:
        inspect_checkpoint(checkpoint)
    assert "\n" not in str(caught.value)
