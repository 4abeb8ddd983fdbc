"""Plain pickles: arrays are read, tensors are named as what cannot be, and nothing is written."""

import pickle

import pytest
import torch

from bnguard.checkpoint import read_checkpoint, write_statistics
from bnguard.errors import CheckpointError
from tests.checkpoint.saving import NAMES, new_statistics, safetensors_bytes


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_of_a_model_zoo_are_read_and_not_changed(network, tmp_path, protocol):
    path = tmp_path / "R-50.pkl"
    arrays = {key: value.numpy() for key, value in network.state_dict().items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "zoo"}, protocol))
    checkpoint = read_checkpoint(path)
    assert checkpoint.format == "pickle"
    assert [layer.name for layer in checkpoint.layers] == NAMES
    assert checkpoint.layers[0].running_mean.tolist() == network.stem[1].running_mean.tolist()
    with pytest.raises(CheckpointError, match="is a NumPy array"):
        write_statistics(path, tmp_path / "out.pkl", new_statistics(path), {})
    assert not (tmp_path / "out.pkl").exists()


@pytest.mark.parametrize("is_module", [True, False])
def test_tensors_that_torch_did_not_save_are_named(network, tmp_path, is_module):
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(network if is_module else network.state_dict()))
    checkpoint = read_checkpoint(path)
    assert not checkpoint.layers
    (problem,) = checkpoint.problems
    assert "pickled without torch.save" in problem


def test_a_safetensors_file_may_begin_as_a_pickle_does(tmp_path):
    """The length of its header, 640 bytes, is the opcode of protocol 2."""
    state = torch.nn.BatchNorm1d(3).state_dict()
    shortest = int.from_bytes(safetensors_bytes(state, {"x": ""})[:8], "little")
    data = safetensors_bytes(state, {"x": "x" * (640 - shortest)})
    assert data.startswith(b"\x80\x02")
    (tmp_path / "model").write_bytes(data)
    assert read_checkpoint(tmp_path / "model").format == "safetensors"
