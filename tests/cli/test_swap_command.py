"""``bnguard swap``, in a process of its own, and the lines that it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Trainer
from safetensors.torch import load_file, save_file
from torch import nn

import bnguard as library
from bnguard.checkpoint.reading import open_checkpoint
from bnguard.cli.main import main
from bnguard.demo import DigitsData, DigitsNet
from bnguard.swapping import api
from tests.cli.running import DEMO, bnguard

QUICK = (*DEMO, "--steps", "0")


@pytest.fixture
def checkpoint(tmp_path):
    model = DigitsNet(width=2)
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}, path)
    return path


def built(code):
    """What the lines printed make, run as they are."""
    names = {}
    exec(code, names)
    return names["model"]


def assert_weights(model, state_dict):
    own = model.state_dict()
    assert set(own) == set(state_dict)
    assert all(torch.equal(own[name], value) for name, value in state_dict.items())


def test_the_checkpoint_and_the_lines_printed_make_the_swapped_model(checkpoint, capsys, of_demo):
    original = checkpoint.read_bytes()
    done = bnguard(
        checkpoint.parent, "swap", checkpoint, "--to", "group", *of_demo, "--keep", "always"
    )
    assert done.returncode == 0, done.stderr
    assert checkpoint.read_bytes() == original
    assert "swapped (group) · 7 BN layers · " in done.stdout
    assert "val_accuracy" in done.stdout
    output = checkpoint.with_name("last-swapped.ckpt")
    saved = torch.load(output, weights_only=True)
    assert saved["hyper_parameters"]["width"] == 2
    note = note_in(output)
    assert (note["action"], note["to"], note["original"]) == ("swap", "group", "last.ckpt")

    _, code = done.stdout.split("the model that it fits:\n")
    assert len(code.strip().splitlines()) == 6
    model = built(code)
    assert_weights(model, saved["state_dict"])
    assert not any("running_mean" in name for name in saved["state_dict"])

    again = main(["swap", str(checkpoint), *of_demo, "--steps", "0"])
    assert again == 2
    assert "exists already; move it away, or force it" in capsys.readouterr().err
    assert main(["swap", str(checkpoint), *of_demo, "--steps", "0", "--force"]) == 0
    assert not list(checkpoint.parent.glob(".bnguard-*"))


def demand_more():
    """Take any score for clearly worse that is not twice as good."""
    api._MAX_SCORE_LOSS = -1.0


def test_a_model_that_is_clearly_worse_is_not_written(checkpoint, of_demo):
    folder = checkpoint.parent
    command = ("swap", checkpoint, "--to", "layer", *of_demo, "--steps", 1)
    done = bnguard(folder, *command, prepare=demand_more)
    assert done.returncode == 1, done.stderr
    assert "not swapped (layer) · 7 BN layers" in done.stdout
    assert "use --keep always to write it anyway" in done.stdout
    assert list(folder.iterdir()) == [checkpoint]


def note_in(path):
    """What bnguard noted in a file; it has no BN layers any more, so it is read as a format."""
    with open_checkpoint(path) as contents:
        return contents.provenance


@pytest.mark.parametrize("to", ["layer", "instance", "batch-renorm", "frozen", "sync"])
def test_every_target_can_be_built_again(checkpoint, to, capsys, of_demo):
    assert main(["swap", str(checkpoint), "--to", to, *of_demo, "--steps=0", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    saved = torch.load(document["written"], weights_only=True)
    assert_weights(built(document["code"]), saved["state_dict"])


def test_json_is_one_document(checkpoint, capsys, of_demo):
    options = ("--steps", "2", "--exclude", '["features.0.1"]', "--json")
    assert main(["swap", str(checkpoint), *of_demo, *options]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["action"], document["to"]) == (1, "swap", "group")
    assert len(document["replaced"]) == 6
    assert document["skipped"] == [{"name": "features.0.1", "reason": "is excluded"}]
    assert document["distillation"]["steps"] == 2
    assert document["metric"] == "val_accuracy"
    assert 0.0 <= document["score_after"] <= 1.0
    saved = torch.load(document["written"], weights_only=True)
    assert_weights(built(document["code"]), saved["state_dict"])


def refuse(word):
    raise AssertionError(f"JSON has no {word}")


def test_a_score_that_is_not_finite_is_strict_json(checkpoint, capsys):
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["classifier.bias"].fill_(torch.nan)
    torch.save(content, checkpoint)
    options = (*QUICK, "--metric=val_loss", "--json")
    assert main(["swap", str(checkpoint), *options]) == 1
    document = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert (document["score_after"], document["written"]) == ("NaN", None)
    assert document["code"] is None
    assert main(["swap", str(checkpoint), *options, "--keep=always"]) == 0


@pytest.mark.parametrize("key", ["model", None])
def test_a_plain_state_dict_stays_one(tmp_path, key, capsys):
    state_dict = DigitsNet(width=2).state_dict()
    path = tmp_path / "weights.pt"
    torch.save(state_dict if key is None else {key: state_dict, "step": 7}, path)
    assert main(["swap", str(path), *QUICK, "--model.width", "2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["written"] == str(tmp_path / "weights-swapped.pt")
    saved = torch.load(document["written"], weights_only=True)
    assert_weights(built(document["code"]), saved if key is None else saved[key])


def test_safetensors_stay_safetensors(tmp_path, capsys):
    path = tmp_path / "weights.safetensors"
    save_file(DigitsNet(width=2).state_dict(), path)
    assert main(["swap", str(path), *QUICK, "--model.width", "2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["written"] == str(tmp_path / "weights-swapped.safetensors")
    assert_weights(built(document["code"]), load_file(document["written"]))
    assert note_in(Path(document["written"]))["original"] == "weights.safetensors"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec")
def test_what_lightning_wrote_is_validated_by_lightning_and_not_resumed(tmp_path, capsys):
    def trainer():
        return Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    data = DigitsData(batch_size=64)
    first = trainer()
    first.fit(DigitsNet(width=2), data)
    path = tmp_path / "epoch.ckpt"
    first.save_checkpoint(path)
    capsys.readouterr()
    assert main(["swap", str(path), *QUICK]) == 0
    printed = capsys.readouterr().out
    assert "without optimizer states, so fine-tune it in a new fit" in printed

    output = tmp_path / "epoch-swapped.ckpt"
    saved = torch.load(output, weights_only=True)
    assert (saved["epoch"], saved["global_step"]) == (1, 18)
    model = built(printed.partition("the model that it fits:\n")[2])
    (metrics,) = trainer().validate(model, data, ckpt_path=output, verbose=False)
    assert 0.0 <= metrics["val_accuracy"] <= 1.0
    with pytest.raises(KeyError, match="optimizer state"):
        trainer().fit(model, data, ckpt_path=output)
    new = trainer()
    new.fit(model, data)
    assert new.global_step == 18


def test_the_precision_reaches_the_distillation(checkpoint, monkeypatch, capsys, of_demo):
    seen = {}

    def swap(model, to, **options):
        seen.update(options)
        return library.swap(model, to)

    monkeypatch.setattr("bnguard.swapping.api.swap", swap)
    options = ("--precision", "bf16-mixed", "--steps", "5")
    assert main(["swap", str(checkpoint), *of_demo, *options]) == 0
    assert seen["fabric"]._precision.precision == "bf16-mixed"
    assert isinstance(seen["teacher_data"], torch.utils.data.DataLoader)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "grop", *DEMO], "did you mean 'group'?"),
        ([*DEMO[2:]], "--model is missing"),
        ([*DEMO, "--model.width", "4"], "does not fit DigitsNet"),
        ([*DEMO, "--output", "last.ckpt", "--force"], "the original itself; choose another output"),
        ([*DEMO, "--output", "."], "a folder, but the output is a file"),
        ([*QUICK, "--output", "nowhere/x.ckpt"], "the folder nowhere does not exist"),
        ([*DEMO, "--split", "holdout"], "has no holdout_dataloader"),
        ([*DEMO, "--metric", "val_accuracie"], "did you mean 'val_accuracy'?"),
        ([*DEMO, "--device", "gpu"], "--device gpu cannot be used here"),
        ([*DEMO, "--exclude", '["nothing"]'], "exclude 'nothing' matches no BN layer"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(
    checkpoint, arguments, message, monkeypatch, capsys
):
    monkeypatch.chdir(checkpoint.parent)
    content = checkpoint.read_bytes()
    assert main(["swap", checkpoint.name, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bnguard: error: ")
    assert message in line
    assert [path.name for path in checkpoint.parent.iterdir()] == ["last.ckpt"]
    assert checkpoint.read_bytes() == content


def test_a_checkpoint_without_bn_is_refused(tmp_path, capsys):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "plain.pt")
    assert main(["swap", str(tmp_path / "plain.pt"), *DEMO]) == 2
    assert "has no BN layers with running statistics: nothing to do" in capsys.readouterr().err
