"""What a command prints, and where to: in pipes, to machines, and beside the prints of others."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from tests.cli.running import DEMO, bnguard
from tests.whatif import trained

# A project that prints at each moment at which a command may run it, in every way there is.
LOUD = """
import atexit, ctypes, os, subprocess
import torch
from torch.utils.data import DataLoader, TensorDataset
import {package} as lightning
import {home} as home

def shout(when):
    print("python", when)
    os.write(1, f"descriptor {{when}}\\n".encode())
    libc = ctypes.CDLL(None)
    libc.puts(f"libc {{when}}".encode())
    libc.fflush(None)
    subprocess.run(["echo", "child", when], check=True)

shout("import")
atexit.register(shout, "exit")

class Loud(home.DigitsNet):
    def __init__(self, width: int = 2):
        super().__init__(width)
        shout("model")

    def forward(self, inputs):
        shout("forward")
        return super().forward(inputs)

    def validation_step(self, batch, index):
        shout("validation")
        return super().validation_step(batch, index)

class Set(TensorDataset):
    def __getitem__(self, index):
        if index == 0:
            shout("worker")
        return super().__getitem__(index)

class Data(home.DigitsData):
    def setup(self, stage):
        super().setup(stage)
        shout("data")

    def train_dataloader(self):
        images, labels = zip(*self.train)
        data = Set(torch.stack(images)[:64], torch.tensor(labels)[:64])
        return DataLoader(data, 32, num_workers=1, multiprocessing_context="fork")

    val_dataloader = train_dataloader
"""
HOMES = {"pytorch_lightning": "bnguard.demo", "lightning.pytorch": "tests.cli.other_lightning"}
MOMENTS = ("import", "model", "data", "forward", "validation", "worker")


@pytest.fixture(params=list(HOMES))
def loud(request, tmp_path):
    source = LOUD.format(package=request.param, home=HOMES[request.param])
    (tmp_path / "loud.py").write_text(source)
    from bnguard.demo import DigitsNet

    torch.save({"state_dict": DigitsNet(width=2).state_dict()}, tmp_path / "last.ckpt")
    return tmp_path


@pytest.mark.parametrize("options", [("--json",), ()], ids=["json", "text"])
@pytest.mark.parametrize(
    "command", [("recalibrate", "--dry-run"), ("diagnose",), ("swap", "--steps=1", "--force")]
)
def test_what_code_of_the_user_prints_is_on_standard_error(loud, command, options):
    name, *more = command
    named = ("--model=loud.Loud", "--data=loud.Data")
    done = bnguard(loud, name, "last.ckpt", *named, *more, *options)
    assert done.returncode in (0, 1), done.stderr
    for moment in MOMENTS:
        for way in ("python", "descriptor", "libc", "child"):
            assert f"{way} {moment}" in done.stderr
            assert f"{way} {moment}" not in done.stdout
    if options:
        assert json.loads(done.stdout)["schema"] == 1


def test_what_is_printed_at_the_end_of_the_process_is_not_in_the_document(loud):
    done = shell(loud, "bnguard diagnose last.ckpt --model=loud.Loud --data=loud.Data --json")
    assert json.loads(done.stdout)["schema"] == 1
    assert "libc exit" in done.stderr


def test_what_is_left_when_nobody_is_apart_goes_where_it_did(tmp_path, capfd):
    """In a process of somebody else, which goes on."""
    from bnguard.cli.main import main

    torch.save(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).state_dict(), tmp_path / "a.pt")
    main(["inspect", str(tmp_path / "a.pt"), "--json"])
    os.write(1, b"after\n")
    print("last")
    out = capfd.readouterr().out
    assert out.endswith("last\n")
    assert "after\n" in out


def shell(folder, line):
    """Run a line in a real shell, with pipes that tell the status of each part."""
    line = line.replace("bnguard", f"{sys.executable} -m bnguard")
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "COLUMNS": "40"},
    )


@pytest.fixture
def long_names(tmp_path):
    """A checkpoint whose path and layers have long names, and which has much to say."""
    folder = tmp_path / "_".join(["a_folder_with_a_long_name"] * 4)
    folder.mkdir()
    name = "encoder_" * 30
    state = {}
    for index in range(400):
        layer = nn.BatchNorm1d(2)
        state |= {f"{name}{index}.{key}": value for key, value in layer.state_dict().items()}
    torch.save(state, folder / "weights.pt")
    return folder


@pytest.mark.parametrize("options", ["--verbose --fail-on never", "--json --fail-on never"])
def test_a_reader_that_stops_is_told_as_by_other_programs(long_names, options):
    """A pipe whose reader ends is 141 to the shell, as of `yes | head`: never 1, for findings."""
    done = shell(long_names, f"bnguard inspect weights.pt {options} | head -n 1")
    assert done.returncode == shell(long_names, "yes | head -n 1").returncode == 141
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1
    read_to_the_end = shell(long_names, f"bnguard inspect weights.pt {options} | cat")
    assert read_to_the_end.returncode == 0


def test_nothing_is_wrapped_or_padded_where_there_is_no_terminal(long_names):
    done = shell(long_names, "bnguard inspect $PWD/weights.pt --verbose | cat")
    assert str(long_names / "weights.pt") in done.stdout
    assert f"{'encoder_' * 30}399 " in done.stdout
    for line in ("bnguard rules | cat", "bnguard explain BN301 | cat"):
        done = shell(long_names, line)
        assert max(map(len, done.stdout.splitlines())) > 80
    assert not [line for line in done.stdout.splitlines() if line != line.rstrip()]


def test_a_command_that_is_proposed_stays_in_one_line(tmp_path):
    folder = tmp_path / ("long_" * 30)
    folder.mkdir()
    model = trained.unconverged()
    content = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    torch.save(content, folder / "last.ckpt")
    done = bnguard(tmp_path, "diagnose", folder / "last.ckpt", *DEMO)
    assert done.stderr == ""
    (proposed,) = [line for line in done.stdout.splitlines() if line.startswith("bnguard re")]
    assert f"{folder / 'last.ckpt'} --model" in proposed
