"""From names to checkpoints."""

from pathlib import Path

import pytest
import torch
from torch import nn

from bnguard.checkpoint import find_checkpoints, read_checkpoint
from bnguard.errors import CheckpointError
from tests.checkpoint.saving import save_distributed, save_sharded_safetensors


def touch(folder, *names):
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(nn.BatchNorm1d(2).state_dict(), path)
    return tuple(paths)


def test_a_folder_stands_for_what_is_in_it_and_below(network, tmp_path):
    files = touch(tmp_path, "a.ckpt", "b/c.pth", "b/d.bin", "e.safetensors", "f.pth.tar", "z.pt")
    folders = (save_distributed(network, tmp_path), save_sharded_safetensors(network, tmp_path))
    (tmp_path / "notes.txt").write_text("no checkpoint")
    assert set(find_checkpoints([tmp_path])) == {*files, *folders}


def test_what_transformers_saves_beside_a_model_is_left_out(tmp_path):
    companions = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth")
    (model,) = touch(tmp_path, "checkpoint-500/pytorch_model.bin")
    touch(tmp_path / "checkpoint-500", *companions)
    assert find_checkpoints([tmp_path]) == (model,)
    named = tmp_path / "checkpoint-500" / "optimizer.pt"
    assert find_checkpoints([named]) == (named,)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.ckpt", ["a.ckpt", "b.ckpt"]),
        ("?.ckpt", ["a.ckpt", "b.ckpt"]),
        ("[b]*", ["b.ckpt"]),
        ("**/*.pt", ["x/c.pt", "x/y/d.pt"]),
        ("x*", ["x/c.pt", "x/y/d.pt"]),
    ],
)
def test_patterns(tmp_path, pattern, expected):
    touch(tmp_path, "a.ckpt", "b.ckpt", "x/c.pt", "x/y/d.pt")
    found = find_checkpoints([f"{tmp_path}/{pattern}"])
    assert [str(path.relative_to(tmp_path)) for path in found] == expected


def test_a_name_that_looks_like_a_pattern_is_a_name(tmp_path):
    """Lightning's file names hold brackets where a metric's name does."""
    paths = touch(tmp_path, "val[loss]=0.1.ckpt", "vall=0.1.ckpt")
    assert find_checkpoints([paths[0]]) == paths[:1]


def test_each_is_found_once_in_the_order_given(tmp_path):
    a, b = touch(tmp_path, "a.pt", "b.pt")
    assert find_checkpoints([b, str(tmp_path), f"{tmp_path}/*.pt"]) == (b, a)


@pytest.mark.parametrize("name", ["missing.ckpt", "none/*.ckpt", "empty", "a\0b"])
def test_what_is_not_there_is_said_when_it_is_read(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (path,) = find_checkpoints([tmp_path / name])
    assert path == tmp_path / name
    with pytest.raises(CheckpointError):
        read_checkpoint(path)


def test_a_link_to_a_folder_above_is_not_followed(tmp_path):
    (path,) = touch(tmp_path, "in/a.pt")
    (tmp_path / "in" / "loop").symlink_to(tmp_path)
    assert find_checkpoints([tmp_path]) == (path,)


def test_relative_names(tmp_path, monkeypatch):
    touch(tmp_path, "a.pt")
    monkeypatch.chdir(tmp_path)
    assert find_checkpoints(["."]) == (Path("a.pt"),)
    assert find_checkpoints(["*.pt"]) == (Path("a.pt"),)
