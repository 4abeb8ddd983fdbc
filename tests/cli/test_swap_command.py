"""``bnguard swap``, in a process of its own, and the lines that it prints."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bnguard.cli import main
from bnguard.demo import DigitsNet

BNGUARD = shutil.which("bnguard", path=str(Path(sys.executable).parent))
# In a process of its own the deprecations that jsonargparse announces are no errors; nor here.
pytestmark = pytest.mark.filterwarnings("default")
DEMO = ("--model", "bnguard.demo.DigitsNet", "--data", "bnguard.demo.DigitsData")


def bnguard(folder, *arguments):
    assert BNGUARD is not None
    return subprocess.run(
        [BNGUARD, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def checkpoint(tmp_path):
    model = DigitsNet(width=2)
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}, path)
    return path


def test_the_checkpoint_and_the_lines_printed_make_the_swapped_model(checkpoint, capsys):
    original = checkpoint.read_bytes()
    done = bnguard(checkpoint.parent, "swap", checkpoint, "--to", "group", *DEMO, "--steps", 2)
    assert done.returncode == 0, done.stderr
    assert checkpoint.read_bytes() == original
    assert "swapped (group) · 7 BN layers · 2 steps" in done.stdout
    assert "val_accuracy" in done.stdout
    output = checkpoint.with_name("last-swapped.ckpt")
    saved = torch.load(output, weights_only=True)
    assert saved["hyper_parameters"]["width"] == 2
    assert saved["bnguard"]["to"] == "group"

    *_, build, change, load = done.stdout.rstrip().splitlines()
    build = build.replace("(…)", "(width=2)")
    code = "\n".join(
        ["import bnguard, torch", "from bnguard.demo import DigitsNet", build, change, load]
    )
    names = {}
    exec(code, names)
    for name, value in names["model"].state_dict().items():
        assert torch.equal(saved["state_dict"][name], value)
    assert not any("running_mean" in name for name in saved["state_dict"])

    again = main(["swap", str(checkpoint), *DEMO, "--steps", "0"])
    assert again == 2
    assert "exists already: choose another --output, or use --force" in capsys.readouterr().err
    assert main(["swap", str(checkpoint), *DEMO, "--steps", "0", "--force"]) == 0
    assert not list(checkpoint.parent.glob(".bnguard-*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "grop", *DEMO], "did you mean 'group'?"),
        ([*DEMO[2:]], "--model is missing"),
        ([*DEMO, "--model.width", "4"], "does not fit DigitsNet"),
        ([*DEMO, "--output", "last.ckpt", "--force"], "is the original; choose another --output"),
        ([*DEMO, "--split", "holdout"], "has no holdout_dataloader"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(
    checkpoint, arguments, message, monkeypatch, capsys
):
    monkeypatch.chdir(checkpoint.parent)
    assert main(["swap", checkpoint.name, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bnguard: error: ")
    assert message in line
    assert [path.name for path in checkpoint.parent.iterdir()] == ["last.ckpt"]
