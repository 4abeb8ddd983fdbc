"""What holds for every format alike: what is read, what is written, what is left."""

import numpy as np
import pytest
import torch

from bnguard.checkpoint import (
    compare,
    find_checkpoints,
    load_state_dict,
    read_checkpoint,
    replace_statistics,
    write_statistics,
)
from bnguard.errors import CheckpointError
from tests.checkpoint.saving import NAMES, files_in, new_statistics


def test_the_same_layers_are_read_from_each(saved, network):
    (model,) = read_checkpoint(saved).models
    assert [layer.name for layer in model.layers] == NAMES
    for layer in model.layers:
        module = network.get_submodule(layer.name)
        for attribute in ("running_mean", "running_var", "weight", "bias"):
            expected = getattr(module, attribute).detach().double().numpy()
            assert np.array_equal(getattr(layer, attribute), expected)
        assert layer.counter == 5
        assert layer.dtype == "float32"


def test_a_state_dict_loads_as_it_was_saved(saved, network):
    state = load_state_dict(saved)
    expected = network.state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert state[key].dtype == value.dtype
        assert torch.equal(state[key], value)
    network.load_state_dict(state)


def test_nothing_but_the_statistics_changes(saved, tmp_path):
    original = files_in(saved)
    output = saved.with_name(f"repaired-{saved.name}")
    statistics = new_statistics(saved)
    assert write_statistics(saved, output, statistics, {"action": "test"}) == output
    assert files_in(saved) == original

    difference = compare(read_checkpoint(saved), read_checkpoint(output))
    assert difference.entries == ()
    assert [layer.name for layer in difference.layers] == NAMES
    state = load_state_dict(output)
    for layer in read_checkpoint(output).layers:
        for attribute in ("running_mean", "running_var"):
            new = statistics[layer.key(attribute)]
            assert torch.equal(state[f"{layer.name}.{attribute}"], new)
        assert layer.counter == 5
    assert read_checkpoint(output).provenance["action"] == "test"
    assert set(tmp_path.iterdir()) == {saved, output}


def test_a_change_of_anything_else_is_seen(saved, network, request, tmp_path):
    with torch.no_grad():
        network.head.bias[2] = torch.nextafter(network.head.bias[2], torch.tensor(9.0))
    (tmp_path / "other").mkdir()
    other = request.node.callspec.params["saved"](network, tmp_path / "other")
    (entry,) = compare(read_checkpoint(saved), read_checkpoint(other)).entries
    assert entry.key.endswith("head.bias")
    assert entry.detail == "values differ"


def test_the_provenance_says_what_was_done_and_to_what(saved):
    output = saved.with_name(f"repaired-{saved.name}")
    statistics = new_statistics(saved)
    write_statistics(saved, output, statistics, {"action": "first"})
    assert read_checkpoint(saved).provenance is None
    first = read_checkpoint(output).provenance
    assert first["action"] == "first"
    assert first["replaced"] == list(statistics)
    assert first["original"]["name"] == saved.name

    again = saved.with_name(f"again-{saved.name}")
    write_statistics(output, again, statistics, {"action": "second"})
    second = read_checkpoint(again).provenance
    assert (second["action"], second["previous"]) == ("second", first)


def test_in_place_keeps_the_original_as_a_backup(saved, tmp_path):
    if saved.is_dir() and len(list(saved.iterdir())) > 1:
        with pytest.raises(CheckpointError, match="only a checkpoint of one file"):
            replace_statistics(saved, new_statistics(saved), {})
        return
    original = files_in(saved)
    backup = replace_statistics(saved, new_statistics(saved), {})
    assert backup == saved.with_name(f"{saved.name}.bak")
    assert list(files_in(backup).values()) == list(original.values())
    assert read_checkpoint(saved).layers[0].running_mean[0] == 10.0
    assert {path.name for path in tmp_path.iterdir()} == {saved.name, backup.name}

    with pytest.raises(CheckpointError, match="exists already"):
        replace_statistics(saved, new_statistics(saved), {})
    repaired = files_in(saved)
    replace_statistics(saved, new_statistics(saved), {}, force=True)
    assert list(files_in(backup).values()) == list(repaired.values())
    assert {path.name for path in tmp_path.iterdir()} == {saved.name, backup.name}


def test_permissions_are_kept(saved):
    saved.chmod(0o750 if saved.is_dir() else 0o640)
    output = saved.with_name(f"repaired-{saved.name}")
    write_statistics(saved, output, new_statistics(saved), {})
    assert output.stat().st_mode == saved.stat().st_mode


def test_an_existing_output_is_replaced_only_by_force(saved):
    output = saved.with_name(f"repaired-{saved.name}")
    write_statistics(saved, output, new_statistics(saved), {"number": 1})
    with pytest.raises(CheckpointError, match="exists already"):
        write_statistics(saved, output, new_statistics(saved), {"number": 2})
    assert read_checkpoint(output).provenance["number"] == 1
    write_statistics(saved, output, new_statistics(saved), {"number": 2}, force=True)
    assert read_checkpoint(output).provenance["number"] == 2
    with pytest.raises(CheckpointError, match="the original itself"):
        write_statistics(saved, saved, new_statistics(saved), {}, force=True)


def test_a_folder_finds_each_once(saved, tmp_path):
    assert find_checkpoints([tmp_path]) == (saved,)
