"""A folder of one file, as transformers saves it: what is one, and what is written."""

import pytest
import torch

from bnguard.checkpoint import (
    compare,
    find_checkpoints,
    read_checkpoint,
    replace_statistics,
    write_statistics,
)
from bnguard.errors import CheckpointError
from tests.checkpoint.saving import NAMES, new_statistics, save_safetensors


@pytest.fixture
def folder(network, tmp_path):
    folder = tmp_path / "hub"
    (folder / "assets").mkdir(parents=True)
    (folder / "assets" / "vocabulary").write_text("a b c")
    (folder / "config.json").write_text("{}")
    # The cache of the Hub consists of links.
    (folder / "model.safetensors").symlink_to(save_safetensors(network, tmp_path))
    (folder / "gone").symlink_to("nowhere")
    return folder


def test_the_folder_is_the_checkpoint_and_so_are_those_below(folder, tmp_path):
    (folder / "checkpoint-5").mkdir()
    torch.save(torch.nn.BatchNorm1d(2).state_dict(), folder / "checkpoint-5" / "model.pt")
    assert find_checkpoints([folder]) == (folder, folder / "checkpoint-5" / "model.pt")
    checkpoint = read_checkpoint(folder)
    assert (checkpoint.path, checkpoint.format) == (folder, "pretrained")
    assert [layer.name for layer in checkpoint.layers] == NAMES


def test_the_copy_is_a_folder_with_all_that_is_beside(folder, tmp_path):
    output = write_statistics(folder, tmp_path / "copy", new_statistics(folder), {"samples": 3})
    assert {path.name for path in output.rglob("*")} == {
        *("assets", "vocabulary", "config.json", "gone", "model.safetensors"),
        "bnguard-provenance.json",
    }
    assert not (output / "model.safetensors").is_symlink()
    difference = compare(read_checkpoint(folder), read_checkpoint(output))
    assert difference.entries == ()
    assert not any(layer.is_identical for layer in difference.layers)
    for path in (output, output / "model.safetensors"):
        assert read_checkpoint(path).provenance["samples"] == 3


def test_in_place_the_one_file_is_replaced(folder):
    (folder / "model.safetensors").unlink()
    (folder.parent / "model.safetensors").rename(folder / "model.safetensors")
    original = (folder / "model.safetensors").read_bytes()
    names = {path.name for path in folder.iterdir()}
    backup = replace_statistics(folder, new_statistics(folder), {})
    assert backup == folder / "model.safetensors.bak"
    assert backup.read_bytes() == original
    assert {path.name for path in folder.iterdir()} == {*names, backup.name}
    assert read_checkpoint(folder).layers[0].running_mean[0] == 10.0


def test_weights_in_two_files_are_to_be_named(folder):
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"name the checkpoint in it: .*, or one of 1 more"):
        read_checkpoint(folder)


def test_a_folder_is_never_replaced_by_force_unless_it_is_a_checkpoint(folder, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "precious").touch()
    statistics = new_statistics(folder)
    with pytest.raises(CheckpointError, match="a folder that is not a checkpoint is not replaced"):
        write_statistics(folder, home, statistics, {}, force=True)
    assert (home / "precious").exists()
    output = write_statistics(folder, tmp_path / "copy", statistics, {})
    with pytest.raises(CheckpointError, match="exists already"):
        write_statistics(folder, output, statistics, {})
    assert write_statistics(folder, output, statistics, {}, force=True) == output
