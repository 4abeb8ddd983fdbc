"""What stops ``recalibrate`` and ``swap`` in the middle leaves the original and no half file."""

from __future__ import annotations

import importlib
import os
import resource
import shutil
import signal
import time
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from bnguard.demo import DigitsNet
from tests.cli.running import DEMO, bnguard, is_one_line_error

RECALIBRATE = ("recalibrate", "last.ckpt", *DEMO, "--samples", "64", "--keep", "always")
SWAP = ("swap", "last.ckpt", *DEMO, "--steps", "0")
COMMANDS = {
    "recalibrate": RECALIBRATE,
    "in place": (*RECALIBRATE, "--in-place"),
    "swap": SWAP,
    "safetensors": (*SWAP, "--output", "swapped.safetensors"),
}

WAITING = """
import time
from pathlib import Path

from bnguard.demo import DigitsData, DigitsNet


def wait():
    Path("reached").touch()
    time.sleep(60)


class Net(DigitsNet):
    def validation_step(self, batch, index):
        wait()


class Data(DigitsData):
    def setup(self, stage):
        wait()
"""


@pytest.fixture
def folder(tmp_path):
    state = DigitsNet(width=2).state_dict()
    content = {"state_dict": state, "hyper_parameters": {"width": 2}}
    # So large that it is copied in several pieces.
    torch.save({**content, "large": torch.zeros(10**7)}, tmp_path / "last.ckpt")
    return tmp_path


def state_of(folder):
    """The files below a folder, each with its content."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in files}


def full_disk():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))


def no_rights():
    if os.geteuid() == 0:
        # What only root may read is imported before.
        for name in ("cli.scoring", "recalibration.api", "swapping.api", "report.json_document"):
            importlib.import_module(f"bnguard.{name}")
        os.setuid(65534)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_one_clear_line(folder, command):
    before = state_of(folder)
    line = is_one_line_error(bnguard(folder, *COMMANDS[command], prepare=full_disk))
    assert "cannot be written: File too large" in line
    assert "free some space" in line
    assert state_of(folder) == before


@pytest.mark.parametrize("command", ["recalibrate", "in place", "swap"])
def test_a_folder_that_nothing_may_be_written_into_is_said_before_the_work(folder, command):
    # The folders of pytest are closed to other users.
    with TemporaryDirectory() as name:
        closed = Path(name)
        (folder / "last.ckpt").chmod(0o644)
        shutil.move(folder / "last.ckpt", closed)
        before = state_of(closed)
        closed.chmod(0o555)
        try:
            line = is_one_line_error(bnguard(closed, *COMMANDS[command], prepare=no_rights))
        finally:
            closed.chmod(0o755)
        assert "cannot be written, because . is not writable" in line
        assert state_of(closed) == before


@pytest.mark.parametrize("command", [RECALIBRATE, SWAP], ids=lambda command: command[0])
def test_an_output_in_no_folder_is_said_before_the_work(folder, command):
    before = state_of(folder)
    line = is_one_line_error(bnguard(folder, *command, "--output", "no/where/copy.ckpt"))
    assert "the folder no/where does not exist; make it" in line
    assert "space" not in line
    assert state_of(folder) == before


def stopped(number, is_reached):
    """Send a signal to a process as soon as it has come to a place."""

    def stop(process):
        while process.is_alive() and not is_reached():
            time.sleep(0.0005)
        os.kill(process.pid, number)

    return stop


def never_done():
    """Wait for the signal before a file is complete: on a busy machine it may come late."""
    os.fsync = lambda handle: time.sleep(60)


@pytest.mark.parametrize("command", ["recalibrate", "in place"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_signal_while_the_copy_is_written(folder, command, number):
    before = state_of(folder)

    def is_writing():
        return any(path.stat().st_size > 0 for path in folder.glob(".bnguard-*/*"))

    stop = stopped(number, is_writing)
    done = bnguard(folder, *COMMANDS[command], prepare=never_done, meanwhile=stop)
    after = state_of(folder)
    left = {name: after.pop(name) for name in list(after) if name.startswith(".bnguard-")}
    assert after == before
    if number == signal.SIGINT:
        is_interrupted(done)
        assert not left
    else:
        assert done.returncode == -number


def is_interrupted(done):
    assert done.returncode == 130, done.stderr
    assert done.stderr == "bnguard: interrupted; no file is left half written\n"


@pytest.mark.parametrize("part", ["--model=waiting.Net", "--data=waiting.Data"])
def test_ctrl_c_in_code_of_the_user(folder, part):
    """Lightning's own loop, which ends the process by itself, and a data module."""
    (folder / "waiting.py").write_text(WAITING)
    before = state_of(folder)
    reached = folder / "reached"
    done = bnguard(folder, *RECALIBRATE, part, meanwhile=stopped(signal.SIGINT, reached.exists))
    is_interrupted(done)
    reached.unlink()
    assert state_of(folder) == before
