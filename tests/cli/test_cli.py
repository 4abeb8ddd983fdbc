"""The real command, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.tensorboard import SummaryWriter

from bnguard import RULES, watch
from bnguard.loggers import TensorBoard
from tests.cli.running import DEMO, bnguard, is_one_line_error


def accuracy_line(text):
    (line,) = [line for line in text.splitlines() if line.startswith("accuracy in eval mode")]
    return [float(word) for word in line.replace("%", "").split() if word[0].isdigit()]


def test_the_demo_names_the_fault_and_repairs_it(demo):
    folder, done = demo
    assert done.stderr == ""
    for text in ("BN303 unconverged-statistics", "BN301 statistic-drift", "tensorboard --logdir"):
        assert text in done.stdout
    before, after = accuracy_line(done.stdout)
    assert before < 80
    assert after > 92
    written = {path.name for path in (folder / "out").iterdir()}
    assert written == {"logs", "digits-0.ckpt", "digits-0-recalibrated.ckpt"}


def test_the_repaired_accuracy_is_that_of_large_batch_statistics(demo):
    """Within half a point of the statistics of one batch of all training images."""
    from bnguard.demo import DigitsData, DigitsNet

    folder, done = demo
    _, after = accuracy_line(done.stdout)
    net = DigitsNet.load_from_checkpoint(folder / "out" / "digits-0.ckpt", weights_only=True)
    data = DigitsData()
    data.setup("fit")
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    net.train()
    with torch.no_grad():
        net(torch.stack([image for image, _ in data.train]))
    net.eval()
    with torch.no_grad():
        right = [int(net(image[None]).argmax() == label) for image, label in data.val]
    assert abs(100 * np.mean(right) - after) <= 0.5


def test_recalibrate_changes_statistics_and_nothing_else(checkpoint, of_demo):
    original = checkpoint.read_bytes()
    done = bnguard(checkpoint.parent, "recalibrate", checkpoint, *of_demo, "--split", "train")
    assert done.returncode == 0, done.stderr
    assert checkpoint.read_bytes() == original
    repaired = checkpoint.with_name("last-recalibrated.ckpt")
    assert f"written: {repaired}" in done.stdout
    before, after = (torch.load(path, weights_only=True) for path in (checkpoint, repaired))
    changed = {
        key
        for key, tensor in before["state_dict"].items()
        if not torch.equal(tensor, after["state_dict"][key])
    }
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {key for key in before["state_dict"] if key.endswith(statistics)}
    for entry in before.keys() - {"state_dict"}:
        assert all(map(same, *map(tree_leaves, (before[entry], after[entry]))))


def same(old, new):
    return torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new


def test_inspect_needs_no_model_code(checkpoint):
    done = bnguard(checkpoint.parent, "inspect", checkpoint, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    (inspected,) = document["checkpoints"]
    assert (document["schema"], document["errors"]) == (1, [])
    assert (inspected["path"], inspected["global_step"]) == (str(checkpoint), 225)
    assert len(inspected["report"]["layers"]) == 7
    assert inspected["report"]["layers"][0]["updates"] == 225


def test_inspect_finds_poison_and_fails_at_the_level_asked_for(tmp_path):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model(torch.full((4, 2), torch.nan))
    torch.save(model.state_dict(), tmp_path / "bad.pt")
    done = bnguard(tmp_path, "inspect", "bad.pt")
    assert done.returncode == 1
    assert "BN402 poisoned-statistics" in done.stdout
    assert bnguard(tmp_path, "inspect", "bad.pt", "--fail-on", "never").returncode == 0


def test_rules_are_selected_and_ignored_by_code_or_prefix(checkpoint):
    def codes(*options):
        done = bnguard(checkpoint.parent, "inspect", checkpoint, "--json", *options)
        (inspected,) = json.loads(done.stdout)["checkpoints"]
        return {finding["code"] for finding in inspected["report"]["findings"]}

    # The momentum of the layers stands in the checkpoint, where the callback noted it.
    assert codes() == {"BN303"}
    assert codes("--select", "BN3,BN402") == {"BN303"}
    assert codes("--ignore", "BN303") == codes("--select", "BN4") == set()
    unknown = bnguard(checkpoint.parent, "inspect", checkpoint, "--ignore", "BN999")
    assert "no rule is called 'BN999'" in is_one_line_error(unknown)


def test_what_is_unusable_does_not_hide_the_rest(checkpoint):
    done = bnguard(checkpoint.parent, "inspect", "none.ckpt", checkpoint)
    assert "none.ckpt" in is_one_line_error(done)
    assert "7 BN layers" in done.stdout


def foreign(path):
    import fractions

    torch.save({"state_dict": {}, "config": fractions.Fraction(1, 3)}, path)


def without_bn(path):
    torch.save(nn.Linear(2, 2).state_dict(), path)


def no_checkpoint(path):
    path.write_text("hello")


def truncated(path):
    torch.save(nn.BatchNorm1d(3).state_dict(), path)
    path.write_bytes(path.read_bytes()[:500])


@pytest.mark.parametrize("make", [foreign, without_bn, no_checkpoint, truncated, lambda path: None])
@pytest.mark.parametrize("command", [("inspect",), ("recalibrate", *DEMO)], ids=lambda c: c[0])
def test_an_unusable_checkpoint_is_one_clear_line(make, command, tmp_path):
    path = tmp_path / "given.ckpt"
    make(path)
    name, *options = command
    line = is_one_line_error(bnguard(tmp_path, name, "given.ckpt", *options))
    assert "given.ckpt" in line
    assert [entry.name for entry in tmp_path.iterdir() if entry != path] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "bnguard.demo.DigitsNet"), "--data is missing"),
        (("--data", "bnguard.demo.DigitsData"), "--model is missing"),
        (("--model", "nowhere.Net", "--data", "nowhere.Data"), "No module named 'nowhere'"),
        (("--model", "DigitsNet", "--data", "x.Y"), "write it as package.module.Name"),
        ((*DEMO, "--model.widht", "4"), "did you mean --model.width? it takes --model.width, --mo"),
        (("--model", "nowhere.Net", "--data", "nowhere.Data"), "or add that to PYTHONPATH"),
        (("--model", "bnguard.demo.DigitNet", *DEMO[2:]), "did you mean 'DigitsNet'?"),
        (("--model", "nowhere.py:Net", *DEMO[2:]), "does not exist"),
        ((*DEMO, "--model.width", "wide"), "width"),
        ((*DEMO, "--model.width", "4"), "does not fit DigitsNet"),
        ((*DEMO, "--samples", "0"), "samples"),
        ((*DEMO, "--split", "test"), "test_dataloader"),
        ((*DEMO, "--split", "vel"), "--split: use one of 'train', 'val', 'test', not vel"),
        ((*DEMO[:2], "--data", "bnguard.demo.__doc__"), "is a str: name a class, or a function"),
        ((*DEMO, "--config", "none.yaml"), "none.yaml cannot be read"),
        (("--model", "torch.nn.Flatten", *DEMO[2:]), "does not fit Flatten"),
        ((*DEMO, "--smaples", "9"), "--smaples does not exist: did you mean --samples?"),
        ((*DEMO, "--samples", "-1"), "--samples: use a whole number above 0, not -1"),
        (("--model", "mine.py", *DEMO[2:]), "write it as package.module.Name, or file.py:Name"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_wrong_option_of_recalibrate_is_one_clear_line(checkpoint, options, message):
    original = checkpoint.read_bytes()
    line = is_one_line_error(bnguard(checkpoint.parent, "recalibrate", checkpoint, *options))
    assert message in line
    assert checkpoint.read_bytes() == original
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_an_empty_loader_and_a_raising_one_are_one_clear_line(checkpoint, of_demo):
    folder = checkpoint.parent
    (folder / "mine.py").write_text(
        "def empty():\n    return []\n\ndef broken():\n    raise OSError('disk on fire')\n"
    )
    (folder / "parses.py").write_text("import sys\n\nsys.exit()\n")
    (folder / "argued.py").write_text(
        "import argparse\n\nparser = argparse.ArgumentParser()\n"
        "parser.add_argument('--lr', required=True)\nparser.parse_args([])\n"
    )
    (folder / "untyped.py").write_text("def data(folder, size=3):\n    return []\n")
    for data, message in (
        ("mine:empty", "empty"),
        ("mine:broken", "disk on fire"),
        ("parses:train", "move that under if __name__ == '__main__'"),
        ("argued:train", "move that under if __name__ == '__main__'"),
        ("untyped:data", "missing: --data.folder; pass it"),
    ):
        done = bnguard(folder, "recalibrate", checkpoint, *of_demo[:2], "--data", data)
        assert message in is_one_line_error(done)
    assert not (folder / "last-recalibrated.ckpt").exists()


def test_a_model_and_a_loader_that_are_made_already_are_named_as_they_are(checkpoint, of_demo):
    (checkpoint.parent / "mine.py").write_text(
        "import torch\nfrom bnguard.demo import DigitsNet\n\n"
        "MODEL = DigitsNet()\nBATCHES = [torch.rand(4, 1, 8, 8) for _ in range(8)]\n"
        "LOADER = torch.utils.data.DataLoader(torch.rand(32, 1, 8, 8), batch_size=8)\n"
        "from functools import partial\nMAKE = partial(list, BATCHES)\n"
    )
    for model, data in (
        (of_demo[1], "mine.LOADER"),
        (of_demo[1], "mine:BATCHES"),
        (of_demo[1], "mine:MAKE"),
        ("mine.MODEL", "mine.LOADER"),
    ):
        options = ("--model", model, "--data", data, "--force")
        done = bnguard(checkpoint.parent, "recalibrate", checkpoint, *options)
        assert done.returncode == 0, done.stderr
    done = bnguard(
        checkpoint.parent, "recalibrate", checkpoint, *of_demo[:2], "--data", "mine.torch"
    )
    assert "is a module: name a class, or a function" in is_one_line_error(done)


def test_an_empty_path_is_not_the_current_folder(checkpoint):
    line = is_one_line_error(bnguard(checkpoint.parent, "inspect", ""))
    assert "a path is empty: is a variable of the shell not set?" in line


def test_a_loader_of_length_one_is_enough(checkpoint, of_demo):
    (checkpoint.parent / "mine.py").write_text(
        "import torch\n\ndef one_batch():\n    return [torch.rand(4, 1, 8, 8)]\n"
    )
    done = bnguard(
        checkpoint.parent, "recalibrate", checkpoint, *of_demo[:2], "--data", "mine:one_batch"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("file", ["hp.py", "path/to/my-hp.py"])
def test_a_file_names_model_and_data(checkpoint, file):
    path = checkpoint.parent / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("from bnguard.demo import DigitsData as Data, DigitsNet as Net\n")
    done = bnguard(
        checkpoint.parent, "recalibrate", checkpoint,
        f"--model={file}:Net", f"--data={file}:Data", "--dry-run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_errors_name_options_and_not_python(checkpoint):
    (checkpoint.parent / "mine.py").write_text("def words():\n    return ['a', 'b']\n")
    done = bnguard(checkpoint.parent, "recalibrate", checkpoint, *DEMO[:2], "--data=mine:words")
    line = is_one_line_error(done)
    assert "wrap the model in one that does" in line
    assert "forward=" not in line


def test_an_existing_output_is_kept_unless_forced(checkpoint, of_demo):
    output = checkpoint.with_name("last-recalibrated.ckpt")
    output.write_text("precious")
    line = is_one_line_error(bnguard(checkpoint.parent, "recalibrate", checkpoint, *of_demo))
    assert "exists" in line
    assert output.read_text() == "precious"
    done = bnguard(checkpoint.parent, "recalibrate", checkpoint, *of_demo, "--force")
    assert done.returncode == 0, done.stderr


def test_a_configuration_of_lightning_cli_names_model_and_data(checkpoint):
    (checkpoint.parent / "config.yaml").write_text(
        "seed_everything: true\n"
        "model:\n  class_path: bnguard.demo.DigitsNet\n  init_args:\n    width: 16\n"
        "data:\n  class_path: bnguard.demo.DigitsData\n  init_args:\n    batch_size: 7\n"
    )
    done = bnguard(checkpoint.parent, "recalibrate", checkpoint, "--config", "config.yaml")
    assert done.returncode == 0, done.stderr


def test_rules_and_pages_are_shown(tmp_path):
    assert "BN402  poisoned-statistics" in bnguard(tmp_path, "rules").stdout
    page = bnguard(tmp_path, "explain", "bn301").stdout
    assert page.startswith("BN301 statistic-drift\n")
    line = is_one_line_error(bnguard(tmp_path, "explain", "BN3x"))
    assert "there are BN301, BN302" in line
    assert "BN403" not in line
    assert "did you mean BN301" in is_one_line_error(bnguard(tmp_path, "explain", "BN3O1"))
    done = bnguard(tmp_path, "explain", "--all", "--html", "rules.html")
    assert done.stdout == "written: rules.html\n"
    assert 'id="BN404"' in (tmp_path / "rules.html").read_text("utf-8")
    assert "use --all" in is_one_line_error(bnguard(tmp_path, "explain"))
    assert "did you mean 'bnguard inspect'" in is_one_line_error(bnguard(tmp_path, "inspct", "x"))


ANSWER_AT_ONCE = """
import contextlib, io, sys
from bnguard.cli.main import COMMANDS, main

def shown(*arguments):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main(arguments)
    return out.getvalue()

assert all(command in shown("--help") for command in COMMANDS)
def is_helpful(command):
    text = shown(command, "--help")
    assert text.startswith(f"usage: bnguard {command}"), text
    _, _, examples = text.partition("\\nexamples:\\n")
    assert examples.count(f"  bnguard {command}") >= 2, text
    assert max(map(len, text.splitlines())) <= 80, text
    usage, _, rest = text.partition("\\n\\n")
    assert all(option in usage for option in ("--model ", "--data ") if option in rest), text

for command in COMMANDS:
    is_helpful(command)
assert "BN301" in shown("rules") and "BN301" in shown("explain", "BN301")
slow = {"torch", "pytorch_lightning", "tensorboard"} & sys.modules.keys()
assert not slow, slow
"""


def test_every_command_has_help_and_two_examples_at_once(tmp_path):
    """What takes seconds to import is not."""
    done = subprocess.run(
        [sys.executable, "-c", ANSWER_AT_ONCE],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "COLUMNS": "80"},
    )
    assert done.returncode == 0, done.stderr


def test_rules_are_plain_data_for_machines(tmp_path):
    rules = json.loads(bnguard(tmp_path, "rules", "--json").stdout)["rules"]
    assert [rule["code"] for rule in rules] == [rule.code for rule in RULES]
    (drift,) = [rule for rule in rules if rule["name"] == "statistic-drift"]
    assert drift["limits"]["max_shift_std"] == 1.0
    explained = json.loads(bnguard(tmp_path, "explain", "BN301", "--json").stdout)["rules"]
    assert [rule.pop("page").partition("\n")[0] for rule in explained] == [drift["fault"]]
    assert explained == [drift]
    both = bnguard(tmp_path, "explain", "BN301", "--json", "--html", "page.html")
    assert (both.returncode, both.stdout) == (2, "")


def test_the_reports_of_runs_are_plain_data_for_machines(checkpoint):
    logs = checkpoint.parent / "logs"
    with SummaryWriter(logs) as writer:
        monitor = watch(nn.Sequential(nn.BatchNorm1d(3)))
        TensorBoard(writer).log_layers(monitor.report(), 7)
    (run,) = json.loads(bnguard(checkpoint.parent, "report", logs, "--json").stdout)["runs"]
    assert (run["layers"], run["last_step"], run["problem"]) == (["0"], 7, "")
