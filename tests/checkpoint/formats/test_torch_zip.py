"""torch's zip files: what torch itself makes of the copy, and storages that are shared."""

import struct
import zipfile

import pytest
import torch
from torch import nn

from bnguard.checkpoint import compare, load_state_dict, read_checkpoint, write_statistics
from bnguard.errors import CheckpointError
from tests.checkpoint.saving import new_statistics, save_zip


def saved_value(value, folder, name="value.pt"):
    torch.save(value, folder / name)
    return folder / name


def repaired(path, statistics=None, output="repaired.pt"):
    output = path.with_name(output)
    statistics = new_statistics(path) if statistics is None else statistics
    return write_statistics(path, output, statistics, {"action": "test"})


@pytest.mark.parametrize("is_mapped", [False, True])
def test_torch_loads_the_copy(network, tmp_path, is_mapped):
    path = save_zip(network, tmp_path)
    statistics = new_statistics(path)
    state = torch.load(repaired(path), weights_only=True, mmap=is_mapped)
    for key, value in network.state_dict().items():
        assert torch.equal(state[key], statistics.get(key, value))
    assert state._metadata == network.state_dict()._metadata


def test_the_archive_is_sound_and_its_old_part_where_it_was(network, tmp_path):
    path = save_zip(network, tmp_path)
    copy = repaired(path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy) as new:
        assert new.testzip() is None
        before, after = old.infolist(), new.infolist()
        assert [r.filename for r in after] == [
            *(r.filename for r in before),
            "zip/bnguard/provenance.json",
        ]
        assert [r.header_offset for r in after[:-1]] == [r.header_offset for r in before]
        changed = {r.filename for r in before if old.read(r) != new.read(r.filename)}
    assert len(changed) == 6  # mean and variance of three layers


def test_the_checksums_behind_the_records_are_right_too(network, tmp_path):
    """zipfile looks at those of the directory alone."""
    copy = repaired(save_zip(network, tmp_path))
    data = copy.read_bytes()
    with zipfile.ZipFile(copy) as archive:
        records = [r for r in archive.infolist() if r.flag_bits & 8]
        ends = [r.header_offset for r in archive.infolist()[1:]]
    assert len(records) > 20
    for record, end in zip(records, ends, strict=True):
        magic, crc, size, _ = struct.unpack_from("<4sIII", data, end - 16)
        assert (magic, crc, size) == (b"PK\x07\x08", record.CRC, record.file_size)


def test_writing_again_leaves_one_provenance(network, tmp_path):
    first = repaired(save_zip(network, tmp_path))
    second = repaired(first, output="again.pt")
    with zipfile.ZipFile(second) as archive:
        assert archive.testzip() is None
        assert sum("bnguard" in name for name in archive.namelist()) == 1
        assert b"previous" in archive.read("zip/bnguard/provenance.json")


def test_a_provenance_in_the_middle_is_replaced_too(network, tmp_path):
    """Another tool may have appended a record of its own."""
    first = repaired(save_zip(network, tmp_path))
    with zipfile.ZipFile(first, "a") as archive:
        archive.writestr("zip/theirs", b"keep me")
    second = repaired(first, output="again.pt")
    with zipfile.ZipFile(second) as archive:
        assert archive.testzip() is None
        assert archive.read("zip/theirs") == b"keep me"
        assert sum("bnguard" in name for name in archive.namelist()) == 1
    assert torch.load(second, weights_only=True).keys() == network.state_dict().keys()


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_records_of_one_name_leave_the_directory_sound(network, tmp_path):
    path = save_zip(network, tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        for text in ("longer than the next", "short"):
            archive.writestr("zip/theirs", text)
    with zipfile.ZipFile(repaired(path)) as archive:
        assert archive.testzip() is None
        assert archive.read("zip/theirs") == b"short"


def test_an_archive_written_by_python_keeps_its_checksums_in_front(network, tmp_path):
    """Other tools repack checkpoints, without descriptors behind the records."""
    path, packed = save_zip(network, tmp_path), tmp_path / "packed.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    copy = repaired(packed)
    with zipfile.ZipFile(copy) as archive:
        assert archive.testzip() is None
    assert torch.load(copy, weights_only=True)["stem.1.running_mean"][0] == 10.0


def test_statistics_that_view_one_storage_with_others(tmp_path):
    flat = torch.arange(20.0)
    state = {
        "weight": flat[:4],
        "bn.running_mean": flat[4:8],
        "bn.running_var": flat[8:12],
        "bn.weight": flat[12:16],
    }
    path = saved_value(state, tmp_path)
    new = {"bn.running_mean": torch.full((4,), -1.0), "bn.running_var": torch.full((4,), -2.0)}
    copy = repaired(path, new)
    loaded = torch.load(copy, weights_only=True)
    for key, value in state.items():
        assert torch.equal(loaded[key], new.get(key, value))
    assert compare(read_checkpoint(path), read_checkpoint(copy)).entries == ()


def test_interleaved_statistics(tmp_path):
    both = torch.arange(8.0).reshape(4, 2)
    path = saved_value({"bn.running_mean": both[:, 0], "bn.running_var": both[:, 1]}, tmp_path)
    new = {"bn.running_mean": torch.full((4,), -1.0), "bn.running_var": torch.full((4,), -2.0)}
    loaded = torch.load(repaired(path, new), weights_only=True)
    assert {key: value.tolist() for key, value in loaded.items()} == {
        key: value.tolist() for key, value in new.items()
    }


@pytest.mark.parametrize("other", ["flat", "part", "mean_of_another"])
def test_bytes_that_another_entry_views_are_not_changed(tmp_path, other):
    flat = torch.arange(8.0)
    others = {
        "flat": {"everything": flat},
        "part": {"part": flat[3:5]},
        "mean_of_another": {"b.running_mean": flat[1:5], "b.running_var": torch.ones(4)},
    }
    state = {"bn.running_mean": flat[:4], "bn.running_var": flat[4:8], **others[other]}
    path = saved_value(state, tmp_path)
    with pytest.raises(CheckpointError, match="shares its bytes with"):
        repaired(path, {"bn.running_mean": torch.zeros(4)})
    assert not (tmp_path / "repaired.pt").exists()


def test_an_expanded_statistic_cannot_be_replaced(tmp_path):
    state = {"bn.running_mean": torch.zeros(1).expand(4), "bn.running_var": torch.ones(4)}
    path = saved_value(state, tmp_path)
    with pytest.raises(CheckpointError, match="saved expanded"):
        repaired(path, {"bn.running_mean": torch.arange(4.0)})


def test_a_module_in_two_places_changes_in_both(tmp_path):
    norm = nn.BatchNorm1d(3)
    path = saved_value(nn.Sequential(norm, nn.Linear(3, 3), norm).state_dict(), tmp_path)
    new = {"0.running_mean": torch.arange(3.0)}
    loaded = torch.load(repaired(path, new), weights_only=True)
    assert loaded["2.running_mean"].tolist() == [0.0, 1.0, 2.0]
    contradiction = new | {"2.running_mean": torch.ones(3)}
    with pytest.raises(CheckpointError, match="shares its bytes"):
        repaired(path, contradiction, "other.pt")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_types_of_statistics(tmp_path, dtype):
    norm = nn.BatchNorm1d(3).to(dtype)
    norm.running_mean.copy_(torch.tensor([1.5, -2.25, 1e4]))
    path = saved_value(norm.state_dict(), tmp_path)
    (layer,) = read_checkpoint(path).layers
    assert layer.running_mean.tolist() == norm.running_mean.double().tolist()
    assert layer.dtype == str(dtype).removeprefix("torch.")
    loaded = torch.load(repaired(path, {"running_var": torch.tensor([0.25, 2.0, 3.0])}))
    assert loaded["running_var"].dtype == dtype
    assert torch.equal(loaded["running_var"], torch.tensor([0.25, 2.0, 3.0], dtype=dtype))


def test_a_value_too_large_for_the_stored_type_is_refused(tmp_path):
    path = saved_value(nn.BatchNorm1d(1).half().state_dict(), tmp_path)
    with pytest.raises(CheckpointError, match="too large for float16"):
        repaired(path, {"running_var": torch.tensor([1e6])})
    copy = repaired(path, {"running_var": torch.tensor([float("inf")])})
    assert torch.load(copy)["running_var"].item() == float("inf")


def test_big_endian_files(tmp_path):
    """As torch writes them on such a machine: the record ``byteorder`` says so."""
    path = saved_value(nn.BatchNorm1d(2).state_dict(), tmp_path)
    big = tmp_path / "big.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(big, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("byteorder"):
                data = b"big"
            elif "/data/" in name:
                width = 8 if len(data) == 8 and name.endswith("4") else 4
                data = b"".join(data[i : i + width][::-1] for i in range(0, len(data), width))
            new.writestr(name, data)
    (layer,) = read_checkpoint(big).layers
    assert (layer.running_var.tolist(), layer.counter) == ([1.0, 1.0], 0)
    copy = repaired(big, {"running_var": torch.tensor([2.0, 3.0])})
    assert load_state_dict(copy)["running_var"].tolist() == [2.0, 3.0]
    assert torch.load(copy)["running_var"].tolist() == [2.0, 3.0]
