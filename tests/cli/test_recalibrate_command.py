"""``bnguard recalibrate`` on files of several models, on folders, and with its options."""

from __future__ import annotations

import copy
import json
import pickle
import shutil

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed.checkpoint as dcp

from bnguard.checkpoint import compare, read_checkpoint, write_statistics
from bnguard.cli.main import main
from bnguard.demo import DigitsData, DigitsNet
from tests.checkpoint.saving import (
    save_distributed,
    save_safetensors,
    save_sharded_bin,
    used_network,
)
from tests.cli.running import DEMO, bnguard, is_one_line_error

MINE = """
import torch
from torch import nn
from tests.checkpoint.saving import Network

class Discriminator(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

def build(width: int = 6):
    return Network()

def images(count: int = 12):
    torch.manual_seed(0)
    return [2 * torch.randn(4, 3, 9, 9) + 1 for _ in range(count)]

def tied():
    # safetensors keeps one name only of the weights that have two here.
    network = Network()
    network.tail = network.head
    return network

def averaged():
    return torch.optim.swa_utils.AveragedModel(Network()).module
"""
PLAIN = ("--model", "mine:build", "--data", "mine:images")


@pytest.fixture
def folder(tmp_path, monkeypatch, request):
    monkeypatch.setenv("PYTHONPATH", str(request.config.rootpath))
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def moved(before, after):
    difference = compare(read_checkpoint(before), read_checkpoint(after))
    assert difference.entries == ()
    return [not layer.is_identical for layer in difference.layers]


def test_arrays_are_refused_before_the_work(folder):
    arrays = {key: value.numpy() for key, value in used_network().state_dict().items()}
    (folder / "zoo.pkl").write_bytes(pickle.dumps({"model": arrays}))
    line = is_one_line_error(bnguard(folder, "recalibrate", "zoo.pkl", *PLAIN))
    assert "zoo.pkl: its statistics are NumPy arrays" in line
    assert bnguard(folder, "recalibrate", "zoo.pkl", *PLAIN, "--dry-run").returncode == 0


def test_of_several_models_the_one_that_is_meant(folder):
    network = used_network()
    state = network.state_dict()
    torch.save({"model": state, "ema": state}, folder / "two.pt")
    line = is_one_line_error(bnguard(folder, "recalibrate", "two.pt", *PLAIN))
    assert "has several models, 'model', 'ema' ('model', 'ema' fit Network)" in line
    assert "--weights NAME" in line
    line = is_one_line_error(bnguard(folder, "recalibrate", "two.pt", *PLAIN, "--weights", "emma"))
    assert "did you mean 'ema'?" in line

    other = {k: v.clone() for k, v in state.items()}
    torch.save({"model": state, "ema": other}, folder / "two.pt")
    done = bnguard(folder, "recalibrate", "two.pt", *PLAIN, "--weights", "ema")
    assert done.returncode == 0, done.stderr
    assert moved(folder / "two.pt", folder / "two-recalibrated.pt") == [False] * 3 + [True] * 3

    discriminator = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    gan = {"generator": state, "discriminator": discriminator.state_dict()}
    torch.save(gan, folder / "gan.pt")
    done = bnguard(
        folder, "recalibrate", "gan.pt", "--model=mine.Discriminator", "--data=mine:images"
    )
    assert done.returncode == 0, done.stderr
    assert moved(folder / "gan.pt", folder / "gan-recalibrated.pt") == [False] * 3 + [True]


def test_a_checkpoint_that_training_saves_again_meanwhile_is_not_repaired(folder):
    torch.save(used_network().state_dict(), folder / "last.pt")
    (folder / "saving.py").write_text(
        "import mine, torch\n"
        "def images():\n"
        "    torch.save(mine.build().state_dict(), 'last.pt')\n"
        "    return mine.images()\n"
    )
    names = {path.name for path in folder.iterdir()}
    line = is_one_line_error(
        bnguard(folder, "recalibrate", "last.pt", *PLAIN[:2], "--data=saving:images", "--in-place")
    )
    assert "last.pt: was saved again meanwhile" in line
    assert {path.name for path in folder.iterdir() if path.is_file()} == names


def test_averaged_weights_as_torch_saves_them(folder):
    averaged = torch.optim.swa_utils.AveragedModel(used_network())
    torch.save(averaged.state_dict(), folder / "swa.pt")
    done = bnguard(folder, "recalibrate", "swa.pt", "--model=mine:averaged", "--data=mine:images")
    assert done.returncode == 0, done.stderr
    assert all(moved(folder / "swa.pt", folder / "swa-recalibrated.pt"))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # which suits us
def test_folders_are_copied_and_not_replaced_in_place(folder):
    network = used_network()
    shutil.move(save_distributed(network, folder), folder / "step=10.5")
    done = bnguard(folder, "recalibrate", "step=10.5", *PLAIN)
    assert done.returncode == 0, done.stderr
    assert all(moved(folder / "step=10.5", folder / "step=10.5-recalibrated"))
    loaded = {"model": used_network().state_dict()}
    dcp.load(loaded, checkpoint_id=folder / "step=10.5-recalibrated")

    sharded = save_sharded_bin(network, folder)
    shutil.copy(folder / "mine.py", sharded)
    # From within, where the folder has no name.
    line = is_one_line_error(
        bnguard(sharded, "recalibrate", "pytorch_model.bin.index.json", *PLAIN, "--in-place")
    )
    assert "only a checkpoint of one file can be replaced in place" in line
    done = bnguard(folder, "recalibrate", f"{sharded.name}/", *PLAIN)
    assert done.returncode == 0, done.stderr
    assert all(moved(sharded, folder / f"{sharded.name}-recalibrated"))
    # As it was given, and from where one is.
    assert f"written: {sharded.name}-recalibrated\n" in done.stdout


def test_a_folder_as_transformers_saves_it(folder):
    pretrained = folder / "hub"
    pretrained.mkdir()
    (pretrained / "config.json").write_text("{}")
    save_safetensors(used_network(), pretrained)
    done = bnguard(folder, "recalibrate", "hub/", *PLAIN)
    assert done.returncode == 0, done.stderr
    assert "written: hub-recalibrated\n" in done.stdout
    assert all(moved(pretrained, folder / "hub-recalibrated"))
    assert (folder / "hub-recalibrated" / "config.json").read_text() == "{}"

    done = bnguard(folder, "recalibrate", "hub", *PLAIN, "--in-place")
    assert "written: hub, with the original as hub/model.safetensors.bak\n" in done.stdout
    assert all(moved(pretrained / "model.safetensors.bak", pretrained))
    done = bnguard(folder, "swap", "hub", "--model=mine:tied", *PLAIN[2:], "--steps=0")
    assert done.returncode == 0, done.stderr
    assert "written: hub-swapped.safetensors;" in done.stdout
    done = bnguard(folder, "diagnose", "hub", *PLAIN)
    assert "bnguard · 48 evaluation samples" in done.stdout


@pytest.fixture
def weights():
    return DigitsNet(width=2).state_dict()


ODD = (*DEMO, "--model.width=2", "--samples=64", "--keep=always", "--json")


def test_names_of_wrappers_are_no_difference_wherever_they_are(weights, tmp_path, capsys):
    """A part that was compiled, in a checkpoint of Lightning; averaged weights of some GPUs."""
    compiled = {key.replace("features.", "features._orig_mod."): weights[key] for key in weights}
    lightning = {"pytorch-lightning_version": "2.5.0", "state_dict": compiled}
    ema = {"ema": {f"module._orig_mod.{key}": weights[key] for key in weights}}
    for content in (lightning, ema):
        torch.save(content, tmp_path / "given.ckpt")
        assert main(["recalibrate", str(tmp_path / "given.ckpt"), *ODD, "--force"]) == 0
        written = json.loads(capsys.readouterr().out)["written"]
        assert all(moved(tmp_path / "given.ckpt", written))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x" * 245 + ".pt", lambda key, tensor: {key: tensor}, "File name too long"),
        ("meta.pt", lambda key, tensor: {key: tensor.to("meta")}, "on the meta device"),
        ("\x1b[2J.pt", lambda key, tensor: {f"\x1b[31m{key}": tensor}, "does not fit DigitsNet"),
    ],
    ids=["long", "meta", "escape"],
)
def test_odd_checkpoints_are_one_clear_line(weights, name, change, message, tmp_path, capsys):
    changed = {key: value for pair in weights.items() for key, value in change(*pair).items()}
    torch.save(changed, tmp_path / name)
    assert main(["recalibrate", str(tmp_path / name), *ODD]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bnguard: error: ")
    assert message in line
    assert "\x1b" not in line
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_methods_and_their_options_do_what_the_library_does(checkpoint, of_demo):
    folder = checkpoint.parent
    statistics = {}
    for name, options in {
        "exact": (),
        "precise": ("--method", "precise", "--precision", "bf16-mixed"),
        "adapt": ("--method", "adapt", "--prior", "100000"),
        "small": ("--memory", "2MB", "--holdout", "0.5", "--tolerance", "0.5"),
    }.items():
        output = f"{name}.ckpt"
        done = bnguard(
            folder, "recalibrate", checkpoint, *of_demo, "--keep", "always", "--output", output,
            *options, "--json", "--device", "cpu", "--samples", 300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        document = json.loads(done.stdout)
        assert (document["schema"], document["kept"], document["written"]) == (1, True, output)
        statistics[name] = read_checkpoint(folder / output).layers[3].running_mean
    old = read_checkpoint(checkpoint).layers[3].running_mean
    distances = {name: abs(mean - old).max() for name, mean in statistics.items()}
    assert len(set(distances.values())) == len(distances)
    assert distances["adapt"] == min(distances.values()) < 0.05 * distances["exact"]
    for options, message in (
        (("--prior", "3"), "needs method 'adapt'"),
        (("--device", "tpu9"), "--device tpu9 cannot be used"),
    ):
        line = is_one_line_error(
            bnguard(folder, "recalibrate", checkpoint, *of_demo, *options, "--output", "x.ckpt")
        )
        assert message in line


@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*LeafSpec",
    "ignore:.*callbacks used to create the checkpoint",
)
def test_training_resumes_from_what_was_repaired_in_place(checkpoint):
    done = bnguard(checkpoint.parent, "recalibrate", checkpoint, *DEMO, "--in-place")
    assert done.returncode == 0, done.stderr
    repaired = torch.load(checkpoint, weights_only=True)["state_dict"]
    started = {}

    class Start(pl.Callback):
        def on_train_start(self, trainer, module):
            started.update(step=trainer.global_step)
            started.update({key: value.clone() for key, value in module.state_dict().items()})
            trainer.should_stop = True

    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=4,
        limit_train_batches=2,
        limit_val_batches=0,
        callbacks=[Start()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(DigitsNet(), DigitsData(), ckpt_path=checkpoint)
    assert started.pop("step") == 225
    assert all(torch.equal(started[key], repaired[key]) for key in repaired)


@pytest.mark.parametrize("momentum", [None, 0.0, 0.001, 0.15, 0.3], ids=str)
@pytest.mark.parametrize("method", ["exact", "precise", "adapt"])
def test_what_was_recalibrated_is_not_accused_whatever_its_momentum(folder, momentum, method):
    (folder / "net.py").write_text(
        "from torch import nn\n\n"
        "def build():\n"
        f"    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum={momentum}))\n"
    )
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    for _ in range(2):
        network(torch.randn(4, 3, 9, 9))
    torch.save(network.state_dict(), folder / "few.pt")
    assert "BN303" in bnguard(folder, "inspect", "few.pt").stdout
    arguments = ("--model", "net:build", "--data", "mine:images", "--method", method)
    done = bnguard(folder, "recalibrate", "few.pt", *arguments)
    assert done.returncode == 0, done.stderr
    inspected = bnguard(folder, "inspect", "few-recalibrated.pt", "--fail-on", "warning")
    assert inspected.returncode == 0
    assert "BN303" not in inspected.stdout
    assert "written by bnguard: recalibrate" in inspected.stdout

    # The record of what was done is lost when the weights are saved anew; the counter is not.
    state = torch.load(folder / "few-recalibrated.pt", weights_only=True)
    torch.save(state, folder / "again.pt")
    assert "BN303" not in bnguard(folder, "inspect", "again.pt").stdout


def test_what_was_recalibrated_by_an_earlier_version_is_judged_by_its_record(folder):
    network = used_network()
    torch.save(network.state_dict(), folder / "few.pt")
    layers = read_checkpoint(folder / "few.pt").layers
    statistics = {
        layer.key(name): torch.tensor(value)
        for layer in layers
        for name, value in (("running_mean", layer.running_mean), ("num_batches_tracked", 12))
    }
    record = {"action": "recalibrate", "method": "exact"}
    write_statistics(folder / "few.pt", folder / "old.pt", statistics, record)
    assert "BN303" not in bnguard(folder, "inspect", "old.pt").stdout
    write_statistics(folder / "few.pt", folder / "mixed.pt", statistics, {"method": "ema"})
    assert "BN303" in bnguard(folder, "inspect", "mixed.pt").stdout


def test_a_pickled_module_is_repaired_with_its_own_settings(folder):
    network = used_network()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps, module.momentum = 1e-3, 0.03
    network.stride = torch.tensor([8.0, 16.0])
    torch.save({"model": copy.deepcopy(network).half(), "ema": network}, folder / "whole.pt")
    done = bnguard(folder, "recalibrate", "whole.pt", *PLAIN, "--weights", "ema")
    assert done.returncode == 0, done.stderr
    assert "eps 0.001 from the checkpoint, not Network's 1e-05 (3 layers)" in done.stdout
    assert "momentum 0.03 from the checkpoint, not Network's 0.1 (3 layers)" in done.stdout
    path = folder / "whole-recalibrated.pt"
    assert moved(folder / "whole.pt", path) == [False] * 3 + [True] * 3
    loaded = torch.load(path, weights_only=False)["ema"]
    assert torch.equal(loaded.stride, network.stride)
    assert loaded.stem[1].eps == 1e-3
    # Enough updates for the momentum of the file, 0.03, not for that of the class.
    assert loaded.stem[1].num_batches_tracked >= 99


def test_a_part_is_repaired_and_what_shares_its_storage_is_told(folder):
    state = used_network().state_dict()
    parts = {f"encoder_{name}.{key}": state[key] for name in "qk" for key in state}
    torch.save(parts, folder / "moco.pt")
    arguments = ("moco.pt", *PLAIN, "--weights", "encoder_q")
    done = bnguard(folder, "recalibrate", *arguments)
    assert done.returncode == 0, done.stderr
    said = "changing 'encoder_q' also changes 'encoder_k.stem.1', 'encoder_k.blocks.0.bn', "
    assert said + "'encoder_k.blocks.1.bn' (they share storage)" in done.stdout
    assert moved(folder / "moco.pt", folder / "moco-recalibrated.pt") == [True] * 6


def test_the_network_alone_takes_its_part_of_a_lightning_module(folder):
    state = used_network().state_dict()
    module = {f"net.{key}": value for key, value in state.items()} | {"loss.weight": torch.ones(3)}
    content = {"state_dict": module, "epoch": 1, "pytorch-lightning_version": "2.6.0"}
    torch.save(content, folder / "last.ckpt")
    done = bnguard(folder, "recalibrate", "last.ckpt", *PLAIN)
    assert done.returncode == 0, done.stderr
    assert moved(folder / "last.ckpt", folder / "last-recalibrated.ckpt") == [True] * 3

    module |= {f"teacher.{key}": value.clone() for key, value in state.items()}
    torch.save(content | {"state_dict": module}, folder / "two.ckpt")
    line = is_one_line_error(bnguard(folder, "recalibrate", "two.ckpt", *PLAIN))
    assert "'state_dict.net', 'state_dict.teacher' fit Network): choose one with --weights" in line


def test_an_output_inside_the_checkpoint_is_refused_at_once(folder):
    save_distributed(used_network(), folder)
    (name,) = (path.name for path in folder.iterdir() if path.is_dir())
    (folder / name / "sub").mkdir()
    line = is_one_line_error(
        bnguard(folder, "recalibrate", name, *PLAIN, "--output", f"{name}/sub/x")
    )
    assert "is inside the checkpoint" in line
