"""The README is executable: its blocks run as they stand."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bnguard.demo import DigitsData, DigitsNet
from bnguard.lightning.framework import Trainer
from tests import readme
from tests.cli.running import bnguard, script

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
README = readme.README.read_text("utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def run(command, folder):
    # The networks are tiny: a second thread costs more than it brings.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )


def test_python_blocks_run(tmp_path):
    # One process for all: to import torch and Lightning takes longer than any of them.
    program = "import sys\nfor code in sys.argv[1:]: exec(code, {'__name__': '__main__'})"
    done = run([sys.executable, "-W", "error", "-c", program, *blocks("python")], tmp_path)
    assert done.returncode == 0, done.stderr


SCRIPT = """
import torch
from torch import nn

model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(40):
    optimizer.zero_grad()
    model(torch.randn(32, 8)).square().mean().backward()
    optimizer.step()
"""

MODEL_AND_DATA = """
from torch.utils.data import Subset

from bnguard.demo import DigitsData, DigitsNet as LitModel


class DataModule(DigitsData):
    def setup(self, stage):
        super().setup(stage)
        self.train, self.val = Subset(self.train, range(256)), Subset(self.val, range(128))
"""


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec")
def test_commands_run(tmp_path):
    (tmp_path / "package").mkdir()
    for name in ("train.py", "package/train.py"):
        (tmp_path / name).write_text(SCRIPT)
    (tmp_path / "my.py").write_text(MODEL_AND_DATA)
    torch.manual_seed(0)
    trainer = Trainer(
        max_epochs=1,
        limit_train_batches=20,
        limit_val_batches=0,
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(DigitsNet(width=4), DigitsData())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    commands = [line for block in blocks("console") for line in block.splitlines()]
    scripts = [line for line in commands if " run " in line]
    assert len(scripts) == 2
    for line in scripts:
        # Without the launcher, which tests/launch starts: three processes more.
        arguments = shlex.split(line[line.index(" run ") :])
        done = bnguard(tmp_path, *arguments)
        assert done.returncode in (0, 1), done.stderr
    readme.run_commands([line for line in commands if line not in scripts], tmp_path)
    assert (tmp_path / "bn.html").is_file()
    repaired = torch.load(tmp_path / "last-recalibrated.ckpt", weights_only=True)
    assert "state_dict" in repaired


def test_what_it_shows_of_commands_is_what_they_print(tmp_path):
    printed = readme.with_outputs(README, tmp_path)
    assert readme.without_numbers(printed) == readme.without_numbers(README)


def test_it_is_short_enough_to_be_read():
    assert len(README.splitlines()) <= 250


def test_the_table_of_rules_is_that_of_the_rules():
    assert readme.with_rules(README) == README, "run: python -m tests.readme"


def test_the_setup_commands_install_the_tested_set_and_ci_runs_the_second():
    demo, tests = blocks("bash")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (torch,) = (
        name for name in project["optional-dependencies"]["dev"] if name.startswith("torch==")
    )
    setup = "python3 -m venv .venv && .venv/bin/python -m pip install -q"
    assert demo == f'{setup} {torch} -e ".[demo]" && .venv/bin/bnguard demo\n'
    assert tests == (f'{setup} -e ".[dev]" && .venv/bin/python -m pytest -n 2 --dist worksteal\n')
    assert "<!-- the tests -->\n```bash\n" in README
    assert "<!-- the tests -->" in (ROOT / ".ci" / "run").read_text("utf-8")


@pytest.mark.parametrize(
    "example", sorted((ROOT / "examples").glob("*.py")), ids=lambda example: example.name
)
def test_examples_run(example, tmp_path):
    if "lightning.pytorch" in example.read_text("utf-8"):
        # The demo's network is of the package that is imported.
        done = run([sys.executable, str(example)], tmp_path)
    else:
        done = script(tmp_path, example)
    assert done.returncode == 0, done.stderr
    assert "bnguard ·" in done.stdout


def test_a_package_index_shows_captions_in_place_of_pictures_that_it_lacks():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    text = README
    for change in project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"][
        "substitutions"
    ]:
        text = re.sub(change["pattern"], change["replacement"], text)
    assert "](.pictures" in README
    assert ".pictures" not in text
    assert "\n*The BatchNorm tab of TensorBoard: layers by steps" in text
    assert "|---|---|---|---|\n| sorted-data, BN203 |" in text
