"""Weights & Biases offline, as both Lightning and Hugging Face write to it."""

import json
import struct
import time
from pathlib import Path

import pytest

from bnguard.lightning import BatchNormMonitor
from tests.loggers.runs import fit, train_with_hugging_face

wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))


def records(content):
    """Yield the records of a log in the format of LevelDB, which may be split at blocks."""
    place, record = 7, b""
    while place < len(content):
        rest = 32768 - place % 32768
        if rest < 7:
            place += rest
            continue
        size, kind = struct.unpack_from("<HB", content, place + 4)
        record += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # The whole of it, or its last part.
            yield record
            record = b""


def finish(run):
    """Return the names of the scalars, the alerts and the newest table of a run."""
    from wandb.proto import wandb_internal_pb2

    run.finish()
    (path,) = Path(run.dir).parent.glob("*.wandb")
    deadline = time.monotonic() + 30
    stored = []
    # Another process writes the file.
    while not any(record.HasField("exit") for record in stored) and time.monotonic() < deadline:
        time.sleep(0.1)
        stored = [wandb_internal_pb2.Record.FromString(one) for one in records(path.read_bytes())]
    items = [item for record in stored for item in record.history.item]
    names = {item.key or "/".join(item.nested_key) for item in items}
    alerts = [record.alert for record in stored if record.HasField("alert")]
    tables = sorted(path.parent.rglob("*.table.json"), key=lambda file: file.stat().st_mtime_ns)
    return names, alerts, json.loads(tables[-1].read_text())


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_lightning(package, tmp_path):
    lightning = pytest.importorskip(package)
    logger = lightning.loggers.WandbLogger(save_dir=tmp_path, offline=True)
    callback = BatchNormMonitor(strict=True, every_n_steps=1)
    fit(lightning, logger, callback, poison_at=8)
    run = logger.experiment
    names, alerts, table = finish(run)
    own = {name for name in names if name.startswith("zz_bnguard/")}
    assert {name.split("/")[1] for name in own} == {
        "shift",
        "variance",
        "mode_gap",
        "values_per_channel",
        "findings",
        "table",
    }
    assert "trainer/global_step" in names
    assert [alert.title.split()[1] for alert in alerts] == ["BN401", "BN402"]
    assert all(alert.level == "ERROR" and "at layers.1" in alert.text for alert in alerts)
    column = table["columns"].index("code")
    assert [row[column] for row in table["data"]] == [f.code for f in callback.report.findings]
    document = json.loads(Path(run.dir, "bnguard-report.json").read_text("utf-8"))
    assert document == callback.report.to_dict()


def test_hugging_face(tmp_path):
    transformers = pytest.importorskip("transformers")
    from bnguard.transformers import BatchNormCallback

    callback = BatchNormCallback()
    train_with_hugging_face(transformers, tmp_path, callback, report_to=["wandb"])
    names, alerts, table = finish(wandb.run)
    assert "zz_bnguard/mode_gap" in names
    assert "train/global_step" in names
    assert alerts == []
    assert len(table["data"]) == len(callback.report.findings)
