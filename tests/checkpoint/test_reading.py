"""What is read from checkpoints of every layout, and what is said of those that are none."""

import argparse
import collections
import gzip
import os
import pathlib
import re
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

import bnguard.checkpoint.contents
from bnguard.checkpoint import compare, load_state_dict, read_checkpoint, write_statistics
from bnguard.errors import CheckpointError
from tests.checkpoint.saving import NAMES, save_zip, used_network


def saved(value, folder, name="value.pt"):
    torch.save(value, folder / name)
    return folder / name


def layers(checkpoint):
    return {model.prefix: [layer.name for layer in model.layers] for model in checkpoint.models}


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "ema", "net"])
def test_a_state_dict_below_a_key(network, tmp_path, key):
    path = saved({"epoch": 3, key: network.state_dict(), "optimizer": {"state": {}}}, tmp_path)
    assert layers(read_checkpoint(path)) == {f"{key}.": NAMES}
    assert load_state_dict(path).keys() == network.state_dict().keys()


def test_a_state_dict_below_several_keys(network, tmp_path):
    path = saved({"trainer": {"nets": [network.state_dict()]}}, tmp_path)
    assert layers(read_checkpoint(path)) == {"trainer.nets.0.": NAMES}


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_the_prefixes_of_wrappers_are_taken_off(network, tmp_path, wrapper):
    path = saved({"state_dict": prefixed(network.state_dict(), wrapper)}, tmp_path)
    checkpoint = read_checkpoint(path)
    assert layers(checkpoint) == {"state_dict.": NAMES}
    assert checkpoint.layers[0].key("running_mean") == f"state_dict.{wrapper}stem.1.running_mean"
    assert load_state_dict(path).keys() == network.state_dict().keys()


def test_a_submodule_that_is_called_module_keeps_its_name(network, tmp_path):
    state = prefixed(network.state_dict(), "module.") | {"scale": torch.ones(1)}
    assert load_state_dict(saved(state, tmp_path)).keys() == state.keys()


def test_several_models_in_a_file(network, tmp_path):
    other = used_network()
    path = saved({"model": network.state_dict(), "ema": other.state_dict()}, tmp_path)
    checkpoint = read_checkpoint(path)
    assert layers(checkpoint) == {"model.": NAMES, "ema.": NAMES}
    assert layers(checkpoint.only("ema")) == {"ema.": NAMES}
    with pytest.raises(CheckpointError, match=r"several models, 'model\.', 'ema\.'"):
        load_state_dict(path)
    loaded = load_state_dict(path, "ema.")
    assert torch.equal(loaded["head.weight"], other.head.weight)
    with pytest.raises(CheckpointError, match=r"no model 'x\.'.*'model\.', 'ema\.'"):
        load_state_dict(path, "x.")
    with pytest.raises(CheckpointError, match=r"no model 'x' with BN layers"):
        checkpoint.only("x")


def test_one_state_dict_under_two_names(network, tmp_path):
    state = network.state_dict()
    path = saved({"model": state, "ema": state}, tmp_path)
    assert layers(read_checkpoint(path)) == {"model.": NAMES, "ema.": NAMES}


def test_dictionaries_that_stand_for_modules(tmp_path):
    norm = dict(nn.BatchNorm1d(3).state_dict())
    path = saved({"model": {"body": {"bn1": norm, "bn2": norm}, "bn3": norm}}, tmp_path)
    assert layers(read_checkpoint(path)) == {"model.": ["body.bn1", "body.bn2", "bn3"]}


def test_a_lone_layer(tmp_path):
    path = saved(nn.BatchNorm1d(3).state_dict(), tmp_path)
    assert layers(read_checkpoint(path)) == {"": [""]}
    assert load_state_dict(path).keys() == nn.BatchNorm1d(3).state_dict().keys()


def test_timm_layout(network, tmp_path):
    """A namespace, and the averaged model beside the trained one."""
    value = {
        "epoch": 11,
        "arch": "resnet18",
        "state_dict": network.state_dict(),
        "optimizer": torch.optim.SGD(network.parameters(), 0.1, 0.9).state_dict(),
        "version": 2,
        "args": argparse.Namespace(model="resnet18", lr=0.1),
        "amp_scaler": {"scale": 65536.0},
        "state_dict_ema": network.state_dict(),
        "metric": 71.3,
    }
    checkpoint = read_checkpoint(saved(value, tmp_path, "last.pth.tar"))
    assert layers(checkpoint) == {"state_dict.": NAMES, "state_dict_ema.": NAMES}
    assert checkpoint.epoch == 11


class Config:
    """A class that only this file has."""


def test_lightning_layout(network, tmp_path):
    value = {
        "epoch": 2,
        "global_step": 40,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": network.state_dict(),
        "callbacks": {"EMA": {"state_dict": network.state_dict()}},
        "hyper_parameters": {
            "width": 6,
            "betas": (0.9, 0.999),
            "data": pathlib.PurePosixPath("data/train"),
            "args": argparse.Namespace(lr=0.1),
            "nested": collections.OrderedDict(a=[1, None]),
            "dtype": torch.float16,
            "size": torch.Size([3, 4]),
            "config": Config(),
            "list": [1, Config()],
            "backbone": network,
            "_instantiator": "os.system",
        },
    }
    checkpoint = read_checkpoint(saved(value, tmp_path))
    assert layers(checkpoint) == {"state_dict.": NAMES, "callbacks.EMA.state_dict.": NAMES}
    assert (checkpoint.epoch, checkpoint.global_step) == (2, 40)
    assert checkpoint.hyper_parameters.values == {
        "width": 6,
        "betas": (0.9, 0.999),
        "data": "data/train",
        "args": {"lr": 0.1},
        "nested": {"a": [1, None]},
        "dtype": "torch.float16",
        "size": (3, 4),
        "_instantiator": "os.system",
    }
    assert checkpoint.hyper_parameters.objects.keys() == {"config", "list", "backbone"}
    assert checkpoint.hyper_parameters.objects["config"].endswith(".Config")
    # Of several models Lightning's own is meant.
    assert load_state_dict(tmp_path / "value.pt").keys() == network.state_dict().keys()


def test_an_instance_norm_with_statistics_counts(tmp_path):
    path = saved(nn.InstanceNorm1d(3, track_running_stats=True).state_dict(), tmp_path)
    (layer,) = read_checkpoint(path).layers
    assert (layer.weight, layer.bias, layer.counter) == (None, None, 0)


def test_a_layer_without_a_counter(tmp_path):
    """torch before 0.4.1 kept none."""
    state = nn.BatchNorm1d(3).state_dict()
    del state["num_batches_tracked"]
    assert read_checkpoint(saved(state, tmp_path)).layers[0].counter is None


def test_names_with_unusual_characters(tmp_path):
    names = ["σ.bn", "a b/c", "with\nnewline", "'quoted\"", "", "..", "\ud800"]
    state = {}
    for name in names:
        state |= prefixed(nn.BatchNorm1d(2).state_dict(), f"{name}.")
    path = saved(state, tmp_path)
    assert [layer.name for layer in read_checkpoint(path).layers] == names
    assert load_state_dict(path).keys() == state.keys()


def test_not_a_number_in_all_of_them(tmp_path):
    norm = nn.BatchNorm1d(3)
    for tensor in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
        tensor.fill_(float("nan"))
    (layer,) = read_checkpoint(saved(norm.state_dict(), tmp_path)).layers
    for values in (layer.running_mean, layer.running_var, layer.weight, layer.bias):
        assert np.isnan(values).all()


def statistics(**changes):
    state = dict(nn.BatchNorm1d(3).state_dict()) | changes
    return {f"bn.{key}": value for key, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"running_var": None}, "running_mean without running_var"),
        ({"running_mean": None}, "running_var without running_mean"),
        ({"running_var": torch.ones(4)}, r"running_mean has shape \(3,\), running_var \(4,\)"),
        ({"running_mean": torch.zeros(3, 1)}, r"running_mean has shape \(3, 1\)"),
        ({"running_mean": torch.tensor(0.0)}, r"running_mean has shape \(\)"),
        ({"running_mean": torch.zeros(3, dtype=torch.int64)}, "running_mean .*int64"),
        ({"running_var": torch.ones(3, dtype=torch.complex64)}, "running_var .*complex64"),
        ({"running_var": torch.ones(3).to(torch.float8_e5m2)}, "running_var .*float8_e5m2"),
        ({"running_mean": torch.zeros(3, device="meta")}, "running_mean .*meta device"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_what_cannot_be_a_layer_is_a_problem(tmp_path, changes, problem):
    others = prefixed(nn.BatchNorm1d(2).state_dict(), "other.")
    checkpoint = read_checkpoint(saved(statistics(**changes) | others, tmp_path))
    assert [layer.name for layer in checkpoint.layers] == ["other"]
    (line,) = checkpoint.problems
    assert line.startswith("bn: ")
    assert re.search(problem, line)


@pytest.mark.parametrize(
    ("changes", "attribute"),
    [
        ({"weight": torch.ones(4)}, "weight"),
        ({"bias": torch.ones(3, dtype=torch.int32)}, "bias"),
        ({"weight": torch.ones(3, device="meta")}, "weight"),
        ({"num_batches_tracked": torch.ones(2)}, "counter"),
        ({"num_batches_tracked": torch.tensor(1.5)}, "counter"),
    ],
)
def test_a_layer_with_one_bad_part_is_read_without_it(tmp_path, changes, attribute):
    checkpoint = read_checkpoint(saved(statistics(**changes), tmp_path))
    assert getattr(checkpoint.layers[0], attribute) is None
    assert len(checkpoint.problems) == 1


@pytest.mark.parametrize(
    "value", [{}, [], None, 3, "text", {"a": {}}, nn.Linear(2, 2), torch.ones(2)]
)
def test_files_without_layers_have_none(tmp_path, value):
    path = saved(value, tmp_path)
    assert read_checkpoint(path).models == ()
    with pytest.raises(CheckpointError, match="no BN layers"):
        load_state_dict(path)


def no_file(folder):
    return folder / "missing.ckpt"


def empty(folder):
    (folder / "empty.pt").touch()
    return folder / "empty.pt"


def text(folder):
    (folder / "text.pt").write_text("not a checkpoint\n" * 100)
    return folder / "text.pt"


def a_folder(folder):
    return folder


def pipe(folder):
    os.mkfifo(folder / "pipe.pt")
    return folder / "pipe.pt"


def other_archive(folder):
    with zipfile.ZipFile(folder / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    return folder / "other.zip"


def compressed(folder):
    path = save_zip(used_network(), folder)
    with (
        zipfile.ZipFile(path) as old,
        zipfile.ZipFile(folder / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return folder / "bomb.pt"


def long_name(folder):
    return folder / ("x" * 300)


@pytest.mark.parametrize(
    "make", [no_file, empty, text, a_folder, pipe, other_archive, compressed, long_name]
)
def test_what_is_no_checkpoint_is_said_in_one_line(tmp_path, make):
    path = make(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "git lfs pull"),
        ("\ufeff\n<!DOCTYPE html><p>Quota überschritten".encode(), "a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a web page"),
        (gzip.compress(b"a checkpoint", mtime=0), "gunzip"),
    ],
    ids=["pointer", "html", "xml", "gzip"],
)
def test_what_was_downloaded_in_place_of_a_checkpoint_is_named(tmp_path, content, advice):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=advice):
        read_checkpoint(tmp_path / "model.pt")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(network, tmp_path):
    path = save_zip(network, tmp_path)
    path.chmod(0)
    with pytest.raises(CheckpointError, match="Permission denied"):
        read_checkpoint(path)


def test_a_truncated_file_is_never_read(saved):
    if saved.is_dir():
        pytest.skip("its files are those of the other formats")
    data = saved.read_bytes()
    for size in {*range(0, len(data), 97), len(data) - 1}:
        saved.write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            read_checkpoint(saved)


def test_a_checkpoint_that_contains_itself(network, tmp_path):
    value = {"model": network.state_dict()}
    value["self"] = value
    assert layers(read_checkpoint(saved(value, tmp_path))) == {"model.": NAMES}


@pytest.mark.parametrize("leaf", ["number", "the whole"])
def test_a_file_that_names_one_branch_endlessly_is_refused(tmp_path, leaf, monkeypatch):
    monkeypatch.setattr(bnguard.checkpoint.contents, "_MOST_ENTRIES", 10_000)
    whole = []
    value = [1] if leaf == "number" else whole
    for _ in range(40):
        value = [value, value]
    whole.append(value)
    with pytest.raises(CheckpointError, match="more than 10,000 values"):
        read_checkpoint(saved(value, tmp_path))


def test_a_long_list_of_numbers_is_no_obstacle(network, tmp_path, monkeypatch):
    """A sampler may keep the order of its data set."""
    monkeypatch.setattr(bnguard.checkpoint.contents, "_MOST_ENTRIES", 150_000)
    value = {"model": network.state_dict(), "order": list(range(200_000))}
    assert layers(read_checkpoint(saved(value, tmp_path))) == {"model.": NAMES}


def test_a_file_whose_layers_share_one_large_storage_is_refused(tmp_path):
    large = torch.zeros(2**20)
    state = {}
    for number in range(100):
        state |= {f"{number}.running_mean": large, f"{number}.running_var": large}
    with pytest.raises(CheckpointError, match="not statistics of BN layers"):
        read_checkpoint(saved(state, tmp_path))


def test_an_expanded_tensor_takes_no_memory(tmp_path):
    state = {"running_mean": torch.zeros(1).expand(2**40), "running_var": torch.ones(1)}
    path = saved(state | {"other": torch.zeros(1).expand(2**40)}, tmp_path)
    assert read_checkpoint(path).layers == ()
    with pytest.raises(CheckpointError, match="too large to be expanded"):
        load_state_dict(path)


def test_a_tensor_of_a_new_type_does_not_hide_the_others(network, tmp_path):
    new = torch.ones(2, dtype=torch.uint8).view(torch.bits8)
    path = saved({"model": network.state_dict() | {"packed": new}}, tmp_path)
    assert layers(read_checkpoint(path)) == {"model.": NAMES}
    statistics = {"model.stem.1.running_mean": torch.ones(6)}
    copy = write_statistics(path, tmp_path / "copy.pt", statistics, {})
    assert compare(read_checkpoint(path), read_checkpoint(copy)).entries == ()
    new.untyped_storage()[0] = 7
    other = saved({"model": network.state_dict() | {"packed": new}}, tmp_path, "other.pt")
    (entry,) = compare(read_checkpoint(path), read_checkpoint(other)).entries
    assert (entry.key, entry.detail) == ("model.packed", "values differ")
    with pytest.raises(CheckpointError, match="holds a tensor of type bits8"):
        load_state_dict(path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "f8", "f2"])
def test_arrays_of_numpy_are_read_and_not_changed(tmp_path, dtype, protocol):
    mean = np.linspace(-300, 300, 30).astype(dtype)
    state = {
        "bn.running_mean": mean,
        "bn.running_var": np.ones(30, dtype),
        "bn.num_batches_tracked": np.int64(7),
    }
    path = tmp_path / "arrays.pt"
    torch.save({"model": state}, path, pickle_protocol=protocol)
    checkpoint = read_checkpoint(path)
    (layer,) = checkpoint.layers
    assert layer.running_mean.tolist() == mean.tolist()
    assert layer.counter == 7
    assert not checkpoint.problems
    assert not compare(checkpoint, checkpoint).entries
    new = {layer.key("running_mean"): torch.zeros(30)}
    with pytest.raises(CheckpointError, match="is a NumPy array, which bnguard reads"):
        write_statistics(path, tmp_path / "out.pt", new, {})
    assert not (tmp_path / "out.pt").exists()


def test_arrays_that_cannot_be_read_are_named(tmp_path):
    objects = np.array([0, None], dtype=object)
    path = saved({"model": {"bn.running_mean": objects, "bn.running_var": objects}}, tmp_path)
    (problem,) = read_checkpoint(path).problems
    assert "NumPy arrays that cannot be read" in problem


@pytest.mark.parametrize("pattern", ["bn.{}", "stage/bn/{}:0", "stage/bn/{}", "{}"])
@pytest.mark.parametrize("variance", ["moving_variance", "moving_var"])
def test_layers_named_as_in_keras_are_read(tmp_path, pattern, variance):
    named = {"moving_mean": 1.0, variance: 2.0, "gamma": 3.0, "beta": 4.0}
    path = saved({pattern.format(k): torch.full((3,), v) for k, v in named.items()}, tmp_path)
    checkpoint = read_checkpoint(path)
    (layer,) = checkpoint.layers
    read = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    assert [values[0] for values in read] == [1.0, 2.0, 3.0, 4.0]
    assert layer.name == pattern.partition("{}")[0].rstrip("./")
    assert layer.eps is None
    with pytest.raises(CheckpointError):
        write_statistics(path, tmp_path / "x", {layer.key("running_mean"): torch.ones(3)}, {})


def test_a_part_of_a_state_dict_is_a_model_when_it_is_named(network, tmp_path):
    state, other = network.state_dict(), used_network().state_dict()
    path = saved(
        {
            "state_dict": {
                **{f"module.encoder_q.{key}": value for key, value in state.items()},
                **{f"module.encoder_k.{key}": value for key, value in other.items()},
            }
        },
        tmp_path,
    )
    checkpoint = read_checkpoint(path)
    for name in ("encoder_k", "module.encoder_k", "state_dict.module.encoder_k"):
        part = checkpoint.only(name)
        assert layers(part) == {"state_dict.module.encoder_k.": NAMES}
    loaded = load_state_dict(path, part.models[0].prefix)
    assert loaded.keys() == other.keys()
    assert all(torch.equal(loaded[key], other[key]) for key in other)
    query = checkpoint.only("encoder_q")
    assert not compare(query, query).entries
    assert {d.key for d in compare(query, part).entries} == {
        f"state_dict.module.encoder_q.{key}"
        for key in state
        if not torch.equal(state[key], other[key]) and "running" not in key
    }
    with pytest.raises(CheckpointError, match="no model 'encoder'"):
        checkpoint.only("encoder")


def test_a_part_that_two_models_have_is_asked_for(network, tmp_path):
    part = {f"net.{key}": value.clone() for key, value in network.state_dict().items()}
    checkpoint = read_checkpoint(saved({"model": part, "ema": dict(part)}, tmp_path))
    with pytest.raises(CheckpointError, match=r"several 'net': name one of 'model.net', 'ema.net'"):
        checkpoint.only("net")


def test_what_shares_storage_is_known(network, tmp_path):
    state = network.state_dict()
    twice = read_checkpoint(saved({"model": state, "ema": state}, tmp_path))
    assert twice.shared_with(twice.models[0]) == ("ema",)
    parts = {f"{name}.{key}": value for name in ("q", "k") for key, value in state.items()}
    checkpoint = read_checkpoint(saved(parts, tmp_path))
    shared = checkpoint.shared_with(checkpoint.model_named("q"))
    assert shared == tuple(f"k.{name}" for name in NAMES)
    assert checkpoint.shared_with(checkpoint.models[0]) == ()
