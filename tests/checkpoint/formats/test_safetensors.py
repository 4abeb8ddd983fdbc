"""safetensors: the package reads the copy, the metadata are kept, bad headers are refused."""

import json
import struct

import pytest
import torch
from torch import nn

from bnguard.checkpoint import read_checkpoint, write_statistics
from bnguard.errors import CheckpointError
from tests.checkpoint.saving import new_statistics, safetensors_bytes, save_safetensors


def header_of(path):
    data = path.read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + size])


def test_the_package_reads_the_copy(network, tmp_path):
    package = pytest.importorskip("safetensors.torch")
    path = save_safetensors(network, tmp_path)
    statistics = new_statistics(path)
    copy = write_statistics(path, tmp_path / "copy.safetensors", statistics, {})
    state = package.load_file(copy)
    for key, value in network.state_dict().items():
        assert torch.equal(state[key], statistics.get(key, value))


def test_files_of_the_package_are_read(network, tmp_path):
    package = pytest.importorskip("safetensors.torch")
    package.save_file(network.state_dict(), tmp_path / "theirs.safetensors")
    assert len(read_checkpoint(tmp_path / "theirs.safetensors").layers) == 3


def test_metadata_are_kept(network, tmp_path):
    path = save_safetensors(network, tmp_path)
    copy = write_statistics(path, tmp_path / "copy.safetensors", new_statistics(path), {})
    metadata = header_of(copy)["__metadata__"]
    assert {"format": "pt", "note": "α"}.items() <= metadata.items()
    assert metadata.keys() == {"format", "note", "bnguard"}


def test_without_metadata_the_format_is_named(network, tmp_path):
    """transformers refuses a file with metadata that name no format."""
    path = tmp_path / "bare.safetensors"
    path.write_bytes(safetensors_bytes(network.state_dict()))
    copy = write_statistics(path, tmp_path / "copy.safetensors", new_statistics(path), {})
    assert header_of(copy)["__metadata__"]["format"] == "pt"


def test_half_precision(tmp_path):
    norm = nn.BatchNorm1d(2).bfloat16()
    norm.running_mean.copy_(torch.tensor([1.5, -2.25]))
    path = tmp_path / "half.safetensors"
    path.write_bytes(safetensors_bytes(norm.state_dict()))
    (layer,) = read_checkpoint(path).layers
    assert (layer.running_mean.tolist(), layer.dtype) == ([1.5, -2.25], "bfloat16")


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"a": 1},
        {"a": {}},
        {"a": TENSOR | {"shape": [3]}},
        {"a": TENSOR | {"shape": [-2]}},
        {"a": TENSOR | {"shape": [2**70]}},
        {"a": TENSOR | {"shape": "2"}},
        {"a": TENSOR | {"dtype": 7}},
        {"a": TENSOR | {"data_offsets": [0, 800]}},
        {"a": TENSOR | {"data_offsets": [8, 0]}},
        {"a": TENSOR, "b": TENSOR},
        {"a": TENSOR | {"data_offsets": [True, 8]}},
    ],
    ids=str,
)
def test_bad_headers_are_refused(tmp_path, header):
    text = json.dumps(header).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(CheckpointError):
        read_checkpoint(path)


def test_a_tensor_of_an_unknown_type_is_passed_over(tmp_path):
    header = {"future": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}
    text = json.dumps(header).encode()
    path = tmp_path / "new.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(2))
    assert read_checkpoint(path).models == ()
