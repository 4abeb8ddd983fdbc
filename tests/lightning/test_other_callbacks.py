"""Beside the callbacks that people use: they and the training are as without the monitor."""

from __future__ import annotations

import warnings

import pytest
import torch

from bnguard.lightning import BatchNormMonitor, BatchNormRecalibration


@pytest.fixture
def both(trainer_of, lightning):
    """Fits a module beside other callbacks, with the monitor before, after and without them."""

    def run(module_of, others, monitor_first=False, **options):
        states = []
        for is_watched in (False, True):
            torch.manual_seed(5)
            module, made = module_of(), others(lightning.callbacks)
            monitor = BatchNormMonitor(every_n_steps=4, strict=True)
            watched = [monitor, *made] if monitor_first else [*made, monitor]
            trainer = trainer_of(*(watched if is_watched else made), **options)
            trainer.fit(module)
            states.append({key: value.clone() for key, value in module.state_dict().items()})
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        assert not any(part._forward_pre_hooks for part in module.modules())
        return monitor, trainer, module

    return run


@pytest.mark.parametrize(
    ("others", "options"),
    [
        (lambda c: [c.EarlyStopping("val_loss", patience=0)], {"max_epochs": 4}),
        (lambda c: [c.ModelCheckpoint(save_last=True)], {"enable_checkpointing": True}),
        (lambda c: [c.ModelCheckpoint(every_n_train_steps=2)], {"enable_checkpointing": True}),
        (lambda c: [c.ModelSummary()], {"enable_model_summary": True}),
        (lambda c: [c.RichModelSummary()], {"enable_model_summary": True}),
        (lambda c: [c.RichProgressBar()], {"enable_progress_bar": True}),
        (lambda c: [c.TQDMProgressBar()], {"enable_progress_bar": True}),
        (lambda c: [c.GradientAccumulationScheduler({0: 1, 1: 3})], {}),
        (lambda c: [c.LearningRateFinder(num_training_steps=5)], {"enable_checkpointing": True}),
        (lambda c: [c.StochasticWeightAveraging(0.05, swa_epoch_start=1)], {"max_epochs": 4}),
        (lambda c: [c.WeightAveraging()], {}),
        (lambda c: [c.EMAWeightAveraging(decay=0.5)], {}),
        (lambda c: [c.EMAWeightAveraging(decay=0.5, use_buffers=False)], {}),
    ],
    ids=lambda value: value.__code__.co_names[0] if callable(value) else str(value),
)
@pytest.mark.parametrize("monitor_first", [True, False])
def test_each(others, options, monitor_first, both, tiny):
    if others.__code__.co_names[0] == "LearningRateFinder":
        pytest.importorskip("tqdm")
    both(tiny, others, monitor_first, **options)


@pytest.mark.parametrize("train_bn", [True, False])
def test_a_backbone_that_thaws(both, tiny, train_bn):
    class HeadFirst(tiny):
        def configure_optimizers(self):
            return torch.optim.SGD(self.head.parameters(), self.lr)

    def others(callbacks):
        return [callbacks.BackboneFinetuning(2, lambda epoch: 1.0, 0.1, train_bn=train_bn)]

    monitor, *_ = both(HeadFirst, others, max_epochs=4)
    assert all(layer.updates_seen > 0 for layer in monitor.report.layers)


def test_a_backbone_that_no_longer_tracks_is_named(both, tiny):
    """``freeze(train_bn=False)`` switches the tracking off, and not the train mode."""

    class HeadOnly(tiny):
        def configure_optimizers(self):
            return torch.optim.SGD(self.head.parameters(), self.lr)

    def others(callbacks):
        class Frozen(callbacks.BaseFinetuning):
            def freeze_before_training(self, pl_module):
                self.freeze(pl_module.backbone, train_bn=False)

            def finetune_function(self, *_): ...

        return [Frozen()]

    monitor, *_ = both(HeadOnly, others, max_epochs=2)
    named = {(finding.code, finding.layer) for finding in monitor.report.findings}
    assert ("BN104", "backbone.1") in named


def test_a_backbone_that_is_frozen_but_updates_is_named(both, tiny):
    def others(callbacks):
        return [callbacks.BackboneFinetuning(100, lambda epoch: 1.0, 0.1, train_bn=True)]

    class Frozen(tiny):
        def on_fit_start(self):
            for parameter in self.backbone.parameters():
                parameter.requires_grad_(False)

    monitor, *_ = both(Frozen, others, max_epochs=4)
    named = {(finding.code, finding.layer) for finding in monitor.report.findings}
    assert ("BN101", "backbone.1") in named


def test_averaged_weights_with_the_statistics_of_others_are_named(both, tiny):
    def others(callbacks):
        class Late(callbacks.WeightAveraging):
            def on_validation_epoch_start(self, trainer, pl_module):
                super().on_validation_epoch_start(trainer, pl_module)
                # As a loader that brings parameters alone: the statistics are another's.
                for name, buffer in pl_module.named_buffers():
                    if name.endswith("running_mean"):
                        buffer.data.add_(20.0)

            def on_validation_epoch_end(self, trainer, pl_module):
                for name, buffer in pl_module.named_buffers():
                    if name.endswith("running_mean"):
                        buffer.data.sub_(20.0)
                super().on_validation_epoch_end(trainer, pl_module)

        return [Late()]

    monitor, *_ = both(tiny, others, max_epochs=3)
    assert "BN304" in {finding.code for finding in monitor.report.findings}


@pytest.mark.parametrize("monitor_first", [True, False])
def test_averaged_weights_are_held_against_their_own_statistics(both, tiny, monitor_first):
    def others(callbacks):
        return [callbacks.EMAWeightAveraging(decay=0.5)]

    monitor, trainer, _ = both(tiny, others, monitor_first, max_epochs=8)
    (averaging,) = (c for c in trainer.callbacks if hasattr(c, "_average_model"))
    own = dict(averaging._average_model.module.named_buffers())
    for layer in monitor.report.layers:
        used = torch.from_numpy(layer.evaluated.running.mean).float()
        assert torch.equal(used, own[f"{layer.name}.running_mean"])


def test_the_tuner(tiny, trainer_of, lightning):
    monitor = BatchNormMonitor(strict=True)
    trainer = trainer_of(monitor, max_epochs=1, enable_checkpointing=True)
    tuner = lightning.tuner.Tuner(trainer)
    module = tiny()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    tuner.lr_find(module, num_training=5)
    tuner.scale_batch_size(module, max_trials=1, steps_per_trial=1, init_val=4)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert monitor.report is None
    trainer.fit(module)
    assert monitor.report.history.run.steps == 6


def test_a_resumed_run_goes_on(tiny, trainer_of, capsys):
    first = BatchNormMonitor(every_n_steps=3, strict=True)
    trainer = trainer_of(first, max_epochs=1, enable_checkpointing=True)
    trainer.fit(tiny(momentum=0.001))
    assert capsys.readouterr().out.count("bnguard: warning: BN303") == 1
    path = trainer.checkpoint_callback.best_model_path

    second = BatchNormMonitor(every_n_steps=50, strict=True)
    trainer_of(second, max_epochs=2).fit(tiny(momentum=0.001), ckpt_path=path)
    assert "bnguard: warning: BN303" not in capsys.readouterr().out
    (finding, *_) = (f for f in second.report.findings if f.code == "BN303")
    assert finding.step == 1
    # One window of three batches was full, the new one has six of its own.
    assert {int(layer.window.batches.max()) for layer in second.report.layers} == {6}
    saved = torch.load(path, weights_only=True)["bnguard"]["monitor"]["state"]
    assert set(saved["windows"]) == {"backbone.1", "head.1"}


def test_a_run_is_resumed_without_the_callbacks_in_silence(tiny, trainer_of):
    callbacks = BatchNormMonitor(strict=True), BatchNormRecalibration(strict=True)
    trainer = trainer_of(*callbacks, max_epochs=1, enable_checkpointing=True)
    trainer.fit(tiny())
    resumed = trainer_of(max_epochs=2, enable_checkpointing=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed.fit(tiny(), ckpt_path=trainer.checkpoint_callback.best_model_path)
    assert resumed.current_epoch == 2
    assert not any("Please add the following callbacks" in str(one.message) for one in caught)


def test_a_run_resumed_from_what_is_broken_is_told_so_and_stopped(tiny, trainer_of, capsys):
    broken = tiny()
    broken.backbone[0].weight.data[0, 0] = torch.nan
    trainer = trainer_of(BatchNormMonitor(strict=True), max_epochs=1, enable_checkpointing=True)
    trainer.fit(broken)
    path = trainer.checkpoint_callback.best_model_path
    capsys.readouterr()

    resumed = trainer_of(BatchNormMonitor(stop_on="error", strict=True), max_epochs=4)
    resumed.fit(tiny(), ckpt_path=path)
    assert "bnguard: error: BN402" in capsys.readouterr().out
    assert resumed.current_epoch < 4


def test_the_state_of_a_run_is_taken_over(tiny, trainer_of):
    first, second, checkpoint = BatchNormMonitor(strict=True), BatchNormMonitor(strict=True), {}
    trainer_of(first, max_epochs=1).fit(tiny())
    first.on_save_checkpoint(None, None, checkpoint)
    second.on_load_checkpoint(None, None, checkpoint)
    trainer_of(second, limit_train_batches=1, max_epochs=1).fit(tiny())
    for old, new in zip(first.report.layers, second.report.layers, strict=True):
        assert int(new.window.batches.max()) == 6
        torch.testing.assert_close(
            torch.from_numpy(new.window.mean),
            torch.from_numpy(old.window.mean),
            atol=1e-5,
            rtol=1e-5,
        )
