"""Checkpoints of other people's libraries, where they are installed."""

import warnings

import pytest
import torch

from bnguard.checkpoint import find_checkpoints, read_checkpoint, write_statistics
from bnguard.layers.bn_layer import find_layers
from tests.checkpoint.saving import new_statistics


@pytest.fixture(params=["one file", "sharded"])
def pretrained(request, tmp_path):
    """What ``save_pretrained`` of transformers writes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        transformers = pytest.importorskip("transformers")
        config = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
        )
        model = transformers.ResNetForImageClassification(config)
        folder = tmp_path / "pretrained"
        size = {"one file": "5GB", "sharded": "8KB"}[request.param]
        model.save_pretrained(folder, max_shard_size=size)
    return transformers, model, folder


def test_save_pretrained_of_transformers(pretrained, tmp_path):
    transformers, model, folder = pretrained
    (path,) = find_checkpoints([folder])
    names = {layer.name for layer in find_layers(model)}
    assert {layer.name for layer in read_checkpoint(path).layers} == names

    statistics = new_statistics(path)
    output = write_statistics(path, tmp_path / "copy", statistics, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = transformers.ResNetForImageClassification.from_pretrained(output)
    state = loaded.state_dict()
    for key, value in statistics.items():
        assert torch.equal(state[key], value)


def test_checkpoint_saver_of_timm(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timm = pytest.importorskip("timm")
        utils = pytest.importorskip("timm.utils")
        model = timm.create_model("resnet18", num_classes=2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        from argparse import Namespace

        arguments = Namespace(model="resnet18", lr=0.1)
        ema = utils.ModelEmaV2(model)
        saver = utils.CheckpointSaver(
            model, optimizer, arguments, ema, checkpoint_dir=str(tmp_path), recovery_dir=""
        )
        saver.save_checkpoint(0, 1.0)
    path = tmp_path / "last.pth.tar"
    names = [layer.name for layer in find_layers(model)]
    found = {m.prefix: [layer.name for layer in m.layers] for m in read_checkpoint(path).models}
    assert found == {"state_dict.": names, "state_dict_ema.": names}
