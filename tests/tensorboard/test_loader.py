"""The entry point can neither slow TensorBoard's start nor stop it."""

import argparse
import importlib.metadata
import subprocess
import sys

from bnguard.tensorboard.loader import BatchNormLoader
from bnguard.tensorboard.plugin import BatchNormPlugin


class Context:
    data_provider = None


def test_tensorboard_finds_the_loader():
    (entry,) = importlib.metadata.entry_points(group="tensorboard_plugins", name="bnguard")
    assert entry.load() is BatchNormLoader


def test_a_fresh_process_imports_little():
    code = (
        "import sys; import bnguard.tensorboard.loader as loader; "
        "heavy = ('torch', 'lightning', 'pytorch_lightning', 'numpy', 'bnguard.rules'); "
        "print([name for name in heavy if name in sys.modules]); "
        "loader.BatchNormLoader().load(type('Context', (), {'data_provider': None})()); "
        "print([name for name in heavy[:3] if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["[]", "[]"]


def test_enough_steps_are_kept_unless_the_user_says_otherwise():
    for given, expected in (({}, 2000), ({"bnguard": 7}, 7)):
        flags = argparse.Namespace(samples_per_plugin=dict(given))
        BatchNormLoader().fix_flags(flags)
        assert flags.samples_per_plugin == {"bnguard": expected}


def test_odd_flags_do_not_stop_tensorboard():
    BatchNormLoader().fix_flags(argparse.Namespace())
    BatchNormLoader().fix_flags(argparse.Namespace(samples_per_plugin=None))
    BatchNormLoader().fix_flags(argparse.Namespace(samples_per_plugin="text"))


def test_a_plugin_that_fails_leaves_tensorboard_alone(monkeypatch, caplog):
    assert isinstance(BatchNormLoader().load(Context()), BatchNormPlugin)
    monkeypatch.setitem(sys.modules, "bnguard.tensorboard.plugin", None)
    assert BatchNormLoader().load(Context()) is None
    assert "no BatchNorm tab" in caplog.text
