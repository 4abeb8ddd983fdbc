"""torch's files before 1.6, as torch itself reads them back."""

import torch

from bnguard.checkpoint import write_statistics
from tests.checkpoint.saving import new_statistics, save_legacy


def test_torch_loads_the_copy(network, tmp_path):
    path = save_legacy(network, tmp_path)
    statistics = new_statistics(path)
    copy = write_statistics(path, tmp_path / "repaired.pt", statistics, {})
    state = torch.load(copy, weights_only=True)
    for key, value in network.state_dict().items():
        assert torch.equal(state[key], statistics.get(key, value))


def test_writing_again_leaves_one_provenance(network, tmp_path):
    path = save_legacy(network, tmp_path)
    statistics = new_statistics(path)
    first = write_statistics(path, tmp_path / "first.pt", statistics, {"number": 1})
    second = write_statistics(first, tmp_path / "second.pt", statistics, {"number": 2})
    assert second.read_bytes().count(b"bnguard-provenance") == 1
    assert torch.load(second, weights_only=True).keys() == network.state_dict().keys()
