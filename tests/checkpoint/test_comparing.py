"""Comparing checkpoints: numbers by hand, and what counts as a change."""

import argparse

import numpy as np
import pytest
import torch
from torch import nn

from bnguard.checkpoint import compare, read_checkpoint, write_statistics
from bnguard.errors import CheckpointError
from tests.checkpoint.saving import NAMES, Network, new_statistics, save_safetensors, used_network


def saved(value, folder, name):
    torch.save(value, folder / name)
    return read_checkpoint(folder / name)


def norm(mean, var, **others):
    return {
        "bn.running_mean": torch.tensor(mean),
        "bn.running_var": torch.tensor(var),
        **others,
    }


def test_shift_and_ratio_are_those_of_the_definition(tmp_path):
    a = saved(norm([0.0, 1.0], [1.0, 4.0]), tmp_path, "a.pt")
    b = saved(norm([3.0, 1.0], [1.0, 8.0]), tmp_path, "b.pt")
    (layer,) = compare(a, b).layers
    assert layer.shift_std == pytest.approx([3.0 / np.sqrt(1.0 + 1e-5), 0.0])
    expected = [0.0, np.log((8.0 + 1e-5) / (4.0 + 1e-5))]
    assert layer.log_variance_ratio == pytest.approx(expected)
    assert not layer.is_identical


def test_bad_numbers_raise_nothing(tmp_path):
    a = saved(norm([float("nan"), 0.0, 0.0], [-1.0, -1.0, 0.0]), tmp_path, "a.pt")
    b = saved(norm([0.0, float("inf"), 0.0], [1.0, -2.0, 0.0]), tmp_path, "b.pt")
    (layer,) = compare(a, b).layers
    assert np.isnan(layer.shift_std[:2]).all()
    assert layer.log_variance_ratio.shape == (3,)


def test_a_checkpoint_is_identical_to_itself(tmp_path):
    state = norm([float("nan")], [1.0], other=torch.tensor([float("nan"), -0.0]))
    a, b = saved(state, tmp_path, "a.pt"), saved(state, tmp_path, "b.pt")
    difference = compare(a, b)
    assert difference.layers[0].is_identical
    assert difference.entries == ()


@pytest.mark.parametrize(
    ("a", "b", "detail"),
    [
        (torch.zeros(1), -torch.zeros(1), "values differ"),
        (torch.zeros(2), torch.zeros(2, 1), "float32 (2,) against float32 (2, 1)"),
        (torch.zeros(2), torch.zeros(2).double(), "float32 (2,) against float64 (2,)"),
        (torch.zeros(2), torch.zeros(2, device="meta"), "values differ"),
        (torch.zeros(2), 3, "StoredTensor against 3"),
        (1, True, "1 against True"),
        (0.0, -0.0, "0.0 against -0.0"),
        ([1, 2, 3], [1, 2, 4], "[1, 2, 3] against [1, 2, 4]"),
        ([1], (1,), "[1] against (1,)"),
        ("x" * 10**6, "x" * (10**6 - 1) + "y", "values differ"),
        (argparse.Namespace(lr=1.0), argparse.Namespace(lr=2.0), "1.0 against 2.0"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_every_change_is_seen(tmp_path, a, b, detail):
    first = saved(norm([0.0], [1.0], other=a), tmp_path, "a.pt")
    second = saved(norm([1.0], [1.0], other=b), tmp_path, "b.pt")
    (entry,) = compare(first, second).entries
    assert entry.key.startswith("other")
    assert entry.detail == detail


def test_the_layout_in_memory_is_no_change(tmp_path):
    images = torch.randn(2, 3, 4, 4)
    a = saved(norm([0.0], [1.0], other=images), tmp_path, "a.pt")
    last = images.to(memory_format=torch.channels_last)
    b = saved(norm([0.0], [1.0], other=last), tmp_path, "b.pt")
    assert compare(a, b).entries == ()


def test_what_one_of_them_lacks_is_named(tmp_path):
    a = saved(norm([0.0], [1.0], left=1, gone={}), tmp_path, "a.pt")
    b = saved(norm([0.0], [1.0], right=1), tmp_path, "b.pt")
    assert [(entry.key, entry.detail) for entry in compare(a, b).entries] == [
        ("left", "only in the first"),
        ("gone", "only in the first"),
        ("right", "only in the second"),
    ]


def test_a_large_tensor_is_compared_to_its_end(tmp_path):
    large = torch.zeros(5_000_000)
    a = saved(norm([0.0], [1.0], large=large), tmp_path, "a.pt")
    large[-1] = 1.0
    b = saved(norm([0.0], [1.0], large=large), tmp_path, "b.pt")
    assert [entry.key for entry in compare(a, b).entries] == ["large"]


def test_one_model_each_is_compared_whatever_its_prefix(network, tmp_path):
    """A Lightning checkpoint against the weights exported from it, wrapped for several GPUs."""
    lightning = {"epoch": 3, "state_dict": network.state_dict(), "optimizer_states": []}
    wrapped = {f"module.{key}": value for key, value in network.state_dict().items()}
    a, b = saved(lightning, tmp_path, "a.ckpt"), saved(wrapped, tmp_path, "b.pt")
    difference = compare(a, b)
    assert [layer.name for layer in difference.layers] == NAMES
    assert difference.entries == ()
    assert all(layer.is_identical for layer in difference.layers)


def test_formats_may_differ(network, tmp_path):
    a = saved(network.state_dict(), tmp_path, "a.pt")
    b = read_checkpoint(save_safetensors(network, tmp_path))
    plain = saved(dict(network.state_dict()), tmp_path, "plain.pt")
    for first, second in ((a, b), (b, a), (a, plain)):
        difference = compare(first, second)
        assert [layer.name for layer in difference.layers] == NAMES
        assert difference.entries == ()


def test_versions_of_modules_are_compared_where_both_say_them(network, tmp_path):
    a = saved(network.state_dict(), tmp_path, "a.pt")
    older = network.state_dict()
    older._metadata["stem.1"]["version"] = 1
    (entry,) = compare(a, saved(older, tmp_path, "b.pt")).entries
    assert (entry.key, entry.detail) == ("_metadata.stem.1.version", "2 against 1")


def test_two_models_of_one_file(tmp_path):
    """Do averaged weights keep the statistics of the trained ones?"""
    trained, averaged = used_network(), Network()
    path = tmp_path / "both.pt"
    torch.save({"model": trained.state_dict(), "ema": averaged.state_dict()}, path)
    checkpoint = read_checkpoint(path)
    difference = compare(checkpoint.only("model"), checkpoint.only("ema"))
    assert [layer.name for layer in difference.layers] == NAMES
    assert not any(layer.is_identical for layer in difference.layers)
    changed = {entry.key for entry in difference.entries}
    parameters = {f"model.{name}" for name, _ in trained.named_parameters()}
    assert {key for key in parameters if "bn" not in key and "stem.1" not in key} <= changed


def test_layers_that_do_not_fit_are_entries(tmp_path):
    a = saved(norm([0.0], [1.0]), tmp_path, "a.pt")
    b = saved(norm([0.0, 1.0], [1.0, 1.0]), tmp_path, "b.pt")
    difference = compare(a, b)
    assert difference.layers == ()
    assert {entry.key for entry in difference.entries} == {"bn.running_mean", "bn.running_var"}


def test_checkpoints_without_layers_are_compared_too(tmp_path):
    a = saved(nn.Linear(2, 2).state_dict(), tmp_path, "a.pt")
    assert compare(a, a).entries == ()


def test_the_copy_of_a_copy(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "a.pt")
    write_statistics(tmp_path / "a.pt", tmp_path / "b.pt", new_statistics(tmp_path / "a.pt"), {})
    difference = compare(read_checkpoint(tmp_path / "a.pt"), read_checkpoint(tmp_path / "b.pt"))
    assert difference.entries == ()
    for layer in difference.layers:
        module = network.get_submodule(layer.name)
        expected = (10 + np.arange(6) - module.running_mean.double().numpy()) / np.sqrt(
            module.running_var.double().numpy() + 1e-5
        )
        assert layer.shift_std == pytest.approx(expected)


@pytest.mark.parametrize("stems", [("net.", ""), ("", "net."), ("backbone.", "model.encoder.")])
def test_a_network_is_compared_wherever_it_was_put(tmp_path, stems):
    state = used_network().state_dict()
    one, other = ({stem + key: value for key, value in state.items()} for stem in stems)
    a = saved({"state_dict": one}, tmp_path, "a.pt")
    b = saved(other, tmp_path, "b.pt")
    assert len(compare(a, b).layers) == len(NAMES)
    assert compare(a, b).entries == ()
    other[f"{stems[1]}{NAMES[0]}.weight"] = torch.full_like(state[f"{NAMES[0]}.weight"], 7.0)
    (entry,) = compare(a, saved(other, tmp_path, "c.pt")).entries
    assert entry.key == f"state_dict.{stems[0]}{NAMES[0]}.weight"


def test_a_network_that_is_in_the_other_twice_is_not_guessed(tmp_path):
    state = used_network().state_dict()
    twice = {f"{part}.{key}": value for part in ("a", "b") for key, value in state.items()}
    assert not compare(saved(twice, tmp_path, "a.pt"), saved(state, tmp_path, "b.pt")).layers


def test_of_several_models_one_has_to_be_chosen(tmp_path):
    state = used_network().state_dict()
    a, b = saved(state, tmp_path, "a.pt"), saved({"g": state, "d": state}, tmp_path, "b.pt")
    with pytest.raises(CheckpointError, match=r"'g', 'd'.*--weights"):
        compare(a, b)
    assert compare(a, b.only("g")).entries == ()
