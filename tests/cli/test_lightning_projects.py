"""``bnguard recalibrate`` in a project of somebody who uses LightningCLI."""

from __future__ import annotations

import pytest
import torch

from bnguard.checkpoint import read_checkpoint
from tests.cli.running import bnguard, is_one_line_error, script

pytestmark = pytest.mark.slow

PARTS = '''
from dataclasses import dataclass
import torch
from pytorch_lightning import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Body(nn.Sequential):
    def __init__(self, width: int = 3, momentum: float = 0.1):
        norm = nn.BatchNorm1d(width, momentum=momentum)
        super().__init__(nn.Linear(4, width), norm, nn.Linear(width, 2))


@dataclass
class Schedule:
    lr: float = 0.1
    steps: tuple[int, int] = (1, 2)


class Net(LightningModule):
    """Has no forward, as many: its steps call the layers."""

    def __init__(self, body: nn.Module, schedule: Schedule, classes: int):
        super().__init__()
        self.save_hyperparameters()
        self.body, self.schedule = body, schedule
        assert classes == 2

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.body(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.log("val_loss", self.training_step(batch, 0))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.schedule.lr)


class Data(LightningDataModule):
    def __init__(self, batch_size: int = 8, classes: int = 2):
        super().__init__()
        self.save_hyperparameters()
        self.batch_size, self.classes = batch_size, classes

    def setup(self, stage):
        x = 3 + 5 * torch.randn(48, 4, generator=torch.Generator().manual_seed(0))
        self.set = TensorDataset(x, (x.sum(1) > 12).long())

    def train_dataloader(self):
        return DataLoader(self.set, self.batch_size)


class Alone(Net):
    """A module with its loaders."""

    def __init__(self, width: int = 4):
        super().__init__(Body(width), Schedule(), 2)

    def train_dataloader(self):
        data = Data()
        data.setup("fit")
        return data.train_dataloader()
'''

TRAIN = """
import warnings
warnings.simplefilter("ignore")
from pytorch_lightning import Trainer
from pytorch_lightning.cli import LightningCLI
from parts import Alone, Data, Net

COMMON = ["fit", "--trainer.max_epochs=1", "--trainer.accelerator=cpu",
          "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
BODY = ["body=parts.Body", "body.init_args.width=5", "schedule.lr=0.01"]

class Linked(LightningCLI):
    def add_arguments_to_parser(self, parser):
        parser.link_arguments("data.classes", "model.classes", apply_on="instantiate")

def run(folder, cli, classes, *args):
    cli(**classes, args=[*COMMON, f"--trainer.default_root_dir={folder}", *args])

fixed = {"model_class": Net, "datamodule_class": Data}
given = [f"--model.{argument}" for argument in BODY]
run("fixed", LightningCLI, fixed, *given, "--model.classes=2", "--data.batch_size=4")
run("linked", Linked, fixed, *given, "--data.batch_size=4")
named = {"subclass_mode_model": True, "subclass_mode_data": True}
given = [f"--model.init_args.{argument}" for argument in (*BODY, "classes=2")]
run("sub class", LightningCLI, named, "--model=parts.Net", *given, "--data=parts.Data")
trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False)
trainer.fit(Alone(width=7))
trainer.save_checkpoint("alone.ckpt")
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("my project")
    (folder / "parts.py").write_text(PARTS)
    (folder / "train.py").write_text(TRAIN)
    done = script(folder, folder / "train.py")
    assert done.returncode == 0, done.stderr
    return folder


NAMED = ("--model", "parts.Net", "--data", "parts.Data")


@pytest.mark.parametrize(
    ("folder", "options"), [("fixed", NAMED), ("linked", NAMED), ("sub class", ())]
)
def test_the_saved_configuration_is_found_and_used(project, folder, options):
    """Fixed classes, linked arguments, nested ones; classes named by the configuration."""
    (checkpoint,) = (project / folder).rglob("*.ckpt")
    done = bnguard(
        project, "recalibrate", checkpoint.relative_to(project), *options, "--split", "train"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert f"arguments from {folder}/lightning_logs/version_0/config.yaml" in done.stdout
    repaired = read_checkpoint(checkpoint.with_name(f"{checkpoint.stem}-recalibrated.ckpt"))
    assert repaired.layers[0].channels == 5
    assert set(repaired.provenance) == {
        *("action", "method", "weights", "data", "split", "samples", "batches", "prior", "metric"),
        *("score_before", "score_after", "bnguard_version", "replaced", "original"),
    }


def test_a_module_with_loaders_needs_no_data(project):
    """Its hyper-parameters are those of the checkpoint."""
    done = bnguard(
        project, "recalibrate", "--split", "train", "alone.ckpt", "--model", "parts.Alone"
    )
    assert done.returncode == 0, done.stderr
    assert "not scored" in done.stdout


def test_no_path_in_a_checkpoint_is_followed(project):
    (project / "evil.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    (checkpoint,) = (project / "fixed").rglob("epoch=0-step=12.ckpt")
    content = torch.load(checkpoint, weights_only=False)
    described = {"class_path": "evil.Body"}
    for value in (described, "{class_path: evil.Body}"):
        content["hyper_parameters"] |= {"body": value, "_instantiator": "evil.build"}
        content["datamodule_hyper_parameters"] |= {"batch_size": value, "_class_path": "evil.Body"}
        torch.save(content, project / "hostile.ckpt")
        line = is_one_line_error(bnguard(project, "recalibrate", "hostile.ckpt", *NAMED))
        assert "data.batch_size" in line or "model.body" in line
        assert not (project / "ran").exists()
