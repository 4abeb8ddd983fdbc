"""The callback in real Trainers of both packages."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bnguard import TrainingViews
from bnguard.checkpoint import read_checkpoint
from bnguard.cli.inspect import checkpoint_view, inspection_document
from bnguard.demo import DigitsData, DigitsNet
from bnguard.errors import ConfigurationError
from bnguard.inspection import inspect_checkpoint
from bnguard.lightning import REPORT_FILE, BatchNormMonitor
from bnguard.lightning.trainer import subject_options
from bnguard.report.views import as_text
from bnguard.tensorboard.log_report import logged_runs
from tests.lightning.conftest import loader


def model_for(lightning):
    """The net of the demo as a LightningModule of the package that the Trainer is of."""
    if lightning.__name__ == "pytorch_lightning":
        return DigitsNet(width=4)
    methods = ("forward", "training_step", "validation_step", "configure_optimizers", "_log_step")
    body = {name: vars(DigitsNet)[name] for name in methods}

    def init(self):
        super(net, self).__init__()
        source = DigitsNet(width=4)
        self.features, self.classifier, self.lr = source.features, source.classifier, source.lr

    net = type("DigitsNet", (lightning.LightningModule,), {**body, "__init__": init})
    return net()


def fit(lightning, folder, callback, **options):
    data = DigitsData()
    data.setup("fit")
    trainer = lightning.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 1,
            "callbacks": [callback],
            "default_root_dir": folder,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 10,
            **options,
        }
    )
    model = model_for(lightning)
    trainer.fit(model, data.train_dataloader(), data.val_dataloader())
    return trainer, model


def test_a_run_is_watched_reported_and_logged(lightning, tmp_path, capsys):
    callback = BatchNormMonitor(every_n_steps=20, strict=True)
    logger = lightning.loggers.TensorBoardLogger(tmp_path)
    trainer, model = fit(lightning, tmp_path, callback, logger=logger)
    assert all(not module._forward_pre_hooks for module in model.modules())

    printed = capsys.readouterr().out
    assert printed.count("bnguard: warning: BN303 unconverged-statistics at 7 layers") == 1
    assert "bnguard · 7 BN layers · 75 steps" in printed

    document = json.loads((tmp_path / "lightning_logs/version_0" / REPORT_FILE).read_text())
    assert {finding["code"] for finding in document["findings"]} >= {"BN303"}
    assert document["steps"] == 75

    events = EventAccumulator(trainer.log_dir)
    events.Reload()
    tags = events.Tags()
    keys = ("findings", "mode_gap", "shift", "values_per_channel", "variance")
    assert sorted(tags["scalars"])[-5:] == [f"zz_bnguard/{key}" for key in keys]
    assert sum("bnguard" in tag for tag in tags["scalars"]) == 5
    assert events.Scalars("zz_bnguard/findings")[-1].value == len(document["findings"])
    own_steps = {event.step for event in events.Scalars("zz_bnguard/values_per_channel")}
    user_steps = {event.step for event in events.Scalars("train_loss_step")}
    assert user_steps <= own_steps
    (text, *_) = events.Tensors("bnguard/findings/text_summary")
    assert b"BN303" in text.tensor_proto.string_val[0]


def test_limits_and_ignored_layers_are_those_of_watch(tiny, trainer_of):
    def accused(**options):
        callback = BatchNormMonitor(report="none", strict=True, select=["BN303"], **options)
        trainer_of(callback).fit(tiny())
        return {finding.layer for finding in callback.report.findings}

    both = {"backbone.1", "head.1"}
    assert accused() == both
    assert accused(per_layer_ignores={"head.*": ["BN303"]}) == {"backbone.1"}
    assert accused(limits={"BN303": {"max_initial_weight": 0.999}}) == set()
    with pytest.raises(ValueError, match="BN303 has no limit"):
        BatchNormMonitor(limits={"BN303": {"max_initial": 0.5}})


def test_weights_are_those_of_the_same_run_without_the_callback(lightning, tmp_path):
    def trained(callbacks):
        torch.manual_seed(3)
        _, model = fit(lightning, tmp_path, callbacks, callbacks=callbacks, logger=False)
        return model.state_dict()

    watched, unwatched = trained([BatchNormMonitor(every_n_steps=7, strict=True)]), trained([])
    assert all(torch.equal(watched[key], unwatched[key]) for key in unwatched)


@pytest.mark.parametrize(
    "options",
    [
        {"logger": False},
        {"fast_dev_run": True},
        {"limit_train_batches": 2, "limit_val_batches": 1},
        {"limit_val_batches": 0},
        {"accumulate_grad_batches": 4},
        {"max_epochs": -1, "max_steps": 12},
        {"enable_progress_bar": True},
    ],
    ids=str,
)
def test_settings_of_the_trainer_do_no_harm(options, tmp_path, capsys):
    lightning = importlib.import_module("pytorch_lightning")
    callback = BatchNormMonitor(strict=True)
    fit(lightning, tmp_path, callback, **options)
    assert callback.report is not None
    assert len(callback.report.layers) == 7
    assert ("bnguard · 7 BN layers" in capsys.readouterr().out) is not options.get("fast_dev_run")


def test_the_sanity_check_is_not_an_evaluation(tmp_path):
    lightning = importlib.import_module("pytorch_lightning")
    callback = BatchNormMonitor(strict=True)
    fit(lightning, tmp_path, callback, limit_train_batches=3, check_val_every_n_epoch=2)
    assert all(layer.evaluated is None for layer in callback.report.layers)


def test_a_run_that_ends_early_is_reported_and_left_clean(tmp_path, capsys):
    lightning = importlib.import_module("pytorch_lightning")

    class Stops(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 5:
                self.model = pl_module
                raise RuntimeError("out of cheese")

    stops, callback = Stops(), BatchNormMonitor(strict=True)
    with pytest.raises(RuntimeError, match="out of cheese"):
        fit(lightning, tmp_path, callback, callbacks=[stops, callback])
    assert callback.report.history.run.steps == 5
    assert "bnguard · 7 BN layers · 5 steps" in capsys.readouterr().out
    assert all(not module._forward_pre_hooks for module in stops.model.modules())


def test_a_poisoned_step_is_undone(tmp_path):
    lightning = importlib.import_module("pytorch_lightning")

    class Poisons(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 5:
                with torch.no_grad():
                    pl_module.features(torch.full_like(batch[0], torch.nan))

    callback = BatchNormMonitor(restore_poisoned=True, strict=True)
    _, model = fit(lightning, tmp_path, callback, callbacks=[Poisons(), callback])
    assert all(value.isfinite().all() for value in model.state_dict().values())
    restored = [f for f in callback.report.findings if f.code == "BN402"]
    assert [finding.step for finding in restored] == [6] * 7


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_an_evaluation_without_a_fit_is_watched(stage, tmp_path, capsys):
    lightning = importlib.import_module("pytorch_lightning")
    data = DigitsData()
    data.setup("fit")
    callback = BatchNormMonitor(strict=True)
    trainer = lightning.Trainer(
        logger=False, callbacks=[callback], accelerator="cpu", enable_progress_bar=False
    )

    class Net(DigitsNet):
        def test_step(self, batch, batch_idx):
            self._log_step(batch, "test")

        def predict_step(self, batch, batch_idx):
            return self(batch[0])

    loader = data.val_dataloader()
    model = Net(width=4)
    getattr(trainer, stage)(model, loader)
    assert all(layer.evaluated is not None for layer in callback.report.layers)
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_an_error_of_our_own_does_not_end_the_run(tmp_path, capsys, monkeypatch):
    lightning = importlib.import_module("pytorch_lightning")
    callback = BatchNormMonitor()
    monkeypatch.setattr(
        "bnguard.monitor.Monitor.step", lambda *_: (_ for _ in ()).throw(KeyError("oops"))
    )
    trainer, model = fit(lightning, tmp_path, callback)
    printed = capsys.readouterr().out
    assert printed.count("bnguard: an error of its own, KeyError: 'oops'") == 1
    assert trainer.global_step == 75
    assert all(not module._forward_pre_hooks for module in model.modules())
    with pytest.raises(KeyError):
        fit(lightning, tmp_path, BatchNormMonitor(strict=True))


def test_an_error_in_a_hook_of_ours_does_not_end_the_run(tmp_path, capsys, monkeypatch):
    lightning = importlib.import_module("pytorch_lightning")
    monkeypatch.setattr(
        "bnguard.observe.layer_calls.values_per_channel",
        lambda *_: (_ for _ in ()).throw(KeyError("n")),
    )
    trainer, model = fit(lightning, tmp_path, BatchNormMonitor())
    printed = capsys.readouterr().out
    assert printed.count("bnguard: an error of its own, KeyError: 'n'") == 1
    assert trainer.global_step == 75
    assert all(not module._forward_pre_hooks for module in model.modules())
    with pytest.raises(KeyError):
        fit(lightning, tmp_path, BatchNormMonitor(strict=True))


@pytest.mark.parametrize(
    ("installed", "missing"),
    [("pytorch_lightning", "lightning"), ("lightning.pytorch", "pytorch_lightning")],
)
def test_one_of_the_two_packages_is_enough(installed, missing):
    code = (
        f"import sys; sys.modules[{missing!r}] = None; from bnguard.lightning import "
        f"BatchNormMonitor; import {installed} as package; "
        "assert issubclass(BatchNormMonitor, package.Callback); package.Trainer("
        "callbacks=[BatchNormMonitor()], logger=False, accelerator='cpu', barebones=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_of_two_packages_callbacks_are_of_the_one_that_may_be_old():
    """Before 2.6, lightning's Trainer takes no other package's callbacks; both take this one."""
    code = (
        "from bnguard.lightning import BatchNormMonitor; import lightning.pytorch as package; "
        "import pytorch_lightning; assert issubclass(BatchNormMonitor, package.Callback); "
        "[each.Trainer(callbacks=[BatchNormMonitor()], logger=False, accelerator='cpu', "
        "barebones=True) for each in (package, pytorch_lightning)]"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_trainer_is_stopped_where_that_is_asked_for(tmp_path, capsys):
    lightning = importlib.import_module("pytorch_lightning")
    callback = BatchNormMonitor(every_n_steps=5, stop_on="warning", strict=True)
    trainer, _ = fit(lightning, tmp_path, callback, min_epochs=0)
    assert trainer.global_step == 1
    assert "stopping the trainer because of BN303" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("report", "printed", "written"),
    [
        ("both", True, True),
        ("terminal", True, False),
        ("file", False, True),
        ("none", False, False),
    ],
)
def test_the_report_goes_where_it_is_asked_to(report, printed, written, tmp_path, capsys):
    lightning = importlib.import_module("pytorch_lightning")
    callback = BatchNormMonitor(report=report, strict=True)
    trainer, _ = fit(lightning, tmp_path, callback, limit_train_batches=2)
    assert ("bnguard · 7 BN layers" in capsys.readouterr().out) is printed
    assert (Path(trainer.log_dir) / REPORT_FILE).exists() is written


def test_a_later_validate_leaves_the_report_of_the_fit(tmp_path):
    lightning = importlib.import_module("pytorch_lightning")
    trainer, model = fit(lightning, tmp_path, BatchNormMonitor(strict=True), limit_train_batches=2)
    file = Path(trainer.log_dir) / REPORT_FILE
    of_the_fit = file.read_text()
    data = DigitsData()
    data.setup("validate")
    trainer.validate(model, data.val_dataloader(), verbose=False)
    assert file.read_text() == of_the_fit


def test_a_checkpoint_holds_the_momentum_of_each_layer(tmp_path):
    lightning = importlib.import_module("pytorch_lightning")
    trainer, _ = fit(lightning, tmp_path, BatchNormMonitor(strict=True), limit_train_batches=2)
    saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    momenta = saved["bnguard"]["monitor"]["momentum"]
    assert momenta["features.0.1"] == 0.005
    assert len(momenta) == 7


def test_a_checkpoint_repeats_what_was_reported_of_its_training(lightning, tmp_path):
    class Frozen(lightning.Callback):
        """A block is frozen, in train mode: BN101, which no checkpoint shows."""

        def on_fit_start(self, trainer, pl_module):
            for part in pl_module.features[0].parameters():
                part.requires_grad_(False)

    callback = BatchNormMonitor(every_n_steps=10, strict=True)
    options = {"limit_train_batches": 30, "callbacks": [Frozen(), callback]}
    trainer, _ = fit(lightning, tmp_path, callback, **options)
    path = trainer.checkpoint_callback.best_model_path
    checkpoint = read_checkpoint(path)
    (noted,) = [noted for noted in checkpoint.reported if noted.code == "BN101"]
    assert (noted.severity, noted.layer) == ("warning", "features.0.1")
    assert noted.first_step <= 10
    assert noted.last_step == 30
    assert set(checkpoint.eps.values()) == {1e-5}
    report = inspect_checkpoint(checkpoint)
    assert not any(finding.code == "BN101" for finding in report.findings)
    shown = " ".join(as_text(checkpoint_view(checkpoint, report, is_verbose=False)).split())
    assert "while training, bnguard reported: warning BN101 frozen-but-updating at steps" in shown
    (document,) = inspection_document([(checkpoint, report)], {})["checkpoints"]
    assert "BN101" in {record["code"] for record in document["reported"]}

    saved, resumed = {}, BatchNormMonitor(strict=True)
    resumed.on_load_checkpoint(None, None, torch.load(path, weights_only=True))
    resumed.on_save_checkpoint(None, None, saved)
    assert "BN101" in {record["code"] for record in saved["bnguard"]["monitor"]["findings"]}


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_the_log_ends_with_the_report_that_is_shown(tmp_path, capsys, is_interrupted):
    """Whether it ends at a step that was logged, or in the middle."""

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if is_interrupted and batch_idx == 33:
                raise ValueError("the user's")

    callback = BatchNormMonitor(every_n_steps=20, strict=True)
    logger = pl.loggers.TensorBoardLogger(tmp_path)
    options = {"logger": logger, "limit_val_batches": 0, "limit_train_batches": 40}
    with pytest.raises(ValueError, match="the user's") if is_interrupted else nullcontext():
        fit(pl, tmp_path, callback, **options, callbacks=[callback, Stop()])
    (run,) = logged_runs(tmp_path)
    logged, shown = (
        {(f.code, f.severity, f.layer, f.message) for f in findings}
        for findings in (run.findings, callback.report.findings)
    )
    assert logged == shown
    assert "still the initial mean" in str(run)
    # The Trainer was given loaders, which have no name.
    subjects = (
        "--model bnguard.demo.DigitsNet "
        "--data bnguard.demo:function_that_gives_the_training_loader\n"
    )
    checkpoint = "CKPT" if is_interrupted else ".ckpt"
    assert f"{checkpoint} {subjects}" in f"{run}\n"
    printed = capsys.readouterr().out
    assert is_interrupted or f".ckpt {subjects}" in f"{printed}\n"


class Loads(DigitsNet):
    def train_dataloader(self):
        return DigitsData().train_dataloader()


def test_the_commands_name_what_can_be_imported(tmp_path):
    class Local(DigitsNet):
        """Of a function, as in many notebooks and tests."""

    here = Loads.__module__
    for model, data, options in (
        (DigitsNet(), DigitsData(), "bnguard.demo.DigitsNet --data bnguard.demo.DigitsData"),
        (Loads(), None, f"{here}.Loads --split train"),
        (Local(), None, f"{here}:function_that_makes_the_model --data {here}:function_that_gives"),
    ):
        trainer = SimpleNamespace(lightning_module=model, datamodule=data)
        assert subject_options(trainer).startswith(f"--model {options}")


@pytest.mark.parametrize("place", ["log_metrics", "add_summary"])
def test_a_logger_that_fails_is_left_alone_and_the_watching_goes_on(
    lightning, tmp_path, capsys, monkeypatch, place
):
    loggers = lightning.loggers

    def fails(*_, **__):
        raise OSError("disk full")

    class Broken(loggers.CSVLogger):
        def log_metrics(self, metrics, step=None):
            if any(name.startswith("zz_bnguard/") for name in metrics):
                fails()
            super().log_metrics(metrics, step)

    broken = Broken(tmp_path / "broken", version=0)
    if place == "add_summary":
        broken = loggers.TensorBoardLogger(tmp_path / "broken", version=0)
        writer = broken.experiment._get_file_writer()
        add = writer.add_summary

        def add_others(summary, step=None, *_):
            if summary.value[0].tag == "bnguard/stats":
                fails()
            add(summary, step)

        monkeypatch.setattr(writer, "add_summary", add_others)
    sound = loggers.CSVLogger(tmp_path / "sound", version=0)
    callback = BatchNormMonitor(every_n_steps=20)
    options = {"logger": [broken, sound], "limit_train_batches": 30}
    fit(lightning, tmp_path, callback, **options)
    printed = capsys.readouterr().out
    assert printed.count("raised OSError: disk full; nothing more is logged there") == 1
    assert "error of its own" not in printed
    assert not callback.is_off
    assert callback.report is not None
    metrics = (tmp_path / "sound/lightning_logs/version_0/metrics.csv").read_text()
    assert "zz_bnguard/values_per_channel" in metrics


def test_a_report_that_cannot_be_written_is_said_to_be(lightning, tmp_path, capsys):
    (tmp_path / "lightning_logs/version_0" / REPORT_FILE).mkdir(parents=True)
    callback = BatchNormMonitor()
    logger = lightning.loggers.CSVLogger(tmp_path, version=0)
    fit(lightning, tmp_path, callback, logger=logger, limit_train_batches=2)
    assert f"{REPORT_FILE} cannot be written: Is a directory" in capsys.readouterr().out
    assert not callback.is_off


def test_limits_and_ignores_reach_the_monitor(lightning, tmp_path):
    options = {
        "limits": {"BN303": {"max_initial_weight": 0.9999}},
        "per_layer_ignores": {"features.*": ["BN1"]},
    }
    trainer, _ = fit(lightning, tmp_path, BatchNormMonitor(**options))
    (callback,) = (c for c in trainer.callbacks if isinstance(c, BatchNormMonitor))
    assert "BN303" not in {finding.code for finding in callback.report.findings}
    with pytest.raises(ConfigurationError, match="max_initial"):
        BatchNormMonitor(limits={"BN303": {"max_initial": 1.0}})
    with pytest.raises(ConfigurationError, match="BN9"):
        BatchNormMonitor(per_layer_ignores={"*": ["BN9"]})


def test_what_bn_does_to_training_is_measured_on_demand(tiny, trainer_of):
    inputs, labels = next(iter(loader(32, 3, 32)))
    views = TrainingViews(lambda model: F.cross_entropy(model(inputs), labels))
    callback = BatchNormMonitor(views=views, report="file", strict=True)
    trainer_of(callback, max_steps=3).fit(tiny())
    first, second = (layer.view for layer in callback.report.layers)
    assert (first.step, first.gradient_cosine) == (2, None)
    assert second.gradient_change > 0
