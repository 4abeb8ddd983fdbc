"""What is written arrives, through every kind of summary writer, and stays small."""

import time

import numpy as np
import pytest
import tensorboardX
from torch.utils.tensorboard import SummaryWriter

from bnguard.tensorboard.log_report import open_log
from bnguard.tensorboard.metadata import CHANNEL_ROWS, Metric, standard_metrics
from bnguard.tensorboard.writer import BatchNormLog, ChannelSnapshot

METRICS = standard_metrics()[:8]
LAYERS = [f"layer{i}.bn" for i in range(53)]


def torch_writer(folder):
    return SummaryWriter(folder)


def tensorboardx_writer(folder):
    return tensorboardX.SummaryWriter(str(folder))


def pytorch_lightning_writer(folder):
    loggers = pytest.importorskip("pytorch_lightning.loggers")
    return _writer_of(loggers, folder)


def lightning_writer(folder):
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    return _writer_of(loggers, folder)


def _writer_of(loggers, folder):
    logger = loggers.TensorBoardLogger(folder, name="", version="")
    return logger.experiment


WRITERS = pytest.mark.parametrize(
    "make", [torch_writer, tensorboardx_writer, pytorch_lightning_writer, lightning_writer]
)


@WRITERS
def test_everything_written_is_read_again(tmp_path, make):
    writer = make(tmp_path)
    log = BatchNormLog(writer, LAYERS, METRICS, ["BatchNorm2d"] * 53)
    values = np.random.default_rng(0).normal(size=(3, 8, 53)).astype(np.float32)
    for step in range(3):
        log.add_stats(values[step], 10 * step)
    finding = {"code": "BN301", "severity": "error", "layer": "layer3.bn", "step": 20}
    log.add_findings([finding], 20)
    log.add_channels("layer3.bn", _snapshot(), 20)
    writer.close()

    reader = open_log(tmp_path)
    (listed,) = reader.runs()
    name = listed["name"]
    run = reader.run(name)
    assert run["layers"] == tuple(LAYERS)
    assert run["kinds"] == ("BatchNorm2d",) * 53
    assert [found["layer"] for found in run["findings"]] == ["layer3.bn"]
    for row, metric in enumerate(METRICS):
        series = reader.stats(name, metric.key)
        assert series.steps.tolist() == [0, 10, 20]
        assert np.array_equal(series.values, values[:, row])
    channels = reader.channels(name, "layer3.bn")
    assert channels.names == CHANNEL_ROWS
    assert np.allclose(channels.values[0], _snapshot().rows().astype(np.float32), equal_nan=True)


def _snapshot():
    return ChannelSnapshot(
        running_mean=np.array([1000.0, 0.0, 0.0]),
        running_var=np.array([1e-4, 4.0, 0.0]),
        batch_mean=np.array([1000.001, 2.0, 0.0]),
        batch_var=np.array([1e-4, 4.0, 0.0]),
        eps=0.0,
    )


def test_half_precision_keeps_a_small_shift_beside_a_large_mean():
    rows = dict(zip(CHANNEL_ROWS, _snapshot().rows(), strict=True))
    assert rows["batch_shift_std"][:2] == pytest.approx([0.1, 1.0], rel=1e-3)
    assert rows["running_std"][:2] == pytest.approx([0.01, 2.0], rel=1e-3)
    assert np.isnan(rows["eval_shift_std"]).all()
    assert rows["gamma"].tolist() == [1.0, 1.0, 1.0]
    assert rows["is_dead"].tolist() == [0.0, 0.0, 1.0]


def test_a_step_logged_twice_is_written_once(tmp_path):
    writer = SummaryWriter(tmp_path)
    log = BatchNormLog(writer, ["bn"], METRICS)
    for value in (1.0, 2.0):
        log.add_stats(np.full((8, 1), value), 5)
    writer.close()
    series = open_log(tmp_path).stats(".", "gain")
    assert (series.steps.tolist(), series.values.tolist()) == ([5], [[1.0]])


def test_findings_are_written_when_they_change_and_as_text_too(tmp_path):
    writer = SummaryWriter(tmp_path)
    log = BatchNormLog(writer, ["bn"], METRICS)
    log.add_stats(np.zeros((8, 1)), 0)
    for step in range(5):
        log.add_findings([{"code": "BN301"}] if step > 2 else [], step)
    writer.close()
    reader = open_log(tmp_path)
    assert [event.step for event in reader._events(".", "bnguard/findings")] == [3]
    content = next(tmp_path.iterdir()).read_bytes()
    assert content.count(b"- **info: ") == 1


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        log = BatchNormLog(writer, ["bn"], METRICS)
        with pytest.raises(ValueError, match=r"\(1, 8\), and \(8, 1\) was announced"):
            log.add_stats(np.zeros((1, 8)), 0)


def test_a_writer_that_was_closed_goes_on(tmp_path):
    writer = SummaryWriter(tmp_path)
    log = BatchNormLog(writer, ["bn"], METRICS)
    log.add_stats(np.zeros((8, 1)), 0)
    writer.close()
    time.sleep(1.1)  # event files are named by the second
    log.add_stats(np.ones((8, 1)), 1)
    writer.close()
    assert open_log(tmp_path).stats(".", "gain").steps.tolist() == [0, 1]


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    from lightning.pytorch.utilities import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = loggers.TensorBoardLogger(tmp_path)
    for writer in (logger.experiment, object()):
        log = BatchNormLog(writer, ["bn"], METRICS)
        log.add_stats(np.zeros((8, 1)), 0)
        log.add_findings([{"code": "BN301"}], 0)
    assert list(tmp_path.iterdir()) == []


@WRITERS
def test_the_log_stays_small(tmp_path, make):
    writer = make(tmp_path)
    log = BatchNormLog(writer, LAYERS, METRICS)
    values = np.random.default_rng(0).normal(size=(8, 53))
    for step in range(1000):
        log.add_stats(values, step)
    writer.close()
    size = sum(file.stat().st_size for file in tmp_path.glob("events.out.tfevents.*"))
    assert size < 2e6


def test_limits_are_those_of_the_rules_in_force():
    from bnguard.rules.bn301_statistic_drift import StatisticDrift

    (shift,) = (
        metric
        for metric in standard_metrics([StatisticDrift(max_shift_std=0.5)])
        if metric.key == "eval_shift_std"
    )
    assert shift.limit == 0.5
    assert isinstance(shift, Metric)
