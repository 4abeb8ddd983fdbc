"""Writing is a transaction: what stops it in the middle leaves the original and no half file."""

import json
import multiprocessing
import os
import resource
import signal
import stat
import tempfile
import time
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from torch import nn

from bnguard.checkpoint import read_checkpoint, replace_statistics, write_statistics
from bnguard.checkpoint.formats.torch_zip import TorchZip
from bnguard.errors import CheckpointError
from tests.checkpoint.saving import files_in, new_statistics, save_sharded_bin, save_zip

MEAN = "bn.running_mean"


@pytest.fixture
def path(network, tmp_path):
    return save_zip(network, tmp_path)


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ({}, "no statistics to write"),
        ({"missing.running_mean": torch.zeros(6)}, "has no entry 'missing.running_mean'"),
        ({"head.weight": torch.zeros(4, 6)}, "'head.weight' is not a running statistic"),
        ({"stem.1.weight": torch.zeros(6)}, "'stem.1.weight' is not a running statistic"),
        ({"stem.1.running_mean": torch.zeros(7)}, r"has shape \(6,\), its new value \(7,\)"),
        ({"stem.1.running_mean": torch.zeros(6, 1)}, r"has shape \(6,\), its new value \(6, 1\)"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(path, tmp_path, statistics, message):
    with pytest.raises(CheckpointError, match=message):
        write_statistics(path, tmp_path / "copy.pt", statistics, {})
    assert list(tmp_path.iterdir()) == [path]


def test_statistics_on_the_meta_device_are_refused(tmp_path):
    path = tmp_path / "meta.pt"
    torch.save({"bn": nn.BatchNorm1d(2, device="meta").state_dict()}, path)
    with pytest.raises(CheckpointError, match="meta device"):
        write_statistics(path, tmp_path / "copy.pt", {MEAN: torch.zeros(2)}, {})


def test_two_entries_of_one_name_are_refused(tmp_path):
    norm = nn.BatchNorm1d(2).state_dict()
    value = {"a": {"b": {"c.running_mean": norm["running_mean"]}}}
    value["a.b"] = {"c.running_mean": norm["running_var"]}
    path = tmp_path / "twice.pt"
    torch.save(value, path)
    with pytest.raises(CheckpointError, match="holds several entries"):
        write_statistics(path, tmp_path / "copy.pt", {"a.b.c.running_mean": torch.zeros(2)}, {})


def test_a_provenance_that_is_no_plain_data_is_refused(path, tmp_path):
    with pytest.raises(CheckpointError, match="not plain data"):
        write_statistics(path, tmp_path / "copy.pt", new_statistics(path), {"model": nn.ReLU()})


def test_a_file_is_opened_once_to_be_read_and_once_to_be_copied(path, tmp_path, monkeypatch):
    opened, statistics = [], new_statistics(path)
    open_path = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, *mode: opened.append(self) or open_path(self, *mode)
    )
    read_checkpoint(path)
    assert opened.count(path) == 1
    write_statistics(path, tmp_path / "copy.pt", statistics, {})
    assert opened.count(path) == 2


def test_the_hash_is_that_of_the_original(path, tmp_path):
    expected = sha256(path.read_bytes()).hexdigest()
    copy = write_statistics(path, tmp_path / "copy.pt", new_statistics(path), {})
    assert read_checkpoint(copy).provenance["original"] == {"name": "zip.pt", "sha256": expected}


def test_a_link_stays_a_link(path, tmp_path):
    link = tmp_path / "link.pt"
    link.symlink_to(path)
    backup = replace_statistics(link, new_statistics(link), {})
    assert link.is_symlink()
    assert read_checkpoint(link).layers[0].running_mean[0] == 10.0
    assert backup == tmp_path / "zip.pt.bak"


def test_a_name_of_the_greatest_length(network, tmp_path):
    path = save_zip(network, tmp_path).rename(tmp_path / ("x" * 252 + ".pt"))
    output = tmp_path / ("y" * 252 + ".pt")
    assert write_statistics(path, output, new_statistics(path), {}) == output


def test_an_output_in_a_folder_that_is_not_there(path, tmp_path):
    with pytest.raises(CheckpointError, match=r"the folder .*no does not exist"):
        write_statistics(path, tmp_path / "no" / "copy.pt", new_statistics(path), {})


def test_when_the_last_step_fails_all_is_as_before(path, tmp_path, monkeypatch):
    before = files_in(tmp_path)
    replace = Path.replace

    def fails(self, target):
        if target == path:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", fails)
        with pytest.raises(KeyboardInterrupt):
            replace_statistics(path, new_statistics(path), {})
    assert files_in(tmp_path) == before


def test_when_a_folder_cannot_take_its_name_the_old_one_keeps_it(network, tmp_path, monkeypatch):
    source = save_sharded_bin(network, tmp_path)
    output = write_statistics(source, tmp_path / "copy", new_statistics(source), {})
    before = files_in(tmp_path)
    rename = Path.rename

    def fails(self, target):
        if self.parent.name.startswith(".bnguard-") and target == output and not output.exists():
            monkeypatch.undo()
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(KeyboardInterrupt):
        write_statistics(source, output, new_statistics(source), {}, force=True)
    assert files_in(tmp_path) == before


# Interruptions of a real process.

# Python 3.12 warns of forks beside threads, which torch and pytest-xdist start.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

# Forked, since to import torch takes seconds.
FORKS = multiprocessing.get_context("fork")


def write(path, output, how, channel):
    """Write a checkpoint as the child process does, and send what stopped it."""
    if how == "disk full":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    if how == "no rights":
        os.setuid(65534)
    if how == "is never done":
        os.fsync = lambda handle: time.sleep(60)
    new = {MEAN: torch.full((4,), 7.0)}
    try:
        if output == path:
            replace_statistics(path, new, {})
        else:
            write_statistics(path, output, new, {})
    except CheckpointError as error:
        channel.send(str(error))
    except KeyboardInterrupt:
        channel.send("interrupted")


def save_large(path, size):
    state = {"large": torch.arange(size // 4, dtype=torch.int32)}
    norm = {f"bn.{key}": value for key, value in nn.BatchNorm1d(4).state_dict().items()}
    torch.save(state | norm, path)
    return sha256(path.read_bytes()).hexdigest()


def writer(path, output, how):
    """Start a child process that writes; return it, and where it sends what stopped it."""
    receiver, sender = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=write, args=(path, output, how, sender))
    process.start()
    sender.close()
    return process, receiver


def error_of(path, output, how):
    process, receiver = writer(path, output, how)
    error = receiver.recv()
    process.join(60)
    return error


def interrupt(path, output, number):
    """Stop a writer as soon as its temporary file has grown a little.

    On a busy machine it might be done before it is stopped, were it ever done.
    """
    process, receiver = writer(path, output, "is never done")
    while not any(p.stat().st_size > 0 for p in path.parent.glob(".bnguard-*/*")):
        assert process.is_alive()
        time.sleep(0.0002)
    os.kill(process.pid, number)
    process.join(60)
    if number == signal.SIGKILL:
        assert process.exitcode == -number
    else:
        assert receiver.recv() == "interrupted"


@pytest.mark.parametrize("is_in_place", [False, True])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_writer_leaves_the_original_and_no_half_file(tmp_path, number, is_in_place):
    path = tmp_path / "large.pt"
    digest = save_large(path, 4 * 10**7)
    output = path if is_in_place else tmp_path / "copy.pt"
    interrupt(path, output, number)
    assert sha256(path.read_bytes()).hexdigest() == digest
    left = {p.name for p in tmp_path.iterdir()} - {"large.pt"}
    if number == signal.SIGINT:
        assert left == set()
    assert all(name.startswith(".bnguard-") for name in left)

    # It can be done again at once.
    new = {MEAN: torch.full((4,), 7.0)}
    replace_statistics(path, new, {}) if is_in_place else write_statistics(path, output, new, {})
    assert read_checkpoint(output).layers[0].running_mean.tolist() == [7.0] * 4


@pytest.mark.parametrize("is_in_place", [False, True])
def test_a_full_disk_leaves_the_original_and_no_half_file(tmp_path, is_in_place):
    path = tmp_path / "large.pt"
    digest = save_large(path, 4 * 10**6)
    output = path if is_in_place else tmp_path / "copy.pt"
    error = error_of(path, output, "disk full")
    assert error.startswith(f"{output}: cannot be written: File too large")
    assert sha256(path.read_bytes()).hexdigest() == digest
    assert [p.name for p in tmp_path.iterdir()] == ["large.pt"]


@pytest.mark.parametrize("is_in_place", [False, True])
def test_a_folder_without_rights_leaves_the_original(is_in_place):
    how = "no rights" if os.geteuid() == 0 else ""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "small.pt"
        digest = save_large(path, 400)
        path.chmod(0o644)
        folder.chmod(0o555)
        try:
            output = path if is_in_place else folder / "copy.pt"
            error = error_of(path, output, how)
            assert error.startswith(str(output))
            assert f"because {folder} is not writable; choose another output" in error
            assert sha256(path.read_bytes()).hexdigest() == digest
            assert [p.name for p in folder.iterdir()] == ["small.pt"]
        finally:
            folder.chmod(0o755)


def copy_as_nobody(source, output):
    if os.geteuid() == 0:  # root may move anything
        os.setuid(65534)
    write_statistics(source, output, new_statistics(source), {})


def test_a_copy_of_a_read_only_folder_is_one(network):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = save_sharded_bin(network, folder)
        folder.chmod(0o777)
        source.chmod(0o555)
        process = FORKS.Process(target=copy_as_nobody, args=(source, folder / "copy"))
        process.start()
        process.join(60)
        assert process.exitcode == 0
        assert read_checkpoint(folder / "copy").layers[0].running_mean[0] == 10.0
        assert stat.S_IMODE((folder / "copy").stat().st_mode) == 0o555
        source.chmod(0o755)
        (folder / "copy").chmod(0o755)


def test_a_file_that_changes_while_it_is_copied_is_not_published(path, tmp_path, monkeypatch):
    copy = TorchZip.copy

    def copy_while_training_goes_on(self, *arguments):
        copy(self, *arguments)
        save_zip(nn.BatchNorm1d(3), tmp_path)

    monkeypatch.setattr(TorchZip, "copy", copy_while_training_goes_on)
    with pytest.raises(CheckpointError, match="changed while it was copied"):
        write_statistics(path, tmp_path / "copy.pt", new_statistics(path), {})
    assert list(tmp_path.iterdir()) == [path]


def test_an_output_that_appears_meanwhile_is_not_replaced(path, tmp_path, monkeypatch):
    copy, output = TorchZip.copy, tmp_path / "copy.pt"

    def copy_while_another_writes(self, *arguments):
        copy(self, *arguments)
        output.write_text("theirs")

    monkeypatch.setattr(TorchZip, "copy", copy_while_another_writes)
    with pytest.raises(CheckpointError, match="exists already"):
        write_statistics(path, output, new_statistics(path), {})
    assert output.read_text() == "theirs"
    assert set(tmp_path.iterdir()) == {path, output}


def test_the_provenance_is_json_in_the_archive(path, tmp_path):
    copy = write_statistics(path, tmp_path / "copy.pt", new_statistics(path), {"samples": 1024})
    with zipfile.ZipFile(copy) as archive:
        note = json.loads(archive.read("zip/bnguard/provenance.json"))
    assert note["samples"] == 1024
