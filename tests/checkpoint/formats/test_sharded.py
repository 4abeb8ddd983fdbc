"""Folders with an index: what they may not name, and what is copied."""

import json

import pytest
import torch

from bnguard.checkpoint import find_checkpoints, read_checkpoint, write_statistics
from bnguard.errors import CheckpointError
from tests.checkpoint.saving import (
    files_in,
    new_statistics,
    save_sharded_bin,
    save_sharded_safetensors,
)


def change_index(folder, change):
    (path,) = folder.glob("*.index.json")
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_everything_in_the_folder_is_copied(network, tmp_path):
    folder = save_sharded_bin(network, tmp_path)
    (folder / "runs").mkdir()
    (folder / "runs" / "log").write_bytes(b"theirs")
    output = write_statistics(folder, tmp_path / "copy", new_statistics(folder), {})
    before = {path.relative_to(folder.name): data for path, data in files_in(folder).items()}
    after = {path.relative_to(output.name): data for path, data in files_in(output).items()}
    changed = {path.name for path in after if after[path] != before.get(path)}
    assert changed == {
        "bnguard-provenance.json",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model-00002-of-00002.bin",
    }
    assert before.keys() < after.keys()


def test_torch_loads_the_shards(network, tmp_path):
    folder = save_sharded_bin(network, tmp_path)
    statistics = new_statistics(folder)
    output = write_statistics(folder, tmp_path / "copy", statistics, {})
    state = {}
    for shard in output.glob("*.bin"):
        state |= torch.load(shard, weights_only=True)
    for key, value in network.state_dict().items():
        assert torch.equal(state[key], statistics.get(key, value))


def test_the_index_stands_for_its_folder(network, tmp_path):
    folder = save_sharded_safetensors(network, tmp_path)
    (index,) = folder.glob("*.index.json")
    assert read_checkpoint(index).path == folder
    assert find_checkpoints([index, folder, f"{tmp_path}/*"]) == (folder,)


@pytest.mark.parametrize("name", ["../stolen.bin", "/etc/passwd", "a/b.bin", "..", "", 7, None])
def test_a_shard_outside_the_folder_is_refused(network, tmp_path, name):
    folder = save_sharded_bin(network, tmp_path)
    change_index(folder, lambda index: index["weight_map"].update({"head.bias": name}))
    with pytest.raises(CheckpointError, match="outside the folder"):
        read_checkpoint(folder)


def test_a_missing_shard_is_named(network, tmp_path):
    folder = save_sharded_bin(network, tmp_path)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.bin: a shard .* is missing"):
        read_checkpoint(folder)


def test_a_tensor_that_is_in_no_shard_is_named(network, tmp_path):
    folder = save_sharded_bin(network, tmp_path)
    shard = "pytorch_model-00001-of-00002.bin"
    change_index(folder, lambda index: index["weight_map"].update(ghost=shard))
    with pytest.raises(CheckpointError, match="ghost is not in"):
        read_checkpoint(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": 1}', "[" * 100_000])
def test_a_bad_index_is_refused(network, tmp_path, text):
    folder = save_sharded_bin(network, tmp_path)
    (path,) = folder.glob("*.index.json")
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        read_checkpoint(folder)
