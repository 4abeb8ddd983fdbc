"""The repairing callback in real Trainers: what is used and saved, how training goes on."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler

import bnguard
from bnguard.checkpoint import read_checkpoint
from bnguard.errors import CalibrationError, ConfigurationError
from bnguard.layers.bn_layer import find_layers
from bnguard.lightning import BatchNormMonitor, BatchNormRecalibration
from bnguard.lightning.scoring import TrainerScore, ValidationScore
from tests.lightning.conftest import loader


def statistics(module):
    return {
        layer.name: torch.stack([layer.running_mean, layer.running_var]).clone()
        for layer in find_layers(module)
    }


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def witness(lightning):
    class Witness(lightning.Callback):
        """Notes the statistics: in validation, before it, and at each training batch."""

        def __init__(self):
            self.after_batch, self.validated, self.before_batch = [], [], []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.before_batch.append(statistics(pl_module))

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.after_batch.append(statistics(pl_module))

        def on_validation_batch_end(self, trainer, pl_module, *_):
            if not trainer.sanity_checking:
                self.validated.append(statistics(pl_module))

    return Witness()


def test_validation_uses_new_statistics_and_training_goes_on_with_its_own(
    tiny, trainer_of, witness, capsys
):
    callback = BatchNormRecalibration(keep="always", strict=True)
    module = tiny(momentum=0.01)
    trainer_of(callback, witness).fit(module)
    assert callback.result.samples == 48
    assert "bnguard: 2 BN layers recalibrated on 48 samples before validation" in (
        capsys.readouterr().out
    )
    # Six batches an epoch: the seventh starts from where the sixth ended, not from validation.
    assert same(witness.before_batch[6], witness.after_batch[5])
    assert not same(witness.validated[0], witness.after_batch[5])
    twin = tiny(momentum=0.01)
    twin.load_state_dict(module.state_dict())
    bnguard.recalibrate(twin, module.train_dataloader(), progress=False)
    for layer, new in statistics(twin).items():
        torch.testing.assert_close(statistics(module)[layer], new, rtol=1e-4, atol=1e-5)


def test_weights_train_as_they_would_without_it(tiny, trainer_of):
    states = []
    for callbacks in [[], [BatchNormRecalibration(keep="always", strict=True)]]:
        torch.manual_seed(3)
        module = tiny()
        trainer_of(*callbacks).fit(module)
        states.append({name: value.clone() for name, value in module.named_parameters()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("monitor_first", [True, False])
def test_the_monitor_does_not_take_it_for_training(tiny, trainer_of, monitor_first):
    reports = []
    for repairs in [[], [BatchNormRecalibration(keep="always", strict=True)]]:
        torch.manual_seed(3)
        monitor = BatchNormMonitor(every_n_steps=4, strict=True)
        callbacks = [monitor, *repairs] if monitor_first else [*repairs, monitor]
        trainer_of(*callbacks, max_epochs=3).fit(tiny())
        reports.append(monitor.report)
    for plain, repaired in zip(*(report.layers for report in reports), strict=True):
        np.testing.assert_allclose(repaired.window.mean, plain.window.mean, rtol=1e-6)
        np.testing.assert_allclose(repaired.window.var_max, plain.window.var_max, rtol=1e-6)
        assert repaired.calls.in_training == plain.calls.in_training
        assert repaired.evaluated.batches == plain.evaluated.batches
        assert np.abs(repaired.eval_shift_std).max() < np.abs(plain.eval_shift_std).max()


def test_the_checkpoint_holds_what_the_validation_used(
    tiny, trainer_of, witness, lightning, tmp_path
):
    checkpoint = lightning.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1)
    callback = BatchNormRecalibration(keep="always", strict=True)
    trainer_of(callback, witness, checkpoint, enable_checkpointing=True).fit(tiny())
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == 2
    for path, used in zip(paths, witness.validated[::3], strict=True):
        saved = torch.load(path, weights_only=True)["state_dict"]
        for name, (mean, var) in used.items():
            assert torch.equal(saved[f"{name}.running_mean"], mean)
            assert torch.equal(saved[f"{name}.running_var"], var)


def test_a_resumed_run_goes_on_with_the_statistics_of_training(tiny, trainer_of, witness, tmp_path):
    def callback():
        return BatchNormRecalibration(keep="always", strict=True)

    first = trainer_of(callback(), witness, enable_checkpointing=True, max_epochs=1)
    first.fit(tiny())
    path = first.checkpoint_callback.best_model_path
    last = witness.after_batch[-1]
    witness.before_batch.clear()
    trainer_of(callback(), witness, max_epochs=2).fit(tiny(), ckpt_path=path)
    assert same(witness.before_batch[0], last)


def test_a_checkpoint_alone_gets_new_statistics(tiny, trainer_of, witness, tmp_path):
    def callback():
        return BatchNormRecalibration(when="checkpoint", keep="always", strict=True)

    module = tiny()
    first = trainer_of(callback(), witness, enable_checkpointing=True, max_epochs=1)
    first.fit(module)
    last = witness.after_batch[-1]
    assert same(statistics(module), last)
    assert same(witness.validated[0], last)
    path = first.checkpoint_callback.best_model_path
    saved = tiny()
    saved.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    assert not same(statistics(saved), last)
    assert all(
        torch.equal(value, dict(module.named_parameters())[name])
        for name, value in saved.named_parameters()
    )
    before = statistics(saved)
    bnguard.recalibrate(saved, saved.train_dataloader(), progress=False)
    for name, values in statistics(saved).items():
        torch.testing.assert_close(values, before[name], rtol=1e-4, atol=1e-5)

    witness.before_batch.clear()
    trainer_of(callback(), witness, max_epochs=2).fit(tiny(), ckpt_path=path)
    assert same(witness.before_batch[0], last)


def test_checkpoints_of_the_same_weights_share_a_recalibration(
    tiny, trainer_of, lightning, tmp_path, capsys
):
    class Scales(lightning.Callback):
        def on_train_end(self, trainer, pl_module):
            for parameter in pl_module.parameters():
                parameter.data.mul_(2.0)
            trainer.save_checkpoint(tmp_path / "scaled.ckpt")

    checkpoint = lightning.callbacks.ModelCheckpoint(tmp_path, "best", save_last=True)
    repair = BatchNormRecalibration(when="checkpoint", keep="always", strict=True)
    trainer_of(repair, checkpoint, Scales(), enable_checkpointing=True, max_epochs=1).fit(tiny())
    best, last, scaled = (
        torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        for name in ("best", "last", "scaled")
    )
    assert same(best["state_dict"], last["state_dict"])
    mean = "head.1.running_mean"
    assert not torch.equal(scaled["state_dict"][mean], last["state_dict"][mean])
    states = [saved["bnguard"]["recalibration"]["checkpoint"]["before"] for saved in (best, last)]
    assert torch.equal(*(state["head.1"]["running_mean"] for state in states))
    printed = capsys.readouterr().out
    assert printed.count("recalibrated on 48 samples for the checkpoint") == 1
    assert (
        "BN layers recalibrated 2 times for the checkpoint, new statistics kept 2 times" in printed
    )


def test_a_checkpoint_of_averaged_weights_gets_statistics_of_these(tiny, trainer_of, lightning):
    averaging = lightning.callbacks.EMAWeightAveraging(decay=0.5)
    callback = BatchNormRecalibration(when="checkpoint", keep="always", strict=True)
    trainer = trainer_of(averaging, callback, enable_checkpointing=True, max_epochs=1)
    trainer.fit(tiny())
    averaged = tiny()
    saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    averaged.load_state_dict(saved["state_dict"])
    before = statistics(averaged)
    bnguard.recalibrate(averaged, averaged.train_dataloader(), progress=False)
    for name, values in statistics(averaged).items():
        torch.testing.assert_close(values, before[name], rtol=1e-4, atol=1e-5)


def test_averaged_weights_keep_statistics_of_their_own(
    tiny, trainer_of, witness, lightning, tmp_path
):
    averaging = lightning.callbacks.EMAWeightAveraging(decay=0.5)
    callback = BatchNormRecalibration(keep="always", strict=True)
    module = tiny()
    trainer = trainer_of(callback, averaging, witness, enable_checkpointing=True)
    trainer.fit(module)
    assert same(witness.before_batch[6], witness.after_batch[5])
    averaged = tiny()
    saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    averaged.load_state_dict(saved["state_dict"])
    assert same(statistics(averaged), witness.validated[-1])
    before = statistics(averaged)
    bnguard.recalibrate(averaged, averaged.train_dataloader(), progress=False)
    for name, values in statistics(averaged).items():
        torch.testing.assert_close(values, before[name], rtol=1e-4, atol=1e-5)


def test_statistics_that_are_no_better_are_taken_back(tiny, trainer_of, witness, capsys):
    noise = [torch.randn(64, 6) * 50 + 900]
    callback = BatchNormRecalibration(data=noise, strict=True)
    trainer_of(callback, witness, max_epochs=1).fit(tiny())
    assert not callback.result.is_kept
    assert same(witness.validated[0], witness.after_batch[-1])
    assert "rolled back" in capsys.readouterr().out


def test_the_gate_counts_what_the_checkpoint_callback_monitors(
    tiny, trainer_of, lightning, tmp_path, capsys
):
    class Scored(tiny):
        def validation_step(self, batch, batch_idx):
            scores = self(batch[0])
            self.log("val_accuracy", (scores.argmax(1) == batch[1]).float().mean())

    checkpoint = lightning.callbacks.ModelCheckpoint(tmp_path, monitor="val_accuracy", mode="max")
    callback = BatchNormRecalibration(strict=True)
    trainer_of(callback, checkpoint, enable_checkpointing=True, max_epochs=1).fit(Scored(0.001))
    assert "before validation: val_accuracy 0." in capsys.readouterr().out
    assert callback.result.score_after > callback.result.score_before


@pytest.mark.parametrize(("monitor", "counted"), [(None, "val_accuracy"), ("val_loss",) * 2])
def test_a_score_is_the_same_in_a_run_and_out_of_it(
    tiny, trainer_of, lightning, tmp_path, monitor, counted
):
    """Batches of unequal size, a metric of the whole epoch, a step that draws."""

    class Scored(tiny):
        def on_validation_epoch_start(self):
            self.right = []

        def validation_step(self, batch):
            scores = self(batch[0])
            self.logger.experiment.add_scalar("drawn", scores.mean())
            self.log("val_loss", F.cross_entropy(scores, batch[1]), on_step=True, on_epoch=True)
            self.right.append(scores.argmax(1) == batch[1])

        def on_validation_epoch_end(self):
            self.log("val_accuracy", torch.cat(self.right).float().mean())

        def val_dataloader(self):
            return loader(19, 2)

    checkpoint = lightning.callbacks.ModelCheckpoint(tmp_path, monitor=monitor)
    logger = lightning.loggers.TensorBoardLogger(tmp_path)
    trainer = trainer_of(checkpoint, enable_checkpointing=True, max_epochs=1, logger=logger)
    module = Scored()
    trainer.fit(module)
    state = read_checkpoint(checkpoint.best_model_path).monitored
    assert state == ({} if monitor is None else {"val_loss": "min"})
    in_run = ValidationScore(trainer, loader(19, 2))
    alone = TrainerScore(
        loader(19, 2), device=torch.device("cpu"), accelerator="cpu", devices=1,
        precision="32-true", metric=None, monitored=state,
    )  # fmt: skip
    assert in_run(module) == pytest.approx(alone(module), rel=1e-6)
    assert (in_run.name, in_run.sign) == (alone.name, alone.sign)
    assert in_run.name == counted
    assert trainer.loggers == [logger]


def test_scoring_leaves_metrics_and_loggers_alone(tiny, trainer_of):
    class Collecting(tiny):
        def on_validation_epoch_start(self):
            self.seen = []

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.seen.append(len(batch[0]))

    module = Collecting()
    callback = BatchNormRecalibration(strict=True)
    trainer = trainer_of(callback, max_epochs=1)
    trainer.fit(module)
    assert module.seen == [8, 8, 8]
    assert set(trainer.callback_metrics) == {"train_loss", "val_loss"}


def test_without_a_loss_nothing_can_be_compared(tiny, trainer_of, capsys):
    class Silent(tiny):
        def validation_step(self, batch, batch_idx):
            self(batch[0])

    trainer = trainer_of(BatchNormRecalibration(), max_epochs=1)
    trainer.fit(Silent())
    assert "logs no metric and returns no loss" in capsys.readouterr().out
    assert trainer.global_step == 6
    with pytest.raises(ConfigurationError, match="keep='always'"):
        trainer_of(BatchNormRecalibration(strict=True), max_epochs=1).fit(Silent())


def test_without_validation_data_the_way_out_is_about_the_score(tiny, trainer_of):
    callback = BatchNormRecalibration(when="fit-end", strict=True)
    module = tiny()
    with pytest.raises(ConfigurationError, match="no validation loaders: pass score="):
        trainer_of(callback, limit_val_batches=0).fit(module, module.train_dataloader(), [])


def test_every_n_epochs(tiny, trainer_of, capsys):
    callback = BatchNormRecalibration(keep="always", every_n_epochs=2, strict=True)
    trainer_of(callback, max_epochs=4).fit(tiny())
    assert capsys.readouterr().out.count("recalibrated") == 2


def test_at_the_end_of_fit_it_is_for_good(tiny, trainer_of, witness, capsys):
    callback = BatchNormRecalibration(when="fit-end", strict=True)
    module = tiny(0.001)
    trainer_of(callback, witness).fit(module)
    assert same(witness.validated[-1], witness.after_batch[-1])
    assert callback.result.is_kept
    assert not same(statistics(module), witness.after_batch[-1])
    assert "no checkpoint that fit saved has these statistics" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_before_a_test_and_taken_back_after_it(stage, tiny, trainer_of, lightning):
    seen = []

    class Looks(lightning.Callback):
        def on_test_batch_end(self, trainer, pl_module, *_):
            seen.append(statistics(pl_module))

        on_predict_batch_end = on_test_batch_end

    module = tiny()
    before = statistics(module)
    batches = list(module.train_dataloader())
    callback = BatchNormRecalibration(when="test", data=batches, keep="always", strict=True)
    getattr(trainer_of(callback, Looks()), stage)(module)
    assert not same(seen[0], before)
    assert same(statistics(module), before)


def test_frozen_layers_stay_as_they_are(tiny, trainer_of, lightning):
    class Frozen(lightning.callbacks.BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.backbone, train_bn=True)

        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.backbone.eval()

        def finetune_function(self, *_): ...

    module = tiny()
    before = statistics(module)
    callback = BatchNormRecalibration(keep="always", strict=True)
    trainer_of(callback, Frozen(), max_epochs=1).fit(module)
    assert [layer.name for layer in callback.result.layers] == ["head.1"]
    assert torch.equal(statistics(module)["backbone.1"], before["backbone.1"])


@pytest.mark.parametrize(
    "options", [{"precision": "bf16-mixed"}, {"val_check_interval": 2}], ids=str
)
def test_settings_of_the_trainer(options, tiny, trainer_of):
    callback = BatchNormRecalibration(keep="always", strict=True)
    trainer_of(callback, **options).fit(tiny())
    assert callback.result.is_kept


def test_options_of_recalibrate_are_passed_on(tiny, trainer_of):
    callback = BatchNormRecalibration(
        when="fit-end",
        method="adapt",
        prior=48.0,
        layers="head.*",
        memory="1GiB",
        keep="always",
        strict=True,
    )
    module = tiny()
    trainer_of(callback).fit(module)
    (layer,) = callback.result.layers
    assert layer.name == "head.1"
    assert [skipped.name for skipped in callback.result.skipped] == ["backbone.1"]
    twin = tiny()
    twin.load_state_dict(module.state_dict())
    exact = bnguard.recalibrate(twin, module.train_dataloader(), layers=["head.1"]).after["head.1"]
    # 48 samples and a prior of 48: half of the way.
    half = (torch.from_numpy(layer.before.mean) + torch.from_numpy(exact.mean)) / 2
    torch.testing.assert_close(torch.from_numpy(layer.after.mean), half, rtol=1e-4, atol=1e-5)


def test_a_pattern_that_matches_no_layer_is_reported(tiny, trainer_of):
    callback = BatchNormRecalibration(layers=["tail.*"], strict=True)
    with pytest.raises(ConfigurationError, match=r"layers 'tail\.\*' matches no BN layer"):
        trainer_of(callback).fit(tiny())


def test_batches_that_are_not_finite_may_be_an_error(tiny, trainer_of):
    batches = [torch.randn(8, 6), torch.full((8, 6), torch.nan)]
    callback = BatchNormRecalibration(
        when="fit-end", data=batches, on_nonfinite="error", keep="always", strict=True
    )
    with pytest.raises(CalibrationError, match="batch 1 has NaN or Inf"):
        trainer_of(callback).fit(tiny())


@pytest.mark.parametrize(
    "options",
    [
        {"when": "sometimes"},
        {"data": "tests"},
        {"method": "ema"},
        {"prior": 10},
        {"memory": "much"},
        {"on_nonfinite": "ignore"},
        {"keep": "never"},
        {"samples": 0},
    ],
    ids=str,
)
def test_unknown_options(options):
    (option,) = options
    with pytest.raises(ConfigurationError, match=f"^{option}[ =]"):
        BatchNormRecalibration(**options)


@pytest.fixture
def counting(tiny):
    """A module that notes number and content of each batch that a score runs it on."""

    class Counting(tiny):
        seen: ClassVar[list] = []

        def validation_step(self, batch, batch_idx):
            # What is run by the trainer itself logs through it.
            if "log" in vars(self):
                self.seen.append((batch_idx, batch))
            first = next(leaf for leaf in tree_leaves(batch) if leaf is not None)
            self.log("val_loss", self(first).square().mean(), batch_size=8)

    return Counting


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 1, 2]),
        ({"limit_val_batches": 2}, [0, 1]),
        ({"limit_val_batches": 0.4}, [0]),
        ({"limit_val_batches": 50}, [0, 1, 2]),
        ({"fast_dev_run": True}, [0]),
        ({"fast_dev_run": 2}, [0, 1]),
        ({"overfit_batches": 2}, [0, 1]),
        ({"num_sanity_val_steps": 1}, [0, 1, 2]),
    ],
    ids=str,
)
def test_a_score_keeps_to_the_limits_of_the_trainer(counting, trainer_of, options, expected):
    callback = BatchNormRecalibration(strict=True)
    trainer_of(callback, **{"max_epochs": 1, **options}).fit(counting())
    assert [number for number, _ in counting.seen] == [*expected, *expected]
    samples = torch.cat([batch[0] for _, batch in counting.seen[: len(expected)]])
    validated = torch.cat([batch[0] for batch in counting().val_dataloader()])[: len(samples)]
    assert torch.equal(samples.sort(0).values, validated.sort(0).values)


@pytest.mark.parametrize(
    "options", [{"limit_train_batches": 2}, {"fast_dev_run": 2}, {"overfit_batches": 2}], ids=str
)
def test_calibration_keeps_to_the_limits_of_the_trainer(tiny, trainer_of, options):
    callback = BatchNormRecalibration(keep="always", strict=True)
    trainer_of(callback, **options).fit(tiny())
    assert callback.result.samples == 16


def test_a_score_has_no_batch_that_the_loader_drops(counting, trainer_of):
    dropping = loader(20, 2, drop_last=True)
    trainer_of(BatchNormRecalibration(strict=True), max_epochs=1).fit(
        counting(), loader(48, 1), dropping
    )
    assert [len(batch[0]) for _, batch in counting.seen] == [8, 8, 8, 8]


def test_what_a_sampler_leaves_out_is_not_calibrated_on(tiny, trainer_of):
    some = SubsetRandomSampler(range(16))
    callback = BatchNormRecalibration(keep="always", strict=True)
    module = tiny()
    trainer_of(callback).fit(module, loader(48, 1, sampler=some), loader(24, 2))
    assert callback.result.samples == 16


@pytest.mark.parametrize("mode", ["list", "dict", "min_size", "max_size", "max_size_cycle"])
def test_several_validation_loaders(counting, trainer_of, lightning, mode):
    loaders = {"a": loader(24, 2), "b": loader(16, 3)}

    class Several(counting):
        if mode in ("list", "dict"):

            def validation_step(self, batch, batch_idx, dataloader_idx):
                super().validation_step(batch, batch_idx)

        def val_dataloader(self):
            if mode in ("list", "dict"):
                return loaders if mode == "dict" else list(loaders.values())
            return lightning.utilities.CombinedLoader(loaders, mode)

    callback = BatchNormRecalibration(strict=True)
    trainer_of(callback, max_epochs=1, limit_val_batches=3).fit(Several())
    expected = [0, 1] if mode == "min_size" else [0, 1, 2]
    assert [number for number, _ in counting.seen] == [*expected, *expected]
    assert isinstance(counting.seen[0][1], list if mode in ("list", "dict") else dict)
    assert callback.result is not None


def test_an_endless_validation_loader_is_not_read_to_its_end(counting, trainer_of):
    class Endless(IterableDataset):
        def __iter__(self):
            while True:
                yield torch.randn(6), torch.tensor(1)

    callback = BatchNormRecalibration(strict=True, samples=32)
    trainer_of(callback, max_epochs=1, limit_val_batches=50).fit(
        counting(), loader(48, 1), DataLoader(Endless(), 8)
    )
    assert [number for number, _ in counting.seen] == [0, 1, 2, 3, 0, 1, 2, 3]


def fails(*_):
    raise IndexError("no such thing")


class Lock:
    def __deepcopy__(self, memo):
        raise TypeError("cannot copy a lock")


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("validation_step", "your validation_step raised IndexError: no such thing"),
        ("score", "your score raised IndexError: no such thing"),
        ("collate", "your validation loader raised IndexError: no such thing"),
        ("forward", "the forward failed at batch 0: IndexError: no such thing"),
        ("copy", "cannot be copied (TypeError: cannot copy a lock): pass score="),
    ],
)
def test_an_error_of_the_users_is_told_from_our_own(
    lightning, tiny, trainer_of, capsys, place, told
):
    class Module(tiny):
        def validation_step(self, batch, batch_idx):
            if "log" in vars(self) and place == "validation_step":
                fails()
            super().validation_step(batch, batch_idx)

    module = Module()
    module.lock = Lock() if place == "copy" else None
    options = {name: fails for name in ("score", "forward") if name == place}
    callback = BatchNormRecalibration(**options)
    trainer = trainer_of(callback, max_epochs=1, num_sanity_val_steps=0)
    validation = loader(24, 2)
    if place == "collate":

        class Fails(lightning.Callback):
            def on_validation_batch_start(self, *_):
                validation.collate_fn = fails

        # The trainer's own iterator has its function already.
        trainer.callbacks.insert(0, Fails())
    trainer.fit(module, loader(48, 1), validation)
    printed = capsys.readouterr().out
    assert told in printed
    assert "BatchNormRecalibration is off from here, and the run goes on." in printed
    assert "error of its own" not in printed
    assert trainer.global_step == 6


def test_the_next_run_begins_anew_whatever_failed_in_the_one_before(tiny, trainer_of, capsys):
    """As when a cell of a notebook is mended and run again."""
    is_broken = True
    callback = BatchNormRecalibration(score=lambda module: fails() if is_broken else 1.0)
    trainer = trainer_of(callback, max_epochs=1)
    module = tiny()
    trainer.fit(module)
    assert callback.is_off
    is_broken = False
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module)
    assert not callback.is_off
    assert callback.result.is_kept
    assert capsys.readouterr().out.count("is off from here") == 1
