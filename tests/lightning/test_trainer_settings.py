"""Real runs over the settings that people use: watched and unwatched, they train the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bnguard.lightning import REPORT_FILE, BatchNormMonitor


@pytest.fixture
def watched(trainer_of):
    """Fits a module twice, with the callback and without; returns callback, trainer, module."""

    def run(module_of, *, callbacks=list, **options):
        states = []
        for monitors in [[], [BatchNormMonitor(every_n_steps=3, strict=True)]]:
            torch.manual_seed(5)
            module = module_of()
            settings = {
                key: value() if callable(value) else value for key, value in options.items()
            }
            trainer = trainer_of(*callbacks(), *monitors, **settings)
            trainer.fit(module)
            states.append({key: value.clone() for key, value in module.state_dict().items()})
        unwatched, state = states
        assert unwatched.keys() == state.keys()
        assert all(torch.equal(state[key], unwatched[key]) for key in state)
        assert not any(part._forward_pre_hooks or part._forward_hooks for part in module.modules())
        callback = monitors[0]
        assert callback.report is not None
        assert len(callback.report.layers) == 2
        return callback, trainer, module

    return run


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 4},
        {"precision": "16-mixed"},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"log_every_n_steps": 1},
        {"log_every_n_steps": 0},
        {"fast_dev_run": True},
        {"limit_train_batches": 2, "limit_val_batches": 1},
        {"limit_val_batches": 0},
        {"overfit_batches": 2},
        {"inference_mode": False},
        {"inference_mode": True, "val_check_interval": 2},
        {"check_val_every_n_epoch": 2},
        {"num_sanity_val_steps": -1},
        {"num_sanity_val_steps": 0},
        {"max_epochs": -1, "max_steps": 5},
        {"gradient_clip_val": 0.1},
        {"detect_anomaly": True},
        {"deterministic": True},
        {"reload_dataloaders_every_n_epochs": 1},
        {"use_distributed_sampler": False},
        {"enable_model_summary": True},
        {"enable_progress_bar": True},
        {"enable_checkpointing": True},
        {"profiler": "simple"},
    ],
    ids=str,
)
def test_trainer_options(options, watched, tiny):
    watched(tiny, **options)


@pytest.mark.parametrize("bar", ["TQDMProgressBar", "RichProgressBar", None])
def test_all_that_is_said_is_seen_beside_a_progress_bar(bar, trainer_of, tiny, lightning, capsys):
    bars = [] if bar is None else [getattr(lightning.callbacks, bar)()]
    callback = BatchNormMonitor(strict=True)
    trainer_of(callback, *bars, enable_progress_bar=bool(bars)).fit(tiny(momentum=0.001))
    printed = capsys.readouterr().out
    assert printed.count("bnguard · watching 2 BN layers") == 1
    assert printed.count("bnguard: warning: BN303 unconverged-statistics at 2 layers") == 1
    assert printed.count("bnguard · 2 BN layers · 12 steps") == 1


def test_barebones(watched, tiny):
    bare = dict.fromkeys(
        ["enable_checkpointing", "logger", "log_every_n_steps", "enable_progress_bar"]
    )
    callback, *_ = watched(tiny, barebones=True, enable_model_summary=None, **bare)
    assert callback.report.history.run.steps == 12


def test_accumulation_is_not_taken_for_several_streams(watched, tiny):
    callback, *_ = watched(tiny, accumulate_grad_batches=3, max_epochs=6)
    assert {finding.code for finding in callback.report.findings} <= {"BN107"}
    assert callback.report.history.run.plan.accumulated_batches == 3


def test_manual_optimization_with_several_optimizers(watched, tiny):
    class Manual(tiny):
        automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.backbone, self.head)]

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                loss = F.cross_entropy(self(batch[0]), batch[1])
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

    callback, trainer, _ = watched(Manual)
    assert trainer.global_step == 24
    assert callback.report.history.run.steps == 12
    assert all(layer.updates_seen == 24 for layer in callback.report.layers)


def test_several_validation_loaders(watched, tiny):
    class Several(tiny):
        def val_dataloader(self):
            return [super().val_dataloader(), super().val_dataloader()]

    callback, *_ = watched(Several)
    assert all(layer.evaluated.batches == 6 for layer in callback.report.layers)


def test_no_validation_at_all(watched, tiny):
    class Unvalidated(tiny):
        validation_step = None
        val_dataloader = None

    callback, *_ = watched(Unvalidated)
    assert all(layer.evaluated is None for layer in callback.report.layers)


@pytest.mark.slow
def test_a_compiled_part(watched, tiny):
    class Compiled(tiny):
        def __init__(self):
            super().__init__()
            self.head = torch.compile(self.head, backend="eager")

    callback, *_ = watched(Compiled)
    assert [layer.name for layer in callback.report.layers] == ["backbone.1", "head.1"]
    assert all(layer.updates_seen == 12 for layer in callback.report.layers)


@pytest.mark.slow
def test_a_module_that_is_compiled_as_a_whole(trainer_of, tiny):
    class Quiet(tiny):
        """Logs nothing: Dynamo cannot trace ``self.log``."""

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self(batch[0])

    callback = BatchNormMonitor(every_n_steps=3, strict=True)
    trainer_of(callback).fit(torch.compile(Quiet(), backend="eager"))
    assert [layer.name for layer in callback.report.layers] == ["backbone.1", "head.1"]
    assert all(layer.updates_seen == 12 for layer in callback.report.layers)


@pytest.mark.parametrize("first", ["CSVLogger", "TensorBoardLogger", "Own"])
def test_several_loggers_in_any_order(first, watched, tiny, lightning, tmp_path):
    loggers = lightning.loggers

    class Own(loggers.logger.DummyLogger):
        """Has no folder."""

    def several():
        made = [
            loggers.CSVLogger(tmp_path / "CSVLogger", version=0),
            loggers.TensorBoardLogger(tmp_path / "TensorBoardLogger", version=0),
            Own(),
        ]
        return sorted(made, key=lambda logger: type(logger).__name__ != first)

    watched(tiny, logger=several)
    (report,) = tmp_path.rglob(REPORT_FILE)
    assert first in (report.parts if first != "Own" else ["Own"])
    folder = tmp_path / "CSVLogger/lightning_logs/version_0"
    assert "zz_bnguard/shift" in (folder / "metrics.csv").read_text()
    assert list(tmp_path.glob("TensorBoardLogger/**/events.out.*"))


def test_csv_logger_alone(watched, tiny, lightning, tmp_path):
    watched(tiny, logger=lambda: lightning.loggers.CSVLogger(tmp_path, version=0))
    rows = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    names = rows[0].split(",")
    column, step = names.index("zz_bnguard/values_per_channel"), names.index("step")
    steps = [int(row.split(",")[step]) for row in rows[1:] if row.split(",")[column]]
    assert sorted(set(steps)) == [1, 3, 5, 7, 9, 11, 12]


def test_loggers_of_other_kinds_are_given_the_scalars(watched, tiny, lightning):
    class Own(lightning.loggers.Logger):
        name, version = "own", 0

        def __init__(self):
            super().__init__()
            self.seen = {}

        def log_metrics(self, metrics, step=None):
            self.seen.update(metrics)

        def log_hyperparams(self, *args, **kwargs): ...

    _, trainer, _ = watched(tiny, logger=Own)
    assert "zz_bnguard/values_per_channel" in trainer.logger.seen
