"""``bnguard diagnose``, in a process of its own."""

from __future__ import annotations

import json
import shlex
import subprocess

import pytest
import torch

from bnguard.demo import DigitsNet
from tests.cli.running import DEMO, bnguard
from tests.whatif import trained

# Of no training, so that it takes no time to make.
PLAIN = """
import torch
from torch import nn

def build(width=8):
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 3))

def loader(size=10):
    return [(x, torch.zeros(size)) for x in torch.randn(120, 4).split(size)]

class Data:
    def prepare_data(self):
        pass

    def setup(self, stage):
        pass

    def train_dataloader(self):
        return loader(20)

    def val_dataloader(self):
        return loader()

def broken():
    raise OSError("disk on fire")
"""


def one_line_error(done):
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("bnguard: error: ")
    return line


@pytest.fixture
def lightning(tmp_path):
    """A checkpoint as Lightning writes it, of a network whose statistics are unconverged."""
    model = trained.unconverged()
    path = tmp_path / "last.ckpt"
    torch.save(
        {
            "pytorch-lightning_version": "2.5.0",
            "state_dict": model.state_dict(),
            "hyper_parameters": dict(model.hparams),
        },
        path,
    )
    return path


@pytest.fixture
def plain(tmp_path):
    (tmp_path / "mine.py").write_text(PLAIN)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(PLAIN, names)
    torch.save(names["build"]().state_dict(), tmp_path / "weights.pt")
    return tmp_path


def test_a_lightning_checkpoint_and_the_command_that_it_proposes(lightning, of_demo):
    original = lightning.read_bytes()
    done = bnguard(lightning.parent, "diagnose", lightning.name, *of_demo)
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    assert "unconverged-statistics" in done.stdout
    assert "the score is val_accuracy, on the evaluation samples" in done.stdout
    assert lightning.read_bytes() == original
    assert list(lightning.parent.iterdir()) == [lightning]

    _, command = done.stdout.split("momentum:\n")
    # As a shell reads it.
    words = command.replace("bnguard ", "printf '%s\\0' ", 1)
    read = subprocess.run(["/bin/sh", "-c", words], capture_output=True, text=True, check=True)
    repaired = bnguard(lightning.parent, *read.stdout.split("\0")[:-1])
    assert repaired.returncode == 0, repaired.stderr
    again = bnguard(lightning.parent, "diagnose", "last-recalibrated.ckpt", *of_demo, "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["cause"]["name"] == "none"


def test_json_of_a_metric_that_is_better_when_lower(lightning, of_demo):
    done = bnguard(
        lightning.parent, "diagnose", lightning, *of_demo, "--json", "--metric", "val_loss",
        "--samples", 300, "--batch-sizes", "[4]",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    document = json.loads(done.stdout)
    assert (document["schema"], document["action"]) == (1, "diagnose")
    assert (document["metric"], document["split"]) == ("val_loss", "val")
    assert (document["samples"], document["reference_samples"]) == (300, 300)
    rows = {row["name"]: row for row in document["rows"]}
    assert rows["stored"]["score"] < rows["reference"]["score"] < 0.0
    assert "batches of 4" in rows
    assert "batches of 2" not in rows
    assert document["cause"]["next_step"].endswith("--split train")


def test_a_configuration_and_what_is_expected(lightning):
    (lightning.parent / "config.yaml").write_text(
        "model:\n  class_path: bnguard.demo.DigitsNet\n"
        "data:\n  class_path: bnguard.demo.DigitsData\n  init_args:\n    batch_size: 7\n"
    )
    state = torch.load(lightning, weights_only=True)
    torch.manual_seed(0)
    model = DigitsNet(width=8, momentum=0.1)
    model.load_state_dict(state["state_dict"])
    torch.nn.init.normal_(model.classifier.weight)
    torch.save(state | {"state_dict": model.state_dict()}, lightning)
    done = bnguard(
        lightning.parent, "diagnose", lightning, "--config", "config.yaml",
        "--expected", 0.95, "--json",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    document = json.loads(done.stdout)
    assert document["cause"]["name"] == "weights"
    assert document["cause"]["next_step"].startswith("bnguard diagnose ")


def test_a_plain_state_dict_with_functions(plain):
    named = ("--model", "mine:build", "--data", "mine:loader")
    done = bnguard(plain, "diagnose", "weights.pt", *named, "--data.size", 20)
    assert done.returncode == 1, done.stderr
    assert "unconverged-statistics" in done.stdout
    assert "not scored" in done.stdout
    assert "(20)" in done.stdout
    assert "training samples" not in done.stdout
    # A function gives one loader: there is no split to name, and training data to ask for.
    unfolded = " ".join(done.stdout.split())
    assert unfolded.endswith(
        "(PACKAGE:function gives the training loader): "
        "bnguard recalibrate weights.pt --model mine:build --data PACKAGE:function"
    )
    assert "--split" not in done.stdout
    told = bnguard(
        plain, "diagnose", "weights.pt", *named, "--reference=mine:loader", "--reference.size", 20
    )
    assert "120 training samples" in told.stdout, told.stderr
    _, command = told.stdout.rsplit("data:\n", 1)
    words = shlex.split(command.replace("\\\n", " "))
    assert words[1:] == ["recalibrate", "weights.pt", *named[:2], "--data=mine:loader",
                         "--data.size", "20"]  # fmt: skip
    module = bnguard(plain, "diagnose", "weights.pt", *named[:3], "mine:Data", "--json")
    document = json.loads(module.stdout)
    assert (document["samples"], document["reference_samples"]) == (120, 120)
    assert document["metric"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "mine:build"), "--data is missing"),
        (("--data", "mine:loader"), "--model is missing"),
        (("--model", "mine:build", "--data", "mine:broken"), "disk on fire"),
        (("--model", "mine:build", "--data", "mine:loader", "--model.width", 9), "does not fit"),
        (("--model", "mine:build", "--data", "mine:loader", "--metric", "acc"), "validation_step"),
        (
            ("--model", "mine:build", "--data", "mine:loader", "--samples", 1),
            "samples 1 is",
        ),
        (("--model", "mine:build", "--data", "mine:Data", "--split", "test"), "test_dataloader"),
    ],
)
def test_unusable_input_is_one_clear_line(plain, options, message):
    assert message in one_line_error(bnguard(plain, "diagnose", "weights.pt", *options))


def test_a_checkpoint_without_bn_is_one_clear_line(tmp_path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "linear.pt")
    done = bnguard(tmp_path, "diagnose", "linear.pt", *DEMO)
    assert "linear.pt" in one_line_error(done)
