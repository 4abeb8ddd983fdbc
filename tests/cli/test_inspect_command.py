"""``bnguard inspect`` and ``bnguard diff``, on what anybody saves."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import warnings

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from bnguard.cli.inspect import inspection_document
from tests.checkpoint.saving import (
    NAMES,
    save_distributed,
    save_legacy,
    save_safetensors,
    save_sharded_bin,
    save_zip,
    used_network,
)
from tests.cli.running import BNGUARD, bnguard, is_one_line_error


class Lit(pl.LightningModule):
    def __init__(self, network):
        super().__init__()
        self.network = network


def by_lightning(network, folder):
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(Lit(network))
    trainer.save_checkpoint(folder / "lightning.ckpt")


def by_torch(network, folder):
    state = {"epoch": 3, "model_state_dict": nn.DataParallel(network).state_dict()}
    torch.save(state, folder / "plain.pt")


def by_timm(network, folder):
    """The layout of timm's CheckpointSaver, with a namespace that torch refuses to load."""
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    content = {"epoch": 1, "arch": "network", "state_dict": network.state_dict()}
    content |= {"optimizer": optimizer.state_dict(), "version": 2, "metric": 0.5}
    torch.save(content | {"args": argparse.Namespace(lr=0.1)}, folder / "timm.pth.tar")


def by_transformers(network, folder):
    transformers = pytest.importorskip("transformers")

    class Model(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.network = network
            self.post_init()

        def _init_weights(self, module):
            pass

    Model(transformers.PretrainedConfig()).save_pretrained(folder / "pretrained")


def by_torch_distributed(network, folder):
    dcp.save({"model": network.state_dict()}, checkpoint_id=folder / "distributed")


def test_the_same_layers_from_every_maker(tmp_path):
    network = used_network()
    makers = (by_lightning, by_torch, by_timm, by_transformers, by_torch_distributed)
    for make in makers:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # theirs
            make(network, tmp_path)
    done = bnguard(tmp_path, "inspect", ".", "--json")
    assert done.returncode == 0, done.stderr
    checkpoints = json.loads(done.stdout)["checkpoints"]
    assert len(checkpoints) == len(makers)
    layers = [
        {
            (layer["name"].removeprefix("network."), layer["channels"], layer["updates"])
            for layer in checkpoint["report"]["layers"]
        }
        for checkpoint in checkpoints
    ]
    assert layers == [{(name, 6, 5) for name in NAMES}] * len(makers)


def test_folders_globs_and_verbose_lines(tmp_path):
    network = used_network()
    (tmp_path / "with space").mkdir()
    for save in (save_zip, save_safetensors, save_sharded_bin):
        save(network, tmp_path / "with space")
    done = bnguard(tmp_path, "inspect", "with space/*.pt", "with space", "--verbose")
    assert done.returncode == 0, done.stderr
    for name in ("zip.pt (torch zip)", "model.safetensors (", "sharded-bin ("):
        assert done.stdout.count(name) == 1
    for name in NAMES:
        assert sum(line.startswith(name) for line in done.stdout.splitlines()) == 3
    assert "\x1b" not in done.stdout


def poisoned(network, name):
    network.get_submodule(name).running_mean[0] = torch.nan
    return network


def test_rules_layers_and_limits_are_those_of_the_project(tmp_path):
    torch.save(poisoned(used_network(), "blocks.0.bn").state_dict(), tmp_path / "bad.pt")
    (tmp_path / "below").mkdir()

    def codes():
        done = bnguard(tmp_path / "below", "inspect", "../bad.pt", "--json")
        (checkpoint,) = json.loads(done.stdout)["checkpoints"]
        return {f["code"] for f in checkpoint["report"]["findings"]}, done.returncode

    assert "BN402" in codes()[0]
    project = tmp_path / "pyproject.toml"
    project.write_text('[tool.bnguard.per-layer-ignores]\n"blocks.0.*" = ["BN402"]\n')
    assert "BN402" not in codes()[0]
    project.write_text('[tool.bnguard]\nselect = ["BN402"]\n')
    assert codes() == ({"BN402"}, 1)
    project.write_text('[tool.bnguard]\nignore = ["BN4", "BN303"]\n')
    assert codes() == (set(), 0)
    project.write_text("[tool.bnguard]\nselct = []\n")
    done = bnguard(tmp_path, "inspect", "bad.pt")
    assert done.returncode == 2
    assert "did you mean select" in done.stderr


def bad_files(folder):
    """What the issue calls bad input, a file each."""
    bn = nn.BatchNorm1d(3).state_dict()
    mean, var = bn["running_mean"], bn["running_var"]
    contents = {
        "empty_dictionary": {},
        "meta": {k: v.to("meta") for k, v in bn.items()},
        "no_var": {"bn.running_mean": mean},
        "shapes": {"bn.running_mean": mean, "bn.running_var": torch.ones(4)},
        "integers": {"bn.running_mean": mean.long(), "bn.running_var": var.long()},
        "no_bn": nn.Linear(2, 2).state_dict(),
    }
    for name, content in contents.items():
        torch.save(content, folder / f"{name}.pt")
    whole = (folder / "no_bn.pt").read_bytes()
    (folder / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "no_bytes.pt").write_bytes(b"")
    (folder / "text.pt").write_text("hello")
    (folder / "folder.pt").mkdir()
    return {path.name for path in folder.iterdir()}


def test_bad_files_are_a_line_each_and_good_ones_are_reported_still(tmp_path):
    names = bad_files(tmp_path)
    strange = tmp_path / "σ [1] né\n.pt"
    network = poisoned(used_network(), "stem.1")
    torch.save({"model": network.state_dict(), "ema": used_network().state_dict()}, strange)
    nans = {k: torch.full((3,), torch.nan) for k in ("a.running_mean", "a.running_var")}
    torch.save(nans, tmp_path / "nans.pt")
    names_given = sorted(path.name for path in tmp_path.iterdir())
    done = bnguard(tmp_path, "inspect", *names_given, "missing.pt")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert all(line.startswith("bnguard: error: ") for line in lines)
    assert len(lines) == len(names) + 1
    for name in (*names, "missing.pt"):
        assert any(name in line for line in lines), name
    assert done.stdout.count("BN402 poisoned-statistics") == 2
    assert "model: stem.1" in done.stdout


def mutated(data, random_):
    at = random_.randrange(len(data))
    junk = random_.randbytes(random_.randrange(1, 40))
    way = random_.randrange(4)
    if way == 0:
        return data[:at]
    return data[:at] + junk + data[at + (len(junk) if way > 1 else 0) :]


def test_a_pipe_is_told_to_be_one_and_one_that_nobody_reads_is_no_fault(tmp_path):
    for number in range(300):
        torch.save(nn.BatchNorm1d(2).state_dict(), tmp_path / f"{number}.pt")
    os.mkfifo(tmp_path / "pipe")
    line = is_one_line_error(bnguard(tmp_path, "inspect", "pipe"))
    assert "a pipe or a device; save it to a file first" in line
    with subprocess.Popen(
        [BNGUARD, "inspect", tmp_path, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"{\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


def test_hundreds_of_damaged_files_in_one_command(tmp_path):
    network, random_ = used_network(), random.Random(0)
    for save in (save_zip, save_legacy, save_safetensors):
        data = save(network, tmp_path).read_bytes()
        for number in range(100):
            path = tmp_path / "damaged" / f"{save.__name__}-{number}.pt"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(mutated(data, random_))
    (save_distributed(network, tmp_path) / ".metadata").write_bytes(random_.randbytes(99))
    done = bnguard(tmp_path, "inspect", "damaged", "distributed", "--json")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    document = json.loads(done.stdout)
    assert len(document["checkpoints"]) + len(document["errors"]) == 301
    assert len(document["errors"]) > 100


def test_the_help_names_the_keys_of_the_document(tmp_path):
    text = bnguard(tmp_path, "inspect", "--help").stdout
    for key in inspection_document([], {}):
        assert f"  {key}  " in text
    for key in ("path", "format", "models", "global_step", "epoch", "provenance", "problems"):
        assert key in text


def test_two_models_of_a_file_are_compared(tmp_path):
    """Averaged weights that keep the statistics of others."""
    network = used_network()
    averaged = {k: v * 0.5 if "conv" in k else v for k, v in network.state_dict().items()}
    torch.save({"state_dict": network.state_dict(), "ema": averaged}, tmp_path / "both.pt")
    done = bnguard(tmp_path, "diff", "both.pt", "both.pt", "--weights", "state_dict", "ema")
    assert done.returncode == 1
    assert "0 of 3 BN layers have other statistics · 4 other entries differ" in done.stdout
    assert "the statistics are the same and other entries are not" in done.stdout
    done = bnguard(tmp_path, "diff", "both.pt", "both.pt", "--weights", "emma")
    assert done.returncode == 2
    assert "did you mean 'ema'?" in done.stderr


def test_one_file_is_enough_to_compare_its_models(tmp_path):
    state = used_network().state_dict()
    torch.save({"state_dict": state, "ema": state}, tmp_path / "both.pt")
    assert bnguard(tmp_path, "diff", "both.pt", "--weights", "state_dict", "ema").returncode == 0
    done = bnguard(tmp_path, "diff", "both.pt")
    assert is_one_line_error(done)
    assert "--weights A B" in done.stderr


def test_no_name_in_a_file_makes_the_terminal_do_anything(tmp_path):
    evil = "\x1b[2J\x07red\n"
    state = {f"{evil}.running_mean": torch.zeros(2), f"{evil}.running_var": -torch.ones(2)}
    torch.save({evil: state, "b": state}, tmp_path / f"{evil}.pt")
    torch.save({evil: state, "b": {}}, tmp_path / "other.pt")
    shown = bnguard(tmp_path, "inspect", "--verbose", f"{evil}.pt", "other.pt")
    compared = bnguard(tmp_path, "diff", "--verbose", f"{evil}.pt", "other.pt")
    for done in (shown, compared):
        assert "red" in done.stdout
        assert all(char.isprintable() for char in (done.stdout + done.stderr).replace("\n", ""))


def test_the_layers_of_several_models_are_told_apart(tmp_path):
    torch.save(
        {"ema": used_network().state_dict(), "net": used_network().state_dict()}, tmp_path / "a.pt"
    )
    lines = bnguard(tmp_path, "inspect", "--verbose", "a.pt").stdout.splitlines()
    assert lines.index("ema") + len(NAMES) + 2 == lines.index("net")


def test_what_lies_beside_a_model_in_a_folder_is_a_note(tmp_path):
    """DeepSpeed's and SpeechBrain's companions; a damaged checkpoint is still an error."""
    folder = tmp_path / "run"
    folder.mkdir()
    save_zip(used_network(), folder)
    torch.save({"optimizer_state_dict": {"step": 3}}, folder / "zero_pp_rank_0_optim_states.pt")
    (folder / "counter.ckpt").write_text("12")
    (folder / "brain.ckpt").write_text("avg_train_loss: 0.5\nstep: 3\n")
    done = bnguard(tmp_path, "inspect", "run", "--fail-on", "never")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("bnguard: note: ") == 3
    assert bnguard(tmp_path, "inspect", "run/counter.ckpt").returncode == 2
    (folder / "broken.ckpt").write_bytes((folder / "zip.pt").read_bytes()[:500])
    done = bnguard(tmp_path, "inspect", "run", "--fail-on", "never")
    assert done.returncode == 2
    assert "broken.ckpt" in done.stderr
