"""A callback that is used twice, copied, interrupted, or given a module that has nothing for it."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import sys
import types
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from torch import nn

from bnguard.errors import CalibrationError, ConfigurationError
from bnguard.lightning import BatchNormMonitor, BatchNormRecalibration
from bnguard.lightning.trainer import class_path
from tests.lightning.conftest import loader


def test_fit_twice_with_the_same_callback(tiny, trainer_of, capsys):
    callback = BatchNormMonitor(every_n_steps=3, strict=True)
    trainer_of(callback, max_epochs=1).fit(tiny(momentum=0.001))
    first = callback.report
    trainer_of(callback, max_epochs=2).fit(tiny(momentum=0.001))
    assert callback.report is not first
    assert callback.report.history.run.steps == 12
    assert capsys.readouterr().out.count("bnguard: warning: BN303") == 2


def test_a_second_fit_of_another_module_knows_nothing_of_the_first(tiny, trainer_of):
    class Wider(tiny):
        def __init__(self):
            super().__init__()
            self.head = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 2))

    callback = BatchNormMonitor(every_n_steps=3, strict=True)
    trainer_of(callback, max_epochs=1).fit(tiny())
    trainer_of(callback, limit_train_batches=1, max_epochs=1).fit(Wider())
    sizes = {layer.name: len(layer.window.mean) for layer in callback.report.layers}
    assert sizes == {"backbone.1": 8, "head.1": 16}
    assert all(layer.window.batches.max() == 1 for layer in callback.report.layers)


def test_the_state_of_another_module_does_no_harm(tiny, trainer_of):
    class Wider(tiny):
        def __init__(self):
            super().__init__()
            self.head = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 2))

    first = BatchNormMonitor(every_n_steps=3, strict=True)
    trainer_of(first, max_epochs=1).fit(tiny())
    second = BatchNormMonitor(strict=True)
    checkpoint = {}
    first.on_save_checkpoint(None, None, checkpoint)
    second.on_load_checkpoint(None, None, checkpoint)
    trainer_of(second, limit_train_batches=1, max_epochs=1).fit(Wider())
    assert {len(layer.window.mean) for layer in second.report.layers} == {8, 16}


def test_fit_validate_test_and_predict_one_after_another(tiny, trainer_of):
    callback = BatchNormMonitor(strict=True)
    trainer, module = trainer_of(callback, max_epochs=1), tiny()
    reports = []
    for stage in (trainer.fit, trainer.validate, trainer.test, trainer.predict):
        stage(module)
        reports.append(callback.report)
    assert [report.history.run.steps for report in reports] == [6, 0, 0, 0]
    assert all(layer.evaluated.batches == 3 for report in reports for layer in report.layers)
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in module.modules())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies(copied, tiny, trainer_of, lightning):
    class CopiesAll(lightning.Callback):
        """As tuners and launchers of processes do."""

        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 3:
                self.part = copied(pl_module.backbone)

    copies, callback = CopiesAll(), copied(BatchNormMonitor(strict=True))
    trainer_of(callback, copies, max_epochs=1).fit(tiny())
    assert callback.report.history.run.steps == 6
    again = copy.deepcopy(callback)
    assert again.report.history.run.steps == 6
    trainer_of(again, max_epochs=1).fit(tiny())
    copies.part(torch.randn(4, 6))


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_without_bn_there_is_one_line(stage, tiny, trainer_of, capsys):
    class Plain(tiny):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = nn.Linear(6, 8), nn.Linear(8, 2)

    callback = BatchNormMonitor(strict=True)
    getattr(trainer_of(callback, max_epochs=1), stage)(Plain())
    lines = [line for line in capsys.readouterr().out.splitlines() if "bnguard" in line]
    assert lines == ["bnguard: Plain has no BN layers, so there is nothing to watch"]
    assert callback.report is None


def test_a_hundred_layers(tiny, trainer_of, capsys):
    class Deep(tiny):
        def __init__(self):
            super().__init__()
            blocks = [(nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=0.001)) for _ in range(98)]
            self.head = nn.Sequential(*(part for block in blocks for part in block), self.head)

    callback = BatchNormMonitor(strict=True)
    trainer_of(callback, max_epochs=1).fit(Deep())
    printed = capsys.readouterr().out
    assert "bnguard: warning: BN303 unconverged-statistics at 100 layers" in printed
    assert "bnguard · 100 BN layers" in printed
    # It fits a screen.
    assert len(printed[printed.index("bnguard · 100") :].splitlines()) < 60


def test_layers_that_join_during_fit_are_watched(tiny, trainer_of):
    class Grows(tiny):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.head.append(nn.BatchNorm1d(2, affine=False))

    callback = BatchNormMonitor(every_n_steps=2, strict=True)
    trainer_of(callback).fit(Grows())
    joined = callback.report.layers[-1]
    assert joined.name == "head.4"
    # From the first validation that follows, or the next look at the whole model, on.
    assert joined.updates_seen > 0


def test_ctrl_c_is_reported(tiny, trainer_of, lightning, capsys):
    class Interrupts(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 4:
                raise KeyboardInterrupt

    callback, module = BatchNormMonitor(strict=True), tiny()
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        trainer_of(Interrupts(), callback).fit(module)
    assert "bnguard · 2 BN layers · 4 steps" in capsys.readouterr().out
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in module.modules())


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_an_exception_in_an_evaluation_is_the_users(stage, tiny, trainer_of):
    class Fails(tiny):
        def validation_step(self, batch, batch_idx):
            if batch_idx == 1 and not self.trainer.sanity_checking:
                raise ValueError("mine")
            super().validation_step(batch, batch_idx)

    module = Fails()
    with pytest.raises(ValueError, match="mine"):
        getattr(trainer_of(BatchNormMonitor(strict=True)), stage)(module)
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in module.modules())


@pytest.mark.parametrize("callback", [BatchNormMonitor, BatchNormRecalibration])
def test_the_configuration_that_a_command_line_saves_can_be_read_again(callback):
    parser = ArgumentParser()
    parser.add_class_arguments(callback, "callback")
    saved = parser.dump(parser.get_defaults())
    read = parser.parse_string(saved)
    assert isinstance(parser.instantiate(read).callback, callback)


def test_a_terminal_that_has_few_characters_is_shown_what_it_can(tiny, trainer_of, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii", write_through=True))
    trainer_of(BatchNormMonitor(strict=True), max_epochs=1).fit(tiny(momentum=0.001))
    assert b"bnguard ? watching 2 BN layers" in written.getvalue()
    assert b"bnguard ? 2 BN layers ? 6 steps" in written.getvalue()


def test_a_terminal_that_is_gone_ends_no_run(tiny, trainer_of, monkeypatch):
    gone = io.StringIO()
    gone.close()
    monkeypatch.setattr(sys, "stdout", gone)
    trainer = trainer_of(BatchNormMonitor(), max_epochs=1)
    trainer.fit(tiny())
    assert trainer.global_step == 6


def test_what_a_forward_logs_is_of_the_users_own_calls(tiny, trainer_of):
    class Logs(tiny):
        def forward(self, inputs):
            if not self.training:
                self.log("calls", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
            return super().forward(inputs)

    # Lightning raises at the end of fit, where nothing is logged.
    repair, module = BatchNormRecalibration(when="fit-end", strict=True), Logs()
    trainer = trainer_of(BatchNormMonitor(strict=True), repair, max_epochs=1)
    trainer.fit(module)
    assert trainer.callback_metrics["calls"] == 3
    assert repair.result is not None
    assert "log" not in vars(module)


@pytest.mark.parametrize(
    "place",
    [
        "bnguard.lightning.monitor.show",
        "bnguard.loggers.text.as_terminal_text",
        "bnguard.monitor.watch",
        "bnguard.lightning.monitor.RunLog.write",
        "bnguard.lightning.monitor.RunLog.conclude",
        "bnguard.monitor.Monitor.state_dict",
        "bnguard.monitor.Monitor.load_state_dict",
        "bnguard.monitor.Monitor.report_of_all_ranks",
        "bnguard.monitor.Monitor._findings_of_all_ranks",
        "bnguard.monitor.Monitor.close",
        "bnguard.observe.observer.Observer.evaluation",
        "bnguard.observe.gap_probe.GapProbe.measure",
        "bnguard.observe.eval_statistics.channel_moments",
    ],
)
def test_an_error_of_our_own_anywhere_ends_no_run(place, tiny, trainer_of, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise KeyError("ours")

    torch.manual_seed(5)
    unwatched = tiny()
    trainer_of(enable_checkpointing=True).fit(unwatched)
    callback = BatchNormMonitor(every_n_steps=3)
    broken = {"bnguard": {"monitor": {"state": {"of": "another version"}}}}
    callback.on_load_checkpoint(None, None, broken)
    monkeypatch.setattr(place, fails)
    torch.manual_seed(5)
    module = tiny()
    trainer = trainer_of(callback, enable_checkpointing=True)
    trainer.fit(module)
    trainer.validate(module)
    assert trainer.global_step == 12
    states = unwatched.state_dict(), module.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert callback.is_off
    assert capsys.readouterr().out.count("bnguard: an error of its own, KeyError") == 1


@pytest.mark.parametrize(
    "options",
    [{"select": ["BN999"]}, {"ignore": ["drift"]}, {"stop_on": "panic"}, {"report": "paper"}],
    ids=str,
)
def test_options_that_do_not_exist_are_refused_at_once(options):
    with pytest.raises(ConfigurationError):
        BatchNormMonitor(**options)


@pytest.mark.parametrize(
    ("place", "path"), [({"__file__": "/some/train.py"}, "train.Net"), ({}, "my.Net")]
)
def test_the_command_names_a_class_of_the_script_by_the_scripts_name(place, path, monkeypatch):
    script = types.ModuleType("__main__")
    vars(script).update(place)
    monkeypatch.setitem(sys.modules, "__main__", script)
    net = type("Net", (), {"__module__": "__main__"})
    assert class_path(net()) == path


def test_rules_can_be_chosen(tiny, trainer_of, capsys):
    for options in ({"select": ["BN2"]}, {"ignore": ["unconverged-statistics"]}):
        callback = BatchNormMonitor(**options, strict=True)
        trainer_of(callback, max_epochs=1).fit(tiny(momentum=0.001))
        assert "BN303" not in {finding.code for finding in callback.report.findings}
    assert "BN303" not in capsys.readouterr().out


def importable(name, package):
    """A module class that another process can import, of each of the packages."""
    base = pytest.importorskip(package).LightningModule

    class Net(base):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(
                nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8, momentum=1e-3)
            )

        def forward(self, inputs):
            return self.layers(inputs)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

        def train_dataloader(self):
            return loader(48, 1)

        def val_dataloader(self):
            return loader(24, 2)

    Net.__qualname__ = name
    return Net


OfPytorchLightning = importable("OfPytorchLightning", "pytorch_lightning")
OfLightning = importable("OfLightning", "lightning.pytorch")


def stored(trainer):
    file = io.BytesIO()
    torch.save(trainer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def elsewhere(trainer):
    """Send it to another process and back, as Ray and joblib do."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(copy.copy, trainer).result(timeout=120)


@pytest.mark.parametrize(
    ("when", "copied"),
    [
        ("validation", copy.deepcopy),
        ("validation", stored),
        ("checkpoint", lambda each: pickle.loads(pickle.dumps(each))),
        ("fit-end", copy.deepcopy),
        ("fit-end", stored),
        ("fit-end", elsewhere),
    ],
)
def test_a_trainer_that_has_fitted_can_be_copied_and_stored(
    lightning, trainer_of, tmp_path, copied, when
):
    if copied is elsewhere and when != "validation":
        pytest.skip("one process will do")
    net = OfPytorchLightning if lightning.__name__ == "pytorch_lightning" else OfLightning
    monitor, repair = BatchNormMonitor(strict=True), BatchNormRecalibration(when=when, strict=True)
    logger = lightning.loggers.TensorBoardLogger(tmp_path)
    trainer = trainer_of(monitor, repair, logger=logger, enable_checkpointing=True)
    trainer.fit(net())
    again = copied(trainer)
    watching, repairing = (
        next(each for each in again.callbacks if isinstance(each, kind))
        for kind in (BatchNormMonitor, BatchNormRecalibration)
    )
    assert str(watching.report) == str(monitor.report)
    np.testing.assert_equal(
        repairing.result.after["layers.1"].mean, repair.result.after["layers.1"].mean
    )
    assert repairing.result.mode_gap_before == repair.result.mode_gap_before
    with pytest.raises(CalibrationError, match="undo\\(\\) of the original"):
        repairing.result.undo()
    again.fit_loop.max_epochs = 3
    again.fit(net())
    assert watching.report.history.run.steps == 6
    assert repairing.result.samples == 48
    repair.result.undo()


def test_a_trainer_can_be_copied_while_it_fits(tiny, trainer_of, lightning):
    class Copies(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 3:
                self.copy = copy.deepcopy(trainer)

    copies, callback = Copies(), BatchNormMonitor(strict=True)
    trainer_of(callback, copies, max_epochs=1).fit(tiny())
    assert callback.report.history.run.steps == 6
    (watching,) = (each for each in copies.copy.callbacks if isinstance(each, BatchNormMonitor))
    assert watching.report is None
    trainer_of(watching, max_epochs=1).fit(tiny())
    assert watching.report.history.run.steps == 6
