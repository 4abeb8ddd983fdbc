"""One small network with used statistics, and every way in which people save it."""

from __future__ import annotations

import json
import struct
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from bnguard.checkpoint import read_checkpoint


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x):
        return x + self.bn(self.conv(x))


class Network(nn.Module):
    """Three BN layers (``stem.1``, ``blocks.0.bn``, ``blocks.1.bn``), and other tensors."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.blocks = nn.Sequential(Block(6), Block(6))
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


NAMES = ["stem.1", "blocks.0.bn", "blocks.1.bn"]


def used_network():
    """A network whose statistics have met a few batches."""
    network = Network()
    with torch.no_grad():
        for _ in range(5):
            network(3 * torch.randn(8, 3, 9, 9) + 1)
    return network.eval()


def save_zip(network, folder):
    return _saved(network.state_dict(), folder / "zip.pt")


def save_legacy(network, folder):
    return _saved(network.state_dict(), folder / "legacy.pt", False)


def save_module(network, folder):
    return _saved(network, folder / "module.pt")


def save_legacy_module(network, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the source code of a class of a test has no file
        return _saved(network, folder / "legacy-module.pt", False)


def save_torchscript(network, folder):
    path = folder / "script.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still what is out there
        torch.jit.script(network).save(path)
    return path


def save_safetensors(network, folder):
    path = folder / "model.safetensors"
    path.write_bytes(safetensors_bytes(network.state_dict(), {"format": "pt", "note": "α"}))
    return path


def save_sharded_safetensors(network, folder):
    def write(tensors, path):
        path.write_bytes(safetensors_bytes(tensors, {"format": "pt"}))

    return _sharded(network, folder / "sharded-safetensors", "model", "safetensors", write)


def save_sharded_bin(network, folder):
    return _sharded(network, folder / "sharded-bin", "pytorch_model", "bin", torch.save)


def save_distributed(network, folder):
    path = folder / "distributed"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is one process
        dcp.save({"model": network.state_dict(), "epoch": 3, "lr": [0.1]}, checkpoint_id=path)
    return path


SAVERS = [
    save_zip,
    save_legacy,
    save_module,
    save_legacy_module,
    save_torchscript,
    save_safetensors,
    save_sharded_safetensors,
    save_sharded_bin,
    save_distributed,
]


def safetensors_bytes(tensors, metadata=None):
    """The bytes of a safetensors file, written by hand from its specification."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    header = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for key, tensor in tensors.items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[key] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def _saved(value, path, is_zip=True):
    torch.save(value, path, _use_new_zipfile_serialization=is_zip)
    return path


def _sharded(network, folder, stem, suffix, write):
    folder.mkdir()
    state = network.state_dict()
    keys = list(state)
    weight_map = {}
    for number, part in ((1, keys[:9]), (2, keys[9:])):
        name = f"{stem}-0000{number}-of-00002.{suffix}"
        write({key: state[key].clone() for key in part}, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    return folder


def new_statistics(path):
    """Statistics for every layer of a checkpoint that no training would give."""
    return {
        layer.key(attribute): start + torch.arange(layer.channels, dtype=torch.float32)
        for layer in read_checkpoint(path).layers
        for attribute, start in (("running_mean", 10.0), ("running_var", 20.0))
    }


def files_in(path: Path):
    """The files of a checkpoint and their bytes."""
    paths = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return {p.relative_to(path.parent): p.read_bytes() for p in paths}
