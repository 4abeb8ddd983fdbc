"""Distributed checkpoints: torch loads the copy, blocks are put together, metadata are not run."""

import io
import pickle
import warnings
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from bnguard.checkpoint import find_checkpoints, load_state_dict, read_checkpoint, write_statistics
from bnguard.errors import CheckpointError
from tests.checkpoint.saving import Network, new_statistics, save_distributed


def metadata_of(folder):
    return pickle.loads((folder / ".metadata").read_bytes())


def put(folder, metadata):
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_torch_loads_the_copy(network, tmp_path):
    folder = save_distributed(network, tmp_path)
    statistics = new_statistics(folder)
    output = write_statistics(folder, tmp_path / "copy", statistics, {})
    state = {"model": Network().state_dict(), "epoch": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=output)
    for key, value in network.state_dict().items():
        assert torch.equal(state["model"][key], statistics.get(f"model.{key}", value))
    assert state["epoch"] == 3


def test_the_archives_in_the_copy_are_sound(network, tmp_path):
    folder = save_distributed(network, tmp_path)
    output = write_statistics(folder, tmp_path / "copy", new_statistics(folder), {})
    for info in metadata_of(output).storage_data.values():
        data = (output / info.relative_path).read_bytes()[info.offset :][: info.length]
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            assert archive.testzip() is None


def test_the_nesting_and_the_plain_values_are_read(network, tmp_path):
    folder = save_distributed(network, tmp_path)
    checkpoint = read_checkpoint(folder)
    assert [model.prefix for model in checkpoint.models] == ["model."]
    assert checkpoint.epoch == 3
    assert find_checkpoints([tmp_path, folder / ".metadata"]) == (folder,)


def test_a_tensor_in_blocks_is_read_and_written_whole(tmp_path):
    """As FSDP saves it: the halves of each tensor in the files of two ranks."""
    folder = tmp_path / "blocks"
    folder.mkdir()
    whole = {"bn.running_mean": torch.arange(6.0), "bn.running_var": 1 + torch.arange(6.0)}
    described, places = {}, {}
    for rank in (0, 1):
        with (folder / f"__{rank}_0.distcp").open("wb") as handle:
            for key, value in whole.items():
                start = handle.tell()
                torch.save(value[3 * rank : 3 * rank + 3].clone(), handle)
                index = MetadataIndex(key, torch.Size([3 * rank]), rank)
                info = dcp.filesystem._StorageInfo(
                    f"__{rank}_0.distcp", start, handle.tell() - start
                )
                places[index] = info
    chunks = [ChunkStorageMetadata(torch.Size([at]), torch.Size([3])) for at in (0, 3)]
    for key, value in whole.items():
        properties = TensorProperties.create_from_tensor(value)
        described[key] = TensorStorageMetadata(properties, value.size(), chunks)
    put(folder, Metadata(described, storage_data=places))

    (layer,) = read_checkpoint(folder).layers
    assert layer.running_mean.tolist() == whole["bn.running_mean"].tolist()
    new = {"bn.running_var": 10 + torch.arange(6.0)}
    output = write_statistics(folder, tmp_path / "copy", new, {})
    assert load_state_dict(output)["bn.running_var"].tolist() == new["bn.running_var"].tolist()
    loaded = {key: torch.zeros(6) for key in whole}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(loaded, checkpoint_id=output)
    assert loaded["bn.running_var"].tolist() == new["bn.running_var"].tolist()
    assert loaded["bn.running_mean"].tolist() == whole["bn.running_mean"].tolist()


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_hostile_metadata_run_nothing(network, tmp_path):
    folder = save_distributed(network, tmp_path)
    metadata = metadata_of(folder)
    metadata.planner_data["evil"] = Hostile(tmp_path / "evil")
    put(folder, metadata)
    with pytest.raises(CheckpointError):
        read_checkpoint(folder)
    assert not (tmp_path / "evil").exists()


def _escape(metadata):
    next(iter(metadata.storage_data.values())).relative_path = "../../etc/passwd"


def _beyond(metadata):
    for info in metadata.storage_data.values():
        info.offset = 10**12


def _transformed(metadata):
    next(iter(metadata.storage_data.values())).transform_descriptors = ["stream.zstd"]


def _wrong_shape(metadata):
    described = metadata.state_dict_metadata["model.stem.1.running_mean"]
    described.size = torch.Size([5])


def _without_place(metadata):
    metadata.storage_data.clear()


@pytest.mark.parametrize(
    "change",
    [_escape, _beyond, _transformed, _wrong_shape, _without_place],
    ids=lambda f: f.__name__,
)
def test_bad_metadata_are_refused(network, tmp_path, change):
    folder = save_distributed(network, tmp_path)
    metadata = metadata_of(folder)
    change(metadata)
    put(folder, metadata)
    with pytest.raises(CheckpointError):
        read_checkpoint(folder)


def test_what_lightning_does_not_distribute_is_read(network, tmp_path):
    folder = save_distributed(network, tmp_path)
    beside = {
        "epoch": 7,
        "global_step": 70,
        "pytorch-lightning_version": "2.6.0",
        "hyper_parameters": {"width": 6},
    }
    torch.save(beside, folder / "meta.pt")
    checkpoint = read_checkpoint(folder)
    assert (checkpoint.global_step, checkpoint.hyper_parameters.values) == (70, {"width": 6})
    assert len(checkpoint.layers) == 3
