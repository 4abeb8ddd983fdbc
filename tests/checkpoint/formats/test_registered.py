"""A format of the user's own: one class, registered once, is read, compared and written."""

import json

import numpy as np
import pytest
import torch

from bnguard.checkpoint import (
    OpenCheckpoint,
    StoredTensor,
    compare,
    find_checkpoints,
    load_state_dict,
    read_checkpoint,
    register_format,
    write_statistics,
)
from bnguard.checkpoint.formats import FORMATS
from tests.checkpoint.saving import NAMES, new_statistics

MAGIC = b"\x93NUMPYS"


class Arrays(OpenCheckpoint):
    """A line of JSON with names and shapes, then float32 arrays one behind the other."""

    format = "arrays"
    endings = (".arrays",)

    def __init__(self, path, files):
        super().__init__(path, files)
        self.source = self.open_file(path)
        head, _, _ = self.source.read(0, min(self.source.size, 2**16)).partition(b"\n")
        self.header = json.loads(head.removeprefix(MAGIC))
        self.root, start = {}, len(head) + 1
        for name, shape in self.header["arrays"].items():
            place = self.source.window(start, 4 * int(np.prod(shape)))
            self.root[name] = StoredTensor.at(place, "float32", tuple(shape))
            start += place.size
        self.data_start = len(head) + 1
        self.provenance = self.header.get("bnguard")

    @classmethod
    def recognises(cls, path, start):
        return start.startswith(MAGIC)

    def copy(self, target, patches, provenance):
        header = {**self.header, "bnguard": json.loads(provenance)}
        data = self.source.window(self.data_start, self.source.size - self.data_start)
        with target.open("wb") as handle:
            handle.write(MAGIC + json.dumps(header).encode() + b"\n")
            handle.writelines(data.patched(patches))


@pytest.fixture(autouse=True)
def registered():
    register_format(Arrays)
    yield
    FORMATS.remove(Arrays)


@pytest.fixture
def path(network, tmp_path):
    state = {key: value for key, value in network.state_dict().items() if value.ndim}
    header = {"arrays": {key: list(value.shape) for key, value in state.items()}}
    data = b"".join(value.numpy().tobytes() for value in state.values())
    path = tmp_path / "model.arrays"
    path.write_bytes(MAGIC + json.dumps(header).encode() + b"\n" + data)
    return path


def test_it_is_found_and_read(path, network, tmp_path):
    assert find_checkpoints([tmp_path]) == (path,)
    checkpoint = read_checkpoint(path)
    assert checkpoint.format == "arrays"
    assert [layer.name for layer in checkpoint.layers] == NAMES
    state = load_state_dict(path)
    assert all(torch.equal(network.state_dict()[key], value) for key, value in state.items())


def test_it_is_written_with_nothing_but_the_statistics_changed(path, tmp_path):
    statistics = new_statistics(path)
    copy = write_statistics(path, tmp_path / "copy.arrays", statistics, {"samples": 7})
    assert read_checkpoint(copy).provenance["samples"] == 7
    assert not compare(read_checkpoint(path), read_checkpoint(copy)).entries
    state = load_state_dict(copy)
    assert all(torch.equal(state[key], value) for key, value in statistics.items())
